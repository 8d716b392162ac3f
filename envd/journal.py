"""The journal: everything that must outlive the daemon, in one SQLite file of the state directory.

    async with Journal.open(settings) as journal:
        journal.put(Kind.DESKTOPS, desktop.id, desktop)
        await journal.commit()      # now a kill, or a power cut, changes nothing about it

What is written waits in memory, the newest version of each record alone, and one task carries all that waits to the
disk in one transaction (a group commit): a hundred callers that wait for `commit` wait for the same fsync. A disk that
takes nothing loses nothing: what waits goes on waiting, `trouble` says why, and no new work is taken until it is
written. A file that cannot be read is set aside and a new one begun.

Jobs and the newest events are in memory, too; records are read from the disk when they are asked for.

The file grows to ENVD_JOURNAL_LIMIT, and what is forgotten beyond makes it shrink: by a few pages at a time
(incremental vacuum), never by a VACUUM, which would take as much room again and hold everybody up. SQLite's log beside
it stays below 8 MB, unless another program reads the file for long.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from collections import ChainMap, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
import structlog

from .errors import DiskLow
from .journal_file import EVENTS_KEPT, Batch, JournalFile, Kept, key
from .models import Event, Job, Model
from .settings import Settings
from .store import Kind, M, MemoryStore

T = TypeVar("T")

logger = structlog.get_logger(__name__)

FILE = "journal.db"
AGAIN = 1.0
"""Seconds between two tries to write to a disk that takes nothing."""
LOOKS = 5.0
"""Seconds between two looks at how much room the disk has."""
ROOM = 64 * 1024**2
"""Bytes that must be free on the disk before new work is taken, or a fiftieth of a small one."""
HOUSEKEEPING = 300.0
"""Seconds between two times that what is old is forgotten."""
PAUSE = 0.05
"""Seconds between two slices of that, for those who write."""
ANSWERS_KEPT = 24 * 3600.0
"""Seconds for which a call that is sent again is answered as it was: a boot of forty minutes, and a night."""
LAST_WRITES = 5.0
"""Seconds that the end of the daemon waits for what is not written yet."""


class Journal(MemoryStore):
    """Made by `open`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(job_limit=settings.journal_jobs, event_limit=EVENTS_KEPT)
        self.path = settings.state_dir / FILE
        self._settings = settings
        self._file = JournalFile(self.path)
        # Of its own: each call to it is whole, whoever stops waiting for it, and they come one after another.
        self._thread = ThreadPoolExecutor(1, "journal")
        self._waiting, self._writing = Batch(), Batch()
        self._asked = self._done = 0
        self._wanted, self._moved = anyio.Event(), anyio.Event()
        self._low = self._broken = ""
        self._doubtful = False

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Journal]:
        """What an earlier life left is there when the block begins, and what was written is on disk when it has ended.

        Raises SettingsError for a file of a newer envd, and for a directory that takes no file.
        """
        journal = cls(settings)
        try:
            journal._take_up(await journal._do(journal._file.open, journal.epoch))
            # By hand: as a `with` it would hand on the block's own exceptions in a group.
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            tasks.start_soon(journal._run)
            tasks.start_soon(journal._look_at_the_disk)
            tasks.start_soon(journal._keep_house)
            try:
                yield journal
            finally:
                with anyio.move_on_after(LAST_WRITES, shield=True):
                    await journal.settle()
                tasks.cancel_scope.cancel()
                await tasks.__aexit__(None, None, None)
        finally:
            with anyio.CancelScope(shield=True):
                await journal._end()

    def _take_up(self, kept: Kept) -> None:
        self.epoch = kept.epoch
        self._jobs = {job.id: job for job in kept.jobs}
        self._events.extend(kept.events)
        ended = [job for job in kept.jobs if job.state.terminal]
        self._ended.extend(job.id for job in sorted(ended, key=lambda job: job.ended_at or job.created_at))
        # The limit may be smaller than it was.
        while len(self._ended) > self._job_limit:
            self._forget_job(self._ended.popleft())

    async def _end(self) -> None:
        """One last try, also on a disk that took nothing before."""
        try:
            for _ in range(2):
                if self._done < self._asked:
                    await self._write()
            if self._done < self._asked:
                logger.error(
                    "what was written last is not in the journal",
                    file=str(self.path),
                    error=self._broken,
                    jobs=sorted(self._waiting.jobs),
                    records=[f"{kind}/{one}" for kind, one in self._waiting.records],
                    events=len(self._waiting.events),
                )
        finally:
            closing = self._thread.submit(self._file.close)
            self._thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(closing))

    async def _do(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments))

    # -- writing ------------------------------------------------------------------------------------------------

    def put_job(self, job: Job) -> None:
        super().put_job(job)
        self._waiting.jobs[job.id] = job
        self._ask()

    def _forget_job(self, job_id: str) -> None:
        super()._forget_job(job_id)
        self._waiting.jobs[job_id] = None
        self._ask()

    def put(self, kind: Kind, record_id: str, record: Model | None) -> None:
        self._waiting.records[kind, key(record_id)] = record
        self._ask()

    def append(self, event: Event) -> None:
        self._events.append(event)
        self._waiting.events.append(event)
        self._ask()
        if self._broken:
            self._tell()

    def _ask(self) -> None:
        self._asked += 1
        self._wanted.set()

    @property
    def trouble(self) -> str:
        return self._broken or self._low

    async def commit(self) -> None:
        asked = self._asked
        await self.settle()
        if self._done < asked:
            raise DiskLow(
                f"The journal {self.path} cannot be written: {self._broken}.",
                hint="Make room on its disk. What runs goes on; new work is taken once the journal is written again.",
                retry_after=30,
            )

    async def settle(self) -> None:
        asked = self._asked
        while self._done < asked and not self._broken:
            await self._moved.wait()

    async def _run(self) -> None:
        while True:
            while self._done == self._asked:
                self._wanted = anyio.Event()
                await self._wanted.wait()
            await self._write()
            if self._broken:
                await anyio.sleep(AGAIN)

    async def _write(self) -> None:
        """All that waits. What cannot be written waits on, beside what has come meanwhile."""
        asked, self._writing, self._waiting = self._asked, self._waiting, Batch()
        try:
            # Whole: an end of the daemon in the middle of it must not leave us in doubt.
            with anyio.CancelScope(shield=True):
                await self._do(self._file.write, self._writing)
        except Exception as error:  # noqa: BLE001 - whatever it was, it may not end the daemon, or lose what waits
            if not self._doubtful:
                # Before anything is shown that may never be written.
                await self._doubt(True)
            self._waiting, self._writing = self._writing.before(self._waiting), Batch()
            self._fail(error)
            return
        again, self._writing = bool(self._broken), Batch()
        self._broken, self._done = "", asked
        self._tell()
        if again:
            logger.info("the journal is written again", file=str(self.path))
            # What came meanwhile was shown, too, and waits for one more batch.
            self._ask()
        elif self._doubtful:
            await self._doubt(False)

    async def _doubt(self, doubtful: bool) -> None:
        """Whether events were shown that are not in the file."""
        with anyio.CancelScope(shield=True):
            await self._do(self._file.is_whole, not doubtful)
        self._doubtful = doubtful

    def _fail(self, error: Exception) -> None:
        if not self._broken:
            known = isinstance(error, sqlite3.Error | OSError)
            logger.error(
                "the journal cannot be written",
                file=str(self.path),
                error=str(error),
                exc_info=None if known else error,
            )
        self._broken = str(error) or type(error).__name__
        self._tell()

    def _tell(self) -> None:
        """Whoever waits, and who follows events: in trouble these are as durable as they will be."""
        if self._events:
            waits = None if self._broken else next(iter(self._writing.events or self._waiting.events), None)
            self._told(waits.sequence - 1 if waits else self._events[-1].sequence)
        self._moved.set()
        self._moved = anyio.Event()

    # -- reading ------------------------------------------------------------------------------------------------

    async def get(self, kind: Kind, record_id: str, model: type[M]) -> M | None:
        record_id = key(record_id)
        if (kind, record_id) not in self._unwritten:
            found = await self._do(self._file.get, kind, record_id, model)
            if (kind, record_id) not in self._unwritten:
                return found
        waits = self._unwritten[kind, record_id]
        assert waits is None or isinstance(waits, model)
        return waits

    async def all(self, kind: Kind, model: type[M], prefix: str = "") -> dict[str, M]:
        found: dict[str, M] = await self._do(self._file.all, kind, model, key(prefix))
        # No write can have come between: answers of the thread arrive in the order of its calls, and a batch counts as
        # unwritten until its own has.
        for (of, record_id), record in self._unwritten.items():
            if of is kind and record_id.startswith(key(prefix)):
                found.pop(record_id, None)
                if isinstance(record, model):
                    found[record_id] = record
        return dict(sorted(found.items()))

    @property
    def _unwritten(self) -> ChainMap[tuple[Kind, str], Model | None]:
        return ChainMap(self._waiting.records, self._writing.records)

    # -- keeping house ------------------------------------------------------------------------------------------

    async def _look_at_the_disk(self) -> None:
        while True:
            try:
                # A disk that hangs does not hold up our end.
                usage = await anyio.to_thread.run_sync(shutil.disk_usage, self.path.parent, abandon_on_cancel=True)
                needed = min(ROOM, usage.total // 50)
                low = usage.free < needed
                why = (
                    f"{usage.free / 1024**2:.1f} MB are free on the disk of {self.path.parent}, "
                    f"{needed / 1024**2:.1f} are needed"
                )
            except OSError as error:
                low, why = True, f"the disk of {self.path.parent} cannot be looked at: {error.strerror}"
            if low and not self._low:
                logger.error("no new work is taken", reason=why)
            self._low = why if low else ""
            await anyio.sleep(LOOKS)

    async def _keep_house(self) -> None:
        while True:
            try:
                await self._forget_what_is_old()
            except (sqlite3.Error, OSError) as error:
                logger.warning("the journal cannot be cleared", file=str(self.path), error=str(error))
            await anyio.sleep(HOUSEKEEPING)

    async def _forget_what_is_old(self) -> None:
        """By age; then, while more is in the file than may be, the oldest of what ages. Room that is left over goes
        back to the disk."""
        now, limit = time.time(), self._settings.journal_limit
        oldest = now - self._settings.journal_days * 86_400
        old = {job.id for job in self._jobs.values() if job.ended_at is not None and job.ended_at < oldest}
        self._ended = deque(job_id for job_id in self._ended if job_id not in old)
        for job_id in old:
            self._forget_job(job_id)
        for kind in Kind:
            if kind.ages:
                await self._in_slices(self._file.forget, kind, oldest if kind is Kind.VERDICTS else now - ANSWERS_KEPT)
        if await self._do(self._file.size) > limit:
            logger.warning("the journal is larger than ENVD_JOURNAL_LIMIT; old answers are forgotten", limit=limit)
            await self._in_slices(self._file.shrink, limit)
        await self._in_slices(self._file.give_back)

    async def _in_slices(self, work: Callable[..., bool], *arguments: object) -> None:
        goes_on = True
        while goes_on:
            goes_on = await self._do(work, *arguments)
            await anyio.sleep(PAUSE)
