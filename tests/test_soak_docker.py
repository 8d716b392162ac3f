"""Resets in a row leave nothing behind: `make soak-docker`, in its short form."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_docker_service import Place, settings
from soak_docker import KINDS, soak

SHORT = [
    pytest.param("containers", 8, id="containers", marks=[pytest.mark.docker, pytest.mark.timeout(240)]),
    pytest.param("clones", 5, id="clones", marks=[pytest.mark.docker, pytest.mark.qemu, pytest.mark.timeout(600)]),
]


@pytest.mark.parametrize(("kind", "resets"), SHORT)
async def test_resets_in_a_row_leave_nothing_behind(kind: str, resets: int, tmp_path: Path) -> None:
    how = settings(Place(tmp_path / "state", tmp_path / "templates"), **KINDS[kind])
    soaked = await soak(how, resets)
    assert soaked.left == []
    assert soaked.rows[-1][1].containers == 0
