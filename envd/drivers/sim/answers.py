"""Answers that are wrong on purpose, one for each `Way`."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, NoReturn

from aiohttp import web

from .behaviour import Way

GARBAGE = b"\x8f\x00not what you asked for\xff" * 40
HTML = "<!doctype html>\n<title>Please sign in</title>\n<h1>Please sign in</h1>\n"
CHUNK = bytes(1 << 16)
HUGE = 256 << 20


async def answer_badly(
    request: web.BaseRequest, way: Way, right: bytes, flat: bytes, wrong: bytes, content_type: str
) -> web.StreamResponse:
    """Answer in this way. `right` is what should be sent; `flat` and `wrong` are what `flat` and `size` send."""
    match way:
        case "reset":
            reset(request)
            await silence()
        case "lose":
            await _break_off(request)
        case "error":
            return html(500, "Internal Server Error")
        case "html":
            return web.Response(text=HTML, content_type="text/html")
        case "redirect":
            return web.Response(status=302, headers={"Location": request.path})
        case "stall" | "die":
            await silence()
        case "cut" | "drip" | "huge":
            return await _stream(request, way, right, content_type)
    bodies = {
        "garbage": GARBAGE,
        "half": right[: len(right) // 2],
        "flat": flat,
        "size": wrong,
        "empty": b"",
    }
    return web.Response(body=bodies[way], content_type=content_type)


async def _break_off(request: web.BaseRequest) -> NoReturn:
    """Close the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    await silence()


def reset(request: web.BaseRequest) -> None:
    """Have the kernel reset the connection, so that even what was sent before is lost."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


async def silence() -> NoReturn:
    """Never return; ends when the connection does."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def html(status: int, title: str) -> web.Response:
    """An error as Flask words it."""
    return web.Response(
        status=status,
        text=f"<!doctype html>\n<html lang=en>\n<title>{status} {title}</title>\n<h1>{title}</h1>\n",
        content_type="text/html",
    )


def as_json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")


async def _stream(request: web.BaseRequest, way: Way, right: bytes, content_type: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    if way != "huge":
        response.content_length = len(right)
    await response.prepare(request)
    if way == "cut":
        await response.write(right[: len(right) // 2])
        if request.transport is not None:
            request.transport.close()
        await silence()
    elif way == "drip":
        for position in range(len(right)):
            await response.write(right[position : position + 1])
            await asyncio.sleep(0.05)
    else:
        for _ in range(HUGE // len(CHUNK)):
            await response.write(CHUNK)
    return response
