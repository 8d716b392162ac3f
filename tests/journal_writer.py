"""`python journal_writer.py STATE_DIR FIRST [KILL]`: a process that writes to a journal as fast as it can, with jobs,
records and events numbered from FIRST, and prints each number once its commit has returned.

KILL is "before" or "after", and a number: it kills itself right before, or after, the COMMIT of that transaction.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import structlog

from envd.events import EventLog
from envd.journal import Journal
from envd.journal_file import JournalFile
from envd.models import Job
from envd.settings import load
from envd.store import Kind

WRITERS = 3


async def main(folder: Path, first: int) -> None:
    numbers = count(first)
    async with Journal.open(load({}, None, state_dir=folder)) as journal:
        events = EventLog(journal)
        await asyncio.gather(*(write(journal, events, numbers) for _ in range(WRITERS)))


async def write(journal: Journal, events: EventLog, numbers: Iterator[int]) -> None:
    for number in numbers:
        job = Job(id=f"job-{number}", env=number, created_at=float(number))
        journal.put_job(job)
        journal.put(Kind.STEPS, f"step-{number}", job)
        events.publish("state", job=job)
        await journal.commit()
        os.write(1, f"{number}\n".encode())


def kill_at(when: str, number: int) -> None:
    transaction, seen = JournalFile._transaction, count()

    @contextmanager
    def deadly(file: JournalFile) -> Iterator[None]:
        mine = next(seen) == number
        with transaction(file):
            yield
            if mine and when == "before":
                assert isinstance(file._database, sqlite3.Connection)
                assert file._database.in_transaction
                os.kill(os.getpid(), signal.SIGKILL)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    JournalFile._transaction = deadly  # type: ignore[method-assign,assignment] # that is what this process is for


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if len(sys.argv) > 3:
        kill_at(sys.argv[3], int(sys.argv[4]))
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
