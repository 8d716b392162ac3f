"""Where jobs and events are kept. This one keeps them in memory; a journal on disk can stand in its place.

Writes are called from the loop, in order, and return at once; `commit` returns when everything written before it is
as durable as this store makes it. Whoever promises something to a caller awaits `commit` first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from .models import Event, Job


class Store(Protocol):
    def put_job(self, job: Job) -> None:
        """Keep this version of the job in place of the one before."""

    def get_job(self, job_id: str) -> Job | None: ...

    def jobs(self) -> Iterable[Job]:
        """All jobs that are kept, oldest first."""

    def append(self, event: Event) -> None: ...

    def events(self) -> Iterable[Event]:
        """The newest events that are kept, oldest first, without a hole."""

    async def commit(self) -> None: ...


class MemoryStore:
    """Keeps the newest `job_limit` ended jobs (all that have not ended) and the newest `event_limit` events."""

    def __init__(self, job_limit: int = 10_000, event_limit: int = 8192) -> None:
        self._jobs: dict[str, Job] = {}
        self._ended: deque[str] = deque()
        self._job_limit = job_limit
        self._events: deque[Event] = deque(maxlen=event_limit)

    def put_job(self, job: Job) -> None:
        before = self._jobs.get(job.id)
        self._jobs[job.id] = job
        if job.state.terminal and not (before and before.state.terminal):
            self._ended.append(job.id)
            if len(self._ended) > self._job_limit:
                del self._jobs[self._ended.popleft()]

    def get_job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def jobs(self) -> Iterable[Job]:
        return tuple(self._jobs.values())

    def append(self, event: Event) -> None:
        self._events.append(event)

    def events(self) -> Iterable[Event]:
        return tuple(self._events)

    async def commit(self) -> None:
        return None
