"""`envd bench`: what it measures, what it leaves alone, and the figures it makes of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from cli_process import envd, on_terminal
from daemon_process import daemon, ended_job, reset

from envd import Client
from envd.cli.bench import quantile

SETTINGS = {"ENVD_ENVS": "3", "ENVD_SCREEN": "320x240", "ENVD_SETTLE_QUIET": "0"}


async def test_it_measures_on_free_envs_alone_and_gives_them_back(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=SETTINGS) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url, env=1))["id"])
        async with Client(process.url) as client:
            [played] = [env.episode for env in await client.envs() if env.episode]
            options = ("--clients", "2", "--resets", "2", "--steps", "3", "--json")
            ran = await asyncio.to_thread(envd, tmp_path, "bench", *options, ENVD_URL=process.url)
            assert (ran.returncode, ran.stderr) == (0, "")
            told = json.loads(ran.stdout)
            counts = {measure["name"]: measure["count"] for measure in told["measures"]}
            steps, resets = 12, 4
            assert counts == {
                "round trip": 40,
                "reset, cold": resets,
                "queue": resets,
                "step": steps,
                "screenshot": steps,
            }
            for measure in told["measures"]:
                assert 0 <= measure["p50_s"] <= measure["p95_s"] <= measure["p99_s"] <= measure["max_s"]
            assert (told["provider"], told["clients"], told["failures"]) == ("sim", 2, {})
            assert [env.episode for env in await client.envs() if env.episode] == [played]
            assert {lease.state for lease in await client.leases()} <= {"ended"}


async def test_with_too_few_free_envs_it_says_what_to_do_and_plays_on_none(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=SETTINGS) as (process, _), Client(process.url) as client:
        many = await asyncio.to_thread(envd, tmp_path, "bench", "--clients", "4", ENVD_URL=process.url)
        assert (many.returncode, many.stdout) == (1, "")
        assert "--clients 3" in many.stderr
        async with client.lease(3):
            ran = await asyncio.to_thread(envd, tmp_path, "bench", ENVD_URL=process.url)
        assert ran.returncode == 1
        assert "envd ls" in ran.stderr
        assert await client.jobs() == []


async def test_what_fails_is_counted_by_its_code_and_told(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=SETTINGS | {"ENVD_SIM": "fail=1"}) as (process, _):
        ran = await asyncio.to_thread(envd, tmp_path, "bench", "--resets", "2", "--json", ENVD_URL=process.url)
        assert ran.returncode == 1
        told = json.loads(ran.stdout)
        assert sum(told["failures"].values()) == 2
        assert [measure["name"] for measure in told["measures"]] == ["round trip"]


async def test_on_a_terminal_there_is_a_bar_and_then_a_table(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=SETTINGS) as (process, _):
        code, shown = await asyncio.to_thread(
            on_terminal, tmp_path, "bench", "--resets", "1", "--steps", "2", ENVD_URL=process.url
        )
        assert code == 0
        assert "calls ━" in shown
        assert "reset, cold" in shown


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param([7.0], 0.99, 7.0, id="one value is every quantile"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 0.5, 2.0, id="the median is one that was measured"),
        pytest.param([float(n) for n in range(1, 101)], 0.95, 95.0, id="five of a hundred are above"),
        pytest.param([float(n) for n in range(1, 101)], 0.99, 99.0, id="one of a hundred is above"),
    ],
)
def test_a_quantile_is_a_value_that_was_measured(values: list[float], share: float, expected: float) -> None:
    assert quantile(values, share) == expected
