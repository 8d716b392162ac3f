"""Where a QEMU process runs: a container (`drivers/docker`) or a sandboxed process of this host (`drivers/qemu`).

Inside every cell the same paths mean the same things, so one command line fits all:

    /run/vm         the machine's own directory: qmp.sock, vnc.sock, serial.log, overlay.qcow2, frames
    /template       the template it is cloned from: ram, state, disk.qcow2; shared by all its clones
    /System.qcow2   the disk that the image's machines begin with, read-only
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..models import Endpoints

if TYPE_CHECKING:
    from ..drivers.base import Death, Report
    from .monitor import Monitor

RUN, TEMPLATE, DISK = "/run/vm", "/template", "/System.qcow2"

Role = Literal["desktop", "template", "trial"]
"""desktop: handed out. template: boots to be frozen. trial: a clone that a new template is tried with."""


@dataclass(frozen=True, slots=True)
class CellSpec:
    """A QEMU process that is to be started.

    name        [a-z0-9-], at most 63 characters: the desktop's id, for the other roles with a suffix
    desktop_id  the desktop that it is started for; destroying that one takes this with it
    argv        QEMU's command line, with paths as they are inside
    run         directory of this host that is /run/vm, laid out already and writable by the cell
    disk        file of this host that is /System.qcow2, if any
    template    directory of this host that is /template, if any
    memory      bytes of the guest's memory; QEMU itself takes some 200 MB beside it
    kvm         whether it is given /dev/kvm
    """

    name: str
    desktop_id: str
    role: Role
    argv: tuple[str, ...]
    run: Path
    memory: int
    disk: Path | None = None
    template: Path | None = None
    kvm: bool = False
    job_id: str = ""
    env: int | None = None
    deadline: float | None = None


class Cell(ABC):
    """Starts, watches and ends QEMU processes. Methods may be called concurrently and cancelled at any await; `end`
    of the same name removes whatever is left. Engine: `envd/vm/engine.py`."""

    @abstractmethod
    def forward(self, port: int) -> str:
        """The host's side of a `hostfwd` rule for this port of the guest: `tcp:127.0.0.1:0` where QEMU is to choose,
        `tcp:0.0.0.0:5000` inside a container."""

    @abstractmethod
    async def start(self, spec: CellSpec, report: Report) -> None:
        """Start the process; return when it runs. Raises BootFailed."""

    async def adopt(self, name: str) -> bool:
        """Whether a process that an earlier life of this daemon started runs, and is known from here on as if it had
        been started now. Raises InfraError when that cannot be told. Cells that end with the daemon adopt none."""
        return False

    @abstractmethod
    async def endpoints(self, name: str, monitor: Monitor) -> Endpoints:
        """Where its forwarded ports are reached from this host. `monitor` is connected."""

    @abstractmethod
    async def end(self, name: str) -> None:
        """Kill it and return when it is gone, with all that the cell itself made for it (not `CellSpec.run`).
        Idempotent. Raises InfraError if that could not be confirmed."""

    @abstractmethod
    async def wait(self, name: str) -> Death:
        """Return when the process has ended or does not exist."""

    @abstractmethod
    async def log_tail(self, name: str, lines: int) -> tuple[str, ...]:
        """Its last words on stdout and stderr. Never raises."""

    @abstractmethod
    async def names(self) -> dict[str, str]:
        """Every cell of this daemon that exists, in whatever state: its name → the id of the desktop it is for."""
