"""Machines that run: started in a cell, connected to, watched for their death, ended.

    desktops/<desktop id>/desktop/      /run/vm of the desktop itself
                          template/     of the machine that boots to become a template
                          trial-1/      of the clones that this is tried with
                          trial-2/
                          saved/        what takes a template's place where a full state is restored
                          machine.json  for the next life of the daemon (`kept.py`)

A folder is there before the cell is started, so whatever is left after a crash is found by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio
import structlog

from ..drivers.base import Death, InstanceSpec, Report
from ..errors import EnvdError, InfraError, InstanceDied
from ..models import Endpoints
from .cell import DISK, TEMPLATE, Cell, CellSpec, Role
from .console import UNTRIED, HostIo, VmConsole
from .disks import write_overlay
from .identity import open_identity
from .machine import Ram, command
from .monitor import Monitor
from .serial import WHILE_BOOTING, SerialLog
from .templates import OVERLAY, Plan

logger = structlog.get_logger(__name__)

PORTS = (5000, 9222, 8080)
"""Of the guest: its server, CDP, VLC."""
OVERLAY_FILE = "overlay.qcow2"
SAVED = "saved"

_SUFFIX: dict[str, str] = {"desktop": "", "template": "-t", "trial-1": "-c1", "trial-2": "-c2"}
"""Part of a desktop → what its cell's name has behind the desktop's id."""
_ROLE: dict[str, Role] = {"desktop": "desktop", "template": "template", "trial-1": "trial", "trial-2": "trial"}

_START_SECONDS, _MONITOR_SECONDS, _LOAD_SECONDS = 60.0, 30.0, 120.0
_TRY = aiohttp.ClientTimeout(total=3, sock_connect=1)
_LAST_WORDS = 2.0
"""Seconds for the cell to say how a machine died that hung up."""


@dataclass(eq=False)
class Running:
    """A machine whose QEMU runs, and the connections to it."""

    name: str
    run: Path
    monitor: Monitor
    serial: SerialLog
    console: VmConsole
    endpoints: Endpoints


class Machines:
    """Those of one daemon and provider."""

    def __init__(self, cell: Cell, root: Path) -> None:
        self.cell = cell
        self.root = root
        self._serials: dict[str, SerialLog] = {}
        """Of the machine that was started last for each desktop."""
        self._ended: dict[str, str] = {}
        """Machines that were ended here → why."""

    async def follow(self) -> None:
        """Read the serial consoles, for ever."""
        while True:
            for serial in tuple(self._serials.values()):
                await serial.read_if_due()
            await anyio.sleep(WHILE_BOOTING)

    @asynccontextmanager
    async def boot(
        self,
        plan: Plan,
        spec: InstanceSpec,
        report: Report,
        *,
        part: str = "desktop",
        template: Path | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> AsyncIterator[Running]:
        """A machine that boots from its disk; with `template` its memory is the file `ram` there."""
        async with self._started(
            plan, spec, report, part, DISK, "own" if template is None else "template", template, UNTRIED, on_phase
        ) as running:
            yield running

    @asynccontextmanager
    async def clone(
        self,
        plan: Plan,
        spec: InstanceSpec,
        report: Report,
        *,
        part: str = "desktop",
        template: Path,
        state: Path,
        memory: bool = False,
        seen: HostIo = UNTRIED,
    ) -> AsyncIterator[Running]:
        """A machine that stands where `state` was saved, paused. `memory`: the state holds the memory as well, and the
        machine has its own instead of the template's."""
        ram: Ram = "own" if memory else "clone"
        async with self._started(
            plan, spec, report, part, f"{TEMPLATE}/{OVERLAY}", ram, template, seen, None, waits=memory
        ) as running:
            async with self.alive(running.name, running.serial):
                await running.monitor.load_state(state, memory=memory, timeout=_LOAD_SECONDS)
            yield running

    @asynccontextmanager
    async def adopt(
        self, desktop_id: str, screen: tuple[int, int], seen: HostIo, on_phase: Callable[[str], None]
    ) -> AsyncIterator[Running]:
        """The machine of an earlier life of this daemon, whose cell is known again (`Cell.adopt`). One that was paused
        goes on; one that QEMU itself stopped is refused. Raises InfraError."""
        run = self.root / desktop_id / "desktop"
        serial = self._serials[desktop_id] = SerialLog(run / "serial.log", on_phase)
        async with self._connected(desktop_id, run, serial, screen, seen, fresh=False) as running:
            async with self.alive(running.name, serial):
                status = await running.monitor.status()
                if status == "paused":
                    await running.monitor.resume()
                elif status != "running":
                    raise InfraError(f"The machine {desktop_id} does not run: QEMU calls it {status}.")
            yield running

    @asynccontextmanager
    async def alive(self, name: str, serial: SerialLog) -> AsyncIterator[None]:
        """Cut the block short when the machine dies. Raises InstanceDied then, else what the block raises."""
        death: Death | None = None
        failure: Exception | None = None

        async def watch() -> None:
            nonlocal death
            death = await self.wait(name)
            race.cancel_scope.cancel()

        async with anyio.create_task_group() as race:
            race.start_soon(watch)
            try:
                yield
            except Exception as error:  # noqa: BLE001 - raised again below, and not as one of a group
                failure = error
                if isinstance(error, InfraError) and error.facts.get("cause") == "connection_lost":
                    await anyio.sleep(_LAST_WORDS)
            race.cancel_scope.cancel()
        if death is not None:
            tail = await self.log_tail(name, serial, 40)
            raise InstanceDied(f"The machine died: {death.reason}.", exit_code=death.exit_code, log=tail) from failure
        if failure is not None:
            raise failure

    async def end(self, desktop_id: str, part: str | None = None) -> None:
        """End one machine of a desktop, or all, and remove its folder. Idempotent. Raises InfraError."""
        directory = self.root / desktop_id
        parts = [part] if part else [one for one in _SUFFIX if await anyio.Path(directory / one).exists()]
        names = {desktop_id + _SUFFIX[one] for one in parts}
        if not parts:  # somebody removed the folder; the cells may be there yet
            names = {name for name, owner in (await self.cell.names()).items() if owner == desktop_id}
        failed: list[EnvdError] = []

        async def end_one(name: str) -> None:
            try:
                await self.cell.end(name)
            except EnvdError as error:
                failed.append(error)

        async with anyio.create_task_group() as ends:
            for name in names:
                ends.start_soon(end_one, name)
        if failed:
            raise failed[0]
        await anyio.to_thread.run_sync(_remove, directory / part if part else directory)
        if part is None:
            self._serials.pop(desktop_id, None)
            self._ended.pop(desktop_id, None)

    async def desktops(self) -> frozenset[str]:
        """Ids of all that there is anything of."""
        folders = await anyio.to_thread.run_sync(_folders, self.root)
        return frozenset(folders) | frozenset((await self.cell.names()).values())

    async def end_when_full(self, running: Running) -> None:
        """QEMU stops a machine whose overlay cannot be written to, which from outside looks as if it hung: end it."""
        async with running.monitor.events("BLOCK_IO_ERROR") as errors:
            async for error in errors:
                said = error["data"].get("reason", "an error of its disk")
                logger.error("machine stopped by its disk", name=running.name, reason=said)
                self._ended[running.name] = f"its disk could not be written on this host: {said}"
                await self.cell.end(running.name)
                return

    async def wait(self, name: str) -> Death:
        """How the machine ended; a SIGBUS is explained."""
        death = await self.cell.wait(name)
        if reason := self._ended.get(name):
            return Death(reason, death.exit_code)
        if death.exit_code in (-7, 135):
            return Death(f"{death.reason} (the memory file of its template was cut short)", death.exit_code)
        return death

    async def last_words(self, desktop_id: str, lines: int) -> tuple[str, ...]:
        """Of the desktop's machine, or of the one that was started last on its behalf."""
        serial = self._serials.get(desktop_id)
        name = desktop_id
        if serial is not None:
            name += _SUFFIX[serial.path.parent.name]
        return await self.log_tail(name, serial, lines)

    async def log_tail(self, name: str, serial: SerialLog | None, lines: int) -> tuple[str, ...]:
        """The last lines of its serial console and of QEMU's own, these last. Never raises."""
        console: tuple[str, ...] = ()
        if serial is not None:
            await serial.read()
            console = serial.tail(lines)
        own = await self.cell.log_tail(name, lines)
        return (*console[-max(lines - len(own), lines // 2) :], *own)[-lines:]

    @asynccontextmanager
    async def _started(
        self,
        plan: Plan,
        spec: InstanceSpec,
        report: Report,
        part: str,
        backing: str,
        ram: Ram,
        template: Path | None,
        seen: HostIo,
        on_phase: Callable[[str], None] | None,
        waits: bool = False,
    ) -> AsyncIterator[Running]:
        """`waits`: for its state, as a clone does anyway."""
        forwards = {port: self.cell.forward(port) for port in PORTS}
        argv = [*command(plan.machine, forwards=forwards, ram=ram), *(("-incoming", "defer") if waits else ())]
        run = self.root / spec.id / part
        await anyio.to_thread.run_sync(_lay_out, run, backing, plan.size)
        serial = self._serials[spec.id] = SerialLog(run / "serial.log", on_phase)
        cell = CellSpec(
            name=spec.id + _SUFFIX[part],
            desktop_id=spec.id,
            role=_ROLE[part],
            argv=tuple(argv),
            run=run,
            memory=plan.machine.memory,
            disk=plan.disk.path,
            template=template,
            kvm=plan.machine.accel == "kvm",
            job_id=spec.job_id,
            env=spec.env,
            deadline=spec.deadline,
        )
        with anyio.fail_after(_START_SECONDS):
            await self.cell.start(cell, report)
        async with self._connected(cell.name, run, serial, plan.machine.screen, seen) as running:
            yield running

    @asynccontextmanager
    async def _connected(
        self, name: str, run: Path, serial: SerialLog, screen: tuple[int, int], seen: HostIo, *, fresh: bool = True
    ) -> AsyncIterator[Running]:
        async with AsyncExitStack() as open_things:
            async with self.alive(name, serial):
                opening = Monitor.open(run / "qmp.sock", timeout=_MONITOR_SECONDS)
                monitor = await open_things.enter_async_context(opening)
                endpoints = await self.cell.endpoints(name, monitor)
            console = VmConsole(monitor, run, screen, seen, fresh=fresh)
            yield Running(name, run, monitor, serial, console, endpoints)


async def answers(session: aiohttp.ClientSession, url: str, *, pause: float) -> None:
    """Return once something answers HTTP there. User networking takes every connection, so each try has its own short
    time, and every try is work for a guest that is busy coming up."""
    while True:
        try:
            async with session.get(url, timeout=_TRY, allow_redirects=False):
                return
        except (aiohttp.ClientError, TimeoutError):
            await anyio.sleep(pause)


def process_of(run: Path) -> Path | None:
    """The folder in /proc of the QEMU of this /run/vm; None where it cannot be seen.

    Whoever made a socket to listen on is its peer (SO_PEERCRED), also in another container. Blocks.
    """
    try:
        with open_identity(run) as sock:
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError:
        return None
    return Path(f"/proc/{pid}") if pid else None


def memory_taken(process: Path | None) -> int | None:
    """Bytes that it has for itself: files that it shares with others left out. Blocks."""
    try:
        rollup = (process / "smaps_rollup").read_text() if process else ""
    except OSError:
        return None
    found = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def processor_wanted(process: Path | None) -> float | None:
    """Seconds that its threads ran or waited to run since they began: on a busy host who waits is not idle. Blocks."""
    nanoseconds = []
    with contextlib.suppress(OSError):
        for thread in (process / "task").iterdir() if process else ():
            with contextlib.suppress(OSError):  # it just ended, or this kernel does not tell
                ran, waited, _ = (thread / "schedstat").read_text().split()
                nanoseconds.append(int(ran) + int(waited))
    return sum(nanoseconds) / 1e9 if nanoseconds else None


def _lay_out(run: Path, backing: str, size: int) -> None:
    """Raises OSError."""
    run.parent.mkdir(mode=0o700, exist_ok=True)
    run.mkdir(mode=0o700)
    write_overlay(run / OVERLAY_FILE, backing=backing, size=size)


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]


def _remove(directory: Path) -> None:
    """Raises InfraError."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InfraError(f"{directory} cannot be removed: {error}.", hint="Look at what it holds.") from error
