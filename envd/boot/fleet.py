"""Every desktop of this daemon, from before it is created until it is confirmed gone.

The fleet boots (create, then readiness raced against death and deadline), watches what is ready, and removes. It
knows nothing of jobs, tasks or envs; who asked for a boot follows it through a `BootWatcher`. Nothing is forgotten:
a removal that fails is tried again until the driver confirms it, and what it has is in the journal before it exists.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp
import anyio
import structlog
from anyio.abc import TaskGroup

from ..drivers.base import Console, Death, Driver, InstanceSpec, Made, Report
from ..errors import BootFailed, EnvdError, InfraError, InstanceDied, OutOfMemory
from ..events import EventLog
from ..guest import Cdp, Guest
from ..models import Desktop, DesktopState, Endpoints, ResetPath
from ..records import KeptDesktop
from ..settings import Settings
from ..store import Kind, Store
from .account import Admission, BootAccount, BootWatcher, boot_failure
from .idling import Idling
from .probes import Readiness, Watcher

logger = structlog.get_logger(__name__)

T = TypeVar("T")
Ask = Callable[[float], Awaitable[object]]

FIRST_PAUSE = 0.5
"""Seconds until a driver that could not remove or watch an instance is asked again; then twice as long, and so on."""
LOG_LINE = 300
"""Characters of a line of the instance's log that a failed boot is told with."""
LOOK = 1.0
"""Seconds within which a living Chrome, or a living guest, answers the monitor."""
GUEST_LOOKS = 5.0
"""Seconds between two looks at the guest port of a spare."""
SLOW_LOOKS = 5
"""A spare that took longer than `LOOK` so many times in a row is given up. One that is refused is so at once."""
SWEEP = 60.0
"""Seconds that a start waits at most until what an earlier life left is gone."""
MOST_FAILED = 100
"""Boots in a row that are counted."""
RESET = "its env was reset"
"""Why a desktop is retired whose env has a newer one, or is about to."""
ADOPTION = 30.0
"""Seconds within which a driver has taken over a desktop of an earlier life, or it is removed."""
RESTORED_LIMIT = 120.0
"""Seconds that a restored machine may take until its probes pass; twelve at once on 4 cores were measured at 7.3."""


@dataclass
class _Entry:
    desktop: Desktop
    made: KeptDesktop | None = None
    """What it was made for and of."""
    gone: anyio.Event = field(default_factory=anyio.Event)
    lost: anyio.Event = field(default_factory=anyio.Event)
    monitor: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    removing: bool = False
    removing_since: float = math.inf
    """On the monotonic clock."""
    idling: Idling | None = None
    """Once it is ready, if it is to be paused."""
    parked: bool = False
    """It is a spare that sleeps, or is about to."""
    parking: anyio.Lock = field(default_factory=anyio.Lock)
    """Held by who puts it to sleep or wakes it."""

    def is_asleep(self) -> bool:
        return self.parked or (self.idling is not None and self.idling.paused)


@dataclass
class _Looks:
    """How a port has answered lately."""

    missed: int = 0
    """In a row."""
    slow: bool = False
    """The last one that it missed was cut off; nothing refused it."""

    async def look(self, ask: Ask, timeout: float = LOOK) -> None:
        began = time.monotonic()
        try:
            await ask(timeout)
        except EnvdError:
            self.missed += 1
            self.slow = time.monotonic() - began >= 0.9 * timeout
        else:
            self.missed = 0

    @property
    def hopeless(self) -> bool:
        return self.missed >= (SLOW_LOOKS if self.slow else 2)


class Fleet:
    """`run` must be running for anything else to work; whoever stops it calls `leave` before, or `clear` next."""

    def __init__(
        self,
        driver: Driver,
        settings: Settings,
        store: Store,
        events: EventLog,
        session: aiohttp.ClientSession,
        daemon_id: str,
    ) -> None:
        self.driver = driver
        self._settings = settings
        self._store = store
        self._events = events
        self._session = session
        self._daemon_id = daemon_id
        self._entries: dict[str, _Entry] = {}
        self._tasks: TaskGroup | None = None
        self._leaving = False
        self.goes_on: Callable[[KeptDesktop], bool] = lambda kept: False
        """Whether a desktop of an earlier life is still wanted."""
        self.failed_boots: list[tuple[float, str]] = []
        """When and with which code the latest boots failed, as far as none succeeded since."""
        self.on_lost: Callable[[Desktop, str], None] = lambda desktop, reason: None
        self.on_spares: Callable[[], None] = lambda: None
        """Told whenever there may be more or fewer of them."""
        self.on_spare_lost: Callable[[Desktop, str], None] = lambda desktop, why: None

    async def run(self, started: anyio.Event) -> None:
        """Host the monitors and removals. First takes over what an earlier life of this daemon left behind, and removes
        what nobody wants any more."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                await self._recover()
                started.set()
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    # -- looking ------------------------------------------------------------------------------------------------

    def desktops(self) -> tuple[Desktop, ...]:
        return tuple(entry.desktop for entry in self._entries.values())

    @property
    def removing_s(self) -> float:
        """For how many seconds the desktop is being removed that is so longest; 0 when none is."""
        since = min((entry.removing_since for entry in self._entries.values()), default=math.inf)
        return max(0.0, time.monotonic() - since)

    def get(self, desktop_id: str) -> Desktop | None:
        entry = self._entries.get(desktop_id)
        return entry.desktop if entry else None

    def guest(self, desktop: Desktop) -> Guest:
        assert desktop.endpoints is not None
        return Guest(self._session, desktop.endpoints.guest)

    def cdp(self, desktop: Desktop) -> Cdp:
        assert desktop.endpoints is not None
        return Cdp(self._session, desktop.endpoints.cdp)

    def console(self, desktop: Desktop) -> Console | None:
        """Its screen and input from outside the guest, where there is a way to them."""
        return self.driver.console(desktop.id)

    @asynccontextmanager
    async def awake(self, desktop_id: str) -> AsyncIterator[None]:
        """For everything that touches the guest: in here its processors run. Raises InfraError."""
        entry = self._entries.get(desktop_id)
        if entry is None or entry.idling is None:
            yield
            return
        async with entry.idling.awake():
            yield

    async def lost(self, desktop_id: str) -> None:
        """Return once the desktop has died or is no longer ours."""
        if entry := self._entries.get(desktop_id):
            await entry.lost.wait()

    # -- booting ------------------------------------------------------------------------------------------------

    def next_path(self) -> ResetPath:
        """How the driver would make a desktop now."""
        try:
            return self.driver.next_path()
        except Exception:
            logger.exception("the driver does not know how it would make a desktop")
            return ResetPath.COLD

    async def admit(self, watcher: BootWatcher) -> None:
        """Return once the driver has room for one desktop more. Raises BootFailed when it never will."""
        began = time.monotonic()
        try:
            await self._ask(self.driver.admit(Admission(watcher)))
        except EnvdError as error:
            phases = {"admit": round(time.monotonic() - began, 3)}
            raise boot_failure(
                error, {"phase": "admit", "phases": phases, "probes": {}, "notes": [], "log": []}
            ) from error

    async def boot(self, watcher: BootWatcher, old: str | None = None) -> Desktop:
        """A clean, ready desktop. Raises BootFailed, BootTimeout or InstanceDied with phase, probes and log.

        `old` is a desktop that nobody uses any more and that is retired by this, at the latest when there is a new one:
        the driver may make the one out of the other. Whatever ends this early, its instance is being removed when it
        returns; `gone` waits for that.
        """
        desktop = Desktop(
            id=f"envd-{self._daemon_id}-{secrets.token_hex(5)}",
            provider=self.driver.name,
            state=DesktopState.BOOTING,
            created_at=time.time(),
        )
        made = KeptDesktop(
            desktop=desktop, job_id=watcher.job_id, screen=self._settings.screen, image=self.driver.image
        )
        entry = self._entries[desktop.id] = _Entry(desktop, made)
        return await self._brought_up(entry, watcher, lambda account: self._make(desktop, watcher, account, old), old)

    async def resume(self, desktop_id: str, watcher: BootWatcher) -> Desktop:
        """As `boot`, of a desktop whose boot an earlier life of this daemon began, with the deadline that it had."""
        entry = self._entries[desktop_id]
        return await self._brought_up(entry, watcher, lambda account: self._taken_over(entry.desktop, watcher, account))

    async def _brought_up(
        self,
        entry: _Entry,
        watcher: BootWatcher,
        make: Callable[[BootAccount], Awaitable[Made]],
        old: str | None = None,
    ) -> Desktop:
        desktop, probing = entry.desktop, self._probing()
        account = self._account(desktop, watcher, probing)
        left = desktop.created_at + self._settings.ready_timeout - time.time()
        try:
            self._set(entry)
            async with probing:
                # Whatever becomes of us, the next life knows of the instance before there is one.
                await self._store.settle()
                with anyio.fail_after(max(left, 0.0)), structlog.contextvars.bound_contextvars(desktop_id=desktop.id):
                    made = await make(account)
            # Nothing is awaited from here on: a ready desktop of no env is a spare for whoever looks.
            self._set(entry, state=DesktopState.READY, endpoints=made.endpoints, ready_at=time.time(), chrome_cdp=True)
            self._let_idle(entry)
        except (EnvdError, TimeoutError) as error:
            self._set(entry, state=DesktopState.REMOVING)
            failure = account.explain(error, await self.log_tail(desktop.id))
            self.failed_boots = [*self.failed_boots, (time.time(), failure.code)][-MOST_FAILED:]
            raise failure from error
        else:
            self.failed_boots = []
        finally:
            account.over = True
            if entry.desktop.state is not DesktopState.READY:
                # Only now: the instance's log, which explains the failure, goes with the instance.
                self.retire(desktop.id, "its boot ended early")
            if old is not None:
                self.retire(old, RESET)
        self._start_soon(partial(self._monitor, entry))
        seconds = round(account.seconds, 3)
        self._events.publish("desktop", desktop_id=desktop.id, state="ready", seconds=seconds, message="desktop ready")
        return entry.desktop

    def _let_idle(self, entry: _Entry) -> None:
        if self._settings.pause_idle:
            entry.idling = Idling(lambda: self.console(entry.desktop), self._start_soon)

    def _probing(self) -> aiohttp.ClientSession:
        """For probes: nothing of them stays open. To a machine that is frozen now it would be a connection of all its
        clones."""
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

    def _account(
        self, desktop: Desktop, watcher: BootWatcher, probing: aiohttp.ClientSession, begins: str = "create"
    ) -> BootAccount:
        readiness_of = partial(self._readiness, probing)
        return BootAccount(desktop.id, watcher, self._events, readiness_of, self._settings.ready_timeout, begins)

    async def _make(self, desktop: Desktop, watcher: BootWatcher, account: BootAccount, old: str | None) -> Made:
        """An instance that has passed its probes."""
        deadline = desktop.created_at + self._settings.ready_timeout
        spec = InstanceSpec(desktop.id, self._settings.screen, watcher.job_id, watcher.env, deadline)
        made = await self._renewed(old, spec, account) if old is not None else None
        if made is None:
            made = await self._ask(self.driver.create(spec, account))
        watcher.made(made.path)
        account.phase("probe")
        await self._until_ready(desktop.id, account, made)
        return made

    async def _taken_over(self, desktop: Desktop, watcher: BootWatcher, account: BootAccount) -> Made:
        """An instance of an earlier life that has passed its probes. Raises InstanceDied for one that is not there."""
        made: Made | None = await self._ask(self.driver.adopt(desktop.id, account))
        if made is None:
            raise InstanceDied("The instance did not outlive the daemon, or cannot be taken over.")
        watcher.made(made.path)
        account.phase("probe")
        await self._until_ready(desktop.id, account, made)
        return made

    async def _renewed(self, old: str, spec: InstanceSpec, account: BootAccount) -> Made | None:
        """What the driver made of the desktop `old`, which is retired by then; None if there is room for a new one."""
        entry = self._entries.get(old)
        if entry is None or entry.removing or entry.lost.is_set():
            return None
        # From here on it neither dies nor is looked at: what becomes of its instance is the driver's doing.
        entry.monitor.cancel()
        entry.lost.set()
        made: Made | None = await self._ask(self.driver.renew(old, spec, account))
        if made is None and not self.driver.traits.make_before_break:
            self.retire(old, RESET)
            await self.gone(old)
        return made

    def _readiness(
        self, session: aiohttp.ClientSession, watcher: Watcher, endpoints: Endpoints, frame: bytes | None
    ) -> Readiness:
        return Readiness(
            guest=Guest(session, endpoints.guest),
            cdp=Cdp(session, endpoints.cdp),
            screen=self._settings.screen,
            interval=self.driver.traits.probe_interval_s,
            chrome_grace=max(self._settings.chrome_grace, self.driver.traits.chrome_grace_s),
            watcher=watcher,
            frame=frame,
        )

    async def _until_ready(self, desktop_id: str, account: BootAccount, made: Made) -> None:
        death: Death | None = None
        restored = made.path is ResetPath.RESTORE

        async def die() -> None:
            nonlocal death
            death = await self._death(desktop_id)
            race.cancel_scope.cancel()

        with anyio.move_on_after(RESTORED_LIMIT if restored else None) as patience:
            async with anyio.create_task_group() as race:
                race.start_soon(die)
                await account.ready(made.endpoints, made.frame if restored else None)
                race.cancel_scope.cancel()
        if death is not None:
            raise _died(death)
        if patience.cancelled_caught:
            raise BootFailed(f"A machine that had been ready when it was saved is not, {RESTORED_LIMIT:g} s after it.")

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
        entry = self._entries[desktop.id]
        if self.driver.traits.parks_spares and not entry.parked:
            entry.parked = True
            self._start_soon(partial(self._park, entry))
        elif entry.idling is not None:
            self._start_soon(entry.idling.pause)
        self.on_spares()

    async def _park(self, entry: _Entry) -> None:
        desktop = entry.desktop
        async with entry.parking:
            try:
                if self._is_spare(entry):
                    await self._ask(self.driver.park(desktop.id))
            except EnvdError as error:
                self.on_spare_lost(desktop, f"it could not be parked: {error.detail}")
                self.retire(desktop.id, "it could not be parked")

    def is_parked(self, desktop: Desktop) -> bool:
        entry = self._entries.get(desktop.id)
        return entry is not None and entry.parked

    async def unpark(self, desktop: Desktop, watcher: BootWatcher) -> None:
        """Wake a parked spare; both probes have passed then. Raises as `boot` does; the caller retires it."""
        entry, probing = self._entries[desktop.id], self._probing()
        account = self._account(desktop, watcher, probing, begins="unpark")
        try:
            async with probing, entry.parking:
                with anyio.fail_after(self._settings.ready_timeout):
                    made: Made = await self._ask(self.driver.unpark(desktop.id, account))
                    account.phase("probe")
                    await self._until_ready(desktop.id, account, made)
            self._change(desktop.id, endpoints=made.endpoints)
            entry.parked = False
        except (EnvdError, TimeoutError) as error:
            raise account.explain(error, await self.log_tail(desktop.id)) from error
        finally:
            account.over = True

    @property
    def spares(self) -> int:
        return sum(1 for entry in self._entries.values() if self._is_usable_spare(entry))

    def take_spare(self, env: int) -> Desktop | None:
        """The oldest spare, now in use by `env`. Before anything is done to it, see whether it `is_well`."""
        for entry in self._entries.values():
            if self._is_usable_spare(entry):
                return self.assign(entry.desktop, env)
        return None

    async def is_well(self, desktop: Desktop) -> bool:
        """Whether both ports of a ready desktop answer now. One that does not is asked once more, and given longer:
        another desktop may be far away."""

        async def look(looks: _Looks, ask: Ask) -> None:
            await looks.look(ask)
            if looks.missed:
                await anyio.sleep(0.1)
                await looks.look(ask, 5 * LOOK)

        chrome, guest = _Looks(), _Looks()
        try:
            async with self.awake(desktop.id), anyio.create_task_group() as tasks:
                tasks.start_soon(look, chrome, self.cdp(desktop).version)
                tasks.start_soon(look, guest, self.guest(desktop).answers)
        except InfraError:  # it cannot be resumed
            return False
        # It may have died while it was asked.
        now = self._entries.get(desktop.id)
        return not (chrome.missed or guest.missed or now is None or now.lost.is_set())

    def assign(self, desktop: Desktop, env: int) -> Desktop:
        """The desktop, in use by `env` from here on."""
        return self._change(desktop.id, env=env, state=DesktopState.IN_USE)

    @staticmethod
    def _is_spare(entry: _Entry) -> bool:
        return entry.desktop.state is DesktopState.READY and entry.desktop.env is None

    def _is_usable_spare(self, entry: _Entry) -> bool:
        return self._is_spare(entry) and entry.desktop.chrome_cdp is True

    def _change(self, desktop_id: str, **changes: object) -> Desktop:
        entry = self._entries.get(desktop_id)
        if entry is None or entry.lost.is_set():
            raise InfraError(f"The desktop {desktop_id} died before it could be used.", desktop_id=desktop_id)
        return self._set(entry, **changes)

    def _set(self, entry: _Entry, **changes: object) -> Desktop:
        """The one place where a desktop changes in a way that the next life of the daemon must know."""
        entry.desktop = entry.desktop.model_copy(update=changes)
        if not self._leaving and entry.made is not None:
            kept = entry.made.model_copy(update={"desktop": entry.desktop})
            self._store.put(Kind.DESKTOPS, entry.desktop.id, kept)
        return entry.desktop

    # -- watching -----------------------------------------------------------------------------------------------

    async def _monitor(self, entry: _Entry) -> None:
        """Notice within two seconds that a ready desktop died, or that its Chrome went away or came back."""
        with entry.monitor:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._look_at_chrome, entry)
                tasks.start_soon(self._look_at_guest, entry)
                death = await self._death(entry.desktop.id)
                tasks.cancel_scope.cancel()
            self._lose(entry, death)

    def _lose(self, entry: _Entry, death: Death) -> None:
        if self._is_spare(entry):
            self.on_spare_lost(entry.desktop, death.reason)
        desktop = self._set(entry, state=DesktopState.LOST, chrome_cdp=False)
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
        looks = _Looks()
        while True:
            await anyio.sleep(self.driver.traits.monitor_interval_s)
            await self._look(entry, looks, self.cdp(entry.desktop).version)
            # One missed look, or a few slow ones, may be a busy machine: an emulated guest draws a page for seconds.
            answers = not looks.hopeless
            if answers != entry.desktop.chrome_cdp and answers is (looks.missed == 0):
                entry.desktop = entry.desktop.model_copy(update={"chrome_cdp": answers})
                self._events.publish(
                    "desktop",
                    env=entry.desktop.env,
                    desktop_id=entry.desktop.id,
                    state="chrome back" if answers else "chrome gone",
                    message="Chrome answers again" if answers else "Chrome's CDP no longer answers",
                )
                self.on_spares()
            self._give_up_spare(entry, looks, "its Chrome was gone")

    async def _look_at_guest(self, entry: _Entry) -> None:
        """Only while it waits as a spare: nobody else would notice."""
        looks = _Looks()
        while True:
            await anyio.sleep(GUEST_LOOKS)
            if self._is_spare(entry):
                await self._look(entry, looks, self.guest(entry.desktop).answers)
                self._give_up_spare(entry, looks, "its guest no longer answered")

    async def _look(self, entry: _Entry, looks: _Looks, ask: Ask) -> None:
        """Nothing in a desktop that is paused or parked answers: it is looked at while it runs."""
        before = looks.missed
        if not entry.is_asleep():
            await looks.look(ask)
        if entry.is_asleep():
            looks.missed = before

    def _give_up_spare(self, entry: _Entry, looks: _Looks, why: str) -> None:
        if self._is_spare(entry) and looks.hopeless:
            self.on_spare_lost(entry.desktop, why)
            self.retire(entry.desktop.id, f"{why} while it waited as a spare")

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

        When the fleet runs no more this leaves it to `clear`, which comes last and takes everything; and after `leave`
        to the next life of the daemon.
        """
        entry = self._entries.get(desktop_id)
        if entry is None or entry.removing or self._tasks is None or self._leaving:
            return
        entry.removing, entry.removing_since = True, time.monotonic()
        self._set(entry, state=DesktopState.REMOVING)
        self._tasks.start_soon(self._remove, entry, why)
        self.on_spares()

    def _start_soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._tasks is not None:
            self._tasks.start_soon(work)

    def leave(self) -> None:
        """From here on every desktop stays as it is, in the journal too: the next life of the daemon takes it over."""
        self._leaving = True

    async def gone(self, desktop_id: str) -> None:
        """Return when the desktop is confirmed gone."""
        entry = self._entries.get(desktop_id)
        if entry is not None and not self._leaving:
            await entry.gone.wait()

    async def clear(self) -> None:
        """Destroy every desktop, each within the driver's `removal_s`; for the daemon's end, when `run` runs no more.

        `desktops` has those that are left.
        """
        async with anyio.create_task_group() as tasks:
            for desktop_id in tuple(self._entries):
                tasks.start_soon(self._clear, desktop_id)

    async def _clear(self, desktop_id: str) -> None:
        if await self._try_destroy(desktop_id):
            self._forget(desktop_id)

    def _forget(self, desktop_id: str) -> None:
        del self._entries[desktop_id]
        self._store.put(Kind.DESKTOPS, desktop_id, None)

    async def _remove(self, entry: _Entry, why: str) -> None:
        desktop = entry.desktop
        entry.monitor.cancel()
        entry.lost.set()
        pause = FIRST_PAUSE
        while not await self._try_destroy(desktop.id):
            await anyio.sleep(pause)
            pause = min(pause * 2, 60)
        self._forget(desktop.id)
        entry.gone.set()
        self._tell_gone(desktop, why)

    def _tell_gone(self, desktop: Desktop, why: str) -> None:
        self._events.publish(
            "desktop", env=desktop.env, desktop_id=desktop.id, state="gone", why=why, message="desktop gone"
        )

    async def _try_destroy(self, desktop_id: str) -> bool:
        limit = self.driver.traits.removal_s
        try:
            with anyio.fail_after(limit):
                await self._ask(self.driver.destroy(desktop_id))
        except (EnvdError, TimeoutError) as error:
            detail = error.detail if isinstance(error, EnvdError) else f"no answer within {limit:g} s."
            self._events.publish(
                "note", desktop_id=desktop_id, message=f"The desktop could not be removed yet: {detail}"
            )
            return False
        return True

    async def _recover(self) -> None:
        """Take over every instance that carries our mark and is still wanted, and remove the others. What resists does
        not hold up the start, and is tried again as every removal is.

        A boot that was under way is left to whoever `resume`s it.
        """
        found = await self._ask(self.driver.list())
        kept = await self._store.all(Kind.DESKTOPS, KeptDesktop)
        # Those of another provider stay known: a life with that one takes them up, or removes them.
        mine = {one for one, record in kept.items() if record.desktop.provider == self.driver.name}
        for desktop_id in mine - found:
            self._store.put(Kind.DESKTOPS, desktop_id, None)
            self._tell_gone(kept[desktop_id].desktop, "it did not outlive the daemon")
        taken: list[_Entry] = []
        unwanted: list[str] = []
        for desktop_id in sorted(found):
            record = kept.get(desktop_id)
            if record is not None and self.goes_on(record):
                entry = self._entries[desktop_id] = _Entry(record.desktop, record)
                if record.desktop.state is not DesktopState.BOOTING:
                    taken.append(entry)
            else:
                self._remove_what_is_left(desktop_id)
                unwanted.append(desktop_id)
        async with anyio.create_task_group() as adopting:
            for entry in taken:
                adopting.start_soon(self._adopt, entry)
        unwanted += [entry.desktop.id for entry in taken if entry.removing]
        with anyio.move_on_after(SWEEP):
            for desktop_id in unwanted:
                await self.gone(desktop_id)

    def _remove_what_is_left(self, desktop_id: str) -> None:
        left = Desktop(id=desktop_id, provider=self.driver.name, state=DesktopState.REMOVING, created_at=time.time())
        self._entries[desktop_id] = _Entry(left)
        self._events.publish("note", desktop_id=desktop_id, message="Removing a desktop of an earlier life")
        self.retire(desktop_id, "an earlier life of this daemon left it behind")

    async def _adopt(self, entry: _Entry) -> None:
        """A ready desktop is as it was, or is removed: one in use without further questions, since what is wrong with
        it its env will see, and a spare if both its ports answer."""
        desktop_id, made, why = entry.desktop.id, None, "it did not outlive the daemon, or cannot be taken over"
        try:
            with anyio.fail_after(ADOPTION):
                made = await self._ask(self.driver.adopt(desktop_id, Report()))
        except (EnvdError, TimeoutError) as error:
            why = error.detail if isinstance(error, EnvdError) else f"the driver did not take it over in {ADOPTION:g} s"
        if made is not None:
            self._set(entry, endpoints=made.endpoints)
            self._let_idle(entry)
            if self._is_spare(entry) and not await self.is_well(entry.desktop):
                made, why = None, "it no longer answers"
        if made is None:
            self.retire(desktop_id, why)
            return
        self._start_soon(partial(self._monitor, entry))
        self._events.publish(
            "desktop", env=entry.desktop.env, desktop_id=desktop_id, state="adopted", message="desktop adopted"
        )
        if self._is_spare(entry):
            # To take it over woke it, where spares sleep.
            self.keep(entry.desktop)


def _died(death: Death) -> InstanceDied:
    detail = f"The instance died while it booted: {death.reason}."
    if death.out_of_memory is None:
        return InstanceDied(detail, exit_code=death.exit_code)
    hint = "Raise RAM_SIZE, or ask less of the desktop."
    return OutOfMemory(detail, hint=hint, exit_code=death.exit_code, limit_bytes=death.out_of_memory)


def is_cancelled() -> bool:
    """Whether somebody asked the current task to stop: else a CancelledError is one that a library leaked."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
