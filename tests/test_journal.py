"""The journal: what it promises of kills, torn files, full disks and poisoned records, with real files and processes.

What the disk does to it is in test_journal_disk.py.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from journaling import Note, at, job, names, set_aside, until

from envd import journal as journal_module
from envd import journal_file
from envd.errors import DiskLow, SettingsError
from envd.events import EventLog
from envd.journal import FILE, Journal
from envd.journal_file import Batch, JournalFile
from envd.models import Event, Job, JobState
from envd.store import Kind, MemoryStore, Store

LIVES = 30
WRITER = Path(__file__).with_name("journal_writer.py")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("journal")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


async def seen_by_another_process(folder: Path, query: str) -> str:
    program = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall())"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder / FILE), query, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return said.decode().strip()


def as_after_a_kill(folder: Path, other: Path) -> Path:
    """What a process that is killed now would leave: the file, and SQLite's log beside it."""
    other.mkdir()
    for suffix in ("", "-wal", "-whole"):
        shutil.copy(folder / f"{FILE}{suffix}", other / f"{FILE}{suffix}")
    return other


# ----------------------------------------------------------------------------------------------------------------------
# Commits
# ----------------------------------------------------------------------------------------------------------------------


async def test_what_was_committed_is_read_by_another_process_and_by_the_next_life(tmp_path: Path) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        events = EventLog(journal)
        journal.put_job(job(1))
        journal.put(Kind.LEASES, "mine", Note(text="kept"))
        event = events.publish("note", message="hello")
        await journal.commit()
        query = "SELECT (SELECT id FROM jobs), (SELECT id FROM leases), (SELECT sequence FROM events)"
        assert await seen_by_another_process(tmp_path, query) == "[('job-1', 'mine', 1)]"
        epoch = journal.epoch
    assert names(tmp_path) == [FILE, f"{FILE}-whole"]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    async with Journal.open(at(tmp_path)) as journal:
        assert (journal.epoch, list(journal.jobs()), list(journal.events())) == (epoch, [job(1)], [event])
        assert await journal.get(Kind.LEASES, "mine", Note) == Note(text="kept")
        assert EventLog(journal).last_id == event.id


async def test_many_who_wait_for_a_commit_wait_for_few_transactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str]] = []
    write = JournalFile.write

    def counted(file: JournalFile, batch: Batch) -> None:
        batches.append(list(batch.jobs))
        write(file, batch)

    monkeypatch.setattr(JournalFile, "write", counted)
    async with Journal.open(at(tmp_path)) as journal:

        async def one(number: int) -> None:
            for version in range(5):
                journal.put_job(job(1000 * version + number))
                await journal.commit()

        async with asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(one(number))
    assert sum(map(len, batches)) == 1000
    assert len(batches) <= 15
    order = [one for batch in batches for one in batch]
    assert order == [f"job-{1000 * version + number}" for version in range(5) for number in range(200)]
    async with Journal.open(at(tmp_path)) as journal:
        assert [one.id for one in journal.jobs()] == order


async def test_of_what_waits_the_newest_version_alone_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batch] = []
    monkeypatch.setattr(JournalFile, "write", lambda file, batch: batches.append(batch))
    async with Journal.open(at(tmp_path)) as journal:
        for version in range(100):
            journal.put_job(job(1, version=version))
            journal.put(Kind.LEASES, "x", Note(text=str(version)))
    assert [(batch.jobs, batch.records) for batch in batches] == [
        ({"job-1": job(1, version=99)}, {(Kind.LEASES, "x"): Note(text="99")})
    ]


async def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Many lives on one file: killed at any moment, right before a COMMIT, and right after one."""
    chosen = random.Random(1)
    acknowledged: set[int] = set()
    first, epoch = 0, ""
    for life in range(LIVES):
        how = ([], ["before", str(chosen.randrange(1, 20))], ["after", str(chosen.randrange(1, 20))])[life % 3]
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(WRITER), str(tmp_path), str(first), *how, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        with anyio.fail_after(30):
            said = await process.stdout.readline() if life % 3 == 0 else b""
            if life % 3 == 0:
                await asyncio.sleep(chosen.uniform(0, 0.15))
                process.kill()
            said += await process.stdout.read()
            assert await process.wait() == -signal.SIGKILL
        acknowledged |= {int(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")}
        async with Journal.open(at(tmp_path)) as journal:
            kept = {one.env for one in journal.jobs()}
            assert acknowledged <= kept
            steps = await journal.all(Kind.STEPS, Job)
            assert steps == {f"step-{number}": job(number) for number in kept if number is not None}
            # The ring is a window on the end of one sequence.
            numbers = [event.sequence for event in journal.events()]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else not acknowledged
            assert {event.job.env for event in journal.events() if event.job} >= set(sorted(acknowledged)[-8000:])
            assert not epoch or journal.epoch == epoch
            epoch = journal.epoch if numbers else ""
            first = max((number for number in kept if number is not None), default=-1) + 1
    assert not set_aside(tmp_path)
    assert len(acknowledged) > 200


# ----------------------------------------------------------------------------------------------------------------------
# Files that are torn, spoilt, or none of ours
# ----------------------------------------------------------------------------------------------------------------------


async def filled(folder: Path, commits: int, copy: Path | None = None) -> None:
    """Commits of one job, record and event each. `copy` is what a kill would leave behind the last."""
    await anyio.Path(folder).mkdir(exist_ok=True)
    async with Journal.open(at(folder)) as journal:
        events = EventLog(journal)
        for number in range(commits):
            journal.put_job(job(number))
            journal.put(Kind.STEPS, f"step-{number}", Note(text="x" * 3000 + str(number)))
            events.publish("state", job=job(number))
            await journal.commit()
        if copy is not None:
            as_after_a_kill(folder, copy)


async def what_is_there(folder: Path) -> tuple[list[Job], dict[str, Note], list[int]]:
    async with Journal.open(at(folder)) as journal:
        steps = await journal.all(Kind.STEPS, Note)
        for one, step in steps.items():
            assert await journal.get(Kind.STEPS, one, Note) == step
        return list(journal.jobs()), steps, [event.sequence for event in journal.events()]


@pytest.mark.parametrize("how", ["cut", "flipped"])
async def test_a_log_with_a_torn_end_is_read_up_to_an_earlier_commit(tmp_path: Path, how: str) -> None:
    await filled(tmp_path / "made", 20, tmp_path / "killed")
    chosen = random.Random(2)
    whole = (tmp_path / "killed" / f"{FILE}-wal").read_bytes()
    found: set[int] = set()
    for _ in range(25):
        torn, place = bytearray(whole), chosen.randrange(len(whole))
        if how == "cut":
            del torn[place:]
        else:
            torn[place] ^= chosen.randrange(1, 256)
        (tmp_path / "torn").mkdir()
        shutil.copy(tmp_path / "killed" / FILE, tmp_path / "torn")
        shutil.copy(tmp_path / "killed" / f"{FILE}-whole", tmp_path / "torn")
        (tmp_path / "torn" / f"{FILE}-wal").write_bytes(torn)
        jobs, steps, events = await what_is_there(tmp_path / "torn")
        found.add(len(jobs))
        assert jobs == [job(number) for number in range(len(jobs))]
        assert steps == {f"step-{number}": Note(text="x" * 3000 + str(number)) for number in range(len(jobs))}
        assert events == list(range(1, len(jobs) + 1))
        assert not set_aside(tmp_path / "torn")
        shutil.rmtree(tmp_path / "torn")
    assert len(found) > 5


@pytest.mark.parametrize("size", [1, 512])
async def test_of_a_file_with_a_hole_nothing_wrong_is_read(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(tmp_path / "made", 40)
    async with Journal.open(at(tmp_path / "made")) as journal:
        epoch = journal.epoch
    chosen = random.Random(3)
    whole = (tmp_path / "made" / FILE).read_bytes()
    fates: list[str] = []
    for _ in range(60):
        spoilt, place = bytearray(whole), chosen.randrange(100, len(whole) - size)
        spoilt[place : place + size] = bytes(value ^ chosen.randrange(1, 256) for value in spoilt[place : place + size])
        (tmp_path / "hole").mkdir()
        (tmp_path / "hole" / FILE).write_bytes(spoilt)
        (tmp_path / "hole" / f"{FILE}-whole").touch()
        caplog.clear()
        jobs, steps, _ = await what_is_there(tmp_path / "hole")
        assert all(one == job(one.env or 0) for one in jobs)
        assert all(step == Note(text="x" * 3000 + one.removeprefix("step-")) for one, step in steps.items())
        async with Journal.open(at(tmp_path / "hole")) as journal:
            if aside := set_aside(tmp_path / "hole"):
                assert (journal.epoch != epoch, jobs, steps) == (True, [], {})
                assert str(aside[0]) in str([record.__dict__ for record in caplog.records])
                fates.append("set aside")
            elif len(jobs) < 40 or len(steps) < 40:
                assert "a record of the journal cannot be read" in caplog.text
                fates.append("passed over")
        shutil.rmtree(tmp_path / "hole")
    assert ("passed over" if size == 1 else "set aside") in fates


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(random.Random(4).randbytes(50_000), id="random bytes"),
        pytest.param(b"a letter to somebody\n" * 500, id="text"),
        pytest.param(b"SQLite format 3\0" + bytes(5000), id="a header alone"),
    ],
)
async def test_a_file_that_is_no_journal_is_set_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    async with Journal.open(at(tmp_path)) as journal:
        journal.put_job(job(1))
        await journal.commit()
    [aside] = set_aside(tmp_path)
    assert aside.read_bytes() == content
    assert [getattr(record, "file", "") for record in caplog.records if "set aside" in record.message] == [str(aside)]


async def test_a_journal_whose_head_is_lost_is_set_aside_with_its_log(tmp_path: Path) -> None:
    await filled(tmp_path / "made", 5, tmp_path / "killed")
    (tmp_path / "killed" / FILE).write_bytes(b"")
    assert await what_is_there(tmp_path / "killed") == ([], {}, [])
    assert len(set_aside(tmp_path / "killed")) == 2


async def test_a_database_of_something_else_is_set_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("CREATE TABLE jobs (title TEXT)")
    database.close()
    assert await what_is_there(tmp_path) == ([], {}, [])
    assert len(set_aside(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b"x"])
async def test_an_empty_file_is_a_new_journal(tmp_path: Path, content: bytes) -> None:
    """To SQLite a few bytes are none."""
    (tmp_path / FILE).write_bytes(content)
    assert await what_is_there(tmp_path) == ([], {}, [])
    assert not set_aside(tmp_path)


async def test_a_directory_in_its_place_is_told_of(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(SettingsError, match=r"cannot be used: .*directory"):
        await what_is_there(tmp_path)


async def test_a_state_directory_that_is_not_there_is_made_for_this_user_alone(tmp_path: Path) -> None:
    await what_is_there(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / FILE).stat().st_mode & 0o777 == 0o600


async def test_a_state_directory_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be used"):
        await what_is_there(tmp_path / "file" / "state")


async def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    await filled(tmp_path, 1)
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("PRAGMA user_version = 77")
    database.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(SettingsError, match=r"version 77.*knows 1\."):
        await what_is_there(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


async def test_a_file_that_another_program_holds_is_told_of_and_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "LOCKED", 0.1)
    await filled(tmp_path, 1)
    holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SettingsError, match="locked"):
        await what_is_there(tmp_path)
    holder.close()
    assert (await what_is_there(tmp_path))[0] == [job(0)]


async def test_where_the_newest_event_is_lost_ids_begin_anew(tmp_path: Path) -> None:
    """Or what comes next would have the id of something else that was shown."""
    await filled(tmp_path, 5)
    async with Journal.open(at(tmp_path)) as journal:
        epoch = journal.epoch
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE events SET document = '{}' WHERE sequence = 5")
    database.close()
    async with Journal.open(at(tmp_path)) as journal:
        assert journal.epoch != epoch
        assert not journal.events()


async def test_events_are_kept_from_behind_a_hole(tmp_path: Path) -> None:
    await filled(tmp_path, 5)
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("DELETE FROM events WHERE sequence = 3")
    database.close()
    assert (await what_is_there(tmp_path))[2] == [4, 5]


# ----------------------------------------------------------------------------------------------------------------------
# Migrations
# ----------------------------------------------------------------------------------------------------------------------


async def test_an_older_file_is_brought_to_the_newest_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(tmp_path, 3)
    newer = "CREATE TABLE more (id TEXT) STRICT; INSERT INTO more SELECT id FROM steps;"
    monkeypatch.setattr(journal_file, "MIGRATIONS", (*journal_file.MIGRATIONS, newer))
    jobs, steps, events = await what_is_there(tmp_path)
    assert (jobs, len(steps), events) == ([job(0), job(1), job(2)], 3, [1, 2, 3])
    query = "SELECT count(*), (SELECT user_version FROM pragma_user_version) FROM more"
    assert await seen_by_another_process(tmp_path, query) == "[(3, 2)]"


async def test_a_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path, 3)
    with monkeypatch.context() as patched:
        bad = "CREATE TABLE more (id TEXT) STRICT; DELETE FROM steps; INSERT INTO nowhere VALUES (1);"
        patched.setattr(journal_file, "MIGRATIONS", (*journal_file.MIGRATIONS, bad))
        with pytest.raises(SettingsError, match="from version 1 to 2: no such table: nowhere"):
            await what_is_there(tmp_path)
    jobs, steps, _ = await what_is_there(tmp_path)
    assert (len(jobs), len(steps)) == (3, 3)
    assert await seen_by_another_process(tmp_path, "SELECT count(*) FROM sqlite_schema WHERE name = 'more'") == "[(0,)]"


# ----------------------------------------------------------------------------------------------------------------------
# Poisoned records
# ----------------------------------------------------------------------------------------------------------------------


async def test_whatever_is_in_a_record_the_others_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = ["it's", '"quoted"', "'; DROP TABLE steps; --", "ünïcödé 🎉", "a\0b", "", "\U0010ffff", "%_*?["]
    async with Journal.open(at(tmp_path)) as journal:
        events = EventLog(journal)
        for one in ids:
            journal.put(Kind.STEPS, one, Note(text=one))
        journal.put(Kind.STEPS, "half", Note(text="half \ud83d"))
        journal.put(Kind.STEPS, "half id \ud83d", Note(text="x"))
        journal.put(Kind.STEPS, "nan", Note(facts={"nan": math.nan, "inf": math.inf}))
        journal.put(Kind.STEPS, "huge", Note(text="x" * 10_000_000))
        journal.put_job(job(1, created_at=math.nan))
        journal.put_job(job(2, eta_s=math.inf))
        events.publish("note", message="half \udc00")
        events.publish("note", message="after it")
        journal.put_job(job(3))
        await journal.commit()
    async with Journal.open(at(tmp_path)) as journal:
        for one in ids:
            assert await journal.get(Kind.STEPS, one, Note) == Note(text=one)
            assert await journal.all(Kind.STEPS, Note, one or "it") != {}
        assert await journal.get(Kind.STEPS, "half", Note) == Note(text="half ?")
        assert await journal.get(Kind.STEPS, "half id \ud83d", Note) == Note(text="x")
        assert await journal.get(Kind.STEPS, "nan", Note) == Note(facts={"nan": None, "inf": None})
        assert await journal.get(Kind.STEPS, "huge", Note) == Note(text="x" * 10_000_000)
        assert [one.id for one in journal.jobs()] == ["job-2", "job-3"]
        assert [event.data["message"] for event in journal.events()] == ["half ?", "after it"]
    unread = [record for record in caplog.records if "cannot be read" in record.message]
    assert [getattr(record, "record", "") for record in unread] == ["job-1"]


async def test_one_that_sqlite_refuses_keeps_no_other_from_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        await journal._do(lambda: journal._file._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000))
        journal.put(Kind.STEPS, "a", Note(text="a"))
        journal.put(Kind.STEPS, "too big", Note(text="x" * 200_000))
        journal.put(Kind.STEPS, "b", Note(text="b"))
        await journal.commit()
        assert list(await journal.all(Kind.STEPS, Note)) == ["a", "b"]
    assert [getattr(record, "record", "") for record in caplog.records if "cannot be kept" in record.message] == [
        "too big"
    ]


async def test_a_record_that_cannot_be_read_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        for one in "abcd":
            journal.put(Kind.STEPS, one, Note(text=one))
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE steps SET document = CAST(x'ff00fe' AS TEXT) WHERE id = 'a'")
        database.execute("UPDATE steps SET document = replace(document, 'b', 'c') WHERE id = 'b'")
        database.execute("UPDATE steps SET id = CAST(x'ff' AS TEXT) WHERE id = 'c'")
    database.close()
    async with Journal.open(at(tmp_path)) as journal:
        assert await journal.all(Kind.STEPS, Note) == {"d": Note(text="d")}
        assert await journal.get(Kind.STEPS, "a", Note) is None
        # Of another kind than is asked for.
        assert await journal.all(Kind.STEPS, Job) == {}
    assert sum("cannot be read" in record.message for record in caplog.records) == 8


# ----------------------------------------------------------------------------------------------------------------------
# The journal and the memory store answer alike
# ----------------------------------------------------------------------------------------------------------------------

ODD = ["", "a", "ab", "b", "\x7f", "\xff", "\xffz", "\ud7ff", "\ue000", "\U0010ffff", "\U0010ffffx", "%", "_", "a\0"]
TEXTS = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
KINDS = st.sampled_from([Kind.LEASES, Kind.DESKTOPS])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KINDS, TEXTS, st.none() | st.text(max_size=5)),
        st.tuples(st.just("get"), KINDS, TEXTS),
        st.tuples(st.just("all"), KINDS, TEXTS),
        st.tuples(st.just("job"), st.integers(0, 8), st.booleans()),
        st.tuples(st.just("event")),
        st.tuples(st.just("commit")),
        st.tuples(st.just("reopen")),
    ),
    max_size=30,
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(STEPS)
def test_the_journal_answers_as_the_memory_store_does(steps: list[Any]) -> None:
    asyncio.run(compare(steps))


async def compare(steps: list[Any]) -> None:
    memory = MemoryStore(job_limit=3)
    with tempfile.TemporaryDirectory() as folder:
        settings = at(Path(folder), journal_jobs=3)
        rest = iter(steps)
        over: set[int] = set()
        number = 0
        again = True
        while again:
            again = False
            async with Journal.open(settings) as journal:
                for what, *how in rest:
                    if what == "reopen":
                        again = True
                        break
                    number += 1
                    for store in (memory, journal):
                        if what == "put":
                            store.put(how[0], how[1], None if how[2] is None else Note(text=how[2]))
                        elif what == "event":
                            store.append(Event(id=f"{journal.epoch}-{number_of_event(store)}", kind="note", at=1.0))
                        elif what == "job" and how[0] not in over:
                            facts = {"state": JobState.FAILED, "ended_at": 4e9 + number} if how[1] else {}
                            store.put_job(job(how[0], version=number, **facts))
                    if what == "job" and how[1]:
                        over.add(how[0])
                    if what == "commit":
                        await journal.commit()
                    if what in ("get", "all"):
                        ask = getattr(memory, what), getattr(journal, what)
                        args = (how[0], how[1], Note) if what == "get" else (how[0], Note, how[1])
                        assert await ask[0](*args) == await ask[1](*args)
                    assert list(journal.jobs()) == list(memory.jobs())
                    for kind in (Kind.LEASES, Kind.DESKTOPS) if what == "put" and number % 5 == 0 else ():
                        assert await journal.all(kind, Note) == await memory.all(kind, Note)
                if [event.kind for event in journal.events()] != [event.kind for event in memory.events()]:
                    raise AssertionError("events differ")


def number_of_event(store: Store) -> int:
    return len(list(store.events())) + 1


async def test_reads_beside_writes_see_each_write(tmp_path: Path) -> None:
    """At whatever moment of a batch's way to the disk it is asked."""
    async with Journal.open(at(tmp_path)) as journal:

        async def one(mine: int) -> None:
            for number in range(100):
                journal.put(Kind.STEPS, f"{mine}-a", Note(text=str(number)))
                journal.put(Kind.STEPS, f"{mine}-b", None if number % 2 else Note(text=str(number)))
                if number % 7 == mine:
                    await journal.commit()
                assert await journal.get(Kind.STEPS, f"{mine}-a", Note) == Note(text=str(number))
                assert await journal.all(Kind.STEPS, Note, f"{mine}-") == {f"{mine}-a": Note(text=str(number))} | (
                    {} if number % 2 else {f"{mine}-b": Note(text=str(number))}
                )

        async with asyncio.TaskGroup() as tasks:
            for mine in range(7):
                tasks.create_task(one(mine))


# ----------------------------------------------------------------------------------------------------------------------
# Cancellation, and others at the file
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(0, 12))
async def test_who_stops_waiting_disturbs_nobody(tmp_path: Path, turns: int) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        journal.put(Kind.STEPS, "a", Note(text="a"))
        waiting = [
            asyncio.create_task(journal.commit()),
            asyncio.create_task(journal.all(Kind.STEPS, Note)),
            asyncio.create_task(journal.get(Kind.STEPS, "b", Note)),
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        journal.put(Kind.STEPS, "b", Note(text="b"))
        await journal.commit()
        assert list(await journal.all(Kind.STEPS, Note)) == ["a", "b"]


@pytest.mark.parametrize("how", ["task", "scope"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34, 200])
async def test_an_opening_that_is_cancelled_leaves_nothing(tmp_path: Path, turns: int, how: str) -> None:
    """The thread is looked for when the test has ended."""
    scope = anyio.CancelScope()

    async def life() -> None:
        with scope:
            async with Journal.open(at(tmp_path)) as journal:
                journal.put_job(job(1))
                await anyio.sleep_forever()

    living = asyncio.create_task(life())
    for _ in range(turns):
        await asyncio.sleep(0)
    if how == "task":
        living.cancel()
    else:
        scope.cancel()
    with anyio.fail_after(10):
        await asyncio.gather(living, return_exceptions=True)
    jobs, _, _ = await what_is_there(tmp_path)
    assert jobs in ([], [job(1)])
    assert not set_aside(tmp_path)


async def test_an_error_of_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    async def life() -> None:
        async with Journal.open(at(tmp_path)) as journal:
            journal.put_job(job(1))
            raise KeyError

    with pytest.raises(KeyError):
        await life()
    assert (await what_is_there(tmp_path))[0] == [job(1)]


async def test_an_end_while_a_batch_is_written_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LAST_WRITES", 0.01)
    begun, write = threading.Event(), JournalFile.write

    def slow(file: JournalFile, batch: Batch) -> None:
        begun.set()
        time.sleep(0.2)
        write(file, batch)

    monkeypatch.setattr(JournalFile, "write", slow)
    async with Journal.open(at(tmp_path)) as journal:
        journal.put_job(job(1))
        await until(begun.is_set)
        journal.put_job(job(2))
    assert (await what_is_there(tmp_path))[0] == [job(1), job(2)]


async def test_a_reader_that_stays_holds_nobody_up(tmp_path: Path) -> None:
    async with Journal.open(at(tmp_path)) as journal:
        journal.put_job(job(1))
        await journal.commit()
        reader = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM jobs").fetchall() == [(1,)]
        with anyio.fail_after(10):
            for number in range(200):
                journal.put(Kind.STEPS, str(number), Note(text="x" * 100_000))
                await journal.commit()
        assert not journal.trouble
        grown = (tmp_path / f"{FILE}-wal").stat().st_size
        assert grown > journal_file.WAL_KEPT
        reader.close()
        # Once the reader has gone, what it held back goes into the file, and the room is given back.
        for number in range(200):
            journal.put(Kind.STEPS, str(number), Note(text="x"))
            await journal.commit()
        assert (tmp_path / f"{FILE}-wal").stat().st_size <= journal_file.WAL_KEPT


async def test_a_foreign_writer_makes_trouble_that_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "LOCKED", 0.1)
    monkeypatch.setattr(journal_module, "AGAIN", 0.05)
    async with Journal.open(at(tmp_path)) as journal:
        writer = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        writer.execute("BEGIN EXCLUSIVE")
        journal.put_job(job(1))
        journal.put(Kind.STEPS, "a", Note(text="a"))
        with anyio.fail_after(5):
            with pytest.raises(DiskLow, match="locked"):
                await journal.commit()
            await journal.settle()
        assert "locked" in journal.trouble
        # What waits is read all the same.
        assert await journal.all(Kind.STEPS, Note) == {"a": Note(text="a")}
        writer.close()
        await until(lambda: not journal.trouble)
        await journal.commit()
    assert (await what_is_there(tmp_path))[0] == [job(1)]


async def test_a_bug_in_writing_is_trouble_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "AGAIN", 0.05)
    async with Journal.open(at(tmp_path)) as journal:
        with monkeypatch.context() as patched:
            patched.setattr(JournalFile, "write", lambda file, batch: [][1])
            journal.put_job(job(1))
            with pytest.raises(DiskLow):
                await journal.commit()
        await until(lambda: not journal.trouble)
    assert "IndexError" in str([record.__dict__ for record in caplog.records])
    assert (await what_is_there(tmp_path))[0] == [job(1)]


async def test_a_commit_that_lasts_is_not_blamed_for_what_comes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = 0, JournalFile.write

    def once(file: JournalFile, batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise sqlite3.OperationalError("disk I/O error")
        write(file, batch)

    monkeypatch.setattr(JournalFile, "write", once)
    async with Journal.open(at(tmp_path)) as journal:
        journal.put_job(job(1))
        committing = asyncio.create_task(journal.commit())
        await committing
        journal.put_job(job(2))
        with pytest.raises(DiskLow):
            await journal.commit()
        monkeypatch.setattr(JournalFile, "write", write)
    gc.collect()
    assert [one.id for one in (await what_is_there(tmp_path))[0]] == ["job-1", "job-2"]
