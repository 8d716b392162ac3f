"""A guest for gradings: a real HTTP server whose every answer a test can replace, and requests to grade with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from envd.tasks.grading import GradeRequest, GuestAddress
from envd.tasks.task import Metric

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeGuest:
    """`files` are there; `faults` replace what a path answers; `asked` are the paths in order."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Handler] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ran: list[Any] = field(default_factory=list)
    outputs: list[str] = field(default_factory=lambda: ["done\n"])

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if request.path in self.faults:
            return await self.faults[request.path](request)
        if request.path == "/file":
            path = str((await request.post())["file_path"])
            if path in self.files:
                return web.Response(body=self.files[path])
            return web.json_response({"error": "File not found"}, status=404)
        if request.path == "/execute":
            self.ran.append((await request.json())["command"])
            return web.json_response({"status": "success", "output": self.outputs[-1], "error": "", "returncode": 0})
        if request.path == "/accessibility":
            return web.json_response({"AT": "<desktop-frame/>"})
        return web.Response(text="ok")

    def address(self, *, chromium: int = 1, vlc: int = 3) -> GuestAddress:
        """Ports 1 to 3 of this host refuse."""
        return GuestAddress("127.0.0.1", self.port, chromium, 2, vlc)

    def request(self, *metrics: Metric, **more: Any) -> GradeRequest:
        given: dict[str, Any] = {"guest": self.address(), "screen": (320, 240), "now": time.time(), **more}
        return GradeRequest(metrics=metrics, allow_internet=False, **given)


@asynccontextmanager
async def fake_guest() -> AsyncIterator[FakeGuest]:
    guest = FakeGuest()
    app = web.Application(client_max_size=2**20)
    app.router.add_route("*", "/{path:.*}", guest.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    guest.port = runner.addresses[0][1]
    try:
        yield guest
    finally:
        await runner.cleanup()


async def resets(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"half of it")
    return await resets(request)


async def is_garbage(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\x00<html>not what was asked for")


async def is_empty(_: web.Request) -> web.StreamResponse:
    return web.Response()


async def fails_in_html(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="<h1>Internal Server Error</h1>", content_type="text/html")


async def redirects(_: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"})


def rule(rules: Any) -> dict[str, Any]:
    return {"type": "rule", "rules": rules}


def number(value: Any) -> Metric:
    """A metric that returns `value`."""
    return Metric("number", rule(value))


def command(words: Sequence[str] = ("whoami",), expected: str = "done\n") -> Metric:
    return Metric("exact_match", {"type": "vm_command_line", "command": list(words)}, rule({"expected": expected}))


def vm_file(func: str = "needs_a_file", path: str = "/home/user/a.txt") -> Metric:
    return Metric(func, {"type": "vm_file", "path": path, "dest": "a.txt"})
