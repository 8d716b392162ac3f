"""The event log: everything that changes is one event, with three sinks: a structured log line, the store, and
followers; and listeners, which count and trace what they hear.

Publishing never waits for a follower. Followers read one shared ring by their own cursor; one that falls so far
behind that the ring has moved on is told of the gap instead of holding anybody up.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import structlog

from .models import Event, Job
from .store import MemoryStore, Store

logger = structlog.get_logger(__name__)

QUIET = frozenset({"position", "probe"})
"""Kinds that are logged at debug level only: a boot makes hundreds of them."""


class EventLog:
    """Append-only. `ring` events stay at hand for followers that reconnect."""

    def __init__(self, store: Store | None = None, ring: int = 8192) -> None:
        self._store = store or MemoryStore()
        self.epoch = self._store.epoch
        self._ring: deque[Event] = deque(self._store.events(), maxlen=ring)
        self._sequence = self._lasting = self._ring[-1].sequence if self._ring else 0
        self._changed = asyncio.Event()
        self._closed = False
        self._listeners: list[Callable[[Event], None]] = []
        self._store.on_lasting(self._is_lasting)

    @property
    def last(self) -> int:
        """The sequence number of the newest event that is shown to followers: one that the next life of the daemon will
        have, too. 0 before the first."""
        return self._lasting

    @property
    def last_id(self) -> str:
        return f"{self.epoch}-{self._lasting}"

    @property
    def closed(self) -> bool:
        return self._closed

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have `listener` called with each event as it is published, where and when that is done. It must not block;
        what it raises is logged."""
        self._listeners.append(listener)

    def publish(
        self,
        kind: str,
        *,
        job: Job | None = None,
        env: int | None = None,
        desktop_id: str | None = None,
        **data: Any,
    ) -> Event:
        """Append an event and wake the followers. `data` must be JSON values."""
        self._sequence += 1
        event = Event(
            id=f"{self.epoch}-{self._sequence}",
            kind=kind,
            at=time.time(),
            job_id=job.id if job else None,
            env=job.env if job and env is None else env,
            desktop_id=job.desktop_id if job and desktop_id is None else desktop_id,
            job=job,
            data=data,
            request_id=structlog.contextvars.get_contextvars().get("request_id"),
        )
        self._ring.append(event)
        self._log(event)
        self._store.append(event)
        self._tell(event)
        return event

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                # What is only counted may not break what changes.
                logger.exception("an event could not be counted", kind=event.kind)

    def _is_lasting(self, sequence: int) -> None:
        # Never back: what was shown while the store was in trouble stays shown.
        self._lasting = max(self._lasting, sequence)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def sequence_of(self, event_id: str | None) -> int | None:
        """The sequence number in one of our own ids; None for one that we never gave out, or none at all."""
        epoch, _, number = (event_id or "").rpartition("-")
        if epoch != self.epoch or re.fullmatch("[0-9]{1,18}", number) is None:
            return None
        sequence = int(number)
        return sequence if sequence <= self._lasting else None

    def missed(self, after: int) -> bool:
        """Whether events following `after` have already left the ring."""
        oldest = self._sequence - len(self._ring)
        return after < oldest

    def recent(self) -> tuple[Event, ...]:
        """The events in the ring, oldest first."""
        return tuple(self._ring)

    async def follow(
        self, after: int, idle: float | None = None, wanted: Callable[[Event], bool] = lambda event: True
    ) -> AsyncGenerator[list[Event] | None, None]:
        """Batches of the wanted events after sequence number `after`, as they come; None after `idle` seconds without
        any.

        Ends when the log is closed, and when the ring has moved on past a follower that was slow: what it missed is
        gone, so it must look at the state of things and follow anew.
        """
        spoke = time.monotonic()
        while not self.missed(after):
            changed = self._changed
            batch = [event for event in self._after(after) if wanted(event)]
            after = max(after, self._lasting)
            if batch:
                yield batch
                spoke = time.monotonic()
            elif self._closed and self._lasting >= self._sequence:
                return
            else:
                try:
                    async with asyncio.timeout(None if idle is None else spoke + idle - time.monotonic()):
                        await changed.wait()
                except TimeoutError:
                    yield None
                    spoke = time.monotonic()

    def close(self) -> None:
        """End every follower once it has read what is there."""
        self._closed = True
        self._wake()

    def _after(self, sequence: int) -> list[Event]:
        """Up to the last that lasts."""
        end = len(self._ring) - (self._sequence - self._lasting)
        wanted = min(self._lasting - sequence, end)
        return [self._ring[index] for index in range(end - wanted, end)] if wanted > 0 else []

    def _log(self, event: Event) -> None:
        facts = {key: value for key in ("job_id", "env", "desktop_id") if (value := getattr(event, key)) is not None}
        if event.job is not None and event.job.episode_id is not None:
            facts |= {"episode_id": event.job.episode_id}
        if event.kind == "state" and event.job is not None:
            facts |= {"state": str(event.job.state)}
            if event.job.error is not None:
                facts |= {"code": event.job.error.code, "detail": event.job.error.detail}
        write = logger.debug if event.kind in QUIET else logger.warning if _is_trouble(event) else logger.info
        rest = {key: value for key, value in event.data.items() if key not in ("message", *facts)}
        write(_sentence(event), kind=event.kind, **facts, **rest)


def _sentence(event: Event) -> str:
    if event.kind == "state" and event.job is not None:
        return f"{event.job.kind} {event.job.state}"
    if event.kind == "phase":
        return f"phase {event.data.get('phase')}"
    return str(event.data.get("message") or event.kind)


def _is_trouble(event: Event) -> bool:
    """Whether somebody who reads only warnings should see it: a failed job, a lost desktop, a prediction that does not
    parse, a set-up step that failed or whose failure was passed over, a verdict without a score."""
    failed = event.kind == "state" and event.job is not None and event.job.error is not None
    data = event.data
    step = (data.get("record") or {}).get("outcome") if event.kind == "setup" else None
    unscored = event.kind == "verdict" and data.get("mask")
    lost = data.get("state") == "lost"
    return failed or lost or bool(step not in (None, "ok") or unscored or data.get("problem") or data.get("warnings"))
