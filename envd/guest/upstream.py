"""One request or one websocket to a port of a desktop, made for somebody outside who is answered with what comes back.

The guest is an adversary here: what it answers may be shown by a browser under this daemon's address. Each call has a
connection of its own, no cookie is kept, no redirect followed, and heads, bodies and messages are bounded, in size and
in time. All of it raises GuestUnreachable and GuestMisbehaved.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import anyio
from yarl import URL

from ..errors import GuestMisbehaved, GuestUnreachable
from .cdp import no_redirects

CONNECT_SECONDS = 10.0
HEAD_SECONDS = 60.0
"""From the request until the head of the answer is there."""
IDLE_SECONDS = 30.0
"""In which a guest that is sending must send `PIECE` bytes, or the rest."""
CLOSE_SECONDS = 0.5
"""For saying goodbye to a guest; whoever waits for its end has a second."""
PIECE = 64 * 1024
LONGEST_HEAD = 32 * 1024
"""Bytes of all headers of an answer; a single one, and how many there may be, aiohttp bounds."""
LARGEST_MESSAGE = 16 * 1024 * 1024
"""Bytes of a websocket's message."""
_TYPE = re.compile(r"[a-z0-9.+-]{1,64}/[a-z0-9.+-]{1,64}")


def misbehaved(detail: str) -> GuestMisbehaved:
    """As a gateway says it: 502. To the daemon itself a guest that answers nonsense is a machine that failed."""
    error = GuestMisbehaved(detail)
    error.status = 502
    return error


@asynccontextmanager
async def asking(
    method: str, url: str, *, headers: Mapping[str, str] | None = None, form: Mapping[str, str] | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer, with its head read and judged; its body comes from `pieces`. `url` is sent as it is written."""
    async with _session() as session:
        with _translated(url):
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    response = await session.request(
                        method, URL(url, encoded=True), headers=headers, data=form, allow_redirects=False
                    )
            except TimeoutError as error:
                raise GuestUnreachable(f"{url} did not answer within {HEAD_SECONDS:g} s.", sent=True) from error
        async with response:
            _judge(response)
            yield response


async def pieces(response: aiohttp.ClientResponse, limit: int) -> AsyncGenerator[bytes, None]:
    """The body, bit by bit, as fast as they are taken."""
    left = limit
    while piece := await _piece(response):
        left -= len(piece)
        if left < 0:
            raise misbehaved(f"{response.url.path} sent more than {limit} bytes.")
        yield piece


async def whole(response: aiohttp.ClientResponse, limit: int) -> bytes:
    return b"".join([piece async for piece in pieces(response, limit)])


def content_type(response: aiohttp.ClientResponse) -> str:
    """What it says its body is, in a spelling of ours."""
    kind = response.content_type.lower()
    if not _TYPE.fullmatch(kind):
        return "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") or kind.endswith("javascript") else kind


def length(response: aiohttp.ClientResponse) -> int | None:
    """How long the body is, where that is sure: reading it fails if it is not."""
    chunked = "Transfer-Encoding" in response.headers
    return None if chunked or response.content_length is None else response.content_length


@asynccontextmanager
async def websocket(
    url: str, protocols: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """An open websocket, of which the caller closes its end; what is not closed at the end of the block is cut."""
    async with _session() as session:
        with _translated(url):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    socket = await session.ws_connect(
                        URL(url, encoded=True), protocols=protocols, headers=headers, max_msg_size=LARGEST_MESSAGE
                    )
            except aiohttp.WSServerHandshakeError as error:
                raise misbehaved(f"{url} is no websocket: {error.status} {error.message[:200]}") from error
            except TimeoutError as error:
                raise GuestUnreachable(f"{url} did not answer within {CONNECT_SECONDS:g} s.", sent=True) from error
        try:
            yield socket
        finally:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await socket.close()


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "envd"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        trace_configs=[no_redirects()],
    ) as session:
        yield session


def _judge(response: aiohttp.ClientResponse) -> None:
    """Raises GuestMisbehaved for what nobody is to be shown."""
    if not (response.status == 200 or 400 <= response.status < 600):
        raise misbehaved(f"{response.url.path} answered {response.status}, where 200 or an error belongs.")
    if sum(len(name) + len(value) for name, value in response.raw_headers) > LONGEST_HEAD:
        raise misbehaved(f"{response.url.path} answered with headers of more than {LONGEST_HEAD} bytes.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise misbehaved(f"{response.url.path} answered in an encoding that was not asked for.")


async def _piece(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    with _translated(str(response.url)):
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while size < PIECE and (part := await response.content.read(PIECE - size)):
                    parts.append(part)
                    size += len(part)
        except TimeoutError as error:
            raise misbehaved(f"{response.url.path} sent {size} bytes in {IDLE_SECONDS:g} s.") from error
    return b"".join(parts)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise GuestUnreachable(f"{url} refused the connection: {error.os_error}.", sent=False) from error
    except aiohttp.ConnectionTimeoutError as error:
        raise GuestUnreachable(f"{url} did not answer within {CONNECT_SECONDS:g} s.", sent=False) from error
    except (aiohttp.ClientResponseError, aiohttp.ClientPayloadError, ValueError) as error:
        raise misbehaved(f"{url} answered what is no HTTP: {_said(error)}") from error
    except (aiohttp.ClientError, OSError) as error:
        raise GuestUnreachable(f"{url} broke off: {_said(error)}", sent=True) from error


def _said(error: Any) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
