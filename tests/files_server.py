"""Serves files on loopback as the sites do that tasks name: with ranges and validators, and with faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

Fault = Callable[["FilesServer", web.Request, bytes], Awaitable[web.StreamResponse]]


class FilesServer:
    """`files` by path; `faults` answer the next requests; `seen` are the requests: path and Range."""

    def __init__(self) -> None:
        self.port = 0
        self.files: dict[str, bytes] = {}
        self.faults: deque[Fault] = deque()
        self.seen: list[tuple[str, str | None]] = []
        self._news = asyncio.Condition()
        self.ranges = True
        self.validators = True
        self.half_read = asyncio.Event()
        """Set when the client has read half a file, as `watch` was told."""
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        """Set when a client left such an answer."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def watch(self, received: int, total: int | None) -> None:
        """Give it to `fetch` as its progress."""
        if total and received >= total // 2:
            self.half_read.set()

    async def asked(self, times: int) -> None:
        """Wait until there were so many requests."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.seen) >= times)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        async with self._news:
            self.seen.append((request.raw_path, request.headers.get("Range")))
            self._news.notify_all()
        content = self.files.get(request.raw_path)
        if self.faults:
            return await self.faults.popleft()(self, request, content or b"")
        return web.Response(status=404) if content is None else self.whole_or_rest(request, content)

    def whole_or_rest(self, request: web.Request, content: bytes) -> web.StreamResponse:
        headers = {"ETag": tag(content)} if self.validators else {}
        asked = request.http_range if self.ranges else slice(None)
        if not asked.start or request.headers.get("If-Range") != tag(content):
            return web.Response(body=content, headers=headers)
        headers["Content-Range"] = f"bytes {asked.start}-{len(content) - 1}/{len(content)}"
        return web.Response(status=206, body=content[asked.start :], headers=headers)


def tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:12]}"'


async def half(
    server: FilesServer, request: web.Request, content: bytes, declared: int | None = None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"ETag": tag(content)} if server.validators else {})
    response.content_length = len(content) if declared is None else declared
    await response.prepare(request)
    await response.write(content[: len(content) // 2])
    return response


async def truncates(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    response = await half(server, request, content)
    assert request.transport is not None
    request.transport.close()
    return response


async def truncates_once_read(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    """As `truncates`, when the client, which must `watch`, has read the half: what it has not read is lost to it."""
    response = await half(server, request, content)
    await server.half_read.wait()
    assert request.transport is not None
    request.transport.close()
    return response


async def resets(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    response = await half(server, request, content)
    assert request.transport is not None
    request.transport.abort()
    return response


async def declares_too_much(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    response = await half(server, request, content + content, declared=len(content) + 7)
    assert request.transport is not None
    request.transport.close()
    return response


async def speaks_garbage(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    assert isinstance(request.transport, asyncio.Transport)
    request.transport.write(b"\x00\x01 SMTP ready\r\n\r\n" * 9)
    request.transport.close()
    return web.Response()


async def pauses(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    """Half, and the rest once `go_on` is set."""
    response = await half(server, request, content)
    try:
        await server.go_on.wait()
        await response.write(content[len(content) // 2 :])
    finally:
        server.left.set()
    return response


def says(status: int, **headers: str) -> Fault:
    async def answer(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


async def takes_any_range(server: FilesServer, request: web.Request, content: bytes) -> web.StreamResponse:
    """A rest of whatever there is now: this server does not know If-Range."""
    start = request.http_range.start or 0
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return web.Response(status=206, body=content[start:], headers={"Content-Range": span, "ETag": tag(content)})


@asynccontextmanager
async def files_server() -> AsyncIterator[FilesServer]:
    server = FilesServer()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        await runner.cleanup()
