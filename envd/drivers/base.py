"""The promise that every driver keeps. `tests/test_driver_contract.py` holds each of them to it.

A driver makes and destroys instances of one provider and knows nothing of queues, tasks, readiness or HTTP clients.
The caller chooses an instance's id before asking for it, so that whatever happens in between (a cancelled call, a
killed daemon) the instance can be found and removed by that id.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Protocol, Self

from ..actions.gestures import Gesture
from ..models import Endpoints, ResetPath


class Report:
    """Who asked for a boot: told how it goes, and the judge of readiness. This one hears nothing.

    The calls without `async` never block and never raise.
    """

    def progress(self, words: str) -> None:
        """What is being done now, in a few words."""

    def phase(self, name: str) -> None:
        """A stretch of the boot begins and the one before it ends: `template`, `firmware`, `kernel`, …"""

    def note(self, words: str) -> None:
        """Something that somebody should read later: a fallback and why, a way that was not taken."""

    async def ready(self, endpoints: Endpoints) -> None:
        """Return once both readiness probes have passed there; for drivers that need a ready guest to go on (a
        template is one). Never gives up by itself: the caller of `create` holds the deadline."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What is asked for. `id` is [a-z0-9-], at most 48 characters, unique for ever. `screen` is (width, height) in
    pixels. `deadline` is when its boot has failed, in Unix seconds."""

    id: str
    screen: tuple[int, int]
    job_id: str = ""
    env: int | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """An instance that was made.

    path    COLD, or RESTORE when it is a clone of a machine that had passed the readiness probes.
    frame   of a clone, a PNG of its screen taken from outside the guest after it was resumed. With an answer from the
            guest's port it stands for the screenshot probe.
    """

    endpoints: Endpoints
    path: ResetPath = ResetPath.COLD
    frame: bytes | None = None


class Console(Protocol):
    """A desktop's screen, keyboard and pointer, worked from outside the guest: as if at the machine itself.

    Works also when nothing in the guest answers. Calls raise InfraError when the machine cannot be reached. May be
    called concurrently; gestures of two calls do not mix.
    """

    @property
    def pictures(self) -> bool:
        """Whether its pictures were seen to be what the guest itself shows, pointer included. Else they are not used
        as observations."""

    @property
    def input(self) -> bool:
        """Whether its gestures were seen to arrive in the guest. Else programs go to the guest's own server."""

    def takes(self, gestures: Sequence[Gesture]) -> bool:
        """Whether so much input at once is sure to arrive, also in a guest that is too busy to look at it."""

    async def picture(self) -> bytes:
        """The screen as PNG, pointer included."""

    async def perform(self, gestures: Sequence[Gesture]) -> None:
        """Do them in order. Raises InfraError with `facts["sent"]`: whether some may have been done."""

    async def pause(self) -> None:
        """Stop the machine's processors. Idempotent."""

    async def resume(self) -> None:
        """Let them run. Idempotent."""


@dataclass(frozen=True, slots=True)
class Death:
    """How an instance ended by itself. `out_of_memory`: it was killed at the limit that it was given, in bytes."""

    reason: str
    exit_code: int | None = None
    out_of_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """What the daemon must know of a provider to plan with it.

    boot_width          boots that may be in flight at once. More than 1 only if boots share nothing with this host.
    restore_width       restores that may be in flight at once, beside the boots.
    make_before_break   whether an env's old desktop may live while its new one boots (else it is destroyed first).
    keeps_old           whether it lives until the new one is made or has failed, instead of being removed meanwhile.
                        A driver that can `renew` gets it for that.
    parks_spares        whether spares are parked while they wait (`Driver.park`).
    removal_s           how long removing one instance may take before it is asked for again.
    prewarm             whether a first desktop is booted at start unless ENVD_PREWARM says otherwise: for slow boots.
    chrome_grace_s      of a desktop that starts Chrome by itself: how long that may take after its server answers. A
                        second Chrome is not started in it before (ENVD_CHROME_GRACE, if that is longer).
    probe_interval_s    between two tries of a readiness probe, before backoff.
    monitor_interval_s  between two looks at a ready desktop's CDP port.
    """

    boot_width: int = 1
    restore_width: int = 1
    make_before_break: bool = True
    keeps_old: bool = False
    parks_spares: bool = False
    removal_s: float = 60.0
    prewarm: bool = False
    chrome_grace_s: float = 0.0
    probe_interval_s: float = 0.05
    monitor_interval_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Costs:
    """What a provider that is paid by the hour is paid now, and was since this life of the daemon began; by type of
    instance. Dollars are US dollars, without those types whose price is not known."""

    instances: Mapping[str, int]
    usd_per_hour: float
    hours: Mapping[str, float]
    usd: float


class Driver(ABC):
    """Open with `async with`; leaving it closes connections but destroys nothing (the daemon decides that).

    Every method may be called concurrently, and may be cancelled at any await without leaving anything behind that
    `destroy` of the same id would not remove.
    """

    name: ClassVar[str]
    traits: Traits = Traits()

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
    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        """Make the instance and return where its ports will answer, which need not be yet.

        Raises BootFailed when the provider refuses or the instance dies before its addresses are known. After a
        failure or a cancellation the caller calls `destroy(spec.id)`.
        """

    async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
        """Make an instance that nobody uses any more into the clean one that `spec` asks for, if that can be done.

        None if it cannot, or was not done: then `create` is called. From the first change on the instance is known
        by `spec.id` alone, also to `destroy` and after a crash. Raises BootFailed as `create` does. Whatever becomes of
        it, the caller calls `destroy(instance_id)` afterwards.
        """
        return None

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        """Take over an instance of an earlier life of this daemon that is booting or ready, as if `create` had just
        made it: from here on `wait`, `console`, `log_tail` and `destroy` know it. Its ports need not answer yet.

        None if it is not there, has died, or cannot be taken over; whatever is left of it is then destroyed. Raises
        InfraError when the provider does not say. A driver whose instances end with the daemon adopts none.
        """
        return None

    async def park(self, instance_id: str) -> None:
        """Put a ready instance to sleep where it costs less. Idempotent. Raises InfraError; then it is destroyed."""
        raise NotImplementedError(f"{self.name} parks nothing")

    async def unpark(self, instance_id: str, report: Report) -> Made:
        """Wake it. Its ports may be elsewhere, and need not answer yet. Raises BootFailed; then it is destroyed."""
        raise NotImplementedError(f"{self.name} parks nothing")

    def next_path(self) -> ResetPath:
        """How `create` would make an instance now: RESTORE where there is something to clone, else COLD. A plan and no
        promise: what it became is `Made.path`."""
        return ResetPath.COLD

    async def admit(self, report: Report) -> None:  # noqa: B027 - a driver whose desktops are elsewhere admits all
        """Return once this host has the processors and the memory for one instance more; meanwhile `report.progress`
        says what is waited for, with numbers."""

    def console(self, instance_id: str) -> Console | None:
        """The machine's own screen and input, where there is a way to them that was seen to work."""
        return None

    def costs(self) -> Costs | None:
        """What the instances cost; None where nobody is paid for them."""
        return None

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
