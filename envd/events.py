"""The event log: everything that changes is one event, with three sinks: a structured log line, the store, and
followers.

Publishing never waits for a follower. Followers read one shared ring by their own cursor; one that falls so far
behind that the ring has moved on is told of the gap instead of holding anybody up.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import structlog

from .models import Event, Job
from .store import MemoryStore, Store

logger = structlog.get_logger(__name__)

QUIET = frozenset({"position", "probe", "progress"})
"""Kinds that are logged at debug level only: a boot makes hundreds of them."""


class EventLog:
    """Append-only. `ring` events stay at hand for followers that reconnect."""

    def __init__(self, store: Store | None = None, ring: int = 8192) -> None:
        self.epoch = secrets.token_hex(4)
        self._store = store or MemoryStore()
        self._ring: deque[Event] = deque(maxlen=ring)
        self._sequence = 0
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> str:
        return f"{self.epoch}-{self._sequence}"

    @property
    def closed(self) -> bool:
        return self._closed

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
            id=self.last_id,
            kind=kind,
            at=time.time(),
            job_id=job.id if job else None,
            env=job.env if job and env is None else env,
            desktop_id=job.desktop_id if job and desktop_id is None else desktop_id,
            job=job,
            data=data,
        )
        self._ring.append(event)
        self._store.append(event)
        self._log(event)
        self._changed.set()
        self._changed = asyncio.Event()
        return event

    def sequence_of(self, event_id: str | None) -> int | None:
        """The sequence number in one of our own ids; None for an id of another epoch or no id at all."""
        epoch, _, number = (event_id or "").rpartition("-")
        if epoch != self.epoch or not number.isdecimal():
            return None
        return min(int(number), self._sequence)

    def missed(self, after: int) -> bool:
        """Whether events following `after` have already left the ring."""
        oldest = self._sequence - len(self._ring)
        return after < oldest

    def recent(self) -> tuple[Event, ...]:
        """The events in the ring, oldest first."""
        return tuple(self._ring)

    async def follow(self, after: int, idle: float | None = None) -> AsyncIterator[list[Event] | None]:
        """Batches of the events after sequence number `after`, as they come; None after `idle` seconds of silence.

        Ends when the log is closed. A follower that fell behind the ring gets what is left; ask `missed` to know.
        """
        while True:
            changed = self._changed
            batch = self._after(after)
            if batch:
                after = self._sequence
                yield batch
            elif self._closed:
                return
            else:
                try:
                    async with asyncio.timeout(idle):
                        await changed.wait()
                except TimeoutError:
                    yield None

    def close(self) -> None:
        """End every follower once it has read what is there."""
        self._closed = True
        self._changed.set()

    def _after(self, sequence: int) -> list[Event]:
        wanted = min(self._sequence - sequence, len(self._ring))
        return [self._ring[index] for index in range(len(self._ring) - wanted, len(self._ring))] if wanted > 0 else []

    def _log(self, event: Event) -> None:
        facts = {key: value for key in ("job_id", "env", "desktop_id") if (value := getattr(event, key)) is not None}
        if event.kind == "state" and event.job is not None:
            facts |= {"state": str(event.job.state)}
            if event.job.error is not None:
                facts |= {"code": event.job.error.code, "detail": event.job.error.detail}
        write = logger.debug if event.kind in QUIET else logger.info
        message = str(event.data.get("message") or event.kind)
        write(
            message, kind=event.kind, **facts, **{k: v for k, v in event.data.items() if k not in ("message", *facts)}
        )
