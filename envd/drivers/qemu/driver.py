"""`PROVIDER=qemu`: looks at what the host has for it, then leaves everything to `envd/vm`."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import anyio
import structlog

from ...models import ResetPath
from ...settings import Settings
from ...vm.engine import Engine
from ...vm.kvm import prove
from ...vm.machine import Accel
from ..base import Console, Death, Driver, InstanceSpec, Made, Report, Traits
from .cell import ProcessCell
from .host import Qemu, find_qemu

logger = structlog.get_logger(__name__)


class QemuDriver(Driver):
    """Desktops of one daemon, under `state_dir/qemu`. A state directory has one daemon, so all there are ours. They end
    with the daemon (`cell.py`), so there are none to adopt."""

    name: ClassVar[str] = "qemu"

    def __init__(
        self, settings: Settings, daemon_id: str
    ) -> None:  # a state directory has one daemon: all there are ours
        self._settings = settings
        self._root = settings.state_dir.absolute() / "qemu"
        self._qemu: Qemu
        self._engine: Engine
        self._open: AsyncExitStack

    @property
    def desktops(self) -> Path:
        """Holds a folder for each, with the machine's directory in it."""
        return self._root / "desktops"

    @property
    def image(self) -> str:
        return self._qemu.name

    async def __aenter__(self) -> Self:
        """Raises MissingDependency for a missing package, StartError where the kernel forbids the sandbox,
        SettingsError for a disk that cannot be used."""
        self._qemu = await find_qemu()
        await anyio.to_thread.run_sync(lambda: self._root.mkdir(mode=0o700, parents=True, exist_ok=True))
        kvm = await prove(self._settings.state_dir, self._qemu.name)
        accel: Accel = "kvm" if kvm.works else "tcg"
        logger.info("virtual machines", qemu=self._qemu.name, accelerator=accel, kvm=kvm.detail, fix=kvm.fix)
        async with AsyncExitStack() as opening:
            cell = await opening.enter_async_context(ProcessCell.open(self._root, self._qemu.version))
            self._engine = await opening.enter_async_context(
                Engine(
                    self._settings,
                    cell,
                    name=self.name,
                    directory=self._root,
                    image=self._qemu.name,
                    qemu=self._qemu.version,
                    accel=accel,
                    why_emulated="" if kvm.works else kvm.detail,
                )
            )
            self.traits: Traits = await anyio.to_thread.run_sync(self._engine.traits)
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The machines that are left end, since they cannot outlive this process. What went wrong in the caller's
        block is not the business of what is closed here."""
        await self._open.__aexit__(None, None, None)

    async def admit(self, report: Report) -> None:
        await self._engine.admit(report)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        return await self._engine.create(spec, report)

    def next_path(self) -> ResetPath:
        return self._engine.next_path()

    def console(self, instance_id: str) -> Console | None:
        return self._engine.console(instance_id)

    async def destroy(self, instance_id: str) -> None:
        await self._engine.destroy(instance_id)

    async def list(self) -> frozenset[str]:
        return await self._engine.list()

    async def wait(self, instance_id: str) -> Death:
        return await self._engine.wait(instance_id)

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        return await self._engine.log_tail(instance_id, lines)
