"""The edge of every request: its id, its log line, and errors as `application/problem+json`. No traceback crosses
the wire."""

from __future__ import annotations

import math
import random
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from .. import __version__
from ..errors import EnvdError, InternalError, MethodNotAllowed, NotFound, RequestError
from ..telemetry.about import HEADERS, SHORT_LEASE, Fact, gathered, note, path_of
from ..telemetry.metrics import Metrics

if TYPE_CHECKING:
    from ..telemetry.tracing import Tracing

logger = structlog.get_logger(__name__)

QUIET_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Asked for every few seconds by machines: logged at debug level only, and not traced."""
STREAMS = frozenset({"text/event-stream", "application/x-ndjson"})
"""What is answered for as long as somebody reads."""
NO_ROUTE = "none"
IN_PATHS = {"job": "job_id", "episode": "episode_id", "lease": "lease"}
"""Parameters of paths that say what a request is about, and as what."""
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
    _note(error)
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
        _note(error)
        await send({"type": "websocket.close", "code": 1008, "reason": error.detail[:100]})
        return
    # After one of these hypercorn 0.18 closes the connection, so nobody is to send another request on it.
    closing = {"Connection": "close"} if scope["type"] == "websocket" else {}
    await problem_response(error, scope["path"], {**(headers or {}), **closing})(scope, receive, send)


def _note(error: EnvdError) -> None:
    """For the request's line. What strangers sent may be in the words."""
    words = "".join(letter if letter.isprintable() else "?" for letter in error.detail)
    note(code=error.code, fault=str(error.fault), detail=words)


class Boundary:
    """Outermost: gives each request an id, counts and traces it, logs it once when it is answered, with what it turned
    out to be about, and turns what nobody caught into a 500. A websocket is a request that ends when it is closed."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        traced = self._tracing.request(scope) if self._tracing and scope["path"] not in QUIET_PATHS else nullcontext()
        with structlog.contextvars.bound_contextvars(request_id=request_id), gathered() as about, traced as span:
            seen = _Seen(scope, request_id, about)
            self._metrics.requests_now.inc()
            try:
                if scope["type"] == "websocket":
                    await self._app(scope, receive, seen.watching(send))
                else:
                    await self._answer(seen, receive, send)
            finally:
                self._metrics.requests_now.dec()
                seen.finish()
                self._count(seen)
                seen.log()
                if span is not None:
                    span.answered(seen.route, seen.method, seen.status, about)

    async def _answer(self, seen: _Seen, receive: Receive, send: Send) -> None:
        scope, body = seen.scope, _Body(receive)
        watched = seen.watching(send, body)
        try:
            if _has_two_lengths(scope):
                refusal = problem_response(TWO_LENGTHS, scope["path"], {"Connection": "close"})
                await refusal(scope, body.receive, watched)
            else:
                await self._app(scope, body.receive, watched)
        except Exception as error:
            logger.exception("a request broke", **seen.facts)
            if seen.status is not None:
                raise
            mistake = InternalError(
                f"The daemon made a mistake: {type(error).__name__}.",
                hint=f"Its log has the traceback under request id {seen.request_id}.",
            )
            await problem_response(mistake, scope["path"])(scope, body.receive, watched)

    def _count(self, seen: _Seen) -> None:
        self._metrics.answered(seen.route, seen.method, seen.status, None if seen.streams else seen.seconds)
        code, fault = seen.about.get("code"), seen.about.get("fault")
        if code is not None and fault is not None:
            self._metrics.failed("answer", str(code), str(fault))


class _Seen:
    """What is seen of a request from outside."""

    def __init__(self, scope: Scope, request_id: str, about: dict[str, Fact]) -> None:
        self.scope = scope
        self.request_id = request_id
        self.about = about
        self.status: int | None = None
        """None before an answer, and of a client that left before."""
        self.streams = scope["type"] == "websocket"
        self._began = time.monotonic()

    @property
    def method(self) -> str:
        return str(self.scope.get("method", "WEBSOCKET"))

    @property
    def route(self) -> str:
        """The template, never the path: of that there are as many as strangers please."""
        return getattr(self.scope.get("route"), "path_format", NO_ROUTE)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def facts(self) -> dict[str, Any]:
        return {"method": self.method, "path": path_of(self.scope)}

    def watching(self, send: Send, body: _Body | None = None) -> Send:
        """`send`, with what every answer has."""

        async def send_and_see(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                self.status = message.get("status", 101)
                self._add_headers(message)
            elif message["type"] == "websocket.close" and self.status is None:
                self.status = 403  # as hypercorn answers one that was not accepted
            if body is None:
                await send(message)
                return
            if message["type"] == "http.response.start":
                await body.read_rest()
            await body.send_beside(send, message)

        return send_and_see

    def _add_headers(self, message: Message) -> None:
        self.finish()
        message.setdefault("headers", [])
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = self.request_id
        headers["envd-version"] = __version__
        for fact, name in HEADERS.items():
            if fact in self.about:
                headers[name] = str(self.about[fact])
        one_call = self.scope["path"].startswith(ONE_CALL_EACH) and self.scope["http_version"] in ("1.0", "1.1")
        if one_call and self.scope["type"] == "http":
            headers["connection"] = "close"
        kind = headers.get("content-type", "").partition(";")[0]
        self.streams = self.streams or kind in STREAMS

    def finish(self) -> None:
        """Note what the path names, unless that is known better by now."""
        for name, fact in IN_PATHS.items():
            value = self.scope.get("path_params", {}).get(name, "")
            if fact not in self.about and re.fullmatch(r"[\w.:-]{1,64}", value, re.ASCII):
                self.about[fact] = value[:SHORT_LEASE] if name == "lease" else value

    def log(self) -> None:
        write = logger.debug if _is_routine(self.scope, self.status) else logger.info
        write("request", **self.facts, status=self.status, seconds=round(self.seconds, 4), **self.about)


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
