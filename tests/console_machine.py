"""A real virtual machine for the tests of its console: the guest disk, under emulation, cold booted."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from envd.errors import EnvdError
from envd.guest import Guest
from envd.settings import load
from envd.vm.console import VmConsole
from envd.vm.monitor import Monitor

SCREEN = (1280, 720)
BOOT_SECONDS = 240
NEEDED = ("qemu-system-x86_64", "qemu-img", "bwrap")


@dataclass
class Machine:
    console: VmConsole
    guest: Guest
    monitor: Monitor
    run: Path
    process: int

    def ticks(self) -> int:
        """Processor time of QEMU so far, in ticks."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def guest_disk() -> Path:
    """Skips when something is missing."""
    for program in NEEDED:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    disk = load(env_file=None).guest_disk
    if not disk.exists():
        pytest.skip(f"there is no guest disk {disk}; `make images` makes it")
    return disk.resolve()


def _qemu(run: Path, *devices: str) -> subprocess.Popen[bytes]:
    width, height = SCREEN
    argv = ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/run", "--bind", str(run), "/run/vm", "--die-with-parent"]
    argv += ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,vmport=off"]
    argv += ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-smp", "2", "-m", "2048"]
    argv += ["-device", f"VGA,edid=on,xres={width},yres={height}", "-serial", "file:/run/vm/serial.log"]
    argv += ["-device", "virtio-keyboard-pci,id=keyboard", "-device", "virtio-tablet-pci,id=tablet"]
    argv += ["-qmp", "unix:/run/vm/qmp.sock,server=on,wait=off", *devices]
    with (run / "qemu.log").open("wb") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log)


def _overlay(run: Path) -> Path:
    overlay = run / "overlay.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(guest_disk()), str(overlay)]
    subprocess.run(argv, check=True)
    return overlay


def _child(process: int) -> int:
    """QEMU: bubblewrap is its parent."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


@asynccontextmanager
async def started(run: Path, *devices: str) -> AsyncIterator[tuple[Monitor, subprocess.Popen[bytes]]]:
    """QEMU with a screen, a tablet, a keyboard and `devices`; /run/vm of it is `run`."""
    process = _qemu(run, *devices)
    try:
        async with Monitor.open(run / "qmp.sock", timeout=20) as monitor:
            yield monitor, process
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def booted(run: Path) -> AsyncIterator[Machine]:
    """The guest, once its server and its screen are there."""
    overlay = _overlay(run)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forward = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:5000"
    disk_devices = ["-drive", f"file={overlay},if=none,id=disk,cache=unsafe", "-device", "virtio-blk-pci,drive=disk"]
    net_devices = ["-netdev", forward, "-device", "virtio-net-pci,netdev=net,romfile="]
    async with started(run, *disk_devices, *net_devices) as (monitor, process), aiohttp.ClientSession() as http:
        guest = Guest(http, f"http://127.0.0.1:{port}")
        end = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                await guest.screenshot(timeout=20)
                break
            except EnvdError as error:
                if time.monotonic() > end:
                    last = (run / "serial.log").read_text(errors="replace")[-2000:]
                    pytest.fail(f"the guest is not up after {BOOT_SECONDS} s: {error}\n{last}")
                await asyncio.sleep(1)
        yield Machine(VmConsole(monitor, run, SCREEN), guest, monitor, run, _child(process.pid))
