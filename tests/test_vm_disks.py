"""Disks of virtual machines: which are usable, and overlays that QEMU's own tools take for good."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from envd.errors import DiskUnusable, NoSpace
from envd.vm.disks import GIB, check_disk, require_space, write_overlay

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed (qemu-utils)")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
    run("qemu-io", "-c", "write -P 7 0 20M", path)
    return path


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("program", [pytest.param("qemu-img", id="qemu-img"), pytest.param(None, id="alone")])
def test_a_whole_disk_is_usable(disk: Path, program: str | None) -> None:
    found = check_disk(disk, program)
    assert (found.path, found.size) == (disk, GIB)


def test_a_disk_is_the_same_wherever_it_lies_and_another_once_it_changed(disk: Path, tmp_path: Path) -> None:
    before = check_disk(disk).identity
    moved = disk.rename(tmp_path / "moved.qcow2")
    assert check_disk(moved).identity == before
    os.utime(moved, (1, 1))
    assert check_disk(moved).identity != before


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        pytest.param(Path.unlink, "absent", id="absent"),
        pytest.param(lambda disk: os.truncate(disk, disk.stat().st_size - 70_000), "truncated", id="last cluster gone"),
        pytest.param(lambda disk: os.truncate(disk, 70_000), "truncated", id="tables gone"),
        pytest.param(lambda disk: os.truncate(disk, 60), "truncated", id="header alone"),
        pytest.param(lambda disk: os.truncate(disk, 0), "not_a_disk", id="empty"),
        pytest.param(lambda disk: disk.write_bytes(b"PK\x03\x04" + bytes(100_000)), "not_a_disk", id="a zip"),
        pytest.param(lambda disk: (disk.unlink(), disk.mkdir()), "not_a_disk", id="a folder"),
        pytest.param(lambda disk: write_at(disk, 4, b"\0\0\0\x09"), "damaged", id="unknown version"),
        pytest.param(lambda disk: write_at(disk, 36, b"\0\0\0\x01"), "damaged", id="first table too short"),
        pytest.param(lambda disk: write_at(disk, 32, b"\0\0\0\x01"), "unreadable", id="encrypted"),
        pytest.param(lambda disk: write_at(disk, 79, b"\x02"), "damaged", id="marked corrupt"),
        pytest.param(lambda disk: write_at(disk, 131_080, bytes(64)), "damaged", id="reference counts wrong"),
    ],
)
def test_a_disk_that_cannot_be_used_is_told_by_its_cause(
    disk: Path, spoil: Callable[[Path], object], cause: str
) -> None:
    spoil(disk)
    with pytest.raises(DiskUnusable) as caught:
        check_disk(disk, "qemu-img")
    assert (caught.value.facts["cause"], caught.value.facts["disk"]) == (cause, str(disk))


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_compressed_disk_that_lost_its_end_is_told_without_qemu_img(disk: Path, tmp_path: Path) -> None:
    raw, packed = tmp_path / "raw", tmp_path / "packed.qcow2"
    raw.write_bytes(os.urandom(5_000_000))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, packed)
    check_disk(packed)
    os.truncate(packed, packed.stat().st_size - 150_000)
    with pytest.raises(DiskUnusable) as caught:
        check_disk(packed)
    assert caught.value.facts["cause"] == "truncated"


def test_an_overlay_is_not_a_disk(disk: Path, tmp_path: Path) -> None:
    write_overlay(tmp_path / "over.qcow2", backing=str(disk), size=GIB)
    with pytest.raises(DiskUnusable, match="overlay") as caught:
        check_disk(tmp_path / "over.qcow2")
    assert caught.value.facts["cause"] == "not_a_disk"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_disk_of_somebody_else_is_unreadable(disk: Path) -> None:
    disk.chmod(0)
    with pytest.raises(DiskUnusable) as caught:
        check_disk(disk)
    assert caught.value.facts["cause"] == "unreadable"


@pytest.mark.parametrize("size", [pytest.param(size * GIB, id=f"{size} GiB") for size in (1, 32, 700, 9000)])
def test_an_overlay_is_what_qemu_would_have_made(disk: Path, tmp_path: Path, size: int) -> None:
    over = tmp_path / "over.qcow2"
    write_overlay(over, backing=str(disk), size=size)
    assert "No errors" in run("qemu-img", "check", over)
    run("qemu-io", *("-c", "read -P 7 0 20M"), *("-c", "write -P 3 10M 5M"), *("-c", "read -P 3 10M 5M"), over)
    run("qemu-io", *("-c", f"write -P 9 {size - 65536} 64k"), *("-c", "read -P 0 100M 1M"), over)
    assert "No errors" in run("qemu-img", "check", over)
    run("qemu-io", "-c", "read -P 7 0 20M", disk)


def test_an_overlay_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "over.qcow2").touch()
    with pytest.raises(FileExistsError):
        write_overlay(tmp_path / "over.qcow2", backing="/System.qcow2", size=GIB)


def test_too_little_space_is_told_with_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(NoSpace) as caught:
        require_space(tmp_path, free + 100 * GIB, "A desktop")
    assert caught.value.facts["needed_bytes"] == free + 100 * GIB
    assert caught.value.facts["where"] == str(tmp_path)
