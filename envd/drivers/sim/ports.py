"""One TCP port of a sim desktop: bound when made, so that its number is known and kept, and open when told.

A plain aiohttp server per port instead of an application and runner: two hundred desktops have four hundred.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from ...errors import InfraError

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
BODY_LIMIT = 1 << 30


class Port:
    """A port of 127.0.0.1. While shut, the kernel refuses connections to it, and nobody else is given its number."""

    def __init__(self, handler: Handler) -> None:
        self._connections = _Connections(
            handler, request_factory=_request, handler_cancellation=True, access_log=None, lingering_time=0
        )
        self._listener: asyncio.Server | None = None
        self._socket: socket.socket | None = _bound(0)
        self.number: int = self._socket.getsockname()[1]

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    async def open(self) -> None:
        """Accept connections. Does nothing when open already, or closed for good."""
        if self._listener is None and self._socket is not None:
            reserved, self._socket = self._socket, None
            loop = asyncio.get_running_loop()
            self._connections.refuses = False
            self._listener = await loop.create_server(
                self._connections, sock=reserved, backlog=128, start_serving=False
            )
            await self._listener.start_serving()

    def shut(self) -> None:
        """Cut every connection and refuse new ones, until opened again."""
        if self._listener is not None:
            self._cut()
            self._socket = _bound(self.number)

    def drop(self) -> None:
        """Cut every connection and give the number up, for good."""
        self._cut()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def close(self) -> None:
        """Drop the port, and return when its last connection and handler have ended. May be called again.

        Raises InfraError when they have not within 5 s.
        """
        self.drop()
        try:
            async with asyncio.timeout(5):
                while self._connections.connections:
                    self._connections.cut()
                    await asyncio.sleep(0)
        except TimeoutError:
            count = len(self._connections.connections)
            raise InfraError(f"{count} connections to port {self.number} did not end within 5 s.") from None

    def _cut(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._connections.refuses = True
        self._connections.cut()


class _Connections(web.Server):
    """The connections of one port. Those that were being accepted when the port was shut are cut on arrival."""

    def __init__(self, handler: Handler, **options: object) -> None:
        super().__init__(handler, **options)  # type: ignore[arg-type]  # keywords of two signatures, one of them open
        self._transports: dict[RequestHandler, asyncio.Transport] = {}
        self.refuses = True

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._transports[handler] = transport
        if self.refuses:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._transports.pop(handler, None)

    def cut(self) -> None:
        for transport in list(self._transports.values()):
            transport.abort()


def _bound(number: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", number))
    made.setblocking(False)
    return made


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_LIMIT)
