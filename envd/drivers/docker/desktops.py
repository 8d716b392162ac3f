"""Desktops that are one container each: our own container desktop, and any image that keeps OSWorld's ports."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from ...models import ResetPath
from ...settings import Settings
from ...vm.capacity import Admission
from ...vm.disks import DESKTOP_BUDGET
from ..base import Console, Death, InstanceSpec, Made, Report, Traits
from . import recipes
from .containers import Containers
from .images import Image

CONTAINER = 600 * 1024**2
"""Bytes of memory that a container desktop takes with a page or two open; measured: 330 MB idle."""

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class ContainerDesktops:
    """The same calls as a driver's. `disk` is what a foreign image's virtual machine begins with; without one it is
    taken for a container desktop. `kvm` is whether /dev/kvm was seen to work."""

    def __init__(
        self,
        settings: Settings,
        daemon_id: str,
        containers: Containers,
        image: Image,
        *,
        cpus: int,
        disk: Path | None = None,
        kvm: bool = False,
    ) -> None:
        self._settings = settings
        self._daemon_id = daemon_id
        self._containers = containers
        self._image = image
        self._cpus = cpus
        self._disk = disk
        self._kvm = kvm
        self._admission = Admission(own_group=False)
        self._is_vm = disk is not None
        # A machine that nobody can clone takes minutes to boot, and all of its memory: a first one is booted early, and
        # an env's old one ends before its new one begins. Each look at an emulated guest is work for it.
        self.traits = (
            Traits(prewarm=True, make_before_break=False, probe_interval_s=1.0, monitor_interval_s=1.0)
            if self._is_vm
            else Traits()
        )

    async def admit(self, report: Report) -> None:
        if self._is_vm:
            await self._admission.for_memory(self._settings.ram_size, "a virtual machine", report)
        else:
            await self._admission.for_memory(min(CONTAINER, self._settings.ram_size), "a container desktop", report)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        deadline = spec.deadline or time.time() + self._settings.ready_timeout
        who = recipes.Identity(self._daemon_id, spec.id, job=spec.job_id, env=spec.env, deadline=deadline)
        ports = await self._containers.start(spec.id, self._recipe(who, spec), report, disk=DESKTOP_BUDGET)
        self._containers.follow(spec.id, report)
        return Made(recipes.endpoints(ports))

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        """Its log is read from its beginning, so phases that are over are told once more, all at once."""
        ports = await self._containers.adopt(instance_id, self._image.kind)
        if ports is None:
            return None
        self._containers.follow(instance_id, report)
        return Made(recipes.endpoints(ports))

    def next_path(self) -> ResetPath:
        return ResetPath.COLD

    def console(self, instance_id: str) -> Console | None:
        return None

    async def destroy(self, instance_id: str) -> None:
        if _ID.fullmatch(instance_id):
            await self._containers.remove(desktop=instance_id)

    async def list(self) -> frozenset[str]:
        return frozenset((await self._containers.names()).values())

    async def wait(self, instance_id: str) -> Death:
        return await self._containers.wait(instance_id)

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        return await self._containers.log_tail(instance_id, lines)

    def _recipe(self, who: recipes.Identity, spec: InstanceSpec) -> dict[str, Any]:
        settings = self._settings
        if self._image.kind == "desktop":
            cpus = settings.cpu_cores if settings.cpu_cores < self._cpus else None
            return recipes.of_desktop(self._image.id, who, screen=spec.screen, memory=settings.ram_size, cpus=cpus)
        return recipes.of_foreign(
            self._image.id,
            who,
            memory=settings.ram_size,
            cpus=settings.cpu_cores,
            disk_size=settings.disk_size,
            disk=None if self._disk is None else str(self._disk),
            kvm=self._kvm,
        )
