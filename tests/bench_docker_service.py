"""`make bench-docker` and `make soak-docker`: the whole service in this process, without its HTTP port.

    async with running(settings(place, provider="docker", docker_image="envd/qemu")) as service:
        timeline = await reset(service, env=0)

In this process, since a desktop's console, which is measured too, has no HTTP route.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from envd.daemon import daemon_id
from envd.errors import EnvdError
from envd.models import Desktop, Job, JobState, ProbeResult, ResetPath
from envd.service import Service, open_service
from envd.settings import Settings, load

MINE = ("CPU_CORES", "DISK_SIZE", "DOCKER_HOST", "ENVD_CLONE_WIDTH", "ENVD_SIM", "ENVD_VM_DISK", "RAM_SIZE")
"""Settings of whoever runs a bench that are heeded; the others would change what it compares."""
MEMORY = "2G"
"""Of a machine, unless RAM_SIZE says otherwise: what the earlier figures it is compared with were measured with."""
BOOT_LIMIT = 1200.0
"""Seconds. An emulated machine boots in one minute, on a busy host in five."""
LEAVE = 120.0
"""Seconds in which a bench takes away what it made, also when it was interrupted."""

_tasks = itertools.count()


@dataclass(frozen=True)
class Place:
    """Where one run keeps what it makes."""

    state: Path
    templates: Path


@contextmanager
def place(kept: Path | None = None) -> Iterator[Place]:
    """Fresh directories, gone at the end of the block; the templates' one in memory, or `kept`, which stays."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="envd-bench-") as state,
        tempfile.TemporaryDirectory(prefix="envd-bench-", dir=memory if memory.is_dir() else None) as templates,
    ):
        yield Place(Path(state), kept or Path(templates))


def settings(where: Place, **changes: Any) -> Settings:
    """Settings of a daemon in `where`; `changes` by field."""
    heeded = {name: os.environ[name] for name in MINE if name in os.environ}
    asked = {
        "state_dir": where.state,
        "template_dir": where.templates,
        "prewarm": False,
        "ready_timeout": BOOT_LIMIT,
        "action_pause": 0.0,
        "max_steps": 10_000,
        "bundles": 20,
    }
    return load({"RAM_SIZE": MEMORY} | heeded, None, **(asked | changes))


@asynccontextmanager
async def running(how: Settings) -> AsyncIterator[Service]:
    """A service that serves. When the block is left, however that is, its desktops are confirmed gone."""
    mark = await anyio.to_thread.run_sync(daemon_id, how.state_dir)
    async with open_service(how, mark) as service, anyio.create_task_group() as tasks:
        started = anyio.Event()
        tasks.start_soon(service.run, started.set)
        await started.wait()
        try:
            yield service
        finally:
            with anyio.move_on_after(LEAVE, shield=True):
                await service.drain()
                await cleared(service)
            tasks.cancel_scope.cancel()


async def cleared(service: Service) -> None:
    """Take every desktop of the service away, and return when the last is confirmed gone."""
    desktops = service.fleet.desktops()
    for desktop in desktops:
        service.fleet.retire(desktop.id, "the bench has done with it")
    for desktop in desktops:
        await service.fleet.gone(desktop.id)


@dataclass(frozen=True)
class Timeline:
    """How a reset went. Times are seconds from its being asked for; `pictured` is when the guest's port first gave a
    picture, for machines that boot."""

    job: Job
    desktop: Desktop
    pictured: float | None

    @property
    def cloned(self) -> bool:
        """Its desktop is a clone of a template, and not what a failed clone fell back to."""
        return self.job.reset_path is ResetPath.RESTORE and "restore" not in self.names()

    @property
    def framed(self) -> float:
        """A clone's first frame was taken; it is let go on, and made itself next."""
        return self.since("identity" if "identity" in self.names() else "probe")

    @property
    def ready(self) -> float:
        """Both probes have passed, and set-up begins."""
        return self.since("set_up")

    @property
    def whole(self) -> float:
        """The first observation is there."""
        assert self.job.ended_at is not None
        return self.job.ended_at - self.job.created_at

    def since(self, phase: str) -> float:
        """When the phase began, the last of that name. Raises LookupError if there was none."""
        for one in reversed(self.job.phases):
            if one.name == phase:
                return one.started_at - self.job.created_at
        raise LookupError(f"no phase {phase} in {', '.join(self.names())}")

    def names(self) -> list[str]:
        return [phase.name for phase in self.job.phases]

    def probed(self, name: str) -> float | None:
        """When this probe passed on the desktop that was handed out."""
        passed = next((probe.seconds for probe in self.job.probes if probe.name == name), None)
        return None if passed is None else self.since("probe") + passed


class ResetFailed(RuntimeError):
    """A reset that was measured did not succeed; says why."""


async def reset(service: Service, env: int = 0) -> Timeline:
    """Reset `env` to a task that it never had, and wait for the first observation. Raises ResetFailed."""
    job = await service.reset(env, {"id": f"bench-{next(_tasks)}"})
    pictured: float | None = None
    while not job.state.terminal:
        job = await service.queue.changed(job.id, job.version, 60)
        if pictured is None and any(
            probe.name == "screenshot" and probe.result is not ProbeResult.UNKNOWN for probe in job.probes
        ):
            pictured = time.time() - job.created_at
    if job.state is not JobState.SUCCEEDED:
        raise ResetFailed(f"a reset ended {job.state}: {told(job)}")
    desktop = service.env(env).desktop
    assert desktop is not None
    return Timeline(job, desktop, pictured)


def told(job: Job) -> str:
    """Why the job ended as it did, in one paragraph with the last lines of the machine's log."""
    if job.error is None:
        return "no reason was given"
    extra = job.error.model_dump()
    lines = " | ".join(str(line) for line in (extra.get("log") or [])[-5:])
    return f"{job.error.detail} {job.error.hint or ''} {lines}".strip()


def words(error: BaseException) -> str:
    """What happened, of each of those that came together."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(words(one) for one in error.exceptions)
    if isinstance(error, EnvdError):
        return f"{error.detail} {error.hint}".strip()
    return f"{type(error).__name__}: {error}"
