"""No answer leaves before what it tells is on disk: what a client was told, the next life of the daemon knows, too."""

from __future__ import annotations

import time

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..calls import out_of_time
from ..errors import InvalidRequest
from ..store import Store
from .bodies import seconds_left
from .problems import problem_response


class Lasting:
    """Inside of `Gate`. Costs nothing while nothing waits for the disk; in trouble nobody is kept waiting. Where the
    disk takes longer than the caller has time (X-Request-Deadline), that is all that it is told."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        until = _until(scope)
        told_otherwise = False

        async def send_what_lasts(message: Message) -> None:
            nonlocal told_otherwise
            if message["type"] == "http.response.start" and not await self._lasts(until):
                told_otherwise = True
                keyed = "idempotency-key" in Request(scope).headers
                await problem_response(out_of_time(keyed=keyed), scope["path"])(scope, receive, send)
            if not told_otherwise:
                await send(message)

        await self._app(scope, receive, send_what_lasts)

    async def _lasts(self, until: float | None) -> bool:
        with anyio.move_on_after(None if until is None else max(0.0, until - time.monotonic())) as waiting:
            await self._store.settle()
        return not waiting.cancelled_caught


def _until(scope: Scope) -> float | None:
    """When the caller stops waiting (monotonic); None for never, and for what is refused further in."""
    try:
        seconds = seconds_left(Request(scope))
    except InvalidRequest:
        return None
    return None if seconds is None else time.monotonic() + seconds
