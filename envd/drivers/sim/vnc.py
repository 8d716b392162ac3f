"""The VNC port of a sim desktop: noVNC's page, and under /websockify a server that greets as RFB and then echoes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import WSMsgType, web

from .answers import answer_badly, html

if TYPE_CHECKING:
    from .desktop import Desktop

GREETING = b"RFB 003.008\n"
PAGES = {
    "/vnc.html": (b'<!doctype html><title>noVNC</title><script type="module" src="core/rfb.js"></script>', "text/html"),
    "/core/rfb.js": (b"export default class RFB {}\n", "text/javascript"),
}


class Vnc:
    def __init__(self, desktop: Desktop) -> None:
        self.desktop = desktop

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.desktop.runs.wait()
        way = self.desktop.asked(request.path, request.query_string)
        body, kind = PAGES.get(request.path, (b"", "text/html"))
        if way is not None:
            return await answer_badly(request, way, body, b"{}", b"[1, 2]", kind)
        if request.path == "/websockify":
            return await self._talk(request)
        return web.Response(body=body, content_type=kind) if body else html(404, "Not Found")

    async def _talk(self, request: web.BaseRequest) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("binary",), max_msg_size=1 << 25)
        await socket.prepare(request)
        await socket.send_bytes(GREETING)
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                await socket.send_bytes(message.data)
            elif message.type is WSMsgType.TEXT:
                await socket.send_str(message.data)
        return socket
