"""Whether this host has the memory and the processors for one virtual machine more.

Memory is a must: who waits for it waits until it is there. Processors are not: on a host that is busy with something
else for hours a slow boot is better than none, so who waits for them goes on after a while, and says so.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import anyio

from ..drivers.base import Report
from ..errors import OutOfMemory
from .disks import in_words

MIB = 1024**2
RESERVE = 512 * MIB
"""Bytes that are left to the rest of the host."""
OVERHEAD = 384 * MIB
"""What QEMU itself takes beside the guest's memory: translated code (256 MiB at most), the screen, its own."""
CLONE_GUESS = 400 * MIB
"""What a clone takes until one of its template was measured: 110 to 320 MB were, working."""

COLD_CORES = 2
"""Processors that an emulated boot keeps busy for its whole length."""
COLD_PATIENCE, CLONE_PATIENCE = 60.0, 5.0
"""Seconds to wait for processors at most."""
_CROWD = 6
"""Threads that run or wait to, for each processor: from there on, one clone more slows all of them down. Two clones at
a time with two processors each bring two to four."""
_POLL = 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` is the whole host's, or that of the control group that this process and its children are in."""

    limit: int
    available: int


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), *, own_group: bool) -> Memory:
    """`own_group`: the machines are children of this process, so what limits it limits them. Blocks."""
    numbers = dict(re.findall(r"^(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE))
    memory = Memory(int(numbers["MemTotal"]) * 1024, int(numbers["MemAvailable"]) * 1024)
    if not own_group:
        return memory
    group = next((line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    directory = cgroups / group.strip("/")
    while directory != cgroups.parent:
        memory = _within(memory, directory)
        directory = directory.parent
    return memory


def _within(memory: Memory, group: Path) -> Memory:
    """What one control group (version 2) leaves of it. Page cache that could be dropped counts as free."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return memory
    if not limit.isdigit():
        return memory
    free = int(limit) - used + (int(cache[1]) if cache else 0)
    return Memory(min(memory.limit, int(limit)), min(memory.available, max(free, 0)))


def clone_width(asked: int | None, memory: Memory, cores: int) -> int:
    """How many clones may come up at once. Emulated, one is worth about a core for a second after it resumes; four
    cores had twelve of them ready soonest with two at a time."""
    return asked or max(1, min(cores // 2, memory.available // CLONE_GUESS))


class Admission:
    """Lets machines in one after another, as measured when each of them asks."""

    def __init__(self, *, own_group: bool, cores: int | None = None, proc: Path = Path("/proc")) -> None:
        self._own_group = own_group
        self._cores = cores or len(os.sched_getaffinity(0))
        self._proc = proc

    async def memory(self) -> Memory:
        return await anyio.to_thread.run_sync(lambda: host_memory(self._proc, own_group=self._own_group))

    async def require(self, needed: int, what: str) -> None:
        """Raises OutOfMemory if this host could not have so much even if nothing else ran."""
        memory = await self.memory()
        if needed > memory.limit:
            raise OutOfMemory(
                f"{what} needs {in_words(needed)} of memory, and this host has {in_words(memory.limit)} in all.",
                hint="Lower RAM_SIZE, or use a larger host.",
                needed_bytes=needed,
                limit_bytes=memory.limit,
            )

    async def for_memory(self, needed: int, what: str, report: Report) -> None:
        """Return once `needed` bytes are free beside the reserve. Raises OutOfMemory as `require` does."""
        await self.require(needed, what)
        while (memory := await self.memory()).available < needed + RESERVE:
            report.progress(
                f"waiting for memory: {what} needs {in_words(needed)} and {in_words(RESERVE)} stay free, "
                f"{in_words(memory.available)} are there"
            )
            await anyio.sleep(_POLL)

    async def for_cold_boot(self, report: Report, patience: float = COLD_PATIENCE) -> None:
        """Return once two processors are idle, or all that there are; after `patience` seconds anyway."""
        wanted = min(COLD_CORES, self._cores) * 0.75  # whole idle ones are not to be had while anything else runs
        with anyio.move_on_after(patience):
            while (idle := await self._idle()) < wanted:
                report.progress(f"waiting for processors: a boot needs {wanted:.1f} idle ones, {idle:.1f} are")
            return
        report.note(f"This boot will be slow: fewer than {wanted:.1f} processors were idle for {patience:.0f} s.")

    async def for_clone(self, report: Report, patience: float = CLONE_PATIENCE) -> None:
        """Return unless the host is crowded; after `patience` seconds anyway."""
        with anyio.move_on_after(patience):
            while (crowd := await anyio.to_thread.run_sync(_runnable, self._proc)) >= _CROWD * self._cores:
                report.progress(f"waiting for processors: {crowd} threads want to run on {self._cores} of them")
                await anyio.sleep(_POLL / 4)
            return
        report.note(f"This clone will be slow: {_CROWD} and more threads wanted each processor for {patience:.0f} s.")

    async def _idle(self) -> float:
        """How many processors were idle during a second."""
        before = await anyio.to_thread.run_sync(_ticks, self._proc)
        await anyio.sleep(_POLL)
        after = await anyio.to_thread.run_sync(_ticks, self._proc)
        idle, total = (now - then for now, then in zip(after, before, strict=True))
        return self._cores * idle / total if total else self._cores


def _ticks(proc: Path) -> tuple[int, int]:
    """Idle, and all."""
    first = (proc / "stat").read_text().split("\n", 1)[0]
    numbers = [int(word) for word in first.split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)


def _runnable(proc: Path) -> int:
    """Threads that run or wait for a processor at this moment."""
    found = re.search(r"^procs_running (\d+)", (proc / "stat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
