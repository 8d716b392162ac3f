"""`envd templates create`: boots one machine and freezes it, in this process, with no daemon or beside one."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
from anyio.to_thread import run_sync
from rich.console import Console

from .. import log
from ..client.transport import OnRetry
from ..daemon import daemon_id, locked
from ..errors import SettingsError
from ..events import EventLog
from ..models import Event, ResetPath
from ..service import Service, open_service
from ..settings import Settings
from .images import look
from .listing import console
from .watch import watch

PLACE = "templates"
"""The folder in the state directory that this command works in, so that it is no second daemon in the daemon's own. It
stays: what a killed one has left behind carries the id that is kept there, and the next one removes it."""


async def create(settings: Settings, output: Console | None = None) -> int:
    """Show how it goes as `envd watch` does. 0 if there is a template for these settings in the end, else 1.

    Raises StartError when the provider cannot be used or has no templates, StateDirLocked when another one is at it.
    """
    output = output or console()
    await _refuse_without_templates(settings)
    log.setup("error", settings.log_format)
    async with _machines(settings) as service:
        if service.driver.next_path() is ResetPath.RESTORE:
            output.out("There is a template for these settings already.")
            return 0
        job = await service.prewarm()
        await watch(_Here(service.events), job.id, output)
        if (await service.queue.ended(job.id)).error is not None:
            return 1
        if service.driver.next_path() is not ResetPath.RESTORE:
            output.out("No template came of it; what was told above says why.")
            return 1
    await run_sync(_hand_over, settings)
    output.out("There is a template for these settings now.")
    return 0


async def _refuse_without_templates(settings: Settings) -> None:
    """Raise what keeps these settings from ever having one, before anything is booted for nothing."""
    if settings.templates == "off":
        raise SettingsError("ENVD_TEMPLATES=off: machines are booted each time.", hint="Unset it to have a template.")
    hint = "Set PROVIDER=docker and ENVD_DOCKER_IMAGE=envd/qemu, or PROVIDER=qemu."
    if settings.provider == "local":
        raise SettingsError("PROVIDER=local makes no virtual machines to clone.", hint=hint)
    if settings.provider == "docker":
        (image, *_), trouble = await look(settings)
        if trouble is not None:
            raise trouble
        if image.present and image.kind != "qemu":
            raise SettingsError(f"Desktops of {image.name} cannot be cloned: it is no machine of ours.", hint=hint)


def _hand_over(settings: Settings) -> None:
    """A template's full state lies on the disk of who made it; the daemon looks for it at its own place."""
    for state in settings.state_dir.glob(f"{PLACE}/{settings.provider}/saved/*"):
        place = settings.state_dir / settings.provider / "saved" / state.name
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        state.rename(place)


@asynccontextmanager
async def _machines(settings: Settings) -> AsyncIterator[Service]:
    """What a daemon has below its HTTP server, for one desktop."""
    directory = settings.state_dir / PLACE
    alone = settings.model_copy(update={"state_dir": directory, "envs": 1, "spares": 0, "prewarm": False})
    async with (
        _held(directory) as identity,
        open_service(alone, identity) as service,
        anyio.create_task_group() as tasks,
    ):
        started = anyio.Event()
        tasks.start_soon(service.run, started.set)
        await started.wait()
        try:
            yield service
        finally:
            with anyio.CancelScope(shield=True):
                await service.drain()
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def _held(directory: Path) -> AsyncIterator[str]:
    """The directory is ours; the id that marks what is made from there."""
    with ExitStack() as stack:
        await run_sync(stack.enter_context, locked(directory))
        yield await run_sync(daemon_id, directory)


class _Here:
    """The events of this process, as a client has those of a server."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    async def watch(
        self, job_id: str | None = None, *, patience: float | None = None, on_retry: OnRetry | None = None
    ) -> AsyncGenerator[Event, None]:
        """Of one job, up to the one that shows its end. Nothing of this is retried."""
        async for batch in self._events.follow(0):
            for event in batch or ():
                if event.job_id == job_id:
                    yield event
                    if event.job is not None and event.job.state.terminal:
                        return
