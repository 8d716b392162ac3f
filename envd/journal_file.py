"""The journal's file: its tables, what is written to them in one transaction, and what is read back. All of it blocks,
and runs in the journal's own thread, one call after another. What a journal promises is told in journal.py.

A table per `Kind`, one for jobs: a record's id, when it was put (Unix seconds), the record as JSON, and a checksum of
both, since a disk that loses a bit makes no error of it.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import structlog

from .errors import SettingsError
from .models import Event, Job, Model
from .store import Kind, M

logger = structlog.get_logger(__name__)

EVENTS_KEPT = 8192
RECORD: Final = "(id TEXT PRIMARY KEY, at REAL NOT NULL, document TEXT NOT NULL, sum INTEGER NOT NULL) STRICT"
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE events (sequence INTEGER PRIMARY KEY, document TEXT NOT NULL, sum INTEGER NOT NULL) STRICT;
    CREATE TABLE jobs {RECORD};
    {"".join(f"CREATE TABLE {kind} {RECORD};" for kind in Kind)}
    {"".join(f"CREATE INDEX {kind}_by_age ON {kind} (at);" for kind in Kind if kind.ages)}
    """,
)
"""Scripts, each from one version of the file to the next; the version is SQLite's user_version."""

SMALLEST = 512
"""Bytes of SQLite's smallest page: what is shorter it takes for empty."""
LOCKED = 5.0
"""Seconds that a write waits for another program that writes to the file."""
WAL_KEPT = 8 * 1024**2
"""Bytes that SQLite's own log beside the file keeps on the disk, once what it held is in the file."""
FREE_KEPT = 16 * 1024**2
"""Bytes in the file that are kept free for what comes. What is free beyond is given back to the disk."""
SLICE = 0.05
"""Seconds for which clearing holds up those who write."""


def _new_deque() -> deque[Event]:
    return deque(maxlen=EVENTS_KEPT)


@dataclass
class Batch:
    """What waits for the disk, the newest version of each; None is to be forgotten."""

    jobs: dict[str, Job | None] = field(default_factory=dict)
    records: dict[tuple[Kind, str], Model | None] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=_new_deque)

    def before(self, newer: Batch) -> Batch:
        """Both as one; what is newer wins."""
        return Batch(
            self.jobs | newer.jobs,
            self.records | newer.records,
            deque((*self.events, *newer.events), maxlen=EVENTS_KEPT),
        )


@dataclass(frozen=True)
class Kept:
    """What an earlier life left: jobs in the order in which they came, the newest events without a hole."""

    epoch: str
    jobs: list[Job]
    events: list[Event]


class JournalFile:
    """`open` comes first. Errors of the disk come out as sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = path.with_name(f"{path.name}-whole")
        self._database: sqlite3.Connection

    # -- opening ------------------------------------------------------------------------------------------------

    def open(self, new_epoch: str) -> Kept:
        """A file that holds no journal is set aside, and a new one begun; `new_epoch` is for that, too.

        Raises SettingsError for a file of a newer envd, and for a place where none can be read or written.
        """
        try:
            try:
                return self._open(new_epoch)
            except sqlite3.Error as error:
                self.close()
                if not _is_of_the_content(error):
                    raise
                aside = _set_aside(self.path)
                logger.error(
                    "the journal cannot be read and was set aside; a new one is begun",
                    file=str(aside),
                    error=str(error),
                )
                return self._open(new_epoch)
        except (sqlite3.Error, OSError) as error:
            raise SettingsError(
                f"The journal {self.path} cannot be used: {error}.",
                hint="Is there room on its disk, may this user write there, and does no other program hold it? "
                "ENVD_STATE_DIR says where it is.",
            ) from error

    def _open(self, new_epoch: str) -> Kept:
        fresh = _make_private(self.path)
        self._database = sqlite3.connect(self.path, timeout=LOCKED, isolation_level=None, check_same_thread=False)
        # Bytes: text that is none shows when it is read, and spoils no other row.
        self._database.text_factory = bytes
        version = self._fetch("PRAGMA user_version")[0][0]
        if version > len(MIGRATIONS):
            raise SettingsError(
                f"The journal {self.path} is of a newer envd: it has version {version}, and this one knows "
                f"{len(MIGRATIONS)}.",
                hint="Run that one, or give this one an ENVD_STATE_DIR of its own.",
            )
        if fresh:
            # Before anything else is written, or it is not heeded.
            self._fetch("PRAGMA auto_vacuum = INCREMENTAL")
        self._fetch("PRAGMA journal_mode = WAL")
        # Each commit reaches the disk: what was promised outlives a power cut, too.
        self._fetch("PRAGMA synchronous = FULL")
        self._fetch(f"PRAGMA journal_size_limit = {WAL_KEPT}")
        # Three seconds for a GB in memory: a hole that shows later would show at each start of the daemon.
        if not fresh and (verdict := self._fetch("PRAGMA integrity_check(1)")[0][0]) != b"ok":
            raise sqlite3.DatabaseError(str(verdict, errors="replace"))
        self._migrate(version)
        return self._load(new_epoch)

    def _migrate(self, version: int) -> None:
        """Each script whole or not at all."""
        if version < 0:
            raise sqlite3.DatabaseError(f"no envd has a version {version}")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            try:
                self._database.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
            except sqlite3.Error as error:
                # Not to be set aside: it is well, and this envd is not.
                if version and _is_of_the_content(error):
                    raise SettingsError(
                        f"The journal {self.path} cannot be brought from version {number - 1} to {number}: {error}.",
                        hint="It is as it was. Run the envd that wrote it, and tell us.",
                    ) from error
                raise

    def _load(self, new_epoch: str) -> Kept:
        jobs = [job for _, job in _read(Job, self._fetch("SELECT id, document, sum FROM jobs ORDER BY rowid"))]
        newest = f"SELECT sequence, document, sum FROM events ORDER BY sequence DESC LIMIT {EVENTS_KEPT}"
        rows = self._fetch(newest)
        events = _without_a_hole(_read(Event, reversed(rows)))
        epoch = "".join(str(value, errors="replace") for (value,) in self._fetch("SELECT value FROM facts"))
        if rows and events and events[-1].id == f"{epoch}-{rows[0][0]}" and self._whole.exists():
            return Kept(epoch, jobs, events)
        # No id of an event is given out twice: where the newest is not known, numbers begin anew under another name.
        with self._transaction():
            self._fetch("DELETE FROM events")
            self._fetch("INSERT OR REPLACE INTO facts VALUES ('epoch', ?)", new_epoch)
        self.is_whole(True)
        return Kept(new_epoch, jobs, [])

    def is_whole(self, whole: bool) -> None:
        """Whether every event that was shown is in the file. If that is not so when this life ends, the next counts
        under another name. It is told by a file that is there or not: to take one away needs no room on the disk."""
        with suppress(OSError):
            if whole:
                self._whole.touch(mode=0o600)
            else:
                self._whole.unlink(missing_ok=True)

    def close(self) -> None:
        """Also when it was never opened, or twice. What SQLite cannot tidy up now it does when it is opened again."""
        with suppress(AttributeError, sqlite3.Error):
            self._database.close()

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> None:
        """All of it, in one transaction that is on the disk when this returns."""
        now = time.time()
        with self._transaction():
            for job_id, job in batch.jobs.items():
                self._put("jobs", job_id, now, job)
            for (kind, record_id), record in batch.records.items():
                self._put(kind, record_id, now, record)
            for event in batch.events:
                self._keep(
                    "INSERT OR REPLACE INTO events VALUES (?, ?, ?)", event.sequence, *_summed(event.sequence, event)
                )
            if batch.events:
                # Here, and not with what else is old: a busy hour has more events than the file has room for.
                self._fetch("DELETE FROM events WHERE sequence <= ?", batch.events[-1].sequence - EVENTS_KEPT)

    def _put(self, table: str, record_id: str, now: float, record: Model | None) -> None:
        if record is None:
            self._fetch(f"DELETE FROM {table} WHERE id = ?", key(record_id))
        elif table == "jobs":
            # A job keeps its place: they are read in the order in which they came.
            self._keep(
                "INSERT INTO jobs VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET document = excluded.document, sum = excluded.sum",
                key(record_id),
                now,
                *_summed(key(record_id), record),
            )
        else:
            self._keep(
                f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)",
                key(record_id),
                now,
                *_summed(key(record_id), record),
            )

    def _keep(self, statement: str, record_id: object, *values: object) -> None:
        """One that SQLite refuses, for its size, say, must not keep all others from the disk."""
        try:
            self._fetch(statement, record_id, *values)
        except (sqlite3.DataError, sqlite3.IntegrityError, OverflowError) as error:
            logger.error("a record cannot be kept in the journal", record=record_id, error=str(error))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._fetch("BEGIN IMMEDIATE")
        try:
            yield
            self._fetch("COMMIT")
        except BaseException:
            # Of some errors SQLite has rolled back by itself.
            with suppress(sqlite3.Error):
                self._fetch("ROLLBACK")
            raise

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, kind: Kind, record_id: str, model: type[M]) -> M | None:
        rows = self._fetch(f"SELECT id, document, sum FROM {kind} WHERE id = ?", record_id)
        return next((record for _, record in _read(model, rows)), None)

    def all(self, kind: Kind, model: type[M], prefix: str) -> dict[str, M]:
        start = prefix.encode()
        # By looking, and not by an end: there is no least text behind all those that begin with U+10FFFF.
        with closing(
            self._database.execute(f"SELECT id, document, sum FROM {kind} WHERE id >= ? ORDER BY id", (prefix,))
        ) as rows:
            return dict(_read(model, takewhile(lambda row: row[0].startswith(start), rows)))

    # -- clearing -----------------------------------------------------------------------------------------------

    def forget(self, kind: Kind, before: float) -> bool:
        """What was put before then, for SLICE seconds. Whether there may be more."""
        with self._slice() as goes_on:
            while goes_on():
                if not self._forget_oldest(kind, 20, before):
                    return False
        return True

    def shrink(self, limit: int) -> bool:
        """The oldest of what ages while more than `limit` bytes are in use, for SLICE seconds. Whether there may be
        more to do."""
        if self.size() <= limit:
            return False
        with self._slice() as goes_on:
            while goes_on():
                ages = {kind: self._fetch(f"SELECT min(at) FROM {kind}")[0][0] for kind in Kind if kind.ages}
                oldest = min(((at, kind) for kind, at in ages.items() if at is not None), default=None)
                if oldest is None or self.size() <= limit:
                    return False
                self._forget_oldest(oldest[1], 1)
        return True

    def give_back(self) -> bool:
        """Free bytes at the end of the file beyond FREE_KEPT, for SLICE seconds. Whether there may be more."""
        kept = FREE_KEPT // self._number("page_size")
        with self._slice() as goes_on:
            while goes_on():
                free = self._number("freelist_count")
                if free <= kept:
                    return False
                self._fetch(f"PRAGMA incremental_vacuum({min(64, free - kept)})")
                if self._number("freelist_count") == free:
                    return False
        return True

    def size(self) -> int:
        """Bytes in use, in the file."""
        return (self._number("page_count") - self._number("freelist_count")) * self._number("page_size")

    @contextmanager
    def _slice(self) -> Iterator[Any]:
        until = time.monotonic() + SLICE
        with self._transaction():
            yield lambda: time.monotonic() < until

    def _forget_oldest(self, kind: Kind, most: int, before: float = math.inf) -> int:
        """How many there were."""
        return self._database.execute(
            f"DELETE FROM {kind} WHERE rowid IN (SELECT rowid FROM {kind} WHERE at < ? ORDER BY at LIMIT ?)",
            (before, most),
        ).rowcount

    def _number(self, pragma: str) -> int:
        return int(self._fetch(f"PRAGMA {pragma}")[0][0])

    def _fetch(self, statement: str, *values: object) -> list[Any]:
        return self._database.execute(statement, values).fetchall()


def key(record_id: str) -> str:
    """Half a character is no text: it is told as an escape."""
    return record_id.encode(errors="backslashreplace").decode()


def _summed(record_id: object, record: Model) -> tuple[str, int]:
    document = _document(record)
    return document, _sum(str(record_id).encode(), document.encode())


def _sum(record_id: bytes, document: bytes) -> int:
    return zlib.crc32(document, zlib.crc32(record_id))


def _document(record: Model) -> str:
    """Whatever a guest said: half a character, which is no JSON, must not keep all others from the disk."""
    try:
        return record.encoded.decode() if isinstance(record, Event) else record.model_dump_json()
    except ValueError:
        told = json.dumps(record.model_dump(), default=str, ensure_ascii=False)
        return told.encode(errors="replace").decode()


def _read(model: type[M], rows: Iterable[Any]) -> Iterator[tuple[str, M]]:
    """Of rows of id, document and checksum, what can be read; what cannot is told and passed over."""
    for record_id, document, checksum in rows:
        name = record_id if isinstance(record_id, bytes) else str(record_id).encode()
        try:
            if _sum(name, document) != checksum:
                raise ValueError("it is not as it was written")
            yield name.decode(), model.model_validate_json(document)
        except ValueError as error:
            logger.warning(
                "a record of the journal cannot be read", record=name.decode(errors="replace"), error=str(error)[:500]
            )


def _without_a_hole(rows: Iterable[tuple[str, Event]]) -> list[Event]:
    """The newest of them, back to the first that is missing."""
    kept: list[Event] = []
    for _, event in rows:
        if kept and event.sequence != kept[-1].sequence + 1:
            kept.clear()
        kept.append(event)
    return kept


def _make_private(path: Path) -> bool:
    """Whether it is new."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fresh = os.fstat(descriptor).st_size < SMALLEST
    finally:
        os.close(descriptor)
    with suppress(FileNotFoundError):
        if fresh and path.with_name(f"{path.name}-wal").stat().st_size:
            raise sqlite3.DatabaseError("the file is empty, and what SQLite keeps beside it is not")
    return fresh


def _is_of_the_content(error: sqlite3.Error) -> bool:
    """Whether what the file holds is at fault, and not the disk, or another program that uses it. Without a code it is
    an error of ours, about the content."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT)


def _set_aside(path: Path) -> Path:
    """With what SQLite keeps beside it. Under a name that says when."""
    aside = path.with_name(
        f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.monotonic_ns() % 1_000_000:06}"
    )
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
