"""`PROVIDER=docker`: looks at the engine, the image and what that needs, then leaves desktops to whoever makes such."""

from __future__ import annotations

import shutil
import time
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import anyio.to_thread
import structlog

from ...errors import BootFailed, DiskUnusable, ImageMissing, SettingsError, StartError
from ...models import ResetPath
from ...settings import Settings
from ...vm.disks import check_disk
from ...vm.engine import Engine as Machines
from ...vm.kvm import Kvm
from ..base import Console, Death, Driver, InstanceSpec, Made, Report, Traits
from . import images
from .containers import Containers
from .desktops import ContainerDesktops
from .engine import OLDEST_API, Engine, api_version, start_error
from .images import Image
from .machines import Trials, machines

logger = structlog.get_logger(__name__)

TOLD_EVERY = 5.0
"""Seconds between two lines about a pull."""


class DockerDriver(Driver):
    """Desktops of one daemon on the Docker engine of this host. They outlive the daemon; its next start takes them over
    or removes them.

    The image's label io.envd.kind says what it is: `desktop`, `qemu`, or, without one, anybody's image that keeps
    OSWorld's contract of ports, environment and mounts.
    """

    name: ClassVar[str] = "docker"

    def __init__(self, settings: Settings, daemon_id: str) -> None:
        self._settings = settings
        self._daemon_id = daemon_id
        self._image: Image | None = None
        self._desktops: ContainerDesktops | Machines
        self._open: AsyncExitStack

    @property
    def image(self) -> str:
        return str(self._image or self._settings.docker_image)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            try:
                await self._begin(opening)
            except DiskUnusable as error:
                raise SettingsError(f"ENVD_VM_DISK: {error.detail}", hint=error.hint, **error.facts) from error
            except BootFailed as error:
                raise start_error(error) from error
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What went wrong in the caller's block is not the business of what is closed here.
        await self._open.__aexit__(None, None, None)

    async def _begin(self, opening: AsyncExitStack) -> None:
        engine = await opening.enter_async_context(Engine(self._settings.docker_host))
        if api_version(engine.about) < OLDEST_API:
            oldest = ".".join(map(str, OLDEST_API))
            raise StartError(
                f"Docker {engine.about.version} speaks version {engine.about.api} of its API, and envd needs {oldest}.",
                hint="Update Docker: 19.03 of 2019 is new enough.",
            )
        self._image = image = await self._have_image(engine)
        containers = Containers(engine, self._daemon_id)
        disk = await self._disk_for(image)
        await opening.enter_async_context(containers)
        kvm: Kvm | None = None
        if image.kind == "qemu":
            made, kvm = await machines(self._settings, self._daemon_id, engine, containers, image)
            self._desktops = await opening.enter_async_context(made)
            self.traits: Traits = await anyio.to_thread.run_sync(made.traits)
        else:
            if disk is not None:
                kvm = await Trials(engine, containers, image, self._daemon_id).kvm(self._settings)
            self._desktops = desktops = ContainerDesktops(
                self._settings,
                self._daemon_id,
                containers,
                image,
                cpus=engine.about.cpus,
                disk=disk,
                kvm=kvm is not None and kvm.works,
            )
            self.traits = desktops.traits
        told = {"kvm": kvm.state.value, "detail": kvm.detail, "fix": kvm.fix} if kvm else {}
        logger.info("docker", engine=engine.about.version, image=str(image), kind=image.kind, **told)

    async def _have_image(self, engine: Engine) -> Image:
        name = self._settings.docker_image
        try:
            return await images.find(engine, name)
        except ImageMissing:
            if self._settings.pull != "missing":
                raise
        logger.info("pulling the image", image=name)
        told = time.monotonic()
        async with aclosing(images.pull(engine, name)) as news:
            async for pulling in news:
                if time.monotonic() - told > TOLD_EVERY:
                    told = time.monotonic()
                    logger.info("pulling", image=name, bytes=pulling.done, of=pulling.total, now=pulling.words)
        return await images.find(engine, name)

    async def _disk_for(self, image: Image) -> Path | None:
        """Of a foreign image. Raises DiskUnusable, SettingsError."""
        if image.kind != "foreign":
            return None
        if self._settings.vm_disk is not None:
            return await anyio.to_thread.run_sync(_checked, self._settings.vm_disk)
        if images.PUBLISHED in image.name:
            raise SettingsError(
                f"{image.name} boots a disk, and none is given.",
                hint="Set ENVD_VM_DISK to OSWorld's Ubuntu.qcow2 (from its Ubuntu.qcow2.zip, unpacked).",
            )
        return None

    async def admit(self, report: Report) -> None:
        await self._desktops.admit(report)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        return await self._desktops.create(spec, report)

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        return await self._desktops.adopt(instance_id, report)

    def next_path(self) -> ResetPath:
        return self._desktops.next_path()

    def console(self, instance_id: str) -> Console | None:
        return self._desktops.console(instance_id)

    async def destroy(self, instance_id: str) -> None:
        await self._desktops.destroy(instance_id)

    async def list(self) -> frozenset[str]:
        return await self._desktops.list()

    async def wait(self, instance_id: str) -> Death:
        return await self._desktops.wait(instance_id)

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        return await self._desktops.log_tail(instance_id, lines)


def _checked(disk: Path) -> Path:
    return check_disk(disk, shutil.which("qemu-img")).path
