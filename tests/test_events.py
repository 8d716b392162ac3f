"""The event log: order, followers, silence, the end, and followers that are too slow."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest

from envd.events import EventLog
from envd.models import Event, Job, JobState
from envd.store import MemoryStore


def job(**facts: Any) -> Job:
    return Job(**({"id": "job-1", "env": 3, "created_at": 0.0} | facts))


async def take(log: EventLog, count: int, after: int = 0, **how: Any) -> list[str]:
    """The kinds of the first `count` events after `after`."""
    kinds: list[str] = []
    async with asyncio.timeout(5), aclosing(log.follow(after, **how)) as batches:
        async for batch in batches:
            kinds += [event.kind for event in batch or ()]
            if len(kinds) >= count:
                break
    return kinds


async def test_events_carry_the_facts_of_their_job_and_ids_that_count_up() -> None:
    log = EventLog()
    first, second = log.publish("state", job=job(desktop_id="d-1")), log.publish("note", env=1, message="hello")
    assert (first.id, second.id) == (f"{log.epoch}-1", f"{log.epoch}-2")
    assert (first.job_id, first.env, first.desktop_id) == ("job-1", 3, "d-1")
    assert (second.job_id, second.env, second.data) == (None, 1, {"message": "hello"})
    assert (log.last, log.last_id) == (2, second.id)


async def test_every_event_reaches_the_store_in_order() -> None:
    store = MemoryStore()
    log = EventLog(store)
    published = [log.publish("note", message=str(number)) for number in range(3)]
    assert list(store.events()) == published


async def test_a_follower_reads_what_was_there_and_what_comes() -> None:
    log = EventLog()
    log.publish("a")
    log.publish("b")
    reading = asyncio.create_task(take(log, 3, after=1))
    await asyncio.sleep(0)
    log.publish("c")
    log.publish("d")
    assert await reading == ["b", "c", "d"]


async def test_a_follower_gets_only_the_events_it_wants() -> None:
    log = EventLog()
    reading = asyncio.create_task(take(log, 2, wanted=lambda event: event.kind == "wanted"))
    for kind in ("wanted", "other", "wanted", "other"):
        log.publish(kind)
        await asyncio.sleep(0)
    assert await reading == ["wanted", "wanted"]


async def test_silence_is_told_of() -> None:
    log = EventLog()
    began = time.monotonic()
    async with asyncio.timeout(5), aclosing(log.follow(0, idle=0.05)) as batches:
        assert await anext(batches) is None
        assert await anext(batches) is None
    assert 0.1 <= time.monotonic() - began < 2


async def test_events_that_a_follower_does_not_want_do_not_break_its_silence() -> None:
    """Else the stream of a job that waits would be silent for as long as other jobs are busy."""
    log = EventLog()

    async def chatter() -> None:
        while True:
            log.publish("other")
            await asyncio.sleep(0.01)

    busy = asyncio.create_task(chatter())
    async with asyncio.timeout(5), aclosing(log.follow(0, idle=0.1, wanted=lambda event: False)) as batches:
        assert await anext(batches) is None
        assert await anext(batches) is None
    busy.cancel()


async def test_closing_the_log_ends_followers_after_they_have_read_what_is_there() -> None:
    log = EventLog()
    log.publish("last")
    batches = log.follow(0)
    log.close()
    assert [[event.kind for event in batch or ()] async for batch in batches] == [["last"]]
    assert log.closed


async def test_closing_the_log_wakes_a_follower_that_waits() -> None:
    log = EventLog()
    waiting = asyncio.create_task(anext(log.follow(0), "ended"))
    await asyncio.sleep(0)
    log.close()
    async with asyncio.timeout(5):
        assert await waiting == "ended"


async def test_a_follower_that_fell_behind_the_ring_is_ended_and_can_tell() -> None:
    log = EventLog(ring=4)
    async with asyncio.timeout(5), aclosing(log.follow(0)) as batches:
        log.publish("seen")
        assert await anext(batches) == list(log.recent())
        for _ in range(5):
            log.publish("too much")
        assert await anext(batches, "ended") == "ended"
    assert log.missed(1)
    assert not log.closed


@pytest.mark.parametrize(("after", "missed"), [(0, True), (5, True), (6, False), (10, False)])
async def test_missed_says_whether_the_ring_still_has_what_followed(after: int, missed: bool) -> None:
    log = EventLog(ring=4)
    for number in range(10):
        log.publish(str(number))
    assert log.missed(after) is missed
    assert [event.kind for event in log.recent()] == ["6", "7", "8", "9"]


@pytest.mark.parametrize(
    ("form", "sequence"),
    [
        pytest.param("{epoch}-1", 1, id="ours"),
        pytest.param("{epoch}-0", 0, id="before the first"),
        pytest.param("{epoch}-2", 2, id="the newest"),
        pytest.param("{epoch}-3", None, id="not given out yet"),
        pytest.param("{epoch}-" + "9" * 5000, None, id="more digits than Python converts"),
        pytest.param("{epoch}--1", None, id="negative"),
        pytest.param("{epoch}-١", None, id="digits of another script"),
        pytest.param("{epoch}-1e0", None, id="no whole number"),
        pytest.param("{epoch}", None, id="no number"),
        pytest.param("00000000-1", None, id="another epoch"),
        pytest.param("", None, id="empty"),
        pytest.param("-", None, id="dash"),
    ],
)
async def test_only_ids_that_were_given_out_have_a_sequence(form: str, sequence: int | None) -> None:
    log = EventLog()
    log.publish("a")
    log.publish("b")
    assert log.sequence_of(form.format(epoch=log.epoch)) == sequence
    assert log.sequence_of(None) is None


async def test_publishing_never_waits_for_followers() -> None:
    log = EventLog(ring=64)
    async with aclosing(log.follow(0)) as slow:
        log.publish("first")
        await anext(slow)
        began = time.monotonic()
        for _ in range(2000):
            log.publish("progress")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("state", list(JobState))
def test_an_event_is_terminal_when_its_job_has_ended(state: JobState) -> None:
    def event(kind: str) -> Event:
        return Event(id="e-1", kind=kind, at=0.0, job=job(state=state))

    ended = state not in (JobState.QUEUED, JobState.BOOTING, JobState.SETTING_UP)
    assert (event("state").terminal, event("note").terminal) == (ended, False)


async def test_what_was_shown_stays_shown() -> None:
    """A store that was in trouble, and is not any more, knows of less than it had told."""
    store = MemoryStore()
    log = EventLog(store)
    for _ in range(3):
        log.publish("note")
    store._told(1)
    assert (log.last, log.sequence_of(f"{log.epoch}-3")) == (3, 3)
