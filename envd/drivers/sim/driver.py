"""The driver that makes sim desktops, and the journal of what it did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import anyio

from ...errors import BootFailed, InfraError
from ...models import Endpoints
from ..base import Death, Driver, InstanceSpec, Made, Report, Traits
from .behaviour import Behaviour
from .desktop import Change, Desktop

if TYPE_CHECKING:
    from ...settings import Settings

Verb = Literal["create-begin", "create-end", "destroy-begin", "destroy-end"] | Change
Behaviours = Behaviour | Sequence[Behaviour] | Callable[[int], Behaviour]


class Entry(NamedTuple):
    """One line of the journal. `at` is of the monotonic clock, in seconds."""

    at: float
    verb: Verb
    id: str


class SimDriver(Driver):
    """Desktops inside this process, which speak both ports for real. They do not outlive the driver.

    `behaviours` says how each desktop behaves: one for all, a sequence by order of creation (the last one repeats),
    or a function of the number of the creation, from 0. It may be changed at any time, for desktops not yet made.
    `desktops` has every instance that exists, also a dead one until it is destroyed. `journal` only ever grows.
    """

    name: ClassVar[str] = "sim"
    traits: Traits = Traits(boot_width=1, make_before_break=True, probe_interval_s=0.01, monitor_interval_s=0.2)

    def __init__(self, settings: Settings, daemon_id: str, behaviour: Behaviours | None = None) -> None:
        """Behaves as `behaviour` says, else as `settings.sim`. Raises SettingsError if that cannot be read."""
        self.behaviours: Behaviours = Behaviour.parse(settings.sim) if behaviour is None else behaviour
        self.daemon_id = daemon_id
        self.desktops: dict[str, Desktop] = {}
        self.journal: list[Entry] = []
        self._made = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.move_on_after(10, shield=True):
            await asyncio.gather(*(desktop.close() for desktop in self.desktops.values()))
        self.desktops.clear()

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        self._note("create-begin", spec.id)
        desktop = self._register(spec)
        behaviour = desktop.behaviour
        report.progress("starting a simulated desktop")
        await asyncio.sleep(behaviour.create_s)
        if behaviour.create_fails:
            desktop.die(Death(behaviour.create_fails))
        elif not desktop.gone.is_set():
            await desktop.start()
        if desktop.death is not None or desktop.guest_port is None or desktop.cdp_port is None:
            reason = desktop.death.reason if desktop.death else "unknown"
            raise BootFailed(f"The simulated desktop {spec.id} could not be made: {reason}.", log=list(desktop.log))
        self._note("create-end", spec.id)
        return Made(
            Endpoints(
                guest=f"http://127.0.0.1:{desktop.guest_port.number}", cdp=f"http://127.0.0.1:{desktop.cdp_port.number}"
            )
        )

    async def destroy(self, instance_id: str) -> None:
        self._note("destroy-begin", instance_id)
        desktop = self.desktops.get(instance_id)
        if desktop is not None:
            desktop.destroy_calls += 1
            await asyncio.sleep(desktop.behaviour.destroy_s)
            if desktop.destroy_calls <= desktop.behaviour.destroy_fails:
                raise InfraError(
                    f"The simulated desktop {instance_id} would not go (call {desktop.destroy_calls} of destroy).",
                    hint="It was told so by destroy_fails; call destroy again.",
                )
            await desktop.close()
            self.desktops.pop(instance_id, None)
        self._note("destroy-end", instance_id)

    async def list(self) -> frozenset[str]:
        return frozenset(self.desktops)

    async def wait(self, instance_id: str) -> Death:
        desktop = self.desktops.get(instance_id)
        if desktop is None:
            return Death("no such instance")
        await desktop.gone.wait()
        return desktop.death or Death("unknown")

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        desktop = self.desktops.get(instance_id)
        return tuple(desktop.log)[-lines:] if desktop is not None and lines > 0 else ()

    # For tests

    def kill(self, instance_id: str, reason: str = "killed") -> None:
        """The machine stops as if by itself. Raises KeyError for an id that does not exist."""
        self.desktops[instance_id].die(Death(reason))

    def stop_chrome(self, instance_id: str) -> None:
        """Chrome ends; CDP refuses connections until it is launched again. Raises KeyError as `kill` does."""
        self.desktops[instance_id].stop_chrome()

    def _register(self, spec: InstanceSpec) -> Desktop:
        if spec.id in self.desktops:
            raise BootFailed(f"An instance {spec.id} exists already.", hint="Ids are unique for ever; choose another.")
        desktop = Desktop(
            spec.id, spec.screen, self._next_behaviour(), self._made, lambda verb: self._note(verb, spec.id)
        )
        self._made += 1
        self.desktops[spec.id] = desktop
        return desktop

    def _next_behaviour(self) -> Behaviour:
        match self.behaviours:
            case Behaviour():
                return self.behaviours
            case Sequence():
                return self.behaviours[min(self._made, len(self.behaviours) - 1)]
            case pick:
                return pick(self._made)

    def _note(self, verb: Verb, instance_id: str) -> None:
        self.journal.append(Entry(time.monotonic(), verb, instance_id))


def boots_in_flight_max(journal: Iterable[tuple[float, str, str]]) -> int:
    """The most boots that ran at once. A boot lasts from `create-begin` until the instance is ready, dead or gone."""
    booting: set[str] = set()
    most = 0
    for _, verb, instance_id in journal:
        if verb == "create-begin":
            booting.add(instance_id)
            most = max(most, len(booting))
        elif verb in ("ready", "died", "destroy-end"):
            booting.discard(instance_id)
    return most
