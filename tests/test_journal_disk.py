"""The journal on disks that are full, small, or take nothing, and how much of one it takes."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from journaling import Note, at, job, set_aside, until

from envd import journal as journal_module
from envd import journal_file
from envd.errors import DiskLow, SettingsError
from envd.events import EventLog
from envd.journal import FILE, Journal
from envd.journal_file import Batch
from envd.models import JobState
from envd.store import Kind


@contextmanager
def disk_of(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own for FOLDER."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "envd-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of(tmp_path / "disk", "2m") as folder:
        yield folder


def fill(folder: Path, leave: int = 0) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    return ballast


def size_of(path: Path) -> int:
    return path.stat().st_size


# ----------------------------------------------------------------------------------------------------------------------
# Full disks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [0, 8192, 40_000])
async def test_a_full_disk_loses_nothing_and_is_written_again_once_there_is_room(
    small_disk: Path, leave: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "AGAIN", 0.05)
    async with Journal.open(at(small_disk)) as journal:
        events = EventLog(journal)
        journal.put_job(job(0))
        await journal.commit()
        ballast = fill(small_disk, leave)
        # As a service: jobs go on, a few records change again and again, events come, someone follows.
        seen: list[int] = []

        async def follow() -> None:
            async for batch in events.follow(0):
                seen.extend(event.sequence for event in batch or ())

        following = asyncio.create_task(follow())
        for version in range(300):
            for number in range(5):
                journal.put_job(job(number, version=version))
                journal.put(Kind.DESKTOPS, f"d-{number}", Note(text="x" * 2000 + str(version)))
                events.publish("note", message="y" * 500)
            await journal.settle()
            await asyncio.sleep(0)
        with anyio.fail_after(5):
            with pytest.raises(DiskLow, match="full"):
                await journal.commit()
        assert "full" in journal.trouble
        await until(lambda: len(seen) == 1500)
        assert seen == list(range(1, 1501))
        waits = journal._waiting.before(Batch())
        assert (len(waits.jobs), len(waits.records)) <= (5, 5)
        assert await journal.get(Kind.DESKTOPS, "d-3", Note) == Note(text="x" * 2000 + "299")
        assert len(await journal.all(Kind.DESKTOPS, Note)) == 5
        last = events.last_id
        ballast.unlink()
        await until(lambda: not journal._broken)
        await journal.commit()
        assert events.last_id == last
        assert sum("cannot be written" in record.message for record in caplog.records) == 1
        events.close()
        await following
    async with Journal.open(at(small_disk)) as journal:
        assert list(journal.jobs()) == [job(number, version=299) for number in range(5)]
        assert [event.sequence for event in journal.events()] == list(range(1, 1501))
        assert await journal.all(Kind.DESKTOPS, Note) == {f"d-{n}": Note(text="x" * 2000 + "299") for n in range(5)}
        assert EventLog(journal).last_id == last


async def test_what_waits_for_a_full_disk_is_bounded(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "AGAIN", 0.01)
    async with Journal.open(at(small_disk)) as journal:
        events = EventLog(journal)
        fill(small_disk)
        for number in range(journal_file.EVENTS_KEPT * 2):
            events.publish("note", message="z" * 100)
            journal.put(Kind.DESKTOPS, "d", Note(text="x" * 5000 + str(number)))
            if number % 1000 == 0:
                await journal.settle()
                await anyio.sleep(0.02)
        await until(lambda: bool(journal._broken))
        assert len(journal._waiting.events) + len(journal._writing.events) <= 2 * journal_file.EVENTS_KEPT
        assert len(journal._unwritten) == 1
        assert events.last == journal_file.EVENTS_KEPT * 2
        (small_disk / "ballast").unlink()


async def test_an_end_on_a_full_disk_is_bounded_and_says_what_is_lost(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Journal.open(at(small_disk)) as journal:
        journal.put_job(job(1))
        await journal.commit()
        ballast = fill(small_disk)
        journal.put(Kind.DESKTOPS, "d", Note(text="x" * 200_000))
        await journal.settle()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    [lost] = [record for record in caplog.records if "written last is not" in record.message]
    assert getattr(lost, "records", None) == ["desktops/d"]
    ballast.unlink()
    async with Journal.open(at(small_disk)) as journal:
        assert list(journal.jobs()) == [job(1)]
        assert await journal.get(Kind.DESKTOPS, "d", Note) is None


async def test_room_that_is_made_just_before_the_end_is_used(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "AGAIN", 3600)
    async with Journal.open(at(small_disk)) as journal:
        ballast = fill(small_disk)
        journal.put(Kind.DESKTOPS, "d", Note(text="x" * 200_000))
        await journal.settle()
        assert journal.trouble
        ballast.unlink()
    async with Journal.open(at(small_disk)) as journal:
        assert await journal.get(Kind.DESKTOPS, "d", Note) == Note(text="x" * 200_000)


async def test_ids_of_events_that_were_shown_and_never_written_are_not_given_out_again(small_disk: Path) -> None:
    async with Journal.open(at(small_disk)) as journal:
        events = EventLog(journal)
        events.publish("note")
        await journal.commit()
        ballast = fill(small_disk)
        for _ in range(100):
            events.publish("note", message="x" * 5000)
        await journal.settle()
        assert events.last == 101
        epoch = journal.epoch
    ballast.unlink()
    async with Journal.open(at(small_disk)) as journal:
        assert journal.epoch != epoch


async def test_a_disk_that_was_full_at_the_start_is_told_of(small_disk: Path) -> None:
    ballast = fill(small_disk)
    with pytest.raises(SettingsError, match=r"cannot be used.*room on its disk"):
        async with Journal.open(at(small_disk)):
            pass
    ballast.unlink()
    async with Journal.open(at(small_disk)) as journal:
        journal.put_job(job(1))
        await journal.commit()
    assert not set_aside(small_disk)


async def test_a_disk_with_little_room_takes_no_new_work(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LOOKS", 0.02)
    async with Journal.open(at(small_disk)) as journal:
        await until(lambda: not journal.trouble)
        ballast = fill(small_disk, leave=20_000)
        await until(lambda: "are needed" in journal.trouble)
        ballast.unlink()
        await until(lambda: not journal.trouble)


async def test_a_disk_that_is_read_only_is_told_of(small_disk: Path) -> None:
    async with Journal.open(at(small_disk)) as journal:
        journal.put_job(job(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # noqa: ASYNC221
    with pytest.raises(SettingsError, match="Read-only file system"):
        async with Journal.open(at(small_disk)):
            pass
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)  # noqa: ASYNC221
    async with Journal.open(at(small_disk)) as journal:
        assert list(journal.jobs()) == [job(1)]


# ----------------------------------------------------------------------------------------------------------------------
# Bounds
# ----------------------------------------------------------------------------------------------------------------------


async def test_what_is_old_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    async with Journal.open(at(tmp_path, journal_days=2)) as journal:
        journal.put_job(job(1, state=JobState.FAILED, ended_at=now))
        journal.put_job(job(2))
        for kind in Kind:
            journal.put(kind, "old", Note())
        await journal.commit()
        now += 86_400 + 1
        journal.put_job(job(3, state=JobState.FAILED, ended_at=now))
        for kind in Kind:
            journal.put(kind, "new", Note())
        await journal.commit()
        await journal._forget_what_is_old()
        assert [one.id for one in journal.jobs()] == ["job-1", "job-2", "job-3"]
        day = [kind for kind in Kind if "old" not in await journal.all(kind, Note)]
        assert day == [Kind.STEPS, Kind.ANSWERS]
        now += 86_400
        await journal._forget_what_is_old()
        assert [one.id for one in journal.jobs()] == ["job-2", "job-3"]
        assert [kind for kind in Kind if "old" not in await journal.all(kind, Note)] == [
            kind for kind in Kind if kind.ages
        ]
    async with Journal.open(at(tmp_path, journal_days=2)) as journal:
        assert [one.id for one in journal.jobs()] == ["job-2", "job-3"]


async def test_of_ended_jobs_the_newest_are_kept_across_lives(tmp_path: Path) -> None:
    """Those that ended last, whenever they began; and all that have not ended."""
    later = time.time()
    async with Journal.open(at(tmp_path, journal_jobs=5)) as journal:
        journal.put_job(job(0))
        for number in range(1, 10):
            journal.put_job(job(number))
        for number in range(9, 0, -1):
            journal.put_job(job(number, state=JobState.FAILED, ended_at=later - number))
        kept = list(journal.jobs())
        assert [one.env for one in kept] == [0, 1, 2, 3, 4, 5]
    async with Journal.open(at(tmp_path, journal_jobs=5)) as journal:
        assert list(journal.jobs()) == kept
    async with Journal.open(at(tmp_path, journal_jobs=2)) as journal:
        assert [one.env for one in journal.jobs()] == [0, 1, 2]
    async with Journal.open(at(tmp_path, journal_jobs=5)) as journal:
        assert [one.env for one in journal.jobs()] == [0, 1, 2]
        journal.put_job(job(3, state=JobState.FAILED, ended_at=later))
        assert [one.env for one in journal.jobs()] == [0, 1, 2, 3]


async def test_a_journal_that_grew_too_large_forgets_the_oldest_and_gives_the_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FREE_KEPT", 1024**2)
    monkeypatch.setattr(journal_module, "PAUSE", 0.001)
    async with Journal.open(at(tmp_path, journal_limit=16 * 1024**2)) as journal:
        journal.put(Kind.DESKTOPS, "d", Note(text="kept"))
        for number in range(60):
            journal.put(Kind.STEPS, f"{number:04}", Note(text="x" * 1_000_000))
            await journal.commit()
        await journal._do(journal._file._fetch, "PRAGMA wal_checkpoint")
        assert size_of(tmp_path / FILE) > 55_000_000
        await journal._forget_what_is_old()
        left = list(await journal.all(Kind.STEPS, Note))
        assert left
        assert left == [f"{number:04}" for number in range(60)][-len(left) :]
        assert await journal.get(Kind.DESKTOPS, "d", Note) == Note(text="kept")
        assert await journal._do(journal._file.size) <= 16 * 1024**2
        await journal._do(journal._file._fetch, "PRAGMA wal_checkpoint")
        assert size_of(tmp_path / FILE) < 18 * 1024**2
    assert size_of(tmp_path / FILE) < 18 * 1024**2


async def test_events_on_the_disk_are_as_many_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "EVENTS_KEPT", 100)
    async with Journal.open(at(tmp_path)) as journal:
        events = EventLog(journal)
        for number in range(1000):
            events.publish("note")
            if number % 10 == 0:
                await journal.commit()
        await journal.commit()
        [(count, least)] = await journal._do(journal._file._fetch, "SELECT count(*), min(sequence) FROM events")
        assert (count, least) == (100, 901)


async def test_the_log_beside_the_file_stays_small(tmp_path: Path) -> None:
    largest = 0
    async with Journal.open(at(tmp_path)) as journal:
        for number in range(1500):
            journal.put(Kind.DESKTOPS, str(number % 10), Note(text="x" * 50_000 + str(number)))
            await journal.commit()
            largest = max(largest, size_of(tmp_path / f"{FILE}-wal"))
    assert largest < journal_file.WAL_KEPT
    assert size_of(tmp_path / FILE) < 4 * 1024**2


async def test_clearing_much_holds_no_writer_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(journal_module, "PAUSE", 0.01)
    async with Journal.open(at(tmp_path)) as journal:
        rows = [(f"a-{number}", now, "{}", 0) for number in range(300_000)]
        await journal._do(lambda: journal._file._database.execute("BEGIN"))
        await journal._do(lambda: journal._file._database.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows))
        await journal._do(lambda: journal._file._database.execute("COMMIT"))
        now += 2 * 86_400
        began = time.monotonic()
        clearing = asyncio.create_task(journal._forget_what_is_old())
        took = []
        while not clearing.done():
            start = time.monotonic()
            journal.put(Kind.DESKTOPS, "d", Note())
            await journal.commit()
            took.append(time.monotonic() - start)
        await clearing
        print(f"300,000 old answers in {time.monotonic() - began:.1f} s; the longest commit {max(took):.3f} s")  # noqa: T201
        assert len(took) > 20
        assert sorted(took)[len(took) * 9 // 10] < 0.5
        assert await journal._do(journal._file._fetch, "SELECT count(*) FROM answers") == [(0,)]


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def lag() -> Iterator[list[float]]:
    """How late the loop was, each time that it should have come by."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - before - 0.005)

    watching = asyncio.create_task(watch())
    try:
        yield late
    finally:
        watching.cancel()


async def test_a_large_journal_is_opened_beside_a_loop_that_runs(tmp_path: Path) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        events = EventLog(journal)
        for number in range(10_000):
            journal.put_job(job(number, state=JobState.FAILED, ended_at=time.time()))
            if number < 8192:
                events.publish("state", job=job(number))
    began = time.monotonic()
    with lag() as late:
        async with Journal.open(at(tmp_path)) as journal:
            took = time.monotonic() - began
            assert len(list(journal.jobs())) == 10_000
            assert len(list(journal.events())) == 8192
    print(f"10,000 jobs and 8,192 events: opened in {took:.2f} s, the loop at most {max(late) * 1000:.0f} ms late")  # noqa: T201
    assert took < 20
    assert max(late) < 1


async def test_two_thousand_writes_a_second_do_not_hold_the_loop(tmp_path: Path) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        events = EventLog(journal)
        with lag() as late:
            for turn in range(100):
                for number in range(20):
                    journal.put_job(job(number, version=turn))
                    events.publish("state", job=job(number))
                await asyncio.sleep(0.01)
            await journal.commit()
    late.sort()
    print(f"the loop was {late[len(late) // 2] * 1000:.1f} ms late, at most {late[-1] * 1000:.0f} ms")  # noqa: T201
    assert late[len(late) // 2] < 0.05
