"""Envs of a server for this process: `DesktopLease`, and the event loop, in a thread, that speaks for all of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from gymnasium import logger
from gymnasium.error import ClosedEnvironmentError

from ..client import Client, EnvHandle
from ..client.lease import TTL, told_of
from ..errors import EnvdError, RequestError, SettingsError
from ..models import Lease

T = TypeVar("T")
NOTICE = 5.0
"""Seconds of waiting for a lease after which a warning says what it waits for."""


@dataclass(frozen=True)
class _Asked:
    """What `Client.lease` is asked for."""

    count: int
    ttl_s: float
    wait_s: float | None
    owner: str | None


class DesktopLease:
    """`count` envs of one server, all or none, until `close`, the end of a `with` block, or of the process.

    url       default: the environment's ENVD_URL, else http://127.0.0.1:15001
    token     default: the environment's ENVD_TOKEN
    owner     for whom, where no token says that: owners are served in turns
    wait_s    how long to wait for so many envs at once; None waits as long as it takes, and warns of it after 5 s
    ttl_s     how long the envs are kept from others when this process dies
    patience  seconds during which a server that stopped answering is tried again

    Raises LeaseUnavailable when `wait_s` is over, and ServerUnreachable. It may be used from several threads, and
    copying it gives the same one: envs that are made of one spec share it.
    """

    def __init__(
        self,
        count: int = 1,
        url: str | None = None,
        *,
        token: str | None = None,
        owner: str | None = None,
        wait_s: float | None = None,
        ttl_s: float = TTL,
        patience: float = 60.0,
    ) -> None:
        self.count = count
        self._client = Client(url, token=token, patience=patience)
        self._asked = _Asked(count, ttl_s, wait_s, owner)
        self._taken: set[int] = set()
        self._changing = threading.Lock()
        self._screen: tuple[int, int] | None = None
        stack = ExitStack()
        # Also when it is forgotten: at the end of the process, waiting for the loop would otherwise never end.
        self._close = weakref.finalize(self, stack.close)
        self._portal = stack.enter_context(start_blocking_portal(name="envd-gym"))
        stack.callback(self._portal.call, self._client.aclose)
        self._held = _Held(self._portal, self._client, self._asked)
        self._held_now = [self._held]
        stack.callback(_release, self._held_now)
        try:
            self._held.wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def close(self) -> None:
        """Give the envs back: their episodes end and their desktops are removed. May be called more than once."""
        self._close()

    @property
    def closed(self) -> bool:
        return not self._close.alive

    @property
    def client(self) -> Client:
        return self._client

    @property
    def screen(self) -> tuple[int, int]:
        """Width and height in pixels of the server's desktops."""
        if self._screen is None:
            version = self.run(self._client.version)
            try:
                width, height = version["settings"]["ENVD_SCREEN"]["value"]
            except (KeyError, TypeError, ValueError) as error:
                raise SettingsError(
                    f"{self._client.url} does not say how large its screens are.", hint="Give it: screen=(1920, 1080)."
                ) from error
            self._screen = int(width), int(height)
        return self._screen

    def take(self) -> int:
        """A place in the lease, from 0, that nobody else in this process has; give it back with `put_back`."""
        self._usable()
        with self._changing:
            free = set(range(self.count)) - self._taken
            if not free:
                raise RequestError(
                    f"All {self.count} envs of this lease are in use.",
                    hint="Close one of them, or make the lease larger: DesktopLease(count).",
                )
            self._taken.add(place := min(free))
            return place

    def put_back(self, place: int) -> None:
        with self._changing:
            self._taken.discard(place)

    def env(self, place: int, *, instead_of: EnvHandle | None = None) -> EnvHandle:
        """The env at `place`, under the lease. One that was lost, or whose handle is `instead_of`, is asked for again,
        for all places. Raises as the constructor does."""
        self._usable()
        with self._changing:
            if self._held.lost or (instead_of is not None and instead_of is self._held.envs[place]):
                self._held.release()
                self._held_now[:] = [held := _Held(self._portal, self._client, self._asked)]
                held.wait()
                self._held = held
            return self._held.envs[place]

    def run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """What `call` returns or raises, in the thread of the loop; what is interrupted here is cancelled there."""
        self._usable()
        future: Future[T] = self._portal.start_task_soon(call, *args)
        try:
            return future.result()
        finally:
            future.cancel()  # matters when the wait was interrupted, by Ctrl-C for example

    def _usable(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("The lease of this env was closed.")


class _Held:
    """One lease, from when it is asked for until it is released or lost, in a task of its own."""

    def __init__(self, portal: BlockingPortal, client: Client, asked: _Asked) -> None:
        self.envs: list[EnvHandle] = []
        self._portal = portal
        self._granted: Future[None] = Future()
        self._waits: Lease | None = None
        self._over = portal.call(anyio.Event)
        self._task = portal.start_task_soon(self._hold, client, asked)

    @property
    def lost(self) -> bool:
        return self._task.done()

    def wait(self) -> None:
        """Return once it is held. Raises why it cannot be."""
        try:
            wait([self._granted], NOTICE)
            if not self._granted.done() and (lease := self._waits) is not None:
                words = f"{lease.count} envs are waited for, number {lease.position} in line{told_of(lease)}"
                logger.warn("%s. wait_s limits the wait.", words)
            self._granted.result()
        except BaseException:
            self._task.cancel()  # matters when the wait was interrupted
            raise

    def release(self) -> None:
        """May be called more than once, and when it is lost."""
        self._portal.call(self._over.set)
        with suppress(EnvdError, CancelledError):
            self._task.result()

    def _told(self, lease: Lease) -> None:
        self._waits = lease

    async def _hold(self, client: Client, asked: _Asked) -> None:
        try:
            async with client.lease(
                asked.count, ttl_s=asked.ttl_s, wait_s=asked.wait_s, owner=asked.owner, on_wait=self._told
            ) as self.envs:
                self._granted.set_result(None)
                await self._over.wait()
        except Exception as error:
            if self._granted.done():
                raise
            self._granted.set_exception(error)


def _release(held: list[_Held]) -> None:
    for one in held:
        one.release()
