"""The driver that makes sim desktops, and the journal of what it did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import anyio

from ...errors import BootFailed, InfraError
from ...models import ResetPath
from ..base import Console, Death, Driver, InstanceSpec, Made, Report, Traits
from .behaviour import Behaviour
from .console import SimConsole
from .desktop import Change, Desktop

if TYPE_CHECKING:
    from ...settings import Settings

Verb = (
    Literal[
        "create-begin", "create-end", "clone-begin", "renew", "adopt", "park", "unpark", "destroy-begin", "destroy-end"
    ]
    | Change
)
Behaviours = Behaviour | Sequence[Behaviour] | Callable[[int], Behaviour]
TRAITS = Traits(boot_width=1, make_before_break=True, probe_interval_s=0.01, monitor_interval_s=0.2)


class Entry(NamedTuple):
    """One line of the journal. `at` is of the monotonic clock, in seconds.

    `create-begin` is a boot, also that of the template for its first clone; `create-end` closes one that was asked for.
    """

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
    traits: Traits = TRAITS

    def __init__(self, settings: Settings, daemon_id: str, behaviour: Behaviours | None = None) -> None:
        """Behaves as `behaviour` says, else as `settings.sim`. Raises SettingsError if that cannot be read."""
        self.behaviours: Behaviours = Behaviour.parse(settings.sim) if behaviour is None else behaviour
        self.daemon_id = daemon_id
        self.desktops: dict[str, Desktop] = {}
        self.journal: list[Entry] = []
        self._made = 0
        self._turn = asyncio.Lock()
        self._has_template = False
        self._restores = 0
        self.traits = traits_of(self.traits, self._next_behaviour(), settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.move_on_after(10, shield=True):
            await asyncio.gather(*(desktop.close() for desktop in self.desktops.values()))
        self.desktops.clear()

    def next_path(self) -> ResetPath:
        clones = self._next_behaviour().restore_s is not None
        return ResetPath.RESTORE if clones and self._has_template else ResetPath.COLD

    async def admit(self, report: Report) -> None:
        if seconds := self._next_behaviour().admit_s:
            report.progress(f"waiting for room: in {seconds:g} s there is some")
            await asyncio.sleep(seconds)

    def console(self, instance_id: str) -> Console | None:
        desktop = self.desktops.get(instance_id)
        return SimConsole(desktop) if desktop is not None and desktop.behaviour.console else None

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        report.progress("starting a simulated desktop")
        desktop = self._register(spec, number := self._made)
        self._made += 1
        if desktop.behaviour.restore_s is None:
            return await self._boot(desktop, desktop.behaviour)
        async with self._turn:
            if not self._has_template:
                report.phase("template")
                await self._make_template(spec, number, desktop.behaviour, report)
        report.phase("clone")
        self._note("clone-begin", spec.id)
        await asyncio.sleep(desktop.behaviour.restore_s)
        self._restores += 1
        if self._restores > desktop.behaviour.restore_fails:
            made = await self._open(desktop, replace(desktop.behaviour, boot_s=0.0, cdp_s=0.0))
            return replace(made, path=ResetPath.RESTORE, frame=await desktop.screenshot())
        report.note(f"Restore {self._restores} failed, as it was told to; the desktop is booted instead.")
        desktop.cloned = False
        async with self._turn:
            made = await self._boot(desktop, desktop.behaviour)
            await report.ready(made.endpoints)
        return made

    async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
        old = self.desktops.get(instance_id)
        if old is None or not old.behaviour.renews or old.gone.is_set():
            return None
        report.phase("renew")
        self._note("renew", instance_id)
        # Known by the new id from here on; what it was ends, and it begins again.
        self.desktops[spec.id] = self.desktops.pop(instance_id)
        await old.close()
        del self.desktops[spec.id]
        return await self.create(spec, report)

    async def park(self, instance_id: str) -> None:
        self._note("park", instance_id)
        self._existing(instance_id).shut()

    async def unpark(self, instance_id: str, report: Report) -> Made:
        self._note("unpark", instance_id)
        desktop = self._existing(instance_id)
        if desktop.behaviour.unpark_fails:
            raise BootFailed(f"The simulated desktop {instance_id} did not wake up.")
        await asyncio.sleep(desktop.behaviour.unpark_s)
        await desktop.reopen()
        assert desktop.endpoints is not None
        return Made(desktop.endpoints)

    def _existing(self, instance_id: str) -> Desktop:
        desktop = self.desktops.get(instance_id)
        if desktop is None or desktop.gone.is_set():
            raise InfraError(f"There is no simulated desktop {instance_id}.")
        return desktop

    async def _make_template(self, spec: InstanceSpec, number: int, behaviour: Behaviour, report: Report) -> None:
        machine = Desktop(f"{spec.id}-t", spec.screen, behaviour, number, lambda verb: None)
        self._note("create-begin", spec.id)
        try:
            made = await self._open(machine, behaviour, seconds=behaviour.create_s)
            await report.ready(made.endpoints)
        finally:
            with anyio.CancelScope(shield=True):
                await machine.close()
        self._has_template = True

    async def _boot(self, desktop: Desktop, behaviour: Behaviour) -> Made:
        self._note("create-begin", desktop.id)
        made = await self._open(desktop, behaviour, seconds=behaviour.create_s)
        self._note("create-end", desktop.id)
        return made

    async def _open(self, desktop: Desktop, behaviour: Behaviour, seconds: float = 0.0) -> Made:
        """The desktop with its ports, which open when its behaviour says so. Raises BootFailed."""
        await asyncio.sleep(seconds)
        if behaviour.create_fails:
            desktop.die(Death(behaviour.create_fails))
        elif not desktop.gone.is_set():
            await desktop.start(behaviour)
        if desktop.death is not None or (endpoints := desktop.endpoints) is None:
            reason = desktop.death.reason if desktop.death else "unknown"
            raise BootFailed(f"The simulated desktop {desktop.id} could not be made: {reason}.", log=list(desktop.log))
        return Made(endpoints)

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

    def _register(self, spec: InstanceSpec, number: int) -> Desktop:
        if spec.id in self.desktops:
            raise BootFailed(f"An instance {spec.id} exists already.", hint="Ids are unique for ever; choose another.")
        behaviour = self._next_behaviour()
        desktop = Desktop(
            spec.id,
            spec.screen,
            behaviour,
            number,
            lambda verb: self._note(verb, spec.id),
            cloned=behaviour.restore_s is not None,
        )
        self.desktops[spec.id] = desktop
        return desktop

    def _next_behaviour(self) -> Behaviour:
        return behaviour_of(self._made, self.behaviours)

    def _note(self, verb: Verb, instance_id: str) -> None:
        self.journal.append(Entry(time.monotonic(), verb, instance_id))


def behaviour_of(number: int, behaviours: Behaviours) -> Behaviour:
    """How the `number`th desktop of a driver behaves, from 0."""
    match behaviours:
        case Behaviour():
            return behaviours
        case Sequence():
            return behaviours[min(number, len(behaviours) - 1)]
        case pick:
            return pick(number)


def traits_of(traits: Traits, first: Behaviour, settings: Settings) -> Traits:
    """Of a driver that has `traits` by its class, and whose first desktop behaves so."""
    traits = replace(traits, keeps_old=first.renews, parks_spares=first.parks)
    return traits if settings.clone_width is None else replace(traits, restore_width=settings.clone_width)


def boots_in_flight_max(journal: Iterable[tuple[float, str, str]]) -> int:
    """The most boots that ran at once. A boot lasts from `create-begin` until the instance is ready, dead or gone, or
    is a template by then that is cloned."""
    return _most_at_once(journal, "create-begin", ("clone-begin", "ready", "died", "destroy-end"))


def restores_in_flight_max(journal: Iterable[tuple[float, str, str]]) -> int:
    """The most restores that ran at once, each from `clone-begin` until it is ready, dead, gone, or booted instead."""
    return _most_at_once(journal, "clone-begin", ("create-begin", "ready", "died", "destroy-end"))


def _most_at_once(journal: Iterable[tuple[float, str, str]], begin: str, ends: tuple[str, ...]) -> int:
    under_way: set[str] = set()
    most = 0
    for _, verb, instance_id in journal:
        if verb == begin:
            under_way.add(instance_id)
            most = max(most, len(under_way))
        elif verb in ends:
            under_way.discard(instance_id)
    return most
