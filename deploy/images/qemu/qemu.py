"""The first process of a container of a virtual machine that is used by itself: QEMU, and noVNC's page for who asks.

The machine is made from DISK, RAM_SIZE, CPU_CORES, DISK_SIZE, KVM and SCREEN. The disk is never written to: what the
machine changes goes to an overlay, and with the container.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

from runner import Program, Runner, listen, on_termination

VM = "/run/vm"
VNC_SOCKET, QMP_SOCKET = f"{VM}/vnc.sock", f"{VM}/qmp.sock"
OVERLAY = f"{VM}/overlay.qcow2"
PORTS = (5000, 9222, 8080)
NOVNC_PORT = 8006
GRACE_SECONDS = 10.0
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def main() -> None:
    command = _machine()
    on_termination(_switch_off)
    novnc = ["websockify", "--inetd", "--web", "/usr/share/novnc", "--unix-target", VNC_SOCKET]
    runner = Machine(
        [
            Program("qemu", command, essential=True, verbatim=True),
            Program("novnc", novnc, listener=listen(NOVNC_PORT), on_demand=True),
        ],
        ENVIRONMENT,
    )
    sys.exit(runner.run())


class Machine(Runner):
    """A runner to which a machine that was switched off is no failure."""

    def code_of(self, program: Program, code: int) -> int:
        return code if code >= 0 else 128 - code


def _machine() -> list[str]:
    """QEMU's command line by the environment. Raises SystemExit with what to do."""
    disk = os.environ.get("DISK") or "/System.qcow2"
    if not os.access(disk, os.R_OK):
        sys.exit(
            f"There is no disk that can be read at {disk}: mount one there (-v DISK.qcow2:{disk}:ro), or set DISK."
        )
    _make_overlay(disk)
    accelerator = "tcg,thread=multi,tb-size=512"
    if os.environ.get("KVM", "N").upper() == "Y":
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            sys.exit("KVM=Y, but /dev/kvm cannot be opened here: start with --device /dev/kvm, or leave KVM out.")
        accelerator = "kvm"
    width, _, height = (os.environ.get("SCREEN") or "1920x1080").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        sys.exit(f"SCREEN={os.environ['SCREEN']!r} is no size of a screen: write it like 1920x1080.")
    forwards = "".join(f",hostfwd=tcp::{port}-:{port}" for port in PORTS)
    return [
        *("qemu-system-x86_64", "-name", "envd", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,usb=off,vmport=off", "-accel", accelerator, "-cpu", "max"),
        *("-m", _size("RAM_SIZE", "2G"), "-smp", os.environ.get("CPU_CORES") or "2"),
        *("-drive", f"file={OVERLAY},if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=disk", "-device", f"VGA,edid=on,xres={width},yres={height}"),
        *("-device", "virtio-keyboard-pci", "-device", "virtio-tablet-pci", "-device", "virtio-rng-pci"),
        *("-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-vnc", f"unix:{VNC_SOCKET}", "-qmp", f"unix:{QMP_SOCKET},server=on,wait=off", "-serial", "stdio"),
    ]


def _make_overlay(disk: str) -> None:
    asked = ["qemu-img", "info", "--output=json", "-U", disk]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        sys.exit(f"{disk} is no disk that QEMU can use: {told.stderr.strip()}")
    backing = json.loads(told.stdout)
    made = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", backing["format"], OVERLAY]
    wanted = os.environ.get("DISK_SIZE")
    if wanted and _bytes(_size("DISK_SIZE", "")) > backing["virtual-size"]:
        made.append(_size("DISK_SIZE", ""))
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"No overlay for {disk} can be made in {VM}: {done.stderr.strip()}")


def _size(name: str, default: str) -> str:
    """A size as QEMU takes it. Raises SystemExit."""
    text = (os.environ.get(name) or default).upper().removesuffix("B")
    if not (text[:-1].isdecimal() and text[-1] in "MGT"):
        sys.exit(f"{name}={os.environ.get(name)!r} is no size: write it like 4G.")
    return text


def _bytes(size: str) -> int:
    return int(size[:-1]) << {"M": 20, "G": 30, "T": 40}[size[-1]]


def _switch_off() -> None:
    """Press the power button, and end without further ado if that has not helped after a while."""
    try:
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(2.0)
            qmp.connect(QMP_SOCKET)
            qmp.sendall(b'{"execute": "qmp_capabilities"}{"execute": "system_powerdown"}')
            qmp.recv(4096)
            time.sleep(GRACE_SECONDS)
    except OSError:
        pass
    os._exit(128 + 15)


if __name__ == "__main__":
    main()
