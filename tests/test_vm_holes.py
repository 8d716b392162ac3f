"""Memory files give back what holds nothing but zeros."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from envd.vm.holes import dig_holes

MIB = 1024**2


@pytest.mark.parametrize("folder", [pytest.param("/dev/shm", id="in memory"), pytest.param("", id="on disk")])
def test_zeros_are_given_back_and_the_content_stays(folder: str, tmp_path: Path) -> None:
    path = Path(folder or tmp_path) / f"envd-holes-{os.getpid()}"
    content = bytes(3 * MIB) + os.urandom(MIB) + bytes(5 * MIB + 4096) + b"end"
    try:
        path.write_bytes(content)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        given_back = dig_holes(path)
        assert path.read_bytes() == content
        assert given_back == pytest.approx(8 * MIB, abs=MIB / 4)
        assert path.stat().st_blocks * 512 < 2 * MIB
        assert dig_holes(path) == 0
    finally:
        path.unlink()


def test_a_file_that_is_one_hole_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 64 * MIB)
    assert dig_holes(path) == 0
    assert path.stat().st_blocks == 0
