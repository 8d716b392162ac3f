"""How this host and this process fare: processors, memory, disk, and how late the event loop is. One sample every few
seconds, of which the last half hour is kept; the dashboard and `/metrics` read the same.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from .telemetry.watchdog import Watchdog
from .vm.capacity import host_memory

logger = structlog.get_logger(__name__)

SAMPLE_SECONDS = 2.0
KEPT = 900
"""Samples: half an hour of them."""
TICK = 0.1
"""Seconds between two looks at how late the loop is."""
LATE = 0.5
"""Seconds of lag that are worth a line in the log."""


@dataclass(frozen=True, slots=True)
class HostSample:
    """`at` in Unix seconds; `cpu` is the share of all processors that was busy since the sample before, 0 to 1; memory
    and disk in bytes, the disk being that of the state directory; `loop_lag_s` is the latest that the event loop was in
    that time, in seconds; `process_memory` the daemon's own resident memory, in bytes."""

    at: float
    cpu: float
    cores: int
    load1: float
    memory_total: int
    memory_available: int
    disk_total: int
    disk_free: int
    process_memory: int
    loop_lag_s: float

    @property
    def as_json(self) -> dict[str, float]:
        return asdict(self)


class Host:
    """Samples while `run` does."""

    def __init__(self, state_dir: Path, proc: Path = Path("/proc")) -> None:
        self._state_dir = state_dir
        self._proc = proc
        self._kept: deque[HostSample] = deque(maxlen=KEPT)
        self._ticks = (0, 0)
        self._lag = 0.0
        self._changed = asyncio.Event()

    @property
    def latest(self) -> HostSample | None:
        """None before the first one."""
        return self._kept[-1] if self._kept else None

    @property
    def samples(self) -> tuple[HostSample, ...]:
        """Oldest first."""
        return tuple(self._kept)

    async def next(self) -> HostSample:
        """The next one, once it is there."""
        await self._changed.wait()
        return self._kept[-1]

    async def run(self) -> None:
        """Until cancelled."""
        with Watchdog() as watchdog:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_loop, watchdog)
                await self._sample()

    async def _sample(self) -> None:
        while True:
            try:
                # A disk that hangs holds up the thread alone, and not the end of the daemon.
                self._keep(await anyio.to_thread.run_sync(self._look, abandon_on_cancel=True))
            except (OSError, LookupError, ValueError) as error:  # /proc of a sandbox may lack this or that
                logger.warning("the host could not be looked at", error=f"{type(error).__name__}: {error}")
            await anyio.sleep(SAMPLE_SECONDS)

    async def _watch_loop(self, watchdog: Watchdog) -> None:
        due = time.monotonic() + TICK
        while True:
            watchdog.beat()
            await anyio.sleep(max(0.0, due - time.monotonic()))
            late = max(0.0, time.monotonic() - due)
            self._lag = max(self._lag, late)
            if late > LATE:
                logger.warning("the event loop was late", seconds=round(late, 3))
            due = time.monotonic() + TICK

    def _keep(self, sample: HostSample) -> None:
        self._kept.append(sample)
        self._changed.set()
        self._changed = asyncio.Event()

    def _look(self) -> HostSample:
        """Blocks, if a disk does."""
        idle, total = self._processors()
        idle_before, total_before = self._ticks
        self._ticks = idle, total
        spent = total - total_before
        memory = host_memory(self._proc, own_group=False)
        disk = shutil.disk_usage(self._state_dir)
        lag, self._lag = self._lag, 0.0
        return HostSample(
            at=round(time.time(), 3),
            cpu=round(1 - (idle - idle_before) / spent, 4) if spent > 0 else 0.0,
            cores=os.cpu_count() or 1,
            load1=round(os.getloadavg()[0], 2),
            memory_total=memory.limit,
            memory_available=memory.available,
            disk_total=disk.total,
            disk_free=disk.free,
            process_memory=_resident(self._proc),
            loop_lag_s=round(lag, 4),
        )

    def _processors(self) -> tuple[int, int]:
        """Ticks that they idled or waited for disks, and all, since the host booted."""
        numbers = [int(word) for word in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)


def _resident(proc: Path) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", (proc / "self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
