"""Instances that are virtual machines: a clone, else a full state restored, else a cold boot.

Drivers put a `Cell` under it and pass on what `drivers/base.py` promises. Whatever happens in between, an instance is
found by its id: as a folder (`running.py`), and as its cells.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

import aiohttp
import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from ..drivers.base import Console, Death, InstanceSpec, Made, Report, Traits
from ..errors import BootFailed, DiskUnusable, EnvdError, NoSpace, SettingsError
from ..guest import Guest
from ..models import ResetPath
from ..settings import Settings
from .capacity import CLONE_GUESS, OVERHEAD, Admission, clone_width, host_memory
from .cell import Cell
from .console import HostIo
from .disks import DESKTOP_BUDGET, check_disk, require_space
from .history import History
from .identity import give_identity
from .keeping import Keeper
from .kept import Kept
from .machine import Accel, Machine
from .making import Making, template_memory
from .running import SAVED, Machines, Running
from .saved import Saved
from .serial import PHASES
from .templates import Plan, Template, Templates

logger = structlog.get_logger(__name__)

_ID = re.compile(r"[a-z0-9-]{1,48}")
OWN_CHROME = 300.0
"""Seconds from the first answer of our own guest's server until its Chrome is late. Emulated, 20 were measured."""
_CLOSE_SECONDS = 10.0


@dataclass(eq=False)
class _Held:
    """A desktop's machine, whose connections one task keeps open until it is told to let go."""

    running: Running
    let_go: anyio.Event = field(default_factory=anyio.Event)
    closed: anyio.Event = field(default_factory=anyio.Event)


@dataclass(eq=False)
class _Creating:
    """A `create` that is under way."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)


class Engine:
    """The virtual machines of one daemon and provider, under `directory`. Open with `async with`; leaving it closes
    connections and ends nothing.

    image     names what runs the machines, for their templates' key: another image is another QEMU
    qemu      its version
    accel     kvm only where that was proven; `why_emulated` says why it was not
    """

    def __init__(
        self,
        settings: Settings,
        cell: Cell,
        *,
        name: str,
        directory: Path,
        image: str,
        qemu: tuple[int, int, int],
        accel: Accel = "tcg",
        why_emulated: str = "",
    ) -> None:
        self._settings = settings
        self._name = name
        self._directory = directory.absolute()
        self._image = image
        self._qemu = qemu
        self._accel: Accel = accel
        self._why_emulated = why_emulated
        self._cores = len(os.sched_getaffinity(0))
        self._machines = Machines(cell, self._directory / "desktops")
        self._keeper = Keeper(Templates.of(settings))
        self._saved = Saved(self._directory / "saved")
        self._history = History(self._directory / "boots.json")
        self._admission = Admission(own_group=name == "qemu")
        self._held: dict[str, _Held] = {}
        self._creating: dict[str, _Creating] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._booting = asyncio.Lock()
        self._open = AsyncExitStack()
        self._tasks: TaskGroup
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        """Raises SettingsError for a disk that cannot be used, StartError for a folder of templates that cannot."""
        await anyio.to_thread.run_sync(self._lay_out)
        try:
            plan = await self._plan(self._settings.screen)
        except DiskUnusable as error:
            raise SettingsError(error.detail, hint=error.hint) from error
        if self._settings.templates == "auto":
            await self._keeper.open(plan.key)
        # No connection is kept: to a guest that becomes a template it would be one that every clone begins with.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        self._session = await self._open.enter_async_context(aiohttp.ClientSession(connector=connector))
        self._tasks = await self._open.enter_async_context(_task_group())
        self._tasks.start_soon(self._machines.follow)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            for held in self._held.values():
                held.let_go.set()
            for held in tuple(self._held.values()):
                await held.closed.wait()
        await self._open.aclose()
        self._keeper.close()

    def traits(self) -> Traits:
        """The first boot makes the template and takes as long as any, so it is begun early. A clone costs little memory
        beside the desktop that it follows; a machine that nothing is shared with needs all of its own. Blocks for the
        time of reading a file of /proc."""
        memory = host_memory(own_group=self._name == "qemu")
        return Traits(
            restore_width=clone_width(self._settings.clone_width, memory, self._cores),
            make_before_break=self._settings.templates == "auto",
            prewarm=True,
            # Our own guest starts Chrome itself.
            chrome_grace_s=OWN_CHROME if self._settings.vm_disk is None else 0.0,
            probe_interval_s=0.1,
            monitor_interval_s=1.0,
        )

    # -- making -------------------------------------------------------------------------------------------------

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        """As drivers promise. A machine that had to be booted cold is returned once its server answers: its serial
        console tells until then how far it is."""
        if not _ID.fullmatch(spec.id):
            raise BootFailed(f"{spec.id!r} is no id for a desktop: [a-z0-9-], at most 48 characters.")
        if spec.id in self._creating or await anyio.Path(self._machines.root / spec.id).exists():
            raise BootFailed(f"There is a desktop {spec.id} already.", phase="create")
        making = self._creating[spec.id] = _Creating()
        try:
            with making.scope:
                plan = await self._plan(spec.screen)
                await anyio.to_thread.run_sync(require_space, self._directory, DESKTOP_BUDGET, "A desktop")
                return await self._made(plan, spec, report)
        except OSError as error:
            why = "something did not answer in time" if isinstance(error, TimeoutError) else str(error)
            raise BootFailed(f"The machine cannot be started: {why}.", phase="create") from error
        finally:
            del self._creating[spec.id]
            making.over.set()
        raise BootFailed(f"The desktop {spec.id} was destroyed while it was made.", phase="create")

    async def _made(self, plan: Plan, spec: InstanceSpec, report: Report) -> Made:
        """By the first way that works. Raises EnvdError and OSError of the last one."""
        if self._settings.templates == "off" or self._keeper.gave_up:
            return await self._boot_cold(plan, spec, report)
        try:
            template = await self._keeper.find(plan.key, report) or await self._made_template(plan, spec, report)
        except (EnvdError, OSError) as error:
            report.note(f"There is no template, so this boot is a cold one: {error}")
            return await self._boot_cold(plan, spec, report)
        try:
            return await self._clone(plan, spec, report, template)
        except NoSpace:
            raise  # every other way needs more of it
        except (EnvdError, OSError) as error:
            await self._keeper.clone_failed(template, error, report)
            await self._discard(spec)
        if await anyio.to_thread.run_sync(self._saved.has, plan.key):
            try:
                return await self._restore(plan, spec, report, template)
            except (EnvdError, OSError) as error:
                report.note(f"The full state could not be restored: {error}")
                await self._discard(spec)
                await anyio.to_thread.run_sync(self._saved.forget, plan.key)
        return await self._boot_cold(plan, spec, report)

    def next_path(self) -> ResetPath:
        return ResetPath.COLD if self._keeper.latest is None else ResetPath.RESTORE

    async def admit(self, report: Report) -> None:
        """Return once there is memory for one more, and a processor to bring it up with. Raises OutOfMemory for what
        this host could never do."""
        if (template := self._keeper.latest) is not None:
            measured = template.manifest.trial.clone_bytes
            needed = int(measured * 1.2) if measured else CLONE_GUESS
            await self._admission.for_memory(needed, "a clone", report)
            await self._admission.for_clone(report)
        else:
            needed = self._settings.ram_size + OVERHEAD
            await self._admission.for_memory(needed, f"a machine of RAM_SIZE={self._settings.ram_size}", report)
            await self._admission.for_cold_boot(report)

    async def _boot_cold(self, plan: Plan, spec: InstanceSpec, report: Report) -> Made:
        async with self._turn(report):
            await self._admission.for_memory(plan.machine.memory + OVERHEAD, "a machine", report)
            await self._announce(plan, report)
            began = time.monotonic()
            report.phase(PHASES[0])
            running = await self._hold(spec.id, self._machines.boot(plan, spec, report, on_phase=report.phase))
            await self._keep_in_mind(spec.id, Kept(path=ResetPath.COLD, screen=spec.screen, booted=False), report)
            await self._making.boot(running, report)
            running.serial.quiet()
            await self._keep_in_mind(spec.id, Kept(path=ResetPath.COLD, screen=spec.screen), report)
            await anyio.to_thread.run_sync(self._history.add, plan.key, time.monotonic() - began)
        return Made(running.endpoints)

    async def _clone(self, plan: Plan, spec: InstanceSpec, report: Report, template: Template) -> Made:
        report.phase("clone")
        trial = template.manifest.trial
        seen = self._wanted(HostIo(trial.pictures, trial.input, trial.io_detail))
        opening = self._machines.clone(plan, spec, report, template=template.directory, state=template.state, seen=seen)
        made = await self._go_on(await self._hold(spec.id, opening), spec, report, template)
        await self._keeper.cloned(template)
        return made

    async def _restore(self, plan: Plan, spec: InstanceSpec, report: Report, template: Template) -> Made:
        report.phase("restore")
        await self._admission.for_memory(plan.machine.memory + OVERHEAD, "a full state", report)
        stand_in = self._machines.root / spec.id / SAVED
        await anyio.to_thread.run_sync(self._saved.stand_in, plan.key, stand_in)
        state = self._saved.state(plan.key)
        opening = self._machines.clone(plan, spec, report, template=stand_in, state=state, memory=True)
        return await self._go_on(await self._hold(spec.id, opening), spec, report, template)

    async def _go_on(self, running: Running, spec: InstanceSpec, report: Report, template: Template) -> Made:
        """The machine stands where the template stood. Its picture is the same before and after it goes on."""
        running.serial.quiet()
        how = template.manifest.trial.identity
        guest = Guest(self._session, running.endpoints.guest)
        async with self._machines.alive(running.name, running.serial):
            frame = await running.console.picture()
            await running.monitor.resume()
            report.phase("identity")
            await give_identity(how, running.run, guest, spec.id, self._settings.client_password)
        seen = running.console.seen
        io = {"pictures": seen.pictures, "input": seen.input, "detail": seen.detail}
        await self._keep_in_mind(spec.id, Kept(path=ResetPath.RESTORE, screen=spec.screen, **io), report)
        return Made(running.endpoints, ResetPath.RESTORE, frame)

    async def _keep_in_mind(self, desktop_id: str, kept: Kept, report: Report) -> None:
        """For the next life of this daemon. Without it a machine is as good in this one."""
        try:
            await anyio.to_thread.run_sync(kept.write, self._machines.root / desktop_id)
        except OSError as error:
            report.note(f"The machine cannot be taken over should this daemon die: {error}")

    async def _discard(self, spec: InstanceSpec) -> None:
        """Nothing is left of a try, so that the next can be made under the same id."""
        with anyio.CancelScope(shield=True):
            await self._remove(spec.id)

    async def _made_template(self, plan: Plan, spec: InstanceSpec, report: Report) -> Template:
        """Made now, unless somebody else was quicker."""
        async with self._turn(report), self._keeper.making(plan.key, report):
            if found := await self._keeper.find(plan.key, report):
                return found
            await self._admission.for_memory(template_memory(plan), "a template", report)
            await self._announce(plan, report)
            made = await self._making.make(plan, spec, report)
            await anyio.to_thread.run_sync(self._history.add, plan.key, made.manifest.boot_seconds)
            logger.info("template made", template=plan.key, trial=made.manifest.trial.model_dump())
            return await self._keeper.find(plan.key, report) or made

    # -- taking over --------------------------------------------------------------------------------------------

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        """As drivers promise. Also a machine in the middle of its cold boot; until that is over no other one begins."""
        if not _ID.fullmatch(instance_id) or instance_id in self._creating or instance_id in self._held:
            return None
        making = self._creating[instance_id] = _Creating()
        try:
            with making.scope:
                return await self._adopt(instance_id, report)
        finally:
            del self._creating[instance_id]
            making.over.set()
        return None

    async def _adopt(self, instance_id: str, report: Report) -> Made | None:
        kept = await anyio.to_thread.run_sync(Kept.read, self._machines.root / instance_id)
        if kept is None or not await self._machines.cell.adopt(instance_id):
            return None
        phase = _nobody if kept.booted else report.phase
        opening = self._machines.adopt(instance_id, kept.screen, self._wanted(kept.seen), phase)
        try:
            running = await self._hold(instance_id, opening)
            if kept.booted:
                running.serial.quiet()
            else:
                self._tasks.start_soon(self._finish_boot, running, kept, report)
            if kept.path is ResetPath.COLD:
                return Made(running.endpoints)
            async with self._machines.alive(running.name, running.serial):
                return Made(running.endpoints, kept.path, await running.console.picture())
        except (EnvdError, OSError) as error:
            report.note(f"The machine cannot be taken over: {error}")
            return None

    async def _finish_boot(self, running: Running, kept: Kept, report: Report) -> None:
        try:
            async with self._booting:
                await self._making.boot(running, report)
        except (EnvdError, OSError) as error:
            logger.info("a boot of an earlier life has failed", name=running.name, error=str(error))
        else:
            running.serial.quiet()
            await self._keep_in_mind(running.name, kept.model_copy(update={"booted": True}), report)

    def _wanted(self, seen: HostIo) -> HostIo:
        """What was seen to work, as far as the settings let it be used."""
        return seen if self._settings.host_io == "auto" else HostIo(False, False, seen.detail)

    # -- looking ------------------------------------------------------------------------------------------------

    def console(self, instance_id: str) -> Console | None:
        held = self._held.get(instance_id)
        return held.running.console if held else None

    async def list(self) -> frozenset[str]:
        return await self._machines.desktops()

    async def wait(self, instance_id: str) -> Death:
        return await self._machines.wait(instance_id)

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        """Its serial console, then what QEMU said, of the machine that was started last on the instance's behalf."""
        return await self._machines.last_words(instance_id, lines)

    async def destroy(self, instance_id: str) -> None:
        """As drivers promise. First ends a `create` that is under way: what dies then is no fault of its template."""
        if not _ID.fullmatch(instance_id):
            return
        if making := self._creating.get(instance_id):
            making.scope.cancel()
            await making.over.wait()
        await self._remove(instance_id)

    async def _remove(self, instance_id: str) -> None:
        async with self._locks.setdefault(instance_id, asyncio.Lock()):
            await self._machines.end(instance_id)
            if held := self._held.get(instance_id):
                held.let_go.set()
                await held.closed.wait()

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _making(self) -> Making:
        password = self._settings.client_password
        return Making(self._machines, self._keeper.templates, self._saved, self._session, password)

    async def _plan(self, screen: tuple[int, int]) -> Plan:
        """Raises DiskUnusable."""
        path = self._settings.guest_disk
        disk = await anyio.to_thread.run_sync(lambda: check_disk(path, shutil.which("qemu-img")))
        cpus = min(self._settings.cpu_cores, self._cores)
        machine = Machine(self._settings.ram_size, cpus, self._accel, screen, self._qemu)
        return Plan(machine, disk, max(disk.size, self._settings.disk_size), self._image)

    @asynccontextmanager
    async def _turn(self, report: Report) -> AsyncIterator[None]:
        """Never two cold boots at once."""
        if self._booting.locked():
            report.progress("waiting for the cold boot of another desktop, or for the template that it becomes")
        async with self._booting:
            yield

    async def _announce(self, plan: Plan, report: Report) -> None:
        before = await anyio.to_thread.run_sync(self._history.seconds, plan.key)
        expected = f"took {before:.0f} s on this host the last time" if before else "was not timed on this host yet"
        if plan.machine.accel == "tcg":
            why = f": {self._why_emulated}" if self._why_emulated else ""
            report.note(f"The machine is emulated, without KVM{why}. A cold boot {expected}.")
        else:
            report.progress(f"a cold boot, which {expected}")

    async def _hold(self, desktop_id: str, opening: AbstractAsyncContextManager[Running]) -> Running:
        """Started, and its connections kept open until it is destroyed or the engine is closed."""
        running: Running = await self._tasks.start(self._keep, desktop_id, opening)
        return running

    async def _keep(
        self,
        desktop_id: str,
        opening: AbstractAsyncContextManager[Running],
        *,
        task_status: TaskStatus[Running],
    ) -> None:
        async with opening as running, _task_group() as watching:
            held = self._held[desktop_id] = _Held(running)
            try:
                watching.start_soon(self._machines.end_when_full, running)
                task_status.started(running)
                await held.let_go.wait()
            finally:
                del self._held[desktop_id]
                held.closed.set()

    def _lay_out(self) -> None:
        """What an earlier life left there is let be: it may be taken over."""
        self._machines.root.mkdir(mode=0o700, parents=True, exist_ok=True)


@asynccontextmanager
async def _task_group() -> AsyncIterator[TaskGroup]:
    async with anyio.create_task_group() as tasks:
        yield tasks
        tasks.cancel_scope.cancel()


def _nobody(phase: str) -> None:
    pass
