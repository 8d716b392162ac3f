"""Resets in a row leave nothing behind: `make soak-docker`, in its short form."""

from __future__ import annotations

import pytest
from bench_docker_service import place, settings
from soak_docker import KINDS, soak

import envd.drivers.docker  # noqa: F401 - here, since an import blocks and drivers are imported when they are chosen

SHORT = [
    pytest.param("containers", 8, id="containers", marks=[pytest.mark.docker, pytest.mark.timeout(240)]),
    pytest.param("clones", 5, id="clones", marks=[pytest.mark.docker, pytest.mark.qemu, pytest.mark.timeout(600)]),
]


@pytest.mark.parametrize(("kind", "resets"), SHORT)
async def test_resets_in_a_row_leave_nothing_behind(kind: str, resets: int) -> None:
    with place() as where:
        soaked = await soak(settings(where, **KINDS[kind]), resets)
    assert soaked.left == []
    assert soaked.rows[-1][1].containers == 0
