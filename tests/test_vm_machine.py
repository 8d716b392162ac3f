"""QEMU's command line: what QEMU makes of it, and which machines are the same."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest

from envd.drivers.base import Report
from envd.drivers.qemu.cell import ProcessCell
from envd.drivers.qemu.host import find_qemu
from envd.vm.cell import CellSpec
from envd.vm.disks import write_overlay
from envd.vm.machine import MIB, Machine, Ram, clones_read_only, command, fingerprint
from envd.vm.monitor import Monitor

MACHINE = Machine(256 * MIB, 2, "tcg", (1920, 1080), (7, 2, 22))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"memory": 512 * MIB}, id="memory"),
        pytest.param({"cpus": 1}, id="cpus"),
        pytest.param({"accel": "kvm"}, id="accelerator"),
        pytest.param({"screen": (800, 600)}, id="screen"),
        pytest.param({"qemu": (7, 2, 23)}, id="qemu"),
        pytest.param({"mac": "52:54:00:12:34:57"}, id="mac"),
    ],
)
def test_machines_that_differ_in_anything_have_other_fingerprints(change: dict[str, Any]) -> None:
    other = dataclasses.replace(MACHINE, **change)
    assert fingerprint(other) != fingerprint(MACHINE)
    assert fingerprint(dataclasses.replace(other)) == fingerprint(other)


@pytest.mark.parametrize(
    ("screen", "megabytes"),
    [
        pytest.param((800, 600), 16, id="small"),
        pytest.param((1920, 1080), 16, id="full hd"),
        pytest.param((2560, 1440), 32, id="larger"),
        pytest.param((3840, 2160), 64, id="4k"),
    ],
)
def test_twice_the_picture_fits_into_the_adapter(screen: tuple[int, int], megabytes: int) -> None:
    assert 2 * 4 * screen[0] * screen[1] <= megabytes * MIB
    assert f"vgamem_mb={megabytes}" in fingerprint(dataclasses.replace(MACHINE, screen=screen))


def test_memory_is_whole_mebibytes_wherever_it_is_named() -> None:
    machine = dataclasses.replace(MACHINE, memory=1_000_000_000)
    line = " ".join(command(machine, forwards={}, ram="template"))
    assert machine.memory == 953 * MIB
    assert "-m size=953M" in line
    assert f"size={953 * MIB},mem-path=/template/ram,share=on" in line


@pytest.mark.parametrize(("qemu", "only"), [pytest.param((7, 2, 22), False), pytest.param((8, 2, 0), True)])
def test_a_clone_asks_for_no_more_of_the_template_than_its_qemu_needs(qemu: tuple[int, int, int], only: bool) -> None:
    line = " ".join(command(dataclasses.replace(MACHINE, qemu=qemu), forwards={}, ram="clone"))
    assert clones_read_only(qemu) is only
    assert ("share=off,readonly=on,rom=off" in line) is only


def lay_out(run: Path, template: Path, disk: Path, memory: int) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True, timeout=30)
    run.mkdir()
    template.mkdir(exist_ok=True)
    with (template / "ram").open("ab") as ram:
        ram.truncate(memory)
    write_overlay(run / "overlay.qcow2", backing="/System.qcow2", size=64 * MIB)


async def hardware(directory: Path, machine: Machine, ram: Ram) -> str:
    """What QEMU itself says of it, without what is another for each process."""
    run, template, disk = directory / ram, directory / "template-files", directory / "disk.qcow2"
    await anyio.to_thread.run_sync(lay_out, run, template, disk, machine.memory)
    argv = command(machine, forwards={5000: "tcp:127.0.0.1:0"}, ram=ram)
    spec = CellSpec(f"m-{ram}", "m", "template", (*argv, "-S"), run, machine.memory, disk=disk, template=template)
    async with ProcessCell.open(directory, machine.qemu) as cell:
        await cell.start(spec, Report())
        try:
            async with Monitor.open(run / "qmp.sock") as monitor:
                told = [await monitor.human(f"info {what}") for what in ("qtree", "pci", "cpus", "ramblock")]
        finally:
            assert not (printed := await cell.log_tail(spec.name, 10)), "\n".join(printed)
    return re.sub(r"guid = .*|thread_id=\d+|0x[0-9a-f]{12,}", "", "\n".join(told))


@pytest.mark.qemu
@pytest.mark.parametrize("screen", [pytest.param((1920, 1080), id="full hd"), pytest.param((1024, 768), id="small")])
async def test_however_it_gets_its_memory_the_guest_sees_one_hardware(tmp_path: Path, screen: tuple[int, int]) -> None:
    machine = dataclasses.replace(MACHINE, screen=screen, qemu=(await find_qemu()).version)
    own, template, clone = [await hardware(tmp_path, machine, ram) for ram in ("own", "template", "clone")]
    assert "virtio-blk-pci" in own
    assert own == template == clone
