"""What a daemon left is taken up by its next life: real processes, killed with real signals, on sim desktops that
outlive them."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import aiohttp
import pytest
from daemon_process import DaemonProcess, daemon, ended_job
from PIL import Image

from envd.drivers.sim.hosted import SimHost

ENV = {
    "ENVD_SIM": "outlive,linger=20",
    "ENVD_SCREEN": "320x240",
    "ENVD_ACTION_PAUSE": "0",
    "ENVD_SETTLE_QUIET": "0",
    "ENVD_LOG_FORMAT": "json",
}
TASK = {"id": "t-1", "instruction": "Type.", "config": [], "evaluator": {"func": "infeasible"}}


@asynccontextmanager
async def life(state: Path, **env: str) -> AsyncIterator[tuple[DaemonProcess, aiohttp.ClientSession]]:
    """One life of the daemon; it is killed at the end of the block."""
    async with daemon(state, env={**ENV, **env}) as (process, session):
        yield process, session


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def post(session: aiohttp.ClientSession, url: str, body: Any, status: int = 200, **headers: str) -> Any:
    async with session.post(
        url, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()}
    ) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def begin(process: DaemonProcess, session: aiohttp.ClientSession, env: int = 0) -> dict[str, Any]:
    """The job of an episode that has begun."""
    job = await post(session, f"{process.url}/v1/envs/{env}/reset", {"task": TASK}, 202)
    ended: dict[str, Any] = await ended_job(session, process.url, job["id"])
    assert ended["state"] == "succeeded", ended
    return ended


async def typed(state: Path, desktop_id: str) -> str:
    async with SimHost(state) as host:
        return await host.typed(desktop_id)


async def desktops(state: Path) -> set[str]:
    async with SimHost(state) as host:
        return set(await host.ask("list"))


async def a_desktop(state: Path) -> set[str]:
    """As soon as there is one."""
    async with asyncio.timeout(10):
        while not (there := await desktops(state)):  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.01)
    return there


def write(text: str) -> dict[str, Any]:
    return {"actions": [f"pyautogui.write({text!r})"]}


async def test_an_episode_goes_on_after_a_kill(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        job = await begin(process, session)
        await post(session, f"{process.url}/v1/envs/0/step", write("one "))
        before = await get(session, f"{process.url}/v1/envs/0")
        history = await get(session, f"{process.url}/v1/envs/0/history")
    async with life(state) as (process, session):
        after = await get(session, f"{process.url}/v1/envs/0")
        assert after == before
        assert await get(session, f"{process.url}/v1/envs/0/history") == history
        assert (await get(session, f"{process.url}/v1/jobs/{job['id']}"))["state"] == "succeeded"
        result = await post(session, f"{process.url}/v1/envs/0/step", write("two"))
        assert (result["step"], result["episode_id"]) == (2, job["episode_id"])
        assert await typed(state, before["desktop"]["id"]) == "one two"
        assert await desktops(state) == {before["desktop"]["id"]}
        verdict = await post(session, f"{process.url}/v1/envs/0/evaluate", {})
        assert (verdict["status"], verdict["score"]) == ("scored", 0.0)
    async with life(state) as (process, session):
        assert await post(session, f"{process.url}/v1/envs/0/evaluate", {}) == verdict
        assert await get(session, f"{process.url}/v1/episodes/{job['episode_id']}/verdict") == verdict


async def test_a_verdict_without_a_score_has_ended_the_episode_also_after_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        url = f"{process.url}/v1/envs/0"
        job = await post(session, f"{url}/reset", {"task": {"id": "t-2"}}, 202)
        assert (await ended_job(session, process.url, job["id"]))["state"] == "succeeded"
        verdict = await post(session, f"{url}/evaluate", {})
        assert (verdict["status"], verdict["provenance"]["end_reason"]) == ("not_evaluable", "evaluated")
    async with life(state) as (process, session):
        url = f"{process.url}/v1/envs/0"
        assert (await get(session, url))["episode"]["end_reason"] == "evaluated"
        refused = await post(session, f"{url}/step", write("more"), 409)
        assert (refused["code"], refused["end_reason"]) == ("episode_over", "evaluated")
        assert await post(session, f"{url}/evaluate", {}) == verdict
        assert (await post(session, f"{process.url}/v1/leases", {}, 201))["envs"] == [0]


async def test_a_step_is_answered_again_and_not_done_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        await begin(process, session)
        url = f"{process.url}/v1/envs/0"
        first = await post(session, f"{url}/step", write("once"), Idempotency_Key="k-1")
        assert await post(session, f"{url}/step", write("once"), Idempotency_Key="k-1") == first
        await post(session, f"{url}/step", write("other"), 422, Idempotency_Key="k-1")
        desktop = (await get(session, url))["desktop"]["id"]
    async with life(state) as (process, session):
        url = f"{process.url}/v1/envs/0"
        again = await post(session, f"{url}/step", write("once"), Idempotency_Key="k-1")
        assert again == first
        with Image.open(io.BytesIO(base64.b64decode(again["screenshot"]))) as image:
            assert image.size == (320, 240)
        assert await typed(state, desktop) == "once"


async def test_a_reset_sent_again_is_the_same_job(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        url = f"{process.url}/v1/envs/0/reset"
        job = await post(session, url, {"task": TASK}, 202, Idempotency_Key='"r-1"')
    async with life(state) as (process, session):
        url = f"{process.url}/v1/envs/0/reset"
        assert (await post(session, url, {"task": TASK}, 202, Idempotency_Key="r-1"))["id"] == job["id"]
        assert (await ended_job(session, process.url, job["id"]))["state"] == "succeeded"
        assert (await post(session, url, {"task": TASK}, 202, Idempotency_Key="r-1"))["id"] == job["id"]
        assert len(await desktops(state)) == 1


async def test_a_boot_goes_on_after_a_kill_with_the_same_instance(tmp_path: Path) -> None:
    state = tmp_path / "state"
    slow = {"ENVD_SIM": "outlive,linger=20,boot=1.5"}
    async with life(state, **slow) as (process, session):
        job = await post(session, f"{process.url}/v1/envs/0/reset", {"task": TASK}, 202)
        there = await a_desktop(state)
    async with life(state, **slow) as (process, session):
        ended = await ended_job(session, process.url, job["id"])
        assert (ended["state"], {ended["desktop_id"]}) == ("succeeded", there)
        assert await desktops(state) == there


async def test_waiting_jobs_keep_their_order(tmp_path: Path) -> None:
    state = tmp_path / "state"
    slow = {"ENVD_SIM": "outlive,linger=20,boot=0.4", "ENVD_ENVS": "4"}
    async with life(state, **slow) as (process, session):
        jobs = [await post(session, f"{process.url}/v1/envs/{env}/reset", {"task": TASK}, 202) for env in (2, 0, 3, 1)]
    async with life(state, **slow) as (process, session):
        ended = [await ended_job(session, process.url, job["id"]) for job in jobs]
        assert [job["state"] for job in ended] == ["succeeded"] * 4
        assert sorted(ended, key=lambda job: job["started_at"]) == ended
        assert len(await desktops(state)) == 4


async def test_a_watcher_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    seen: list[str] = []

    async def watch(process: DaemonProcess, session: aiohttp.ClientSession, until: str | None) -> None:
        headers = {"Last-Event-ID": seen[-1]} if seen else {}
        async with session.get(f"{process.url}/v1/events", headers=headers) as stream:
            last = ""
            async for line in stream.content:
                if line.startswith(b"id: "):
                    last = line[4:].decode().strip()
                elif line.startswith(b"event: ") and line != b"event: snapshot\n":
                    seen.append(last)
                if until is not None and until.encode() in line and b'"succeeded"' in line:
                    return

    async with life(state) as (process, session):
        watching = asyncio.create_task(watch(process, session, None))
        await begin(process, session)
        process.signal(SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await watching
    async with life(state) as (process, session):
        job = await post(session, f"{process.url}/v1/envs/0/reset", {"task": TASK}, 202)
        await asyncio.wait_for(watch(process, session, job["id"]), 20)
    epochs = {one.rpartition("-")[0] for one in seen}
    numbers = [int(one.rpartition("-")[2]) for one in seen]
    assert len(epochs) == 1
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_a_clean_end_leaves_nothing_unless_it_is_to(tmp_path: Path) -> None:
    for keep, left in (("0", 0), ("1", 1)):
        state = tmp_path / f"state{keep}"
        async with life(state, ENVD_KEEP_DESKTOPS=keep) as (process, session):
            await begin(process, session)
            await post(session, f"{process.url}/v1/envs/0/step", write("a"))
            process.signal(SIGTERM)
            assert await process.ended() == 0
        async with life(state, ENVD_KEEP_DESKTOPS=keep) as (process, session):
            assert len(await desktops(state)) == left
            env = await get(session, f"{process.url}/v1/envs/0")
            assert env["state"] == ("playing" if left else "lost"), env


async def test_a_boot_is_left_to_the_next_life_at_a_clean_end(tmp_path: Path) -> None:
    state = tmp_path / "state"
    keeping = {"ENVD_SIM": "outlive,linger=20,boot=1.5", "ENVD_KEEP_DESKTOPS": "1", "ENVD_ENVS": "2"}
    async with life(state, **keeping) as (process, session):
        jobs = [await post(session, f"{process.url}/v1/envs/{env}/reset", {"task": TASK}, 202) for env in (0, 1)]
        there = await a_desktop(state)
        process.signal(SIGTERM)
        assert await process.ended() == 0
    assert await desktops(state) == there
    async with life(state, **keeping) as (process, session):
        ended = [await ended_job(session, process.url, job["id"]) for job in jobs]
        assert [job["state"] for job in ended] == ["succeeded"] * 2
        assert {ended[0]["desktop_id"]} == there
