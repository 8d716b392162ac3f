"""Calls that change something, done once however often they are sent, and answered within their caller's time.

    job = await calls.do(sent, replay=..., work=...)

A call goes on when its caller leaves or has no more time. One with an idempotency key is known by it: sent again while
it goes on it waits for the same outcome, and afterwards it is answered as it was, for a day, also by the next life of
the daemon. What a call was is kept together with what it changed, by whoever changes it (`KeptAnswer`); one that was
refused before it changed anything is not kept, and may be sent again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import anyio
import structlog
from anyio.abc import TaskGroup

from .errors import DeadlinePassed, DiskLow, Draining, EnvdError, InternalError, KeyReused
from .records import KeptAnswer
from .store import Kind, Store

logger = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sent:
    """How a call came.

    key          its idempotency key, "" for none
    fingerprint  the same for calls that ask for the same of the same route
    until        when its caller stops waiting, on the monotonic clock; None for never
    owner        who sent it
    lease        that it was sent under, if it was
    """

    key: str = ""
    fingerprint: str = ""
    until: float | None = None
    owner: str = ""
    lease: str | None = None

    @property
    def left(self) -> float | None:
        """Seconds in which it must be answered."""
        return None if self.until is None else max(0.0, self.until - time.monotonic())


UNMARKED = Sent()


@dataclass
class _Going:
    """`outcome` has one thing once it is `done`, if there is no `error`."""

    fingerprint: str
    done: anyio.Event = field(default_factory=anyio.Event)
    outcome: list[Any] = field(default_factory=list)
    error: Exception | None = None


class Calls:
    """`run` must be running for calls to outlive their callers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._going: dict[str, _Going] = {}
        self._tasks: TaskGroup | None = None

    async def run(self, started: anyio.Event) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                started.set()
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    async def do(self, sent: Sent, work: Callable[[], Awaitable[T]], replay: Callable[[KeptAnswer], Awaitable[T]]) -> T:
        """What `work` returns or raises; for a key that is known what it did then, or what `replay` makes of it.

        Raises KeyReused for a key of another call, DeadlinePassed when the caller's time is over first; the call then
        goes on.
        """
        going = self._going.get(sent.key) if sent.key else None
        if going is not None:
            _require_same(going.fingerprint, sent)
            return cast(T, await self._outcome(going, sent))
        going = _Going(sent.fingerprint)
        if sent.key:
            self._going[sent.key] = going

        async def once() -> T:
            kept = await self._store.get(Kind.ANSWERS, sent.key, KeptAnswer) if sent.key else None
            if kept is None:
                return await work()
            _require_same(kept.fingerprint, sent)
            return await replay(kept)

        # Looking for what it was goes on without its caller, too: the disk may take longer than that has time.
        if self._tasks is None:
            await self._run(sent.key, going, once)
        else:
            self._tasks.start_soon(self._run, sent.key, going, once)
        return cast(T, await self._outcome(going, sent))

    async def keep(self, sent: Sent, what: Literal["job", "lease"], made: str) -> None:
        """Return when what the call made, by its id, is on disk together with whose answer it is. Raises DiskLow; then
        the call may be sent again, and what it made is its caller's to undo."""
        if sent.key:
            answer = KeptAnswer(fingerprint=sent.fingerprint, what=what, id=made)
            self._store.put(Kind.ANSWERS, sent.key, answer)
        try:
            await self._store.commit()
        except DiskLow:
            if sent.key:
                self.forget(sent.key)
            raise

    def forget(self, key: str) -> None:
        """What was kept of the call: nothing came of it, and sent again it is done anew."""
        self._store.put(Kind.ANSWERS, key, None)

    async def _run(self, key: str, going: _Going, work: Callable[[], Awaitable[Any]]) -> None:
        going.error = Draining("The daemon is shutting down; the call is cut short.", retry_after=5)
        try:
            going.outcome.append(await work())
            going.error = None
        except EnvdError as error:
            going.error = error
        except Exception as error:
            logger.exception("a call broke")
            going.error = InternalError(f"The daemon made a mistake: {error!r}")
        finally:
            if key and self._going.get(key) is going:
                del self._going[key]
            going.done.set()

    async def _outcome(self, going: _Going, sent: Sent) -> Any:
        with anyio.move_on_after(sent.left):
            await going.done.wait()
        if not going.done.is_set():
            raise out_of_time(keyed=bool(sent.key))
        if going.error is not None:
            raise going.error
        return going.outcome[0]


def out_of_time(*, keyed: bool) -> DeadlinePassed:
    return DeadlinePassed(
        "The call goes on; its caller's time is over.",
        hint="Send it again with the same Idempotency-Key: it is answered, and not done a second time."
        if keyed
        else "Give such calls an Idempotency-Key: sent again with it they are answered, and not done twice.",
        retry_after=1,
    )


def _require_same(fingerprint: str, sent: Sent) -> None:
    if fingerprint != sent.fingerprint:
        raise KeyReused(
            "The Idempotency-Key was sent before, with another request.", hint="Give each request a key of its own."
        )
