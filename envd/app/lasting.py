"""No answer leaves before what it tells is on disk: what a client was told, the next life of the daemon knows, too."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..store import Store


class Lasting:
    """Inside of `Gate`. Costs nothing while nothing waits for the disk; in trouble nobody is kept waiting."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_what_lasts(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._store.settle()
            await send(message)

        await self._app(scope, receive, send_what_lasts if scope["type"] == "http" else send)
