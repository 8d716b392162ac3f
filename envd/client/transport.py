"""One HTTP session to one envd server: deadlines, what may be sent twice, and every failure as an EnvdError.

Nothing else in the client meets an aiohttp exception. Proxy variables of the environment are not used: desktops are
served inside a cluster, and a proxy that intercepts loopback traffic is a common way to see 502 from nowhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from ..errors import (
    CapacityError,
    EnvdError,
    InfraError,
    InvalidRequest,
    JobExpired,
    ServerUnreachable,
    SettingsError,
    StillBooting,
)
from .answers import Answer, retry_after
from .saving import Into

DEFAULT_URL = "http://127.0.0.1:15001"

CONNECT_SECONDS = 10.0
KEEPALIVE_SECONDS = 15.0
"""Idle connections are dropped before the server drops them (20 s), else a POST may meet a closing one."""
QUIET_SECONDS = 45.0
"""A stream without even a heartbeat for so long (three times the server's interval) is dead."""
BODY_LIMIT = 64 * 1024 * 1024
FIRST_CONTACT_SECONDS = 3.0
A_WEEK = 7 * 86_400.0
"""Seconds: a server is told of no longer time, and takes no number of arbitrary length."""
KEEPS_KEYS = "Envd-Version"
"""A header of every answer of a server that keeps idempotency keys."""

OnRetry = Callable[[EnvdError, float], None]
"""Told why a call is made again, and after how many seconds. Must not block."""


class Resend(Enum):
    """When a request may be made again."""

    KEYED = "keyed"
    """Also after a refusal for want of capacity with Retry-After, which says that nothing was accepted; and when the
    answer was lost, if the server is one that keeps idempotency keys: it answers again and does nothing twice. Of
    another server, input whose answer was lost is not sent again."""
    ALWAYS = "always"
    """Also when the answer was lost: the request changes nothing, or does what it does once however often it comes."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of the monotonic clock, infinite for none."""

    at: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        return cls(float("inf") if seconds is None else time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.at - time.monotonic()

    @property
    def left_or_none(self) -> float | None:
        return None if self.at == float("inf") else max(0.0, self.left)


@dataclass(slots=True)
class Backoff:
    """Full jitter: anything from nothing to a bound that doubles, so that a herd of clients spreads out."""

    base: float = 0.2
    cap: float = 10.0
    attempt: int = 0

    def next(self) -> float:
        bound = min(self.cap, self.base * 2 ** min(self.attempt, 16))
        self.attempt += 1
        return random.uniform(0, bound)

    def reset(self) -> None:
        self.attempt = 0


class Transport:
    """`token` is sent with every request; by default what ENVD_TOKEN has.

    `patience` is how many seconds a server that cannot be reached is tried again; one that never once answered is
    given up after 3 s at most, since it is probably not there at all.

    The session opens with the first request and belongs to the event loop of that moment.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, patience: float = 60.0) -> None:
        self.url = _base(url or os.environ.get("ENVD_URL") or DEFAULT_URL)
        token = (os.environ.get("ENVD_TOKEN", "") if token is None else token).strip()
        if not re.fullmatch("[!-~]*", token):
            raise SettingsError(
                "The token (ENVD_TOKEN) holds something that cannot be sent.", hint="openssl rand -hex 32"
            )
        self._headers = {"User-Agent": "envd-client"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.patience = patience
        self._session: aiohttp.ClientSession | None = None
        self._reached = False
        self._keeps_keys = False

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def patience_of(self, asked: float | None) -> float:
        patience = self.patience if asked is None else asked
        return patience if self._reached else min(patience, FIRST_CONTACT_SECONDS)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        resend: Resend = Resend.ALWAYS,
        deadline: Deadline,
        attempt_timeout: float | None = None,
        limit: int = BODY_LIMIT,
        into: Into | None = None,
        accept: tuple[int, ...] = (),
        on_retry: OnRetry | None = None,
        patience: float | None = None,
    ) -> Answer:
        """The answer, if it is 2xx or of a status in `accept`. Its body is empty when it went `into` a file.

        Raises the typed error of any other answer, and ServerUnreachable, whose fact `outcome` is `not_sent` or
        `unknown`.

        `deadline` bounds everything; `attempt_timeout` one try of it.
        """
        content = _encoded(body)
        key = uuid.uuid4().hex if method == "POST" else ""
        backoff = Backoff()
        silent_since: float | None = None
        while True:
            try:
                answer = await self._attempt(
                    method, path, content, params, headers or {}, deadline, attempt_timeout, limit, into, key
                )
                if answer.ok or answer.status in accept:
                    return answer
                error = answer.error()
            except ServerUnreachable as unreachable:
                error = unreachable
            pause = backoff.next() + (error.retry_after or 0.0)
            if isinstance(error, ServerUnreachable):
                known = resend is Resend.KEYED and self._keeps_keys
                again = resend is Resend.ALWAYS or known or error.facts.get("outcome") == "not_sent"
                silent_since = silent_since or time.monotonic()
                give_up = min(deadline.at, silent_since + self.patience_of(patience))
            else:
                again = _refused_for_now(error)
                silent_since = None
                give_up = deadline.at
            if not again or time.monotonic() + pause > give_up:
                raise error
            if on_retry is not None:
                on_retry(error, pause)
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def stream(self, path: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The open response of an event stream. Raises ServerUnreachable, or the typed error of a non-2xx answer.

        Reading from it may raise what `translated` translates.
        """
        request = f"GET {self.url}{path}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=QUIET_SECONDS)
        with translated(self.url, request):
            response = await self._opened().get(
                self.url + path,
                headers={"Accept": "text/event-stream", "Cache-Control": "no-store"} | headers,
                timeout=timeout,
                allow_redirects=False,
            )
        try:
            self._reached = True
            if not 200 <= response.status < 300:
                with translated(self.url, request):
                    answer = await self._read(response, request, 1024 * 1024)
                raise answer.error()
            yield response
        finally:
            response.close()

    async def _attempt(
        self,
        method: str,
        path: str,
        content: bytes | None,
        params: dict[str, str] | None,
        headers: dict[str, str],
        deadline: Deadline,
        attempt_timeout: float | None,
        limit: int,
        into: Into | None,
        key: str,
    ) -> Answer:
        left = deadline.left_or_none
        total = min((t for t in (left, attempt_timeout) if t is not None), default=None)
        headers = headers | ({"Content-Type": "application/json"} if content is not None else {})
        headers |= {"Idempotency-Key": key} if key else {}
        headers |= {"X-Request-Deadline": f"{min(total, A_WEEK):.3f}"} if total is not None and method == "POST" else {}
        request = f"{method} {self.url}{path}"
        with translated(self.url, request):
            # aiohttp reads a total of 0 as none.
            async with self._opened().request(
                method,
                self.url + path,
                data=content,
                headers=headers,
                params=params,
                timeout=aiohttp.ClientTimeout(
                    total=None if total is None else max(total, 0.001), sock_connect=CONNECT_SECONDS
                ),
                allow_redirects=False,
            ) as response:
                # A proxy in between may answer in its stead now and then, without the header.
                self._keeps_keys = self._keeps_keys or KEEPS_KEYS in response.headers
                answer = await self._read(response, request, limit, into)
        self._reached = True
        return answer

    async def _read(
        self, response: aiohttp.ClientResponse, request: str, limit: int, into: Into | None = None
    ) -> Answer:
        body = b""
        if into is None or not 200 <= response.status < 300:
            async with aclosing(_bounded(response, request, limit)) as pieces:
                body = b"".join([piece async for piece in pieces])
        elif response.content_type != into.content_type:
            raise InfraError(
                f"{request} was answered with {response.content_type} where {into.content_type} was due.",
                hint="Is it an envd server that listens there, and nothing in between?",
            )
        else:
            async with aclosing(_bounded(response, request, into.limit)) as pieces:
                await into.take(pieces)
        return Answer(response.status, response.content_type, retry_after(response.headers), body, request)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # No limit on connections: one per watcher and per held reset, and the caller decides how many.
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=KEEPALIVE_SECONDS, socket_factory=_socket_that_notices
                ),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
            )
        return self._session


async def _bounded(response: aiohttp.ClientResponse, request: str, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises InfraError once it is larger than `limit` bytes."""
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            raise InfraError(
                f"{request} was answered with more than {limit} bytes.",
                hint="Is it an envd server that listens there?",
            )
        yield piece


@contextmanager
def translated(url: str, request: str) -> Iterator[None]:
    """Foreign errors become ServerUnreachable here, with what to check and whether the request can have arrived."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
        raise _unreachable(url, request, error) from error


def _unreachable(url: str, request: str, error: Exception) -> ServerUnreachable:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    where = f"{host}:{port}"
    outcome = "unknown"
    hint = f"Is envd running, and listening on an address that this machine reaches? Check {where} and ENVD_URL."
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        outcome = "not_sent"
        detail = f"The host name {host} cannot be resolved."
        hint = "Check the name in ENVD_URL and this machine's DNS."
    elif isinstance(error, aiohttp.ClientConnectorError) and _refused(error):
        outcome = "not_sent"
        detail = f"Nothing listens on {where}: connection refused."
        hint = (
            "Is envd running? Start it there, or point ENVD_URL at it. "
            "A server bound to 127.0.0.1 is reached from its own machine only."
        )
    elif isinstance(error, aiohttp.ConnectionTimeoutError):
        outcome = "not_sent"
        detail = f"No connection to {where} in time."
        hint = f"A firewall or a security group may drop the packets; check host and port {where}."
    elif isinstance(error, aiohttp.ClientConnectorError):
        outcome = "not_sent"
        detail = f"No connection to {where} ({_words(error)})."
    elif isinstance(error, TimeoutError):
        detail = f"{request} had no answer in time."
    elif isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError | OSError):
        detail = f"The connection was lost before {request} was answered ({_words(error)})."
        hint = f"Was envd restarted? Check {where} and envd's log."
    else:
        detail = f"{request} was answered with something that is not HTTP ({_words(error)})."
    hint += f" `envd doctor --url {url}` says more."
    return ServerUnreachable(detail, hint=hint, outcome=outcome, host=host, port=port)


def _refused_for_now(error: EnvdError) -> bool:
    """The two exceptions are about a job that was accepted: it goes on, or it is over."""
    return (
        isinstance(error, CapacityError)
        and not isinstance(error, StillBooting | JobExpired)
        and error.retry_after is not None
    )


def _refused(error: aiohttp.ClientConnectorError) -> bool:
    return isinstance(getattr(error, "os_error", None), ConnectionRefusedError)  # a certificate error has no os_error


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # what is no port is found out only now
    except ValueError as error:
        raise SettingsError(
            f"The address of the server is none: {error}.",
            hint=f"Give it as http://HOST:PORT, for example {DEFAULT_URL}.",
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(
            f"{url!r} is not the address of a server.", hint=f"Give it as http://HOST:PORT, for example {DEFAULT_URL}."
        )
    if parts.username is not None:
        raise SettingsError(
            "The address of a server holds no user.", hint="What a server wants is a token: ENVD_TOKEN."
        )
    return url.rstrip("/")


def _socket_that_notices(info: Any) -> socket.socket:
    """A reset may be held open for 20 minutes without a byte; a peer that vanished is noticed after a minute."""
    family, kind, protocol, _, _ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made


def _encoded(body: Any) -> bytes | None:
    if body is None:
        return None
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"What is to be sent cannot be written as JSON: {error}.") from error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
