"""The promise that every driver keeps. `tests/test_driver_contract.py` holds each of them to it.

A driver makes and destroys instances of one provider and knows nothing of queues, tasks, readiness or HTTP clients.
The caller chooses an instance's id before asking for it, so that whatever happens in between (a cancelled call, a
killed daemon) the instance can be found and removed by that id.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from ..models import Endpoints

Report = Callable[[str], None]
"""Told in a few words what the driver is doing now; shown as progress. Never blocks, never raises."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What is asked for. `id` is [a-z0-9-], at most 63 characters, unique for ever. `screen` is (width, height) in
    pixels."""

    id: str
    screen: tuple[int, int]
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """How an instance ended by itself."""

    reason: str
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """What the daemon must know of a provider to plan with it.

    boot_width          boots that may be in flight at once. More than 1 only if boots share nothing with this host.
    make_before_break   whether an env's old desktop may live while its new one boots (else it is destroyed first).
    prewarm             whether a first desktop is booted at start unless ENVD_PREWARM says otherwise: for slow boots.
    probe_interval_s    between two tries of a readiness probe, before backoff.
    monitor_interval_s  between two looks at a ready desktop's CDP port.
    """

    boot_width: int = 1
    make_before_break: bool = True
    prewarm: bool = False
    probe_interval_s: float = 0.05
    monitor_interval_s: float = 0.5


class Driver(ABC):
    """Open with `async with`; leaving it closes connections but destroys nothing (the daemon decides that).

    Every method may be called concurrently, and may be cancelled at any await without leaving anything behind that
    `destroy` of the same id would not remove.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits] = Traits()

    @property
    def image(self) -> str:
        """What its desktops are made of, as a verdict's provenance names it."""
        return self.name

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Check that the provider can be used at all. Raises StartError (MissingDependency, SettingsError) with what
        to do."""

    @abstractmethod
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @abstractmethod
    async def create(self, spec: InstanceSpec, report: Report) -> Endpoints:
        """Make the instance and return where its ports will answer, which need not be yet.

        Raises BootFailed when the provider refuses or the instance dies before its addresses are known. After a
        failure or a cancellation the caller calls `destroy(spec.id)`.
        """

    @abstractmethod
    async def destroy(self, instance_id: str) -> None:
        """Remove the instance and return when it is confirmed gone: no process, no port, no file.

        Idempotent; an id that never existed is gone already. Raises InfraError if it could not be confirmed.
        """

    @abstractmethod
    async def list(self) -> frozenset[str]:
        """Ids of the instances of this daemon that exist, in whatever state. Never those of another daemon."""

    @abstractmethod
    async def wait(self, instance_id: str) -> Death:
        """Return when the instance has died by itself, been destroyed, or does not exist."""

    @abstractmethod
    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        """The last lines the instance wrote. Also for an instance that died; empty when nothing is known. Never
        raises."""
