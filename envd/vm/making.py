"""How a template is made: boot, settle, freeze; then two clones show whether it is one.

What the clones are asked is whether both show, before they go on, the picture that the machine stopped with; whether
one of them, going on, answers on its ports as itself; and which ways past the guest work (`trial.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio

from ..drivers.base import InstanceSpec, Report
from ..errors import BootFailed, InfraError
from ..guest import Guest
from .capacity import OVERHEAD
from .holes import dig_holes
from .identity import How, give_identity, has_helper
from .running import OVERLAY_FILE, Machines, Running, answers, memory_taken, process_of, processor_wanted
from .saved import Saved
from .serial import PHASES
from .templates import OVERLAY, RAM, STATE, Plan, Template, Templates, Trial
from .trial import host_io_works

STILL, STILL_LIMIT = 2.0, 90.0
"""Seconds without a change after which a guest has settled, and after which one that never does is taken as it is."""
BUSY = 0.4
"""Processors that a settled guest uses at most. Emulated, an idle desktop with a browser takes 0.1 to 0.2."""
_LOOK = 0.25
HANG_UP = 20.0
"""Seconds that connections into the guest are given to end by themselves. Whoever probed it keeps his for 15."""
_TRIAL_SECONDS = 300.0
"""For a clone that is tried. Giving up costs a whole boot, and a host may be busy."""
_CLEAN_UP = 30.0
_POLL = 1.0


@dataclass(frozen=True, slots=True)
class Making:
    """What a template is made with. `password` is that of the guest's user."""

    machines: Machines
    templates: Templates
    saved: Saved
    session: aiohttp.ClientSession
    password: str

    async def make(self, plan: Plan, spec: InstanceSpec, report: Report) -> Template:
        """The template, admitted. The caller holds its lock. Raises BootFailed and what the parts raise."""
        directory = await anyio.to_thread.run_sync(self.templates.begin, plan)
        try:
            frame, helper, seconds = await self._freeze(plan, spec, report, directory)
            report.phase("trial")
            trial = await self._try(plan, spec, report, directory, frame, helper)
            await anyio.to_thread.run_sync(dig_holes, directory / RAM)
            return await anyio.to_thread.run_sync(self.templates.admit, plan, trial, seconds)
        finally:
            with anyio.move_on_after(_CLEAN_UP, shield=True):
                await anyio.to_thread.run_sync(lambda: shutil.rmtree(directory, ignore_errors=True))

    async def boot(self, running: Running, report: Report) -> None:
        """Return when the guest's server answers."""
        async with self.machines.alive(running.name, running.serial):
            await answers(self.session, running.endpoints.guest, pause=_POLL)

    async def _freeze(self, plan: Plan, spec: InstanceSpec, report: Report, directory: Path) -> tuple[str, bool, float]:
        """Leaves memory, state and disk in `directory`. Returns the digest of the last picture, whether the guest has
        the identity helper, and how long the boot took."""
        began = time.monotonic()
        report.phase(PHASES[0])
        async with self._ended(spec, "template"):
            async with self.machines.boot(
                plan, spec, report, part="template", template=directory, on_phase=report.phase
            ) as running:
                await self.boot(running, report)
                async with self.machines.alive(running.name, running.serial):
                    await report.ready(running.endpoints)
                    seconds = time.monotonic() - began
                    report.phase("settle")
                    await self._settle(running, report)
                    helper = await has_helper(running.run)
                    report.phase("freeze")
                    await running.monitor.pause()
                    frame = _digest(await running.console.picture())
                    await running.monitor.save_state(directory / STATE)
            await self.machines.cell.end(running.name)
            await anyio.to_thread.run_sync(_take_overlay, running.run / OVERLAY_FILE, directory / OVERLAY)
        return frame, helper, seconds

    async def _settle(self, running: Running, report: Report) -> None:
        """Return when the screen stands still and nobody is connected to the guest: in a clone nobody will be."""
        with anyio.move_on_after(HANG_UP) as hanging_up:
            while True:  # nothing tells when a connection ends
                if "TCP[ESTABLISHED]" not in await running.monitor.human("info usernet"):
                    break
                await anyio.sleep(_LOOK)
        if hanging_up.cancelled_caught:
            report.note("Somebody stayed connected to the machine that became the template; clones see that break.")
        with anyio.move_on_after(STILL_LIMIT) as settling:
            process = await anyio.to_thread.run_sync(process_of, running.run)
            while not await self._is_still(running, process):
                report.progress("waiting until the guest has nothing more to do")
        if settling.cancelled_caught:
            report.note(f"The guest never kept still for {STILL:g} s; the template was made of it as it was.")

    async def _is_still(self, running: Running, process: Path | None) -> bool:
        """Whether the screen did not change for a while, and the guest left its processors idle, which shows also what
        no screen does: in an emulated guest a program may be seconds away from its next line."""
        began, picture = anyio.current_time(), await running.console.picture()
        before = await anyio.to_thread.run_sync(processor_wanted, process)
        while anyio.current_time() - began < STILL:
            await anyio.sleep(_LOOK)
            if await running.console.picture() != picture:
                return False
        after = await anyio.to_thread.run_sync(processor_wanted, process)
        return before is None or after is None or after - before < STILL * BUSY

    async def _try(
        self, plan: Plan, spec: InstanceSpec, report: Report, directory: Path, frame: str, helper: bool
    ) -> Trial:
        """Raises BootFailed for a template that cannot be trusted."""
        await self._same_picture(plan, spec, report, directory, frame)
        async with (
            self._ended(spec, "trial-1"),
            self.machines.clone(
                plan, spec, report, part="trial-1", template=directory, state=directory / STATE
            ) as running,
        ):
            with anyio.fail_after(_TRIAL_SECONDS):
                async with self.machines.alive(running.name, running.serial):
                    return await self._go_on(running, spec, report, frame, helper)

    async def _same_picture(self, plan: Plan, spec: InstanceSpec, report: Report, directory: Path, frame: str) -> None:
        """The clone that never goes on. All that it has is the template's, so its full state is saved, for when the
        memory file cannot be cloned."""
        async with (
            self._ended(spec, "trial-2"),
            self.machines.clone(
                plan, spec, report, part="trial-2", template=directory, state=directory / STATE
            ) as running,
            self.machines.alive(running.name, running.serial),
        ):
            _require_same(frame, await running.console.picture())
            await self.saved.save(plan, running.monitor, directory / OVERLAY, report)

    async def _go_on(self, running: Running, spec: InstanceSpec, report: Report, frame: str, helper: bool) -> Trial:
        guest = Guest(self.session, running.endpoints.guest)
        _require_same(frame, await running.console.picture())
        await running.monitor.resume()
        how: How = "helper" if helper else "command"
        try:
            await give_identity(how, running.run, guest, spec.id, self.password)
        except InfraError as error:
            if helper:
                raise
            how = "none"
            report.note(f"Clones keep the template's host name and machine id, and their clocks are behind: {error}")
        for url in (running.endpoints.guest, running.endpoints.cdp):
            await answers(self.session, url, pause=0.2)
        process = await anyio.to_thread.run_sync(process_of, running.run)
        taken = await anyio.to_thread.run_sync(memory_taken, process)
        seen = await host_io_works(running.console, guest)
        report.note(f"Past the guest: pictures {seen.pictures}, input {seen.input}. {seen.detail}")
        return Trial(
            frame=frame,
            identity=how,
            pictures=seen.pictures,
            input=seen.input,
            io_detail=seen.detail,
            clone_bytes=taken,
        )

    @asynccontextmanager
    async def _ended(self, spec: InstanceSpec, part: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with anyio.move_on_after(_CLEAN_UP, shield=True):
                await self.machines.end(spec.id, part)


def template_memory(plan: Plan) -> int:
    """Bytes that making one takes at most: the clones that it is tried with share nearly all of it."""
    return plan.machine.memory + OVERHEAD


def _require_same(frame: str, picture: bytes) -> None:
    if _digest(picture) != frame:
        raise BootFailed(
            "A clone of the new template does not show what the template showed when it was stopped.",
            hint="Set ENVD_TEMPLATES=off if this guest cannot be cloned.",
        )


def _digest(picture: bytes) -> str:
    """Of a PNG of our own encoder, which makes the same bytes of the same pixels."""
    return hashlib.sha256(picture).hexdigest()


def _take_overlay(overlay: Path, to: Path) -> None:
    """Move the file, whose writer has ended. Raises OSError."""
    with open(os.open(overlay, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise OSError(f"{overlay} is no file")
        with to.open("xb") as target:
            shutil.copyfileobj(source, target, 1024**2)
