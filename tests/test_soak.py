"""Whatever dies or is lost on the way, no job ends twice, no input is applied twice, nothing is left: `make soak`, in
its short form."""

from __future__ import annotations

from pathlib import Path

import pytest
from figures import FIGURES
from soak import SHOWN, soak

SEED = 20
"""Of what goes wrong when; the machine's own pace still makes each run another."""


@pytest.mark.timeout(420)
async def test_whatever_dies_nothing_is_lost_done_twice_or_left(tmp_path: Path) -> None:
    soaked = await soak(36, 16, SEED, tmp_path, quiet=4)
    FIGURES.extend(soaked.lines())
    assert soaked.wrong[:SHOWN] == []
    assert soaked.left == []
    # It did what it is for.
    for kind in ("client", "machine", "engine", "daemon SIGKILL"):
        assert soaked.kills[kind], soaked.kills
    for fate in ("left", "unheard", "torn"):
        assert soaked.cut[fate], soaked.cut
    assert soaked.ledger.counts["verdicts scored"] > 0
    assert soaked.texts[0] > 0
