"""`/v1/logs`: the last lines of the daemon's log, one JSON object a line; and those that follow, as they come.

Lines that say where somebody is, and those of the audit, are told to whoever has the scope `admin` alone. A reader that
comes back says which line it had last; a restart begins anew, and all of its lines are new.

Plain ASGI, as event streams are: the log never waits for a reader, and a reader that does not read is cut off.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import anyio
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .. import log
from ..access import Scope as Allowed
from ..errors import EnvdError, HttpVersionUnsupported, InvalidRequest
from ..service import Service
from ..telemetry.lines import Line, Wanted
from .bodies import number_in_query, service_of
from .gate import caller_of
from .problems import problem_response
from .sse import PIECE, SEND_LIMIT, counted, refuse_another

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
MOST = 5000
"""Lines of one answer; all that are kept."""
USUAL = 200
HEADERS = [
    (b"content-type", b"application/x-ndjson"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Logs:
    """The last lines of the log, of one `env`, `job` or `episode`, from a `level` up, not older than `since` (Unix
    seconds), the newest `limit` of them; with `follow=1` also those that come, until the daemon ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        service = service_of(request)
        try:
            wanted, after, limit, follows = _asked(request)
            if follows:
                if scope["http_version"] not in ("1.0", "1.1"):
                    raise HttpVersionUnsupported(
                        "A log is followed over HTTP/1.1 only.", hint="Let your proxy speak 1.1."
                    )
                refuse_another(service)
        except EnvdError as error:
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        lines, reached = log.LINES.after(after, wanted)
        start = {"type": "http.response.start", "status": 200, "headers": HEADERS}
        if scope["method"] == "HEAD" or not follows:
            await send(start)
            await _tell([] if scope["method"] == "HEAD" else lines[-limit:], send)
            return
        with counted(service):
            await send(start)
            await _play(service, _pieces(service, lines[-limit:], reached, wanted), receive, send)


def _asked(request: Request) -> tuple[Wanted, int, int, bool]:
    """What is wanted, after which line, how many, and whether to follow. Raises InvalidRequest."""
    query = request.query_params
    level = query.get("level", "debug").lower()
    if level not in LEVELS:
        message = f"must be one of {', '.join(LEVELS)}"
        raise InvalidRequest(f"level: {message}.", errors=[{"field": "level", "message": message}])
    wanted = Wanted(
        env=int(number_in_query(request, "env", 0, 10**6)) if "env" in query else None,
        job=query.get("job"),
        episode=query.get("episode"),
        level=LEVELS[level],
        since=number_in_query(request, "since", 0, 1e11),
        private=caller_of(request.scope).scope >= Allowed.ADMIN,
    )
    follows = number_in_query(request, "follow", 0, 1) > 0
    after = log.LINES.number_of(query.get("after", ""))
    return wanted, after, int(number_in_query(request, "limit", USUAL, MOST)) or USUAL, follows


async def _pieces(service: Service, lines: list[Line], after: int, wanted: Wanted) -> AsyncGenerator[bytes, None]:
    # At once, also where there is nothing to tell: who waits for the first byte knows that it is connected.
    if not lines:
        yield b"\n"
    for piece in _packed(lines):
        yield piece
    following = log.LINES.follow(after, wanted, service.settings.heartbeat)
    async with aclosing(following) as batches:
        async for batch in batches:
            for piece in _packed(batch):
                yield piece
            if not batch:
                yield b"\n"


async def _tell(lines: list[Line], send: Send) -> None:
    """All of them. Of a reader that does not read the connection is cut, so that it does not take them for all."""
    try:
        for piece in _packed(lines):
            with anyio.fail_after(SEND_LIMIT):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
    except TimeoutError:
        return
    await send({"type": "http.response.body", "body": b""})


async def _play(service: Service, pieces: AsyncGenerator[bytes, None], receive: Receive, send: Send) -> None:
    """Send until the daemon ends, the reader leaves, or does not read."""
    async with anyio.create_task_group() as tasks:

        async def end_with_the_daemon() -> None:
            await service.draining.wait()
            tasks.cancel_scope.cancel()

        async def end_with_the_reader() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(end_with_the_daemon)
        tasks.start_soon(end_with_the_reader)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    with anyio.fail_after(SEND_LIMIT):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            tasks.cancel_scope.cancel()
    with anyio.move_on_after(1):
        await send({"type": "http.response.body", "body": b""})


def _packed(lines: list[Line]) -> Iterator[bytes]:
    """In pieces of about `PIECE` bytes, made as they are wanted: what is sent to a reader that does not read stays in
    memory, and the lines are there anyway."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(f"{line.text}\n")
        size += len(held[-1])
        if size >= PIECE:
            yield "".join(held).encode()
            held, size = [], 0
    if held:
        yield "".join(held).encode()


routes = [Route("/v1/logs", Logs(), methods=["GET"])]
