"""What it takes until a promise is on the disk, for one caller and for a hundred at once, and how fast a large journal
is opened. `make bench` runs it with the others; by itself it prints its own table."""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import structlog
from bench_figures import Figures, percentile

from envd.events import EventLog
from envd.journal import Journal
from envd.models import Job, JobState
from envd.settings import load


async def measure_journal(figures: Figures, folder: Path) -> None:
    """FOLDER is on the disk that is measured."""
    # A line for each event would be measured, too.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    synced = fsync_ms(folder)
    async with Journal.open(load({}, None, state_dir=folder)) as journal:
        for writers, count in ((1, 300), (100, 50)):
            took: list[float] = []
            began = time.perf_counter()
            await asyncio.gather(*(_write(journal, writer, count, took) for writer in range(writers)))
            rate = len(took) / (time.perf_counter() - began)
            for name, value in (("p50", statistics.median(took)), ("p99", percentile(took, 99))):
                what = f"journal: commit, {writers} at once, {name} of {len(took)}"
                figures.add(f"commit_{writers}_{name}_ms", what, value * 1000, "ms", beside=("fsync", synced))
            figures.add(f"commit_{writers}_per_s", f"journal: commits, {writers} at once", rate, "/s")
        events = EventLog(journal)
        for number in range(10_000):
            job = Job(id=f"full-{number}", env=0, created_at=0, state=JobState.FAILED, ended_at=time.time())
            journal.put_job(job)
            events.publish("state", job=job)
    began = time.perf_counter()
    async with Journal.open(load({}, None, state_dir=folder)) as journal:
        took_s = time.perf_counter() - began
        what = f"journal: opened, {len(list(journal.jobs())):,} jobs and {len(list(journal.events())):,} events"
        figures.add("journal_open_s", what, took_s, "s")


async def _write(journal: Journal, writer: int, count: int, took: list[float]) -> None:
    for version in range(count):
        began = time.perf_counter()
        journal.put_job(Job(id=f"job-{writer}", env=writer, created_at=0, version=version))
        await journal.commit()
        took.append(time.perf_counter() - began)


def fsync_ms(folder: Path) -> float:
    """Of a page at the end of a file: what no commit can be faster than. The median."""
    took = []
    with (folder / "page").open("wb", buffering=0) as file:
        for _ in range(100):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000


async def main() -> None:
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="envd-bench-") as folder:
        await measure_journal(figures, Path(folder))
    figures.show()


if __name__ == "__main__":
    asyncio.run(main())
