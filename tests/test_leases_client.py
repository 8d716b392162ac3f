"""`async with client.lease(n) as envs`: held while the block runs, given back after it, and never lost in silence."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from serving import Served, eventually, serving

from envd.client import Client
from envd.client import lease as client_lease
from envd.errors import InvalidRequest, Leased, LeaseOver, LeaseUnavailable, ServerUnreachable
from envd.models import EnvState, Lease, LeaseEnd, LeaseState

TASK = {"id": "t-1", "config": [], "evaluator": {"func": "infeasible"}}


def held(served: Served) -> list[Lease]:
    return [lease for lease in served.service.leases.all() if lease.state is LeaseState.HELD]


def hasten(served: Served, monkeypatch: pytest.MonkeyPatch, ttl_s: float) -> None:
    """Grant shorter leases than can be asked for, so that a holder must renew at once."""
    whole = served.service.leases.ask

    def ask(owner: str, asked: Any) -> Lease:
        return whole(owner, asked.model_copy(update={"ttl_s": ttl_s}))

    monkeypatch.setattr(served.service.leases, "ask", ask)


async def until_cancelled() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling()


async def released_within(served: Served, client: Client, then: Callable[[], Awaitable[None]]) -> None:
    """A block whose lease somebody else releases, and which then does `then`."""
    async with client.lease():
        served.service.leases.release(held(served)[0].id)
        await then()


async def test_the_handles_play_under_the_lease_which_is_given_back_at_the_end() -> None:
    async with serving(envs=2) as served, Client(served.url) as client:
        async with client.lease(2, owner="ann") as envs:
            assert [env.number for env in envs] == [0, 1]
            job = await envs[0].reset(TASK)
            assert (await envs[0].act("WAIT")).step == 1
            assert (await envs[0].evaluate()).score == 0.0
            assert await envs[0].screenshot()
            state = await envs[1].state()
            assert state.lease is not None
            assert state.lease.owner == "ann"
            with pytest.raises(Leased, match="Env 0 is leased to ann"):
                await client.reset(TASK)
        assert held(served) == []
        assert (await client.env_state(0)).state is EnvState.EMPTY
        assert (await client.verdict(job.episode_id or "")).score == 0.0
        await client.reset(TASK)


async def test_two_blocks_follow_one_another() -> None:
    async with serving() as served, Client(served.url) as client:
        order: list[str] = []

        async def play(name: str) -> None:
            async with client.lease(1, owner=name) as [env]:
                order.append(f"{name} has env {env.number}")
                await env.reset(TASK)
                order.append(f"{name} leaves")

        await asyncio.gather(play("ann"), play("bob"))
        assert order == ["ann has env 0", "ann leaves", "bob has env 0", "bob leaves"] or order == [
            "bob has env 0",
            "bob leaves",
            "ann has env 0",
            "ann leaves",
        ]


async def test_a_lease_is_renewed_for_as_long_as_the_block_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served, Client(served.url) as client:
        hasten(served, monkeypatch, 0.6)
        async with client.lease():
            [first] = held(served)
            await eventually(lambda: held(served)[0].expires_at > first.expires_at + 1.2)
            assert [lease.id for lease in held(served)] == [first.id]
        assert held(served) == []


async def test_a_lost_lease_ends_the_block_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served, Client(served.url) as client:
        hasten(served, monkeypatch, 0.6)
        with pytest.raises(LeaseOver) as lost:
            await released_within(served, client, until_cancelled)
        assert lost.value.facts["end_reason"] == LeaseEnd.RELEASED


async def test_a_lease_that_the_server_does_not_know_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served, Client(served.url) as client:
        hasten(served, monkeypatch, 0.6)

        async def forgotten() -> None:
            book = served.service.leases._book
            book.forget(book.ended()[0].created_at + 10_000)
            await asyncio.Event().wait()

        with pytest.raises(LeaseOver, match="There is no lease of that id"):
            await released_within(served, client, forgotten)


async def test_a_block_that_ends_just_when_its_lease_is_lost_does_not_pass_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as served, Client(served.url) as client:
        hasten(served, monkeypatch, 0.6)

        async def ends_all_the_same() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

        with pytest.raises(LeaseOver):
            await released_within(served, client, ends_all_the_same)


async def test_a_call_after_the_end_is_told_so_and_does_not_play_on() -> None:
    async with serving() as served, Client(served.url) as client:

        async def play() -> None:
            async with client.lease() as [env]:
                served.service.leases.release(held(served)[0].id)
                await env.reset(TASK)

        with pytest.raises(LeaseOver, match="was released"):
            await play()
        assert served.service.queue.active() == ()


async def test_a_failure_of_the_block_comes_out_as_it_is_and_the_lease_is_given_back() -> None:
    async with serving() as served, Client(served.url) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.lease():
                raise ZeroDivisionError
        assert held(served) == []


async def test_a_block_that_is_cancelled_gives_its_lease_back() -> None:
    async with serving() as served, Client(served.url) as client:
        began = asyncio.Event()

        async def play() -> None:
            async with client.lease():
                began.set()
                await asyncio.Event().wait()

        playing = asyncio.create_task(play())
        await began.wait()
        assert len(held(served)) == 1
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        assert served.service.leases.all() == []


async def test_who_stops_waiting_leaves_the_line() -> None:
    async with serving() as served, Client(served.url) as client, client.lease():
        with pytest.raises(LeaseUnavailable, match="1 env was not free") as given_up:
            async with client.lease(wait_s=0.1):
                raise AssertionError("there is no second env")
        assert given_up.value.facts["position"] == 1
        assert "env 0 is leased to" in given_up.value.detail
        waiting = asyncio.create_task(client.lease().__aenter__())
        await eventually(lambda: served.service.leases._attended.total() == 1)  # it knows its lease, and asks about it
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(served.service.leases.all()) == 1


async def test_who_cannot_have_a_lease_is_told_what_takes_each_env_and_what_frees_it() -> None:
    async with serving(envs=2) as served, Client(served.url) as client:
        await served.play(1)
        episode = served.service.env(1).episode
        assert episode is not None
        async with client.lease(owner="ann"):
            seen: list[Lease] = []
            with pytest.raises(LeaseUnavailable) as given_up:
                async with client.lease(2, wait_s=0.1, owner="bob", on_wait=seen.append):
                    raise AssertionError("there are not two")
        assert re.search(
            rf"within 0.1 s: env 0 is leased to ann; env 1 is played on without a lease for \d s \({episode.id}\): "
            "evaluating it, or a step with DONE or FAIL, ends that and frees the env",
            given_up.value.detail,
        )
        _, taken = given_up.value.facts["waits_for"]
        assert (taken["env"], taken["by"], taken["since"]) == (1, "episode", episode.started_at)
        assert seen
        assert [one.by for one in seen[0].waits_for] == ["lease", "episode"]


@pytest.mark.parametrize("said", ["DONE", "FAIL", "evaluate"])
async def test_what_is_said_to_free_an_env_frees_it(said: str) -> None:
    async with serving() as served, Client(served.url) as client:
        await served.play()

        async def had() -> list[int]:
            async with client.lease(wait_s=20) as envs:
                return [env.number for env in envs]

        waiting = asyncio.create_task(had())
        await eventually(lambda: served.service.leases._attended.total() == 1)
        if said == "evaluate":
            await served.evaluate()
        else:
            await served.post("/v1/envs/0/step", {"actions": [said]})
        assert await waiting == [0]


async def test_more_envs_than_there_are_cannot_be_waited_for() -> None:
    async with serving() as served, Client(served.url) as client:
        with pytest.raises(InvalidRequest, match="has 1 env, not 2"):
            async with client.lease(2):
                raise AssertionError("there is no second env")


async def test_a_server_that_stays_away_loses_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_lease, "GIVE_BACK", 0.2)
    async with serving() as served, Client(served.url, patience=0.3) as client:
        hasten(served, monkeypatch, 0.3)

        async def play() -> None:
            async with client.lease():
                client.http.url = "http://127.0.0.1:1"
                await asyncio.Event().wait()

        with pytest.raises(LeaseOver, match="The lease was lost") as lost:
            await play()
    assert isinstance(lost.value.__cause__, ServerUnreachable)
