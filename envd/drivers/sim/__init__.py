"""The `sim` driver: desktops inside this process that speak the guest's two ports for real.

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
"""

from .behaviour import BAD, FOREVER, PRESETS, WAYS, Bad, Behaviour, Fault, Way
from .calls import Call
from .desktop import Desktop
from .driver import Entry, SimDriver, boots_in_flight_max, restores_in_flight_max
from .gui import Click, Gui

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
    "SimDriver",
    "Way",
    "boots_in_flight_max",
    "restores_in_flight_max",
]
