"""The journal: everything that must outlive the daemon, in one SQLite file of the state directory.

    async with Journal.open(settings) as journal:
        journal.put(Kind.DESKTOPS, desktop.id, desktop)
        await journal.commit()      # now a kill, or a power cut, changes nothing about it

What is written waits in memory, the newest version of each record alone, and one task carries all that waits to the
disk in one transaction (a group commit): a hundred callers that wait for `commit` wait for the same fsync. A disk that
takes nothing loses nothing: what waits goes on waiting, `trouble` says why, and no new work is taken until it is
written. A file that cannot be read is set aside and a new one begun.

Jobs and the newest events are in memory, too; records are read from the disk when they are asked for. Tables, one per
`Kind`, have a record's id, when it was put (Unix seconds), and the record as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiosqlite
import anyio
import anyio.to_thread
import structlog
from pydantic import ValidationError

from .errors import DiskLow, SettingsError
from .models import Event, Job, Model
from .settings import Settings
from .store import Kind, M, MemoryStore

logger = structlog.get_logger(__name__)

FILE = "journal.db"
RECORD: Final = "(id TEXT PRIMARY KEY, at REAL NOT NULL, document TEXT NOT NULL) STRICT"
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE jobs (id TEXT PRIMARY KEY, at REAL NOT NULL, ended INTEGER NOT NULL, document TEXT NOT NULL) STRICT;
    CREATE TABLE events (sequence INTEGER PRIMARY KEY, document TEXT NOT NULL) STRICT;
    {"".join(f"CREATE TABLE {kind} {RECORD};" for kind in Kind)}
    """,
)
"""Scripts, each from one version of the file to the next; the version is SQLite's user_version."""

AGAIN = 1.0
"""Seconds between two tries to write to a disk that takes nothing."""
LOOKS = 5.0
"""Seconds between two looks at how much room the disk has."""
ROOM = 64 * 1024**2
"""Bytes that must be free on the disk before new work is taken, or a fiftieth of a small one."""
HOUSEKEEPING = 300.0
"""Seconds between two times that what is old is forgotten."""
ANSWERS_KEPT = 24 * 3600.0
"""Seconds for which a call that is sent again is answered as it was: a boot of forty minutes, and a night."""
LAST_WRITES = 5.0
"""Seconds that the end of the daemon waits for what is not written yet."""
CHECKED = 64 * 1024**2
"""Bytes up to which the whole file is checked when it is opened. A larger one shows its holes when it is read."""
EVENTS_KEPT = 8192


@dataclass
class _Batch:
    """What waits for the disk. `number` counts writes over the journal's life."""

    number: int = 0
    jobs: dict[str, Job | None] = field(default_factory=dict)
    records: dict[tuple[Kind, str], Model | None] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def before(self, newer: _Batch) -> _Batch:
        """Both as one; what is newer wins."""
        events = [*self.events, *newer.events][-EVENTS_KEPT:]
        return _Batch(newer.number, self.jobs | newer.jobs, self.records | newer.records, events)


class Journal(MemoryStore):
    """Made by `open`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        super().__init__(job_limit=settings.journal_jobs, event_limit=EVENTS_KEPT)
        self.path = path
        self._settings = settings
        self._database: aiosqlite.Connection
        self._waiting, self._writing = _Batch(), _Batch()
        self._asked = self._done = 0
        self._wanted, self._moved = anyio.Event(), anyio.Event()
        self._low = self._broken = ""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Journal]:
        """What an earlier life left is there when the block begins, and what was written is on disk when it has ended.

        Raises SettingsError for a file of a newer envd, and for a directory that takes no file.
        """
        journal = cls(settings.state_dir / FILE, settings)
        await journal._begin()
        try:
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
                await journal._database.close()

    # -- writing ------------------------------------------------------------------------------------------------

    def put_job(self, job: Job) -> None:
        super().put_job(job)
        self._waiting.jobs[job.id] = job
        self._ask()

    def _forget_job(self, job_id: str) -> None:
        super()._forget_job(job_id)
        self._waiting.jobs[job_id] = None

    def put(self, kind: Kind, record_id: str, record: Model | None) -> None:
        self._waiting.records[kind, record_id] = record
        self._ask()

    def append(self, event: Event) -> None:
        self._events.append(event)
        self._waiting.events.append(event)
        self._ask()
        if self._broken:
            self._tell()

    def _ask(self) -> None:
        self._asked += 1
        self._waiting.number = self._asked
        self._wanted.set()

    @property
    def trouble(self) -> str:
        return self._broken or self._low

    async def commit(self) -> None:
        await self.settle()
        if self._broken:
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
            self._writing, self._waiting = self._waiting, _Batch()
            try:
                await self._write(self._writing)
            except (sqlite3.Error, OSError) as error:
                # Never lost: it waits on, beside what has come meanwhile.
                self._waiting = self._writing.before(self._waiting)
                self._waiting.number = self._asked
                self._writing = _Batch()
                self._fail(str(error))
                await anyio.sleep(AGAIN)
                continue
            number, self._writing = self._writing.number, _Batch()
            if self._broken:
                logger.info("the journal is written again", file=str(self.path))
            self._broken, self._done = "", number
            self._tell()

    def _fail(self, why: str) -> None:
        if not self._broken:
            logger.error("the journal cannot be written", file=str(self.path), error=why)
        self._broken = why
        self._tell()

    def _tell(self) -> None:
        """Whoever waits, and who follows events: in trouble these are as durable as they will be."""
        if self._events:
            pending = [] if self._broken else [*self._writing.events, *self._waiting.events]
            self._told(pending[0].sequence - 1 if pending else self._events[-1].sequence)
        self._moved.set()
        self._moved = anyio.Event()

    async def _write(self, batch: _Batch) -> None:
        database, now = self._database, time.time()
        await database.execute("BEGIN IMMEDIATE")
        try:
            if batch.jobs:
                jobs = [(one, job) for one, job in batch.jobs.items() if job is not None]
                await database.executemany(
                    "INSERT INTO jobs VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET ended = excluded.ended, "
                    "document = excluded.document",
                    ((one, job.created_at, job.state.terminal, _document(job)) for one, job in jobs),
                )
                gone = [(one,) for one, job in batch.jobs.items() if job is None]
                await database.executemany("DELETE FROM jobs WHERE id = ?", gone)
            for kind in {kind for kind, _ in batch.records}:
                mine = [(one, record) for (of, one), record in batch.records.items() if of is kind]
                await database.executemany(
                    f"INSERT OR REPLACE INTO {kind} VALUES (?, ?, ?)",
                    ((one, now, _document(record)) for one, record in mine if record is not None),
                )
                gone = [(one,) for one, record in mine if record is None]
                await database.executemany(f"DELETE FROM {kind} WHERE id = ?", gone)
            await database.executemany(
                "INSERT OR REPLACE INTO events VALUES (?, ?)",
                ((event.sequence, _document(event)) for event in batch.events),
            )
            await database.execute("COMMIT")
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(sqlite3.Error):
                await database.execute("ROLLBACK")
            raise

    # -- reading ------------------------------------------------------------------------------------------------

    async def get(self, kind: Kind, record_id: str, model: type[M]) -> M | None:
        for batch in (self._waiting, self._writing):
            if (kind, record_id) in batch.records:
                waits = batch.records[kind, record_id]
                assert waits is None or isinstance(waits, model)
                return waits
        rows = await self._database.execute_fetchall(f"SELECT id, document FROM {kind} WHERE id = ?", (record_id,))
        return next(_read(model, rows), (None, None))[1]

    async def all(self, kind: Kind, model: type[M], prefix: str = "") -> dict[str, M]:
        await self.settle()
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "\U0010ffff"
        rows = await self._database.execute_fetchall(
            f"SELECT id, document FROM {kind} WHERE id >= ? AND id < ? ORDER BY id",
            (prefix, after),
        )
        return dict(_read(model, rows))

    # -- opening ------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        try:
            await self._load()
        except sqlite3.DatabaseError as error:
            with anyio.CancelScope(shield=True), suppress(AttributeError):
                await self._database.close()
            if _is_of_the_disk(error):
                raise SettingsError(
                    f"The journal {self.path} cannot be used: {error}.",
                    hint="Is there room on its disk, and may this user write there? ENVD_STATE_DIR says where it is.",
                ) from error
            aside = await anyio.to_thread.run_sync(_set_aside, self.path)
            logger.error(
                "the journal cannot be read and was set aside; a new one is begun", file=str(aside), error=str(error)
            )
            await self._load()

    async def _load(self) -> None:
        await anyio.to_thread.run_sync(_make_private, self.path)
        self._database = database = await aiosqlite.connect(self.path, isolation_level=None)
        size = (await anyio.Path(self.path).stat()).st_size
        await database.execute("PRAGMA journal_mode = WAL")
        # Each commit reaches the disk: what was promised outlives a power cut, too.
        await database.execute("PRAGMA synchronous = FULL")
        await database.execute("PRAGMA journal_size_limit = 67108864")
        if 0 < size <= CHECKED:
            [[verdict]] = await database.execute_fetchall("PRAGMA quick_check(1)")
            if verdict != "ok":
                raise sqlite3.DatabaseError(str(verdict))
        await self._migrate()
        self._jobs.clear()
        self._ended.clear()
        self._events.clear()
        jobs = await database.execute_fetchall("SELECT id, document FROM jobs ORDER BY at, id")
        for _, job in await anyio.to_thread.run_sync(lambda: list(_read(Job, jobs))):
            super().put_job(job)
        events = await database.execute_fetchall(
            f"SELECT sequence, document FROM events ORDER BY sequence DESC LIMIT {EVENTS_KEPT}"
        )
        self._events.extend(
            await anyio.to_thread.run_sync(lambda: _without_a_hole(_read(Event, reversed(list(events)))))
        )
        [[epoch]] = await database.execute_fetchall("SELECT max(value) FROM facts WHERE name = 'epoch'")
        last = self._events[-1].id.rpartition("-")[0] if self._events else epoch
        if epoch and last == epoch:
            self.epoch = str(epoch)
        else:
            self._events.clear()
            await database.execute("DELETE FROM events")
            await database.execute("INSERT OR REPLACE INTO facts VALUES ('epoch', ?)", (self.epoch,))

    async def _migrate(self) -> None:
        """Raises SettingsError for a file of a newer envd."""
        database = self._database
        [[version]] = await database.execute_fetchall("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise SettingsError(
                f"The journal {self.path} is of a newer envd: it has version {version}, and this one knows "
                f"{len(MIGRATIONS)}.",
                hint="Run that one, or give this one an ENVD_STATE_DIR of its own.",
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            await database.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")

    # -- keeping house ------------------------------------------------------------------------------------------

    async def _look_at_the_disk(self) -> None:
        while True:
            try:
                usage = await anyio.to_thread.run_sync(shutil.disk_usage, self.path.parent)
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
        """By age; then, while the file is larger than it may be, the older half of what ages."""
        database, now = self._database, time.time()
        ages = [kind for kind in Kind if kind.ages]
        oldest = now - self._settings.journal_days * 86_400
        for job in [job for job in self._jobs.values() if job.ended_at is not None and job.ended_at < oldest]:
            # It is the first of those that have ended, or nearly: they end in about the order in which they began.
            self._ended.remove(job.id)
            self._forget_job(job.id)
            self._ask()
        for kind in ages:
            limit = oldest if kind is Kind.VERDICTS else now - ANSWERS_KEPT
            await database.execute(f"DELETE FROM {kind} WHERE at < ?", (limit,))
        if self._events:
            await database.execute("DELETE FROM events WHERE sequence < ?", (self._events[0].sequence,))
        while await self._size() > self._settings.journal_limit:
            before = await self._size()
            for kind in ages:
                await database.execute(f"DELETE FROM {kind} WHERE at <= (SELECT avg(at) FROM {kind})")
            logger.warning("the journal is larger than ENVD_JOURNAL_LIMIT; old answers are forgotten", bytes=before)
            if await self._size() >= before:
                break

    async def _size(self) -> int:
        """Bytes in use, in the file."""
        [[pages]] = await self._database.execute_fetchall("PRAGMA page_count")
        [[free]] = await self._database.execute_fetchall("PRAGMA freelist_count")
        [[size]] = await self._database.execute_fetchall("PRAGMA page_size")
        return int((pages - free) * size)


def _read(model: type[M], rows: Iterable[Any]) -> Iterator[tuple[str, M]]:
    """Of rows of id and document, what can be read; what cannot is told and passed over."""
    for record_id, document in rows:
        try:
            yield str(record_id), model.model_validate_json(document)
        except ValidationError as error:
            logger.warning("a record of the journal cannot be read", record=record_id, error=str(error)[:500])


def _document(record: Model) -> str:
    """Whatever a guest said: half a character, which is no JSON, must not keep all others from the disk."""
    try:
        return record.encoded.decode() if isinstance(record, Event) else record.model_dump_json()
    except ValueError:
        told = json.dumps(record.model_dump(), default=str, ensure_ascii=False)
        return told.encode(errors="replace").decode()


def _without_a_hole(rows: Iterable[tuple[str, Event]]) -> list[Event]:
    """The newest of them, back to the first that is missing."""
    kept: list[Event] = []
    for _, event in rows:
        if kept and event.sequence != kept[-1].sequence + 1:
            kept.clear()
        kept.append(event)
    return kept


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _is_of_the_disk(error: sqlite3.DatabaseError) -> bool:
    """Whether the disk is at fault, and not what the file holds."""
    codes = (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
    )
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in codes


def _set_aside(path: Path) -> Path:
    """With what SQLite keeps beside it. Under a name that says when."""
    aside = path.with_name(
        f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.monotonic_ns() % 1000}"
    )
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
