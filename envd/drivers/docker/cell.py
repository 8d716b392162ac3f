"""The container around a virtual machine of ours: what `envd/vm` starts its QEMU processes in."""

from __future__ import annotations

import os

import anyio.to_thread

from ...errors import BootFailed
from ...models import Endpoints
from ...vm.cell import Cell, CellSpec
from ...vm.monitor import Monitor
from ..base import Death, Report
from . import recipes
from .containers import Containers
from .engine import About, Engine
from .images import Image

LAYER = 128 * 1024**2
"""Bytes that a cell may write beside its overlay, which is not on the engine's disk."""


class DockerCell(Cell):
    """Cells of one daemon, made of our image `envd/qemu`. They run as this process's user, whose files they are given,
    without any privilege."""

    def __init__(self, engine: Engine, containers: Containers, image: Image, daemon_id: str) -> None:
        self._engine = engine
        self._containers = containers
        self._image = image
        self._daemon_id = daemon_id
        self._ports: dict[str, dict[int, int]] = {}

    def forward(self, port: int) -> str:
        return f"tcp:0.0.0.0:{port}"

    async def start(self, spec: CellSpec, report: Report) -> None:
        who = recipes.Identity(
            self._daemon_id, spec.desktop_id, spec.role, job=spec.job_id, env=spec.env, deadline=spec.deadline
        )
        about = self._engine.about
        recipe = await anyio.to_thread.run_sync(
            lambda: recipes.of_cell(self._image.id, who, spec, user=user_of(about), own_users=about.remapped)
        )
        self._ports[spec.name] = await self._containers.start(spec.name, recipe, report, disk=LAYER)

    async def adopt(self, name: str) -> bool:
        ports = await self._containers.adopt(name, self._image.kind)
        if ports is not None:
            self._ports[name] = ports
        return ports is not None

    async def endpoints(self, name: str, monitor: Monitor) -> Endpoints:
        if name not in self._ports:
            raise BootFailed(f"There is no container {name}.")
        return recipes.endpoints(self._ports[name])

    async def end(self, name: str) -> None:
        await self._containers.remove(name=name)
        self._ports.pop(name, None)

    async def wait(self, name: str) -> Death:
        return await self._containers.wait(name)

    async def log_tail(self, name: str, lines: int) -> tuple[str, ...]:
        return await self._containers.log_tail(name, lines)

    async def names(self) -> dict[str, str]:
        return await self._containers.names()


def user_of(about: About) -> str:
    """This process's user, as uid:gid inside. An engine that runs as this user maps it to root: nobody else in there
    has its rights."""
    return "0:0" if about.rootless else f"{os.getuid()}:{os.getgid()}"
