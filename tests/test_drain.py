"""The way out: no new work, episodes that may go on for a while, a second signal that waits for nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import aiohttp
from daemon_process import daemon, ended_job, reset, watch

ENV = {"ENVD_ENVS": "2", "ENVD_SCREEN": "320x240", "ENVD_SETTLE_QUIET": "0", "ENVD_ACTION_PAUSE": "0"}


async def post(session: aiohttp.ClientSession, url: str, body: Any = None) -> tuple[int, Any]:
    async with session.post(url, json=body or {}) as answer:
        return answer.status, await answer.json()


async def test_episodes_go_on_until_they_are_judged_and_nothing_new_begins(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=ENV) as (process, session):
        url = process.url
        assert (await ended_job(session, url, (await reset(session, url))["id"]))["state"] == "succeeded"
        opened = asyncio.Event()
        stream = asyncio.create_task(watch(session, url, opened))
        await opened.wait()
        status, told = await post(session, f"{url}/v1/drain", {"limit_s": 60})
        assert (status, told["draining"], told["envs"]) == (202, True, [0])
        assert 55 < told["left_s"] <= 60
        status, problem = await post(session, f"{url}/v1/envs/1/reset")
        assert (status, problem["code"]) == (503, "draining")
        assert (await post(session, f"{url}/v1/prewarm"))[0] == 503
        async with session.get(f"{url}/readyz") as answer:
            assert (answer.status, (await answer.json())["reasons"]) == (503, ["the daemon is shutting down"])
        assert (await post(session, f"{url}/v1/envs/0/step", {"actions": ["DONE"]}))[0] == 200
        assert (await post(session, f"{url}/v1/envs/0/evaluate"))[0] == 200
        assert await process.ended() == 0
        assert b"server-shutdown" in await stream


async def test_a_limit_of_nothing_ends_the_daemon_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=ENV) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        began = time.monotonic()
        await post(session, f"{process.url}/v1/drain", {"limit_s": 0})
        assert await process.ended() == 0
        assert time.monotonic() - began < 5


async def test_a_second_signal_waits_for_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={**ENV, "ENVD_DRAIN_LIMIT": "600"}) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        process.signal(SIGTERM)
        await process.logged(lambda line: "takes no new work and ends" in line)
        assert process.process.returncode is None
        sent = process.signal(SIGINT)
        assert await process.ended() == 0
        assert time.monotonic() - sent < 5


async def test_asked_again_a_drain_has_another_limit(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=ENV) as (process, session):
        await ended_job(session, process.url, (await reset(session, process.url))["id"])
        await post(session, f"{process.url}/v1/drain", {"limit_s": 600})
        async with session.get(f"{process.url}/v1/drain") as answer:
            assert (await answer.json())["left_s"] > 500
        await post(session, f"{process.url}/v1/drain", {"limit_s": 0.1})
        assert await process.ended() == 0
