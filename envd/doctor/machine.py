"""The platform, Python and its packages, and the clock."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..findings import Finding
from ..settings import Settings

ELSEWHERE = "envd doctor --url http://HOST:15001, once a worker runs on a Linux host: git clone … && make serve"
MODULES = {
    "aws": ("aws", ("aioboto3",)),
    "docker": ("docker", ("aiodocker", "isal", "numpy", "qemu.qmp")),
    "local": ("agent", ("pyautogui", "isal", "mss", "numpy", "pyperclip", "Xlib")),
    "qemu": ("qemu", ("isal", "numpy", "qemu.qmp")),
}
"""Provider → the extra of this distribution that it needs, and the modules that come with it."""
UNSYNCHRONISED = 0x40
"""STA_UNSYNC of adjtimex(2): nothing keeps the kernel's clock in time."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What kind of machine this is. `container` names what says that this is inside of one; empty if nothing does."""

    system: str
    name: str
    kernel: str
    processor: str
    container: str = ""

    @property
    def is_wsl(self) -> bool:
        return "microsoft" in self.kernel.lower()


def this_machine() -> Machine:
    """Blocks."""
    system, name = platform.system(), platform.system()
    if system == "Linux":
        try:
            name = platform.freedesktop_os_release().get("PRETTY_NAME", system)
        except OSError:
            pass
    elif system == "Darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    return Machine(system, name, platform.release(), platform.machine(), container_of())


def container_of(root: Path = Path("/")) -> str:
    """Which container this is in, as far as it shows. Blocks."""
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    return ""


def platform_of(machine: Machine) -> Finding:
    """The verdict on this machine as a worker."""
    what = "platform"
    told = f"{machine.name}, {machine.system} {machine.kernel}, {machine.processor}"
    if machine.system != "Linux":
        return Finding(
            what,
            "failed",
            f"{machine.name}: desktops are made on Linux alone (there is no KVM here, and Docker brings none). Client "
            "here, worker elsewhere: trainers and every client command of envd work on this machine",
            ELSEWHERE,
        )
    if machine.is_wsl:
        return Finding(
            what,
            "warning",
            f"{told}: WSL. Client here, worker elsewhere is what is supported; a worker in WSL was never tried",
            ELSEWHERE,
        )
    inside = f", in a container ({machine.container})" if machine.container else ""
    return Finding(what, "ok", f"{told}{inside}: supported")


def python_of() -> Finding:
    """What runs this command, which is what `envd serve` of the same folder runs on."""
    told = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever forced an older one on it is to be told so
        return Finding("Python", "failed", f"{told} is too old", "use Python 3.11 or newer")
    return Finding("Python", "ok", told)


def packages_of(settings: Settings, is_there: Callable[[str], bool] | None = None) -> Finding:
    """Those that the provider needs beside envd's own. Blocks."""
    provider = settings.provider
    if provider not in MODULES:
        return Finding("packages", "ok", f"PROVIDER={provider} needs none beside envd's own")
    extra, modules = MODULES[provider]
    is_there = is_there or has_module
    missing = [name for name in modules if not is_there(name)]
    if missing:
        return Finding(
            "packages",
            "failed",
            f"PROVIDER={provider} needs Python modules that are not installed: {', '.join(missing)}",
            f"{sys.executable} -m pip install 'envd-server[{extra}]'",
        )
    return Finding("packages", "ok", f"all of PROVIDER={provider}: {', '.join(modules)}")


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a part of a package that is not there
        return False


def clock_of(settings: Settings, status: int | None) -> Finding:
    """`status` is the kernel's (`clock_status`), None where it does not tell. Signatures, TLS and comparing logs need
    the right time; desktops do not."""
    what = "clock"
    if status is None:
        return Finding(what, "unknown", "the kernel does not say whether it is kept in time", "timedatectl")
    if not status & UNSYNCHRONISED:
        return Finding(what, "ok", "kept in time by NTP, as the kernel says")
    if settings.provider == "aws":
        return Finding(
            what,
            "warning",
            "nothing keeps it in time, as the kernel says: AWS refuses requests that are signed minutes off",
            "sudo timedatectl set-ntp true",
        )
    return Finding(
        what,
        "ok",
        f"nothing keeps it in time (NTP), and PROVIDER={settings.provider} works all the same; if times in logs do not "
        "match those of trainers: envd doctor --url from there compares the clocks",
    )


def clock_status() -> int | None:
    """The status word of adjtimex(2), which changes nothing when it is asked so. Blocks for no time."""

    class Timex(ctypes.Structure):
        # The rest of it is room for the kernel to write to.
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("frequency", ctypes.c_long),
            ("largest_error", ctypes.c_long),
            ("estimated_error", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * 512),
        )

    told = Timex()
    try:
        done = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(told))
    except (OSError, AttributeError):
        return None
    return int(told.status) if done >= 0 else None
