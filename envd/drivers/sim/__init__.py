"""The `sim` driver: desktops that speak the guest's two ports for real, inside this process or in one that outlives it.

For tests, demos and benchmarks. A desktop draws a simple picture, follows pyautogui programs, and is fast unless the
setting `ENVD_SIM` or the test that made it says otherwise.

behaviour.py  how a desktop is told to behave     driver.py    the driver and its journal
desktop.py    one desktop and its life            ports.py     a port that opens and shuts
guest.py      the guest port                      cdp.py       the CDP port
vnc.py        the VNC port, if it has one
shell.py      the commands that it knows          devtools.py  the CDP port's websockets
files.py      its files                           gui.py       its screen, and the programs that change it
calls.py      what was asked of it                picture.py   what it looks like
answers.py    bad answers                         console.py   its screen and input from outside
hosted.py     the driver of those that outlive the daemon
host.py       the process that they are in        wire.py      what is said between the two
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .behaviour import BAD, FOREVER, PRESETS, WAYS, Bad, Behaviour, Fault, Way
from .calls import Call
from .desktop import Desktop
from .driver import Entry, SimDriver, boots_in_flight_max, restores_in_flight_max
from .gui import Click, Gui
from .hosted import HostedSimDriver, SimHost

if TYPE_CHECKING:
    from ...settings import Settings

__all__ = [
    "BAD",
    "FOREVER",
    "PRESETS",
    "WAYS",
    "Bad",
    "Behaviour",
    "Call",
    "Click",
    "Desktop",
    "Entry",
    "Fault",
    "Gui",
    "HostedSimDriver",
    "SimDriver",
    "SimHost",
    "Way",
    "boots_in_flight_max",
    "restores_in_flight_max",
    "sim_driver",
]


def sim_driver(settings: Settings, daemon_id: str) -> SimDriver | HostedSimDriver:
    """The driver whose desktops live where `settings.sim` says. Raises SettingsError if that cannot be read."""
    outlive = Behaviour.parse(settings.sim).outlive
    return HostedSimDriver(settings, daemon_id) if outlive else SimDriver(settings, daemon_id)
