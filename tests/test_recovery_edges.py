"""Where lives of the daemon end in the middle of something odd: settings that changed, records that are gone, failures
while it takes up what was left. Real processes on sim desktops that outlive them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from signal import SIGTERM
from typing import Any

import aiohttp
from daemon_process import DaemonProcess, daemon, ended_job
from test_recovery import ENV, TASK, a_desktop, begin, desktops, get, life, post, typed, write

from envd.drivers.sim import SimHost
from envd.journal import FILE

SLOW_TASK = {"id": "slow", "instruction": "Wait.", "config": [{"type": "sleep", "parameters": {"seconds": 60}}]}


async def in_state(session: aiohttp.ClientSession, url: str, job_id: str, state: str) -> dict[str, Any]:
    """The job, as soon as it is in that state."""
    async with asyncio.timeout(20):
        while (job := await get(session, f"{url}/v1/jobs/{job_id}"))["state"] != state:
            await get(session, f"{url}/v1/jobs/{job_id}?wait=5&after={job['version']}")
        found: dict[str, Any] = job
        return found


async def until_there_are(state: Path, count: int) -> None:
    async with asyncio.timeout(10):
        while len(await desktops(state)) != count:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)


async def until_typed(state: Path, desktop_id: str, text: str) -> None:
    async with asyncio.timeout(10):
        while await typed(state, desktop_id) != text:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)


def change_journal(state: Path, statement: str) -> int:
    """How many rows it changed, in the journal of a daemon that does not run."""
    with sqlite3.connect(state / FILE) as database:
        changed = database.execute(statement).rowcount
    database.close()
    return changed


async def test_jobs_of_envs_that_are_no_more_end_and_leave_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    slow = {"ENVD_SIM": "outlive,linger=20,boot=0.5"}
    async with life(state, **slow, ENVD_ENVS="4") as (process, session):
        setting_up = await post(session, f"{process.url}/v1/envs/1/reset", {"task": SLOW_TASK}, 202)
        await in_state(session, process.url, setting_up["id"], "setting_up")
        booting = await post(session, f"{process.url}/v1/envs/2/reset", {"task": TASK}, 202)
        waiting = await post(session, f"{process.url}/v1/envs/3/reset", {"task": TASK}, 202)
        await until_there_are(state, 2)
    async with life(state, **slow, ENVD_ENVS="1") as (process, session):
        for job in (setting_up, booting, waiting):
            ended = await get(session, f"{process.url}/v1/jobs/{job['id']}")
            assert (ended["state"], ended["error"]["code"]) == ("failed", "unknown_env")
        await until_there_are(state, 0)
        assert (await begin(process, session))["state"] == "succeeded"
        assert len(await desktops(state)) == 1


async def test_a_boot_whose_job_cannot_be_taken_up_is_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    slow = {"ENVD_SIM": "outlive,linger=20,boot=2"}
    async with life(state, **slow) as (process, session):
        job = await post(session, f"{process.url}/v1/envs/0/reset", {"task": TASK}, 202)
        await a_desktop(state)
    assert change_journal(state, "DELETE FROM requests") == 1
    async with life(state, **slow) as (process, session):
        assert (await get(session, f"{process.url}/v1/jobs/{job['id']}"))["state"] == "failed"
        await until_there_are(state, 0)


async def test_a_second_restart_does_not_end_the_patience_that_the_first_one_gave(tmp_path: Path) -> None:
    state = tmp_path / "state"
    forever = {"ENVD_SIM": "outlive,linger=20,boot=100", "ENVD_ENVS": "2"}
    async with life(state, ENVD_ENVS="2") as (process, session):
        asked_at = time.monotonic()
        body = {"task": SLOW_TASK, "queue_timeout_s": 3}
        jobs = [await post(session, f"{process.url}/v1/envs/{env}/reset", body, 202) for env in (0, 1)]
        for job in jobs:
            await in_state(session, process.url, job["id"], "setting_up")
    async with life(state, **forever) as (process, session):
        await in_state(session, process.url, jobs[0]["id"], "booting")
        await in_state(session, process.url, jobs[1]["id"], "queued")
    await asyncio.sleep(max(0.0, asked_at + 3.5 - time.monotonic()))  # the time that it had at first is over then
    async with life(state, **forever) as (process, session):
        assert (await get(session, f"{process.url}/v1/jobs/{jobs[1]['id']}"))["state"] == "queued"


async def test_a_verdict_is_found_once_also_when_the_journal_has_forgotten_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        await begin(process, session)
        verdict = await post(session, f"{process.url}/v1/envs/0/evaluate", {})
    assert change_journal(state, "DELETE FROM verdicts") == 1
    async with life(state) as (process, session):
        # Nothing more is expected of an episode that was judged by an earlier life.
        assert (await get(session, f"{process.url}/v1/drain"))["envs"] == []
        assert await post(session, f"{process.url}/v1/envs/0/evaluate", {}) == verdict


async def test_an_episode_whose_steps_were_forgotten_does_not_go_on_with_half_a_dialogue(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        await begin(process, session)
        await post(session, f"{process.url}/v1/envs/0/step", write("a"))
        await post(session, f"{process.url}/v1/envs/0/step", write("b"))
    assert change_journal(state, "DELETE FROM steps") == 2
    async with life(state) as (process, session):
        env = await get(session, f"{process.url}/v1/envs/0")
        assert (env["state"], env["episode"]["end_reason"]) == ("lost", "lost"), env
        await until_there_are(state, 0)


UNSEEN = """
from envd.errors import GuestUnreachable
from envd.guest import Guest

async def no_picture(self, *how, **more):
    raise GuestUnreachable("The guest does not answer.", sent=False)

Guest.screenshot = no_picture
"""
"""A prelude: no picture can be had of any desktop."""


async def test_a_step_that_was_cut_short_and_left_nothing_to_see_is_answered_with_what_is_known(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    body = {**write("once"), "step": 1, "pause_s": 60}
    async with life(state) as (process, session):
        await begin(process, session)
        desktop = (await get(session, f"{process.url}/v1/envs/0"))["desktop"]["id"]
        sending = asyncio.create_task(session.post(f"{process.url}/v1/envs/0/step", json=body, headers=KEY))
        await until_typed(state, desktop, "once")
        await process.kill()
        await asyncio.wait([sending])
        assert sending.exception() is not None
    async with daemon(state, env=ENV, prelude=UNSEEN) as (process, session):
        url = f"{process.url}/v1/envs/0/step"
        problem = await post(session, url, body, 503, **{"Idempotency_Key": KEY["Idempotency-Key"]})
        assert (problem["code"], problem["actions"][0]["outcome"]) == ("guest_unreachable", "unknown")
        assert await post(session, url, body, 503) == problem
        assert (await get(session, f"{process.url}/v1/envs/0"))["episode"]["steps"] == 1
    async with life(state) as (process, session):
        result = await post(session, f"{process.url}/v1/envs/0/step", {**write(" more"), "step": 2})
        assert result["step"] == 2
        assert await typed(state, desktop) == "once more"


KEY = {"Idempotency-Key": "k-1"}
DIES = """
from envd.drivers.base import Death
from envd.episodes import Envs

whole = Envs._remember

async def remember(self, slot, steps):
    found = await whole(self, slot, steps)
    self._fleet._lose(self._fleet._entries[slot.desktop_id], Death("it died meanwhile"))
    return found

Envs._remember = remember
"""
"""A prelude: a desktop dies while its episode is taken up."""


async def test_a_desktop_that_dies_while_its_episode_is_taken_up_is_lost(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        await begin(process, session)
    async with daemon(state, env=ENV, prelude=DIES) as (process, session):
        env = await get(session, f"{process.url}/v1/envs/0")
        assert (env["state"], env["detail"]) == ("lost", "it died meanwhile")
        assert env["episode"]["end_reason"] == "lost"


async def test_evidence_of_what_is_played_is_not_cleared_away_by_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "state"
    few = {"ENVD_ENVS": "3", "ENVD_BUNDLES": "1"}
    async with life(state, **few) as (process, session):
        for env in range(3):
            await begin(process, session, env)
    async with life(state, **few) as (process, session):
        envs = (await get(session, f"{process.url}/v1/envs"))["envs"]
        assert [env["state"] for env in envs] == ["playing"] * 3
        await begin(process, session, 2)
        kept = (await get(session, f"{process.url}/v1/episodes"))["episodes"]
        assert {envs[0]["episode"]["id"], envs[1]["episode"]["id"]} <= set(kept)


async def still_runs(process: DaemonProcess, session: aiohttp.ClientSession) -> float:
    """How long what is played may go on, in seconds. It is asked more than once, and a step is done."""
    for _ in range(5):
        await post(session, f"{process.url}/v1/envs/0/step", write("a"))
        told = await get(session, f"{process.url}/v1/drain")
        assert told["draining"]
    left: float = told["left_s"]
    return left


async def test_a_drain_that_is_asked_for_again_or_confirmed_by_a_signal_waits_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state) as (process, session):
        await begin(process, session)
        await post(session, f"{process.url}/v1/drain", {"limit_s": 600}, 202)
        assert await still_runs(process, session) > 500
        await post(session, f"{process.url}/v1/drain", {"limit_s": 300}, 202)
        assert 200 < await still_runs(process, session) <= 300
        process.signal(SIGTERM)
        assert await still_runs(process, session) > 200
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_a_set_up_and_a_step_that_a_clean_end_cuts_short_are_left_to_the_next_life(tmp_path: Path) -> None:
    state = tmp_path / "state"
    keeping = {"ENVD_KEEP_DESKTOPS": "1", "ENVD_ENVS": "2"}
    body = {**write("once"), "pause_s": 60}
    async with life(state, **keeping) as (process, session):
        await begin(process, session)
        desktop = (await get(session, f"{process.url}/v1/envs/0"))["desktop"]["id"]
        job = await post(session, f"{process.url}/v1/envs/1/reset", {"task": SLOW_TASK}, 202)
        await in_state(session, process.url, job["id"], "setting_up")
        sending = asyncio.create_task(post(session, f"{process.url}/v1/envs/0/step", body, 503, Idempotency_Key="k"))
        await until_typed(state, desktop, "once")
        process.signal(SIGTERM)
        assert (await sending)["code"] == "draining"
        assert await process.ended() == 0
    async with life(state, **keeping) as (process, session):
        result = await post(session, f"{process.url}/v1/envs/0/step", body, Idempotency_Key="k")
        assert [action["outcome"] for action in result["actions"]] == ["unknown"]
        assert await typed(state, desktop) == "once"
        again = await in_state(session, process.url, job["id"], "setting_up")
        assert again["desktop_id"] not in (desktop, job["desktop_id"])
        await until_there_are(state, 2)
        await post(session, f"{process.url}/v1/jobs/{job['id']}/cancel", {}, 202)
        assert (await ended_job(session, process.url, job["id"]))["state"] == "cancelled"


TWO_AT_ONCE = """
import asyncio
from envd.errors import GuestUnreachable
from envd.guest import Guest

both = asyncio.Barrier(2)

async def no_picture(self, *how, **more):
    await both.wait()
    raise GuestUnreachable("The guest does not answer.", sent=False)

Guest.screenshot = no_picture
"""
"""A prelude: who asks for a picture waits until another one is asked for."""


async def test_guests_that_hang_hold_up_the_start_together(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with life(state, ENVD_ENVS="2") as (process, session):
        sending = []
        for env in range(2):
            job = await begin(process, session, env)
            body = {**write("a"), "pause_s": 60}
            sending.append(asyncio.create_task(session.post(f"{process.url}/v1/envs/{env}/step", json=body)))
            await until_typed(state, job["desktop_id"], "a")
        await process.kill()
        await asyncio.gather(*sending, return_exceptions=True)
    async with daemon(state, env={**ENV, "ENVD_ENVS": "2"}, prelude=TWO_AT_ONCE) as (process, session):
        for env in range(2):
            assert (await get(session, f"{process.url}/v1/envs/{env}"))["episode"]["steps"] == 1


async def test_a_spare_that_slept_sleeps_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    parking = {"ENVD_SIM": "outlive,linger=20,parks", "ENVD_SPARES": "1"}

    async def until_parked(times: int) -> None:
        async with asyncio.timeout(10), SimHost(state) as host:
            while sum(entry[1] == "park" for entry in await host.ask("journal")) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async with life(state, **parking):
        await until_parked(1)
    async with life(state, **parking) as (process, session):
        await until_parked(2)
        assert len(await desktops(state)) == 1
        assert (await begin(process, session))["reset_path"] == "spare"
