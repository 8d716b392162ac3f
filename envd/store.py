"""What is kept of jobs, desktops, episodes and events: the promise (`Store`), and a store that keeps it in memory.
The one on disk is `journal.py`.

Writes are called from the loop, in order, and return at once; `commit` returns when everything written before it is
as durable as this store makes it. Whoever promises something to a caller awaits `commit` first.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Protocol, TypeVar

from .models import Event, Job, Model

M = TypeVar("M", bound=Model)


class Kind(StrEnum):
    """What records are of, beside jobs and events. Those that `ages` are forgotten by themselves, the others are taken
    away by who put them."""

    REQUESTS = "requests"  # by job: what it was asked for, until it has ended
    DESKTOPS = "desktops"  # from before it is created until it is confirmed gone
    EPISODES = "episodes"  # by env: the one that it has
    PLAYS = "plays"  # by episode: what its verdict will need
    STEPS = "steps"  # by episode and number: what was said, and what came of it
    VERDICTS = "verdicts"  # by episode
    ANSWERS = "answers"  # by idempotency key: what a call was, and where its answer is
    LEASES = "leases"

    @property
    def ages(self) -> bool:
        return self in (Kind.STEPS, Kind.VERDICTS, Kind.ANSWERS)


class Store(Protocol):
    epoch: str
    """Of event ids: new when the sequence starts again."""

    @property
    def trouble(self) -> str:
        """Why what is written now may not last; empty when it will. Then no new work is taken."""

    def put_job(self, job: Job) -> None:
        """Keep this version of the job in place of the one before."""

    def get_job(self, job_id: str) -> Job | None: ...

    def jobs(self) -> Iterable[Job]:
        """All jobs that are kept, oldest first."""

    def put(self, kind: Kind, record_id: str, record: Model | None) -> None:
        """Keep `record` in place of the one before; None forgets it."""

    async def get(self, kind: Kind, record_id: str, model: type[M]) -> M | None: ...

    async def all(self, kind: Kind, model: type[M], prefix: str = "") -> dict[str, M]:
        """By id, in the order of ids, those that begin with `prefix`."""

    def append(self, event: Event) -> None: ...

    def events(self) -> Iterable[Event]:
        """The newest events that are kept, oldest first, without a hole."""

    def on_lasting(self, told: Callable[[int], None]) -> None:
        """Have `told` called with the number of events, counted over all lives, that are as durable as they will be."""

    async def commit(self) -> None:
        """Raises DiskLow when what was written does not last, and is not known to before long."""

    async def settle(self) -> None:
        """As `commit`, and returns also when there is trouble."""


class MemoryStore:
    """Keeps the newest `job_limit` ended jobs (all that have not ended), of each kind of record that ages as many, and
    the newest `event_limit` events."""

    def __init__(self, job_limit: int = 10_000, event_limit: int = 8192) -> None:
        self.epoch = secrets.token_hex(4)
        self._jobs: dict[str, Job] = {}
        self._ended: deque[str] = deque()
        self._job_limit = job_limit
        self._events: deque[Event] = deque(maxlen=event_limit)
        self._records: dict[Kind, OrderedDict[str, Model]] = {kind: OrderedDict() for kind in Kind}
        self._told: Callable[[int], None] = lambda sequence: None

    @property
    def trouble(self) -> str:
        return ""

    def put_job(self, job: Job) -> None:
        before = self._jobs.get(job.id)
        self._jobs[job.id] = job
        if job.state.terminal and not (before and before.state.terminal):
            self._ended.append(job.id)
            if len(self._ended) > self._job_limit:
                self._forget_job(self._ended.popleft())

    def _forget_job(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)

    def get_job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def jobs(self) -> Iterable[Job]:
        return tuple(self._jobs.values())

    def put(self, kind: Kind, record_id: str, record: Model | None) -> None:
        records = self._records[kind]
        records.pop(record_id, None)
        if record is not None:
            records[record_id] = record
            if kind.ages and len(records) > self._job_limit:
                records.popitem(last=False)

    async def get(self, kind: Kind, record_id: str, model: type[M]) -> M | None:
        found = self._records[kind].get(record_id)
        assert found is None or isinstance(found, model)
        return found

    async def all(self, kind: Kind, model: type[M], prefix: str = "") -> dict[str, M]:
        found = {one: self._records[kind][one] for one in sorted(self._records[kind]) if one.startswith(prefix)}
        return {record_id: record for record_id, record in found.items() if isinstance(record, model)}

    def append(self, event: Event) -> None:
        self._events.append(event)
        self._told(event.sequence)

    def events(self) -> Iterable[Event]:
        return tuple(self._events)

    def on_lasting(self, told: Callable[[int], None]) -> None:
        self._told = told

    async def commit(self) -> None:
        return None

    async def settle(self) -> None:
        return None
