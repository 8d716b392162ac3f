"""Calls that meet something odd: a disk that fills meanwhile, a step in its middle, a failure before anything was done,
an answer that belongs to another episode, the end of the daemon."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from serving import Served, eventually, serving
from test_calls import FOR_EVER, step, write

from envd.calls import Sent
from envd.client.transport import Deadline, Transport
from envd.drivers.base import Death
from envd.drivers.sim import Behaviour
from envd.errors import DiskLow, InfraError, NotFound
from envd.journal import Journal
from envd.records import KeptAnswer
from envd.store import Kind

KEYED = {"headers": {"Idempotency-Key": "k-1"}}


@asynccontextmanager
async def nothing_lasts(served: Served) -> AsyncIterator[None]:
    """The disk takes nothing, and did when the calls began."""

    async def commit() -> None:
        raise DiskLow("The journal cannot be written.", retry_after=30)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.service.store, "commit", commit)
        yield


async def test_a_reset_that_did_not_last_is_done_when_it_is_sent_again() -> None:
    async with serving(FOR_EVER) as served:
        async with nothing_lasts(served):
            status, problem = await served.post("/v1/envs/0/reset", {}, **KEYED)
            assert (status, problem["code"]) == (503, "disk_low")
        status, job = await served.post("/v1/envs/0/reset", {}, **KEYED)
        assert (status, job["cancel_requested"]) == (202, False)


async def test_who_joins_a_job_and_cannot_be_promised_it_does_not_end_it() -> None:
    async with serving(FOR_EVER) as served:
        _, job = await served.post("/v1/envs/0/reset", {})
        async with nothing_lasts(served):
            assert (await served.post("/v1/envs/0/reset", {}))[0] == 503
        assert not (await served.get(f"/v1/jobs/{job['id']}"))[1]["cancel_requested"]


async def test_a_lease_that_did_not_last_is_asked_for_anew() -> None:
    async with serving() as served:
        asked = {"count": 1, "owner": "me"}
        async with nothing_lasts(served):
            assert (await served.post("/v1/leases", asked, **KEYED))[0] == 503
        status, lease = await served.post("/v1/leases", asked, **KEYED)
        assert (status, lease["state"]) == (201, "held")


async def test_a_step_that_comes_again_in_its_middle_is_told_so() -> None:
    async with serving(Behaviour(answer_s=0.5)) as served:
        desktop = await served.play()
        first = asyncio.create_task(step(served, write("a", step=1)))

        def steps() -> int:
            episode = served.service.env(0).episode
            return episode.steps if episode is not None else 0

        for fact in (lambda: desktop.gui.typed == "a", lambda: steps() == 1):
            await eventually(fact)
            status, problem = await step(served, write("a", step=1))
            assert (status, problem["code"]) == (409, "env_busy")
        assert await first == await step(served, write("a", step=1))
        assert desktop.gui.typed == "a"


async def test_a_step_that_could_not_begin_leaves_its_number_and_never_another_ones_answer() -> None:
    async with serving() as served:
        desktop = await served.play()

        def sleeps_on(desktop_id: str) -> AbstractAsyncContextManager[None]:
            raise InfraError("The machine cannot be resumed.")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(served.service.fleet, "awake", sleeps_on)
            failed = await step(served, write("a", step=1), key="k-1")
            assert (failed[0], failed[1]["code"]) == (503, "infra_error")
        assert (await step(served, write("b", step=1), key="k-2"))[1]["step"] == 1
        status, problem = await step(served, write("a", step=1), key="k-1")
        assert (status, problem["code"]) == (409, "step_repeated")
        assert (await step(served, write("a", step=2), key="k-1"))[1]["step"] == 2
        assert desktop.gui.typed == "ba"


async def test_an_evaluation_sent_again_judges_no_other_episode() -> None:
    async with serving() as served:
        await served.play(task={"id": "t", "config": [], "evaluator": {"func": "infeasible"}})
        # As a daemon leaves it that ends in the middle of an evaluation; a reset followed.
        served.service.store.put(Kind.ANSWERS, "k-1", KeptAnswer(fingerprint="f", what="verdict", id="ep-before"))
        with pytest.raises(NotFound):
            await served.service.evaluate(0, Sent(key="k-1", fingerprint="f"))
        episode = served.service.env(0).episode
        assert episode is not None
        assert not episode.done


@pytest.mark.parametrize("drain_limit", [0, 30])
async def test_a_held_reset_that_the_end_of_the_daemon_cancels_is_another_one_when_it_is_sent_again(
    drain_limit: float,
) -> None:
    async with serving(Behaviour(boot_s=60), envs=2, drain_limit=drain_limit) as served:
        resetting = asyncio.create_task(served.post("/env/reset", {"task_config": {}, "slot_id": 1}, **KEYED))
        await eventually(lambda: bool(served.service.queue.active()))
        draining = asyncio.create_task(served.service.drain())
        status, problem = await resetting
        assert (status, problem["code"]) == (503, "draining")
        assert await served.service.store.get(Kind.ANSWERS, "k-1", KeptAnswer) is None
        await draining


async def test_a_reset_that_fails_while_the_next_life_is_awaited_is_left_to_that() -> None:
    async with serving(keep_desktops=True, drain_limit=30) as served:
        slow = {"id": "slow", "config": [{"type": "sleep", "parameters": {"seconds": 60}}]}
        _, job = await served.post("/v1/envs/0/reset", {"task": slow})
        await served.in_state(job["id"], "setting_up")
        draining = asyncio.create_task(served.service.drain())
        await eventually(served.service.closing.is_set)
        next(iter(served.sim.desktops.values())).die(Death("it was killed"))
        assert (await served.in_state(job["id"], "queued", "failed"))["state"] == "queued"
        await draining


@pytest.mark.parametrize("prefer", ["wait=0", "respond-async, wait=1"])
async def test_a_preferred_wait_is_no_deadline(prefer: str) -> None:
    async with serving(FOR_EVER) as served:
        status, job, headers = await served.ask("POST", "/v1/envs/0/reset", {}, headers={"Prefer": prefer})
        assert (status, headers["Preference-Applied"]) == (202, "wait")
        assert job["state"] == "booting"


async def test_a_client_may_wait_for_ever() -> None:
    async with serving() as served:
        transport = Transport(served.url)
        try:
            answer = await transport.request("POST", "/v1/prewarm", deadline=Deadline.after(1e12))
        finally:
            await transport.aclose()
        assert answer.status == 202


@asynccontextmanager
async def a_disk_that_hangs(served: Served) -> AsyncIterator[None]:
    """The journal's thread does nothing, until the end of the block."""
    journal, on = served.service.store, threading.Event()
    assert isinstance(journal, Journal)
    journal._thread.submit(on.wait)
    try:
        yield
    finally:
        on.set()


async def test_a_caller_is_answered_in_its_time_also_where_the_disk_hangs() -> None:
    async with serving(envs=2) as served:
        desktop = await served.play()
        async with a_disk_that_hangs(served):
            for key in ("", "k-1"):
                began = time.monotonic()
                status, problem = await step(served, write("a"), key=key, deadline="0.5")
                assert (status, problem["code"]) == (503, "deadline_passed")
                assert time.monotonic() - began < 1
            # Nor is it told of what may not last: what the disk has not got yet the next life would not know.
            served.service.events.publish("note", message="not on the disk yet")
            status, problem = await served.post("/v1/envs/7/reset", {}, headers={"X-Request-Deadline": "0.5"})
            assert (status, problem["code"]) == (503, "deadline_passed")
            assert desktop.gui.typed == ""
        # Both went on; an env does one thing at a time.
        again = await step(served, write("a"), key="k-1")
        assert again[0] == 200 or again[1]["code"] == "env_busy"
        await eventually(lambda: "a" in desktop.gui.typed)
