"""Admission of virtual machines: what is waited for, with which numbers, and for how long."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from envd.drivers.base import Report
from envd.errors import OutOfMemory
from envd.vm.capacity import CLONE_GUESS, RESERVE, Admission, Memory, clone_width, host_memory

GIB = 1024**3


class Host:
    """What a kernel would tell of one."""

    def __init__(self, root: Path) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.group("", {})
        self.memory(total=16 * GIB, available=8 * GIB)
        self.processors(idle=0, busy=0)
        (self.proc / "self/cgroup").write_text("0::/a/b\n")

    def memory(self, *, total: int, available: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n")

    def processors(self, *, idle: int, busy: int, running: int = 1) -> None:
        (self.proc / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 0\nprocs_running {running}\n")

    def group(self, name: str, files: dict[str, str]) -> None:
        directory = self.groups / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, words in files.items():
            (directory / file).write_text(words)

    def admission(self) -> Admission:
        return Admission(own_group=False, cores=4, proc=self.proc)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


class Told(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.doing: list[str] = []
        self.notes: list[str] = []
        self.heard = anyio.Event()

    def progress(self, words: str) -> None:
        self.doing.append(words)
        self.heard.set()

    def note(self, words: str) -> None:
        self.notes.append(words)


def test_memory_is_the_hosts_unless_a_control_group_leaves_less(host: Host) -> None:
    assert host_memory(host.proc, host.groups, own_group=True) == Memory(16 * GIB, 8 * GIB)
    stat = f"anon 1\ninactive_file {GIB}\n"
    host.group("a", {"memory.max": f"{4 * GIB}\n", "memory.current": f"{2 * GIB}\n", "memory.stat": stat})
    host.group("a/b", {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 5\n"})
    assert host_memory(host.proc, host.groups, own_group=True) == Memory(4 * GIB, 3 * GIB)
    assert host_memory(host.proc, host.groups, own_group=False) == Memory(16 * GIB, 8 * GIB)


def test_this_host_can_be_read() -> None:
    memory = host_memory(own_group=True)
    assert 0 < memory.available <= memory.limit


async def test_a_machine_waits_for_memory_and_says_how_much_is_missing(host: Host) -> None:
    host.memory(total=16 * GIB, available=GIB)
    told = Told()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.admission().for_memory, 4 * GIB, "a machine", told)
        await told.heard.wait()
        host.memory(total=16 * GIB, available=4 * GIB + RESERVE)
    assert told.doing == [
        "waiting for memory: a machine needs 4.0 GiB and 512 MiB stay free, 1.0 GiB are there",
    ]


async def test_a_machine_larger_than_the_host_is_refused_at_once(host: Host) -> None:
    with pytest.raises(OutOfMemory) as caught:
        await host.admission().for_memory(17 * GIB, "a machine", Told())
    assert caught.value.facts == {"needed_bytes": 17 * GIB, "limit_bytes": 16 * GIB}


async def test_a_cold_boot_waits_until_two_processors_are_idle(host: Host) -> None:
    told = Told()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.admission().for_cold_boot, told)
        await anyio.sleep(0.3)
        host.processors(idle=0, busy=100)
        await told.heard.wait()
        await anyio.sleep(0.3)
        host.processors(idle=200, busy=300)  # two of the four
    assert told.doing == ["waiting for processors: a boot needs 1.5 idle ones, 0.0 are"]
    assert told.notes == []


async def test_a_cold_boot_on_a_host_that_stays_busy_goes_on_with_a_note(host: Host) -> None:
    told = Told()
    admission = host.admission()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(admission.for_cold_boot, told, 2.5)
        await anyio.sleep(0.3)
        host.processors(idle=0, busy=400)
        await anyio.sleep(1)
        host.processors(idle=0, busy=800)
        await anyio.sleep(1)
        host.processors(idle=0, busy=1200)
    assert told.notes == ["This boot will be slow: fewer than 1.5 processors were idle for 2 s."]


async def test_a_clone_waits_on_a_crowded_host_and_not_for_ever(host: Host) -> None:
    host.processors(idle=0, busy=0, running=24)
    told = Told()
    await host.admission().for_clone(told, 0.6)
    assert told.doing[0] == "waiting for processors: 24 threads want to run on 4 of them"
    assert told.notes == ["This clone will be slow: 6 and more threads wanted each processor for 1 s."]


async def test_a_clone_goes_on_as_soon_as_the_crowd_is_gone(host: Host) -> None:
    host.processors(idle=0, busy=0, running=24)
    told = Told()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.admission().for_clone, told, 60)
        await told.heard.wait()
        host.processors(idle=0, busy=0, running=23)
    assert told.notes == []


@pytest.mark.parametrize(
    ("asked", "available", "cores", "width"),
    [
        pytest.param(None, 24 * GIB, 4, 2, id="half of the cores"),
        pytest.param(None, 24 * GIB, 1, 1, id="at least one"),
        pytest.param(None, 3 * CLONE_GUESS, 64, 3, id="as many as memory has room for"),
        pytest.param(7, GIB, 1, 7, id="as many as were asked for"),
    ],
)
def test_clones_come_up_as_wide_as_the_host_is(asked: int | None, available: int, cores: int, width: int) -> None:
    assert clone_width(asked, Memory(32 * GIB, available), cores) == width
