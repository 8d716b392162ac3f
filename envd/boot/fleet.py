"""Every desktop of this daemon, from before it is created until it is confirmed gone.

The fleet boots (create, then readiness raced against death and deadline), watches what is ready, and removes. It
knows nothing of jobs, tasks or envs; who asked for a boot follows it through a `BootWatcher`. Nothing is forgotten:
a removal that fails is tried again until the driver confirms it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import aiohttp
import anyio
import structlog
from anyio.abc import TaskGroup

from ..drivers.base import Death, Driver, InstanceSpec, Made, Report
from ..errors import BootFailed, BootTimeout, EnvdError, InfraError, InstanceDied
from ..events import EventLog
from ..guest import Cdp, Guest
from ..models import Desktop, DesktopState, Endpoints, Probe
from ..settings import Settings
from .probes import Readiness

logger = structlog.get_logger(__name__)

T = TypeVar("T")

REMOVE_TRY = 60.0
"""Seconds that one call of `driver.destroy` may take."""
FIRST_PAUSE = 0.5
"""Seconds until a driver that could not remove or watch an instance is asked again; then twice as long, and so on."""
LOG_LINE = 300
"""Characters of a line of the instance's log that a failed boot is told with."""
CDP_LOOK = 1.0
"""Seconds within which a living Chrome answers the monitor."""


class BootWatcher(Protocol):
    """Told how a boot goes. Calls never block and never raise."""

    job_id: str

    def phase(self, name: str, desktop_id: str) -> None:
        """`admit`, `create`, those that the driver tells, then `probe`."""

    def probed(self, probe: Probe) -> None: ...

    def note(self, message: str) -> None: ...

    def progress(self, message: str) -> None: ...


@dataclass
class _Entry:
    desktop: Desktop
    gone: anyio.Event = field(default_factory=anyio.Event)
    lost: anyio.Event = field(default_factory=anyio.Event)
    monitor: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    removing: bool = False


class _Report(Report):
    """What a driver tells of a boot, for whoever watches it; and the readiness of a machine that the driver needs."""

    def __init__(self, fleet: Fleet, watcher: BootWatcher, desktop_id: str) -> None:
        self._fleet = fleet
        self._watcher = watcher
        self._desktop_id = desktop_id

    def progress(self, words: str) -> None:
        self._watcher.progress(words)

    def phase(self, name: str) -> None:
        self._watcher.phase(name, self._desktop_id)

    def note(self, words: str) -> None:
        self._watcher.note(words)

    async def ready(self, endpoints: Endpoints) -> None:
        await self._fleet._readiness(endpoints, self._watcher).wait()


class Fleet:
    """`run` must be running for anything else to work; whoever stops it calls `clear` next."""

    def __init__(
        self, driver: Driver, settings: Settings, events: EventLog, session: aiohttp.ClientSession, daemon_id: str
    ) -> None:
        self.driver = driver
        self._settings = settings
        self._events = events
        self._session = session
        self._daemon_id = daemon_id
        self._entries: dict[str, _Entry] = {}
        self._tasks: TaskGroup | None = None
        self.on_lost: Callable[[Desktop, str], None] = lambda desktop, reason: None
        self.on_spare: Callable[[], None] = lambda: None

    async def run(self, started: anyio.Event) -> None:
        """Host the monitors and removals. First removes what an earlier life of this daemon left behind."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                await self._sweep()
                started.set()
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    # -- looking ------------------------------------------------------------------------------------------------

    def desktops(self) -> tuple[Desktop, ...]:
        return tuple(entry.desktop for entry in self._entries.values())

    def get(self, desktop_id: str) -> Desktop | None:
        entry = self._entries.get(desktop_id)
        return entry.desktop if entry else None

    def guest(self, desktop: Desktop) -> Guest:
        assert desktop.endpoints is not None
        return Guest(self._session, desktop.endpoints.guest)

    def cdp(self, desktop: Desktop) -> Cdp:
        assert desktop.endpoints is not None
        return Cdp(self._session, desktop.endpoints.cdp)

    async def lost(self, desktop_id: str) -> None:
        """Return once the desktop has died or is no longer ours."""
        if entry := self._entries.get(desktop_id):
            await entry.lost.wait()

    # -- booting ------------------------------------------------------------------------------------------------

    async def boot(self, watcher: BootWatcher) -> Desktop:
        """A clean, ready desktop. Raises BootFailed, BootTimeout or InstanceDied with phase, probes and log.

        Whatever ends this early, its instance is being removed when it returns; `gone` waits for that.
        """
        began = time.monotonic()
        desktop = Desktop(
            id=f"envd-{self._daemon_id}-{secrets.token_hex(5)}",
            provider=self.driver.name,
            state=DesktopState.BOOTING,
            created_at=time.time(),
        )
        entry = self._entries[desktop.id] = _Entry(desktop)
        phases: dict[str, float] = {}
        readiness: Readiness | None = None
        try:
            watcher.phase("create", desktop.id)
            with anyio.fail_after(self._settings.ready_timeout):
                spec = InstanceSpec(desktop.id, self._settings.screen, watcher.job_id)
                made: Made = await self._ask(self.driver.create(spec, _Report(self, watcher, desktop.id)))
                phases["create"] = round(time.monotonic() - began, 3)
                watcher.phase("probe", desktop.id)
                readiness = self._readiness(made.endpoints, watcher)
                await self._until_ready(desktop.id, readiness, watcher, began)
            now_ready = {
                "state": DesktopState.READY,
                "endpoints": made.endpoints,
                "ready_at": time.time(),
                "chrome_cdp": True,
            }
            entry.desktop = desktop.model_copy(update=now_ready)
        except (EnvdError, TimeoutError) as error:
            entry.desktop = desktop.model_copy(update={"state": DesktopState.REMOVING})
            raise await self._explain(error, desktop.id, phases, readiness, began) from error
        finally:
            if entry.desktop.state is not DesktopState.READY:
                # Only now: the instance's log, which explains the failure, goes with the instance.
                self.retire(desktop.id, "its boot ended early")
        if self._tasks is not None:
            self._tasks.start_soon(self._monitor, entry)
        seconds = round(time.monotonic() - began, 3)
        self._events.publish("desktop", desktop_id=desktop.id, state="ready", seconds=seconds, message="desktop ready")
        return entry.desktop

    def _readiness(self, endpoints: Endpoints, watcher: BootWatcher) -> Readiness:
        return Readiness(
            guest=Guest(self._session, endpoints.guest),
            cdp=Cdp(self._session, endpoints.cdp),
            screen=self._settings.screen,
            interval=self.driver.traits.probe_interval_s,
            chrome_grace=self._settings.chrome_grace,
            watcher=watcher,
        )

    async def _until_ready(self, desktop_id: str, readiness: Readiness, watcher: BootWatcher, began: float) -> None:
        death: Death | None = None

        async def die() -> None:
            nonlocal death
            death = await self._death(desktop_id)
            race.cancel_scope.cancel()

        async with anyio.create_task_group() as race:
            race.start_soon(die)
            race.start_soon(self._tell_progress, readiness, watcher, began)
            await readiness.wait()
            race.cancel_scope.cancel()
        if death is not None:
            raise InstanceDied(f"The instance died while it booted: {death.reason}.", exit_code=death.exit_code)

    async def _tell_progress(self, readiness: Readiness, watcher: BootWatcher, began: float) -> None:
        """The line that users of older servers look for: every second at first, later every ten."""
        while True:
            waited = time.monotonic() - began
            await anyio.sleep(1 if waited < 30 else 10)
            passed = ", ".join(f"{name}={probe.passed}" for name, probe in readiness.probes.items())
            waited = time.monotonic() - began
            watcher.progress(
                f"Waiting for VM to be ready… {waited:.0f}s / {self._settings.ready_timeout:.0f}s ({passed})"
            )

    async def _explain(
        self,
        error: EnvdError | TimeoutError,
        desktop_id: str,
        phases: dict[str, float],
        readiness: Readiness | None,
        began: float,
    ) -> BootFailed:
        phase = "probe" if readiness else "create"
        seconds = time.monotonic() - began
        phases[phase] = round(seconds - sum(phases.values()), 3)
        probes = readiness.probes if readiness else {}
        facts: dict[str, Any] = {
            "desktop_id": desktop_id,
            "phase": phase,
            "phases": phases,
            "probes": {name: f"{probe.result}: {probe.detail}" for name, probe in probes.items()},
            "log": list(await self.log_tail(desktop_id)),
        }
        if isinstance(error, TimeoutError):
            missing = " and ".join(name for name, probe in probes.items() if not probe.passed) or "its instance"
            return BootTimeout(
                f"Not ready after {seconds:.0f} s, in phase {phase}: still waiting for {missing}.",
                hint="If it was still making progress, raise DOCKER_VM_READY_TIMEOUT; otherwise see the log lines.",
                **facts,
            )
        kind = type(error) if isinstance(error, BootFailed) else BootFailed
        return kind(error.detail, hint=error.hint, retry_after=error.retry_after, **{**error.facts, **facts})

    async def log_tail(self, desktop_id: str) -> tuple[str, ...]:
        """The last lines of its instance, within two seconds; empty when they cannot be had."""
        with anyio.move_on_after(2):
            try:
                return tuple(line[:LOG_LINE] for line in await self._ask(self.driver.log_tail(desktop_id)))
            except EnvdError as error:
                logger.warning("cannot read the instance's log", desktop_id=desktop_id, error=error.detail)
        return ()

    async def _ask(self, call: Awaitable[T]) -> T:
        """What the driver answers. Raises EnvdError whatever the driver raises: the boundary to the drivers.

        Also when the call was cancelled from inside, by nobody here: that would end the task that waits for it, and
        so its job, without a word.
        """
        try:
            return await call
        except EnvdError:
            raise
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            failure: BaseException = error
        except Exception as error:  # noqa: BLE001 - drivers call libraries that raise what they like
            failure = error
        raise InfraError(f"The {self.driver.name} driver failed: {failure!r}.") from failure

    # -- handing out --------------------------------------------------------------------------------------------

    def keep(self, desktop: Desktop) -> None:
        """Put a clean desktop aside as a spare, for `take_spare`."""
        self._change(desktop.id, env=None, state=DesktopState.READY)
        self.on_spare()

    @property
    def spares(self) -> int:
        return sum(1 for entry in self._entries.values() if self._is_spare(entry))

    def take_spare(self, env: int) -> Desktop | None:
        """The oldest spare, now in use by `env`."""
        for entry in self._entries.values():
            if self._is_spare(entry):
                return self.assign(entry.desktop, env)
        return None

    def assign(self, desktop: Desktop, env: int) -> Desktop:
        """The desktop, in use by `env` from here on."""
        return self._change(desktop.id, env=env, state=DesktopState.IN_USE)

    @staticmethod
    def _is_spare(entry: _Entry) -> bool:
        return entry.desktop.state is DesktopState.READY and entry.desktop.env is None

    def _change(self, desktop_id: str, **changes: object) -> Desktop:
        entry = self._entries.get(desktop_id)
        if entry is None or entry.lost.is_set():
            raise InfraError(f"The desktop {desktop_id} died before it could be used.", desktop_id=desktop_id)
        entry.desktop = entry.desktop.model_copy(update=changes)
        return entry.desktop

    # -- watching -----------------------------------------------------------------------------------------------

    async def _monitor(self, entry: _Entry) -> None:
        """Notice within two seconds that a ready desktop died, or that its Chrome went away or came back."""
        with entry.monitor:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._look_at_chrome, entry)
                death = await self._death(entry.desktop.id)
                tasks.cancel_scope.cancel()
            self._lose(entry, death)

    def _lose(self, entry: _Entry, death: Death) -> None:
        entry.desktop = entry.desktop.model_copy(update={"state": DesktopState.LOST, "chrome_cdp": False})
        desktop = entry.desktop
        self._events.publish(
            "desktop",
            env=desktop.env,
            desktop_id=desktop.id,
            state="lost",
            reason=death.reason,
            exit_code=death.exit_code,
            message="desktop lost",
        )
        entry.lost.set()
        self.on_lost(desktop, death.reason)
        self.retire(desktop.id, "it died")

    async def _look_at_chrome(self, entry: _Entry) -> None:
        assert entry.desktop.endpoints is not None
        cdp = Cdp(self._session, entry.desktop.endpoints.cdp)
        missed = 0
        while True:
            await anyio.sleep(self.driver.traits.monitor_interval_s)
            try:
                await cdp.version(timeout=CDP_LOOK)
            except EnvdError:
                missed += 1
            else:
                missed = 0
            # One missed look may be a busy machine; two in a row is a Chrome that is not there.
            answers = missed < 2
            if answers != entry.desktop.chrome_cdp and (answers or missed == 2):
                entry.desktop = entry.desktop.model_copy(update={"chrome_cdp": answers})
                self._events.publish(
                    "desktop",
                    env=entry.desktop.env,
                    desktop_id=entry.desktop.id,
                    state="chrome back" if answers else "chrome gone",
                    message="Chrome answers again" if answers else "Chrome's CDP no longer answers",
                )

    async def _death(self, desktop_id: str) -> Death:
        """`driver.wait`, asked again when asking failed: that the provider cannot be reached kills no desktop."""
        pause = FIRST_PAUSE
        while True:
            try:
                return await self._ask(self.driver.wait(desktop_id))
            except EnvdError as error:
                logger.warning("cannot watch the instance", desktop_id=desktop_id, error=error.detail)
                await anyio.sleep(pause)
                pause = min(pause * 2, 30)

    # -- removing -----------------------------------------------------------------------------------------------

    def retire(self, desktop_id: str, why: str) -> None:
        """Begin to remove the desktop; `gone` waits for the end. Calling it again changes nothing.

        When the fleet runs no more this leaves it to `clear`, which comes last and takes everything.
        """
        entry = self._entries.get(desktop_id)
        if entry is None or entry.removing or self._tasks is None:
            return
        entry.removing = True
        entry.desktop = entry.desktop.model_copy(update={"state": DesktopState.REMOVING})
        self._tasks.start_soon(self._remove, entry, why)

    async def gone(self, desktop_id: str) -> None:
        """Return when the desktop is confirmed gone."""
        if entry := self._entries.get(desktop_id):
            await entry.gone.wait()

    async def clear(self) -> None:
        """Destroy every desktop, each within `REMOVE_TRY`; for the end of the daemon, when `run` runs no more.

        `desktops` has those that are left.
        """
        async with anyio.create_task_group() as tasks:
            for desktop_id in tuple(self._entries):
                tasks.start_soon(self._clear, desktop_id)

    async def _clear(self, desktop_id: str) -> None:
        if await self._try_destroy(desktop_id):
            del self._entries[desktop_id]

    async def _remove(self, entry: _Entry, why: str) -> None:
        desktop = entry.desktop
        entry.monitor.cancel()
        entry.lost.set()
        pause = FIRST_PAUSE
        while not await self._try_destroy(desktop.id):
            await anyio.sleep(pause)
            pause = min(pause * 2, 60)
        del self._entries[desktop.id]
        entry.gone.set()
        self._events.publish(
            "desktop", env=desktop.env, desktop_id=desktop.id, state="gone", why=why, message="desktop gone"
        )

    async def _try_destroy(self, desktop_id: str) -> bool:
        try:
            with anyio.fail_after(REMOVE_TRY):
                await self._ask(self.driver.destroy(desktop_id))
        except (EnvdError, TimeoutError) as error:
            detail = error.detail if isinstance(error, EnvdError) else f"no answer within {REMOVE_TRY:g} s."
            self._events.publish(
                "note", desktop_id=desktop_id, message=f"The desktop could not be removed yet: {detail}"
            )
            return False
        return True

    async def _sweep(self) -> None:
        """Remove every instance that carries our mark: nobody alive knows it. What resists does not hold up the
        start, and is tried again as every removal is."""
        found = await self._ask(self.driver.list())
        for desktop_id in found:
            left = Desktop(
                id=desktop_id, provider=self.driver.name, state=DesktopState.REMOVING, created_at=time.time()
            )
            self._entries[desktop_id] = _Entry(left)
            self._events.publish("note", desktop_id=desktop_id, message="Removing a desktop of an earlier life")
            self.retire(desktop_id, "an earlier life of this daemon left it behind")
        with anyio.move_on_after(REMOVE_TRY):
            for desktop_id in found:
                await self.gone(desktop_id)


def is_cancelled() -> bool:
    """Whether somebody asked the current task to stop: else a CancelledError is one that a library leaked."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
