"""The edge of every request: its id, its log line, and errors as `application/problem+json`. No traceback crosses
the wire."""

from __future__ import annotations

import math
import random
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from .. import __version__
from ..errors import EnvdError, InternalError, MethodNotAllowed, NotFound, RequestError

logger = structlog.get_logger(__name__)

QUIET_PATHS = frozenset({"/livez", "/readyz", "/health"})
LOOKED_AT = re.compile(r"/dashboard/|/v1/envs/[^/]*/screenshot$|/v1/episodes/[^/]*/frames/")
"""What the dashboard asks for again and again while somebody looks: small pictures, and parts of itself."""

ONE_CALL_EACH = ("/env/", "/health")
"""Clients of these routes connect anew for each call. That they have left hypercorn 0.18 notices
only when its keep-alive time is over, and holds the socket and three tasks until then; told to close, it does so at
once."""

REST_BYTES = 64 * 1024 * 1024
REST_SECONDS = 5.0
"""How much of a body that nobody wants is read before the client is answered anyway, and for how long."""


TWO_LENGTHS = RequestError(
    "The request has a Content-Length and a Transfer-Encoding.",
    hint="Send one of them. A proxy that goes by the other would take the rest for a request of somebody else's.",
)


def problem_response(error: EnvdError, instance: str, headers: Mapping[str, str] | None = None) -> Response:
    problem = error.problem(instance)
    sent = dict(headers or {})
    if error.retry_after is not None:
        # Spread by up to a quarter, so that clients which were refused together do not return together.
        sent["Retry-After"] = str(math.ceil(error.retry_after * random.uniform(1, 1.25)))
    return Response(
        problem.model_dump_json(exclude_none=True), problem.status, sent, media_type="application/problem+json"
    )


async def refuse(
    error: EnvdError, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request, or a websocket that was not accepted yet, with a problem."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": error.detail[:100]})
        return
    # After one of these hypercorn 0.18 closes the connection, so nobody is to send another request on it.
    closing = {"Connection": "close"} if scope["type"] == "websocket" else {}
    await problem_response(error, scope["path"], {**(headers or {}), **closing})(scope, receive, send)


class Boundary:
    """Outermost: gives each request an id, logs it once when it is answered, and turns what nobody caught into a
    500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        body = _Body(receive)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["envd-version"] = __version__
                if scope["path"].startswith(ONE_CALL_EACH) and scope["http_version"] in ("1.0", "1.1"):
                    headers["connection"] = "close"
                await body.read_rest()
            await body.send_beside(send, message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            # Still percent-encoded: what a stranger sends must not move the cursor of whoever reads the log.
            facts = {"method": scope["method"], "path": scope["raw_path"].decode("ascii", "replace")}
            try:
                if _has_two_lengths(scope):
                    await problem_response(TWO_LENGTHS, scope["path"], {"Connection": "close"})(
                        scope, body.receive, send_with_id
                    )
                else:
                    await self._app(scope, body.receive, send_with_id)
            except Exception as error:
                logger.exception("a request broke", **facts)
                if status is not None:
                    raise
                mistake = InternalError(
                    f"The daemon made a mistake: {type(error).__name__}.",
                    hint=f"Its log has the traceback under request id {request_id}.",
                )
                await problem_response(mistake, scope["path"])(scope, body.receive, send_with_id)
            finally:
                write = logger.debug if _is_routine(scope, status) else logger.info
                write("request", **facts, status=status, seconds=round(time.monotonic() - began, 4))


def _is_routine(scope: Scope, status: int | None) -> bool:
    """Whether a request is nobody's business unless something is looked for."""
    path: str = scope["path"]
    looks = path.startswith("/dashboard/") or b"width=" in scope["query_string"]
    return path in QUIET_PATHS or (looks and status in (200, 304) and LOOKED_AT.match(path) is not None)


class _Body:
    """What is left of a request's body when the answer begins.

    A client that still sends would never read the answer, and hypercorn 0.18 hangs for good on a body of which
    nobody takes more than its queue holds; so it is read and thrown away, within limits.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def read_rest(self) -> None:
        """Return when all is read, or as soon as that takes too long or is too much."""
        left = REST_BYTES
        with anyio.move_on_after(REST_SECONDS):
            while not self._complete and left > 0:
                left -= len((await self.receive()).get("body", b""))

    async def send_beside(self, send: Send, message: Message) -> None:
        """Send, and meanwhile read on if there is still something to read: hypercorn then closes the connection."""
        if self._complete:
            await send(message)
            return
        async with anyio.create_task_group() as both:
            both.start_soon(self._read_on)
            await send(message)
            both.cancel_scope.cancel()

    async def _read_on(self) -> None:
        while not self._complete:
            await self.receive()


def _has_two_lengths(scope: Scope) -> bool:
    """Hypercorn 0.18 takes the Transfer-Encoding, and what follows for another request on the same connection."""
    return {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in scope["headers"]}


def _request_id(given: str) -> str:
    return given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else secrets.token_hex(8)


async def _envd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EnvdError)
    return problem_response(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    translated: EnvdError
    if error.status_code == 404:
        translated = NotFound(f"There is nothing at {path}.", hint="GET /docs lists what there is.")
    elif error.status_code == 405:
        translated = MethodNotAllowed(f"{path} does not take {request.method}.", hint=_allowed(error.headers))
    else:
        translated = RequestError(str(error.detail))
    return problem_response(translated, path, error.headers)


def _allowed(headers: Mapping[str, str] | None) -> str:
    return f"It takes {headers['Allow']}." if headers and "Allow" in headers else ""


exception_handlers: dict[Any, ExceptionHandler] = {EnvdError: _envd_error, HTTPException: _http_error}
