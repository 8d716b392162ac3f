"""The first process of the guest disk's machine: makes the kernel's services usable, then runs the desktop.

There is no udev, no systemd and no login: an emulated processor pays for each process that starts, and a desktop for
one task needs none of them. When the X server ends, or somebody presses the power button, the machine is switched off.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
import time

import network
from runner import Program, Runner
from session import ENVIRONMENT, RUNTIME, programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Say = Callable[[str], None]

UID = GID = 1000
MODULES = (
    *("xhci_pci", "ehci_pci", "uhci_hcd", "usbhid", "hid_generic", "virtio_input", "psmouse", "evdev", "button"),
    *("virtio_net", "e1000", "e1000e", "virtio_console", "virtio_rng", "bochs"),
)
IDENTITY_PORT = "envd.identity"
XORG_CONF = "/run/xorg.conf"
USB_CONTROLLER = "0x0c03"
POWER_KEY = 116
TABLET_SECONDS = 4.0

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    os.umask(0o022)
    console = _console()
    runner_says = _say_to(console)
    runner_says("envd-milestone: kernel")
    _mount_all()
    _settle_in()
    _load(*MODULES)
    runner = Runner([], ENVIRONMENT, (UID, GID))
    runner.console = console
    network.up(runner_says)
    devices = _input_devices()
    _write_xorg_conf(devices)
    x_server = Program(
        "X server",
        [
            *("Xorg", ":0", "vt1", "-config", XORG_CONF, "-displayfd", "2", "-quiet", "-logfile", "/var/log/Xorg.log"),
            *("-noreset", "-novtswitch", "-keeptty", "-s", "0", "-dpms", "-ac", "-nolisten", "tcp"),
            *("-nolisten", "local", "-extension", "GLX"),
        ],
        essential=True,
        as_root=True,
        milestone=("0", "display"),
    )
    runner.add(programs(x_server))
    port = _identity_port()
    if port:
        runner.add([Program("identity", ["/opt/envd/lib/identity", port], restart=True, as_root=True)])
    for button in (device for device in devices if device.power):
        _switch_off_by(button.node, runner)
    code = runner.run()
    runner.say("machine", f"the desktop ended with {code}; switching off")
    _switch_off()


class Input:
    """An input device of the kernel's, by what its keys and axes are."""

    def __init__(self, directory: str) -> None:
        self.node = f"/dev/input/{os.path.basename(directory)}"
        self.name = _read(f"{directory}/device/name")
        keys, absolute, relative = (
            _bits(_read(f"{directory}/device/capabilities/{kind}")) for kind in ("key", "abs", "rel")
        )
        letters, left_button = range(16, 26), 0x110
        self.power = bool(keys >> POWER_KEY & 1) and not keys >> letters[0] & 1
        self.keyboard = all(keys >> key & 1 for key in letters)
        self.tablet = bool(keys >> left_button & 1) and absolute & 3 == 3
        self.mouse = bool(keys >> left_button & 1) and relative & 3 == 3


def _input_devices() -> list[Input]:
    """All that there are. The kernel finds those on USB some time after its driver is loaded, so a machine with USB
    and no tablet yet is given time."""
    patience = time.monotonic() + (TABLET_SECONDS if _has_usb() else 0.0)
    while True:
        names = sorted(os.listdir("/sys/class/input")) if os.path.isdir("/sys/class/input") else []
        devices = [Input(f"/sys/class/input/{name}") for name in names if name.startswith("event")]
        on_usb = [device for device in devices if device.name.startswith("QEMU QEMU USB")]
        complete = any(device.tablet for device in devices) and (not on_usb or any(d.keyboard for d in on_usb))
        if complete or time.monotonic() > patience:
            return devices
        time.sleep(0.05)


def _has_usb() -> bool:
    devices = "/sys/bus/pci/devices"
    return any(_read(f"{devices}/{name}/class").startswith(USB_CONTROLLER) for name in os.listdir(devices))


def _write_xorg_conf(devices: list[Input]) -> None:
    """Xorg asks udev what there is; here it is told. The pointer is drawn into the picture, where whoever looks at the
    emulated display from outside sees it too."""
    sections, used = [], []
    for number, device in enumerate(devices):
        if device.power or not (device.keyboard or device.tablet or device.mouse):
            continue
        used.append(f'  InputDevice "input{number}"\n')
        sections.append(
            f'Section "InputDevice"\n  Identifier "input{number}"\n  Driver "evdev"\n'
            f'  Option "Device" "{device.node}"\n  Option "GrabDevice" "false"\nEndSection\n'
        )
    preferred = [word[7:] for word in _read("/proc/cmdline").split() if word.startswith("screen=")]
    mode = f'  Option "PreferredMode" "{preferred[-1]}"\n' if preferred else ""
    with open(XORG_CONF, "w") as file:
        file.write(
            "".join(sections)
            + f'Section "Monitor"\n  Identifier "monitor"\n{mode}EndSection\n'
            + 'Section "Device"\n  Identifier "screen"\n  Driver "modesetting"\n  Option "AccelMethod" "none"\n'
            + '  Option "SWcursor" "true"\n  Option "Monitor-Virtual-1" "monitor"\nEndSection\n'
            + 'Section "Screen"\n  Identifier "screen"\n  Device "screen"\n  Monitor "monitor"\n'
            + "  DefaultDepth 24\nEndSection\n"
            + 'Section "ServerFlags"\n  Option "AutoAddDevices" "false"\n  Option "AutoEnableDevices" "false"\n'
            + '  Option "DontVTSwitch" "true"\n  Option "DontZap" "true"\nEndSection\n'
            + 'Section "ServerLayout"\n  Identifier "layout"\n  Screen "screen"\n'
            + "".join(used)
            + "EndSection\n"
        )


def _mount_all() -> None:
    for kind, where, options in (
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("tmpfs", "/run", "mode=755,size=64m"),
        ("devpts", "/dev/pts", "mode=620,gid=5,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
    ):
        os.makedirs(where, exist_ok=True)
        if _libc.mount(kind.encode(), where.encode(), kind.encode(), 0, options.encode()) != 0:
            sys.stderr.write(f"{where} cannot be mounted: {os.strerror(ctypes.get_errno())}\n")


def _settle_in() -> None:
    """Names, directories, and what keys of the kernel's own would do: Ctrl-Alt-Del belongs to the desktop."""
    rb_disable_cad = 0
    _libc.reboot(rb_disable_cad)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{link}"):
            os.symlink(target, f"/dev/{link}")
    socket.sethostname(_read("/etc/hostname") or "desktop")
    if not _read("/etc/machine-id"):
        with open("/etc/machine-id", "w") as file:
            file.write(os.urandom(16).hex() + "\n")
    os.makedirs("/var/lib/dbus", exist_ok=True)
    if not os.path.lexists("/var/lib/dbus/machine-id"):
        os.symlink("/etc/machine-id", "/var/lib/dbus/machine-id")
    os.makedirs(RUNTIME, exist_ok=True)
    os.chmod(RUNTIME, 0o700)
    os.chown(RUNTIME, UID, GID)
    os.makedirs("/run/lock", exist_ok=True)
    for device, mode in (("fuse", 0o666), ("ptmx", 0o666), ("tty", 0o666)):
        if os.path.exists(f"/dev/{device}"):
            os.chmod(f"/dev/{device}", mode)


def _load(*modules: str) -> None:
    pid = os.posix_spawn("/sbin/modprobe", ["modprobe", "-a", "-q", *modules], {"PATH": "/usr/sbin:/usr/bin"})
    os.waitpid(pid, 0)


def _identity_port() -> str | None:
    """The device of the host's channel for names and seeds, if the machine has it."""
    ports = "/sys/class/virtio-ports"
    for name in os.listdir(ports) if os.path.isdir(ports) else []:
        if _read(f"{ports}/{name}/name") == IDENTITY_PORT:
            return f"/dev/{name}"
    return None


def _switch_off_by(node: str, runner: Runner) -> None:
    event = struct.Struct("llHHi")
    button = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def pressed() -> None:
        key, down = 1, 1
        read = os.read(button, event.size * 16)
        for _, _, kind, code, value in event.iter_unpack(read):
            if (kind, code, value) == (key, POWER_KEY, down):
                runner.say("machine", "the power button was pressed; switching off")
                _switch_off()

    runner.watch(button, pressed)


def _switch_off() -> None:
    """End everything, write back what is in memory, and cut the power. Never returns."""
    try:
        os.kill(-1, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.sync()
    ms_rdonly, ms_remount = 1, 32
    _libc.mount(None, b"/", None, ms_rdonly | ms_remount, None)
    rb_power_off = 0x4321FEDC
    _libc.reboot(rb_power_off)
    while True:
        time.sleep(60)


def _console() -> int:
    for path in ("/dev/ttyS0", "/dev/console", "/dev/null"):
        try:
            return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            continue
    return 2


def _say_to(console: int) -> Say:
    def say(line: str) -> None:
        try:
            os.write(console, line.encode() + b"\n")
        except OSError:
            pass

    return say


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _bits(text: str) -> int:
    """A bit map as sysfs prints it: words of 64 bits in hexadecimal, the highest first."""
    number = 0
    for word in text.split():
        number = number << 64 | int(word, 16)
    return number


if __name__ == "__main__":
    main()
