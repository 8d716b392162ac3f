"""`hypercorn envd.asgi:app`: the same service where hypercorn owns the socket and the signals. `envd serve` is the
better choice.

The lifespan runs the supervised half. Two things need care here (traps.md, findings 1 and 3): hypercorn would go on
answering when the queue has died, so this process ends itself then; and it waits for open streams before it ends the
lifespan, so the signal is heard here too, beside hypercorn's own handler, and the streams are ended at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import structlog
from starlette.types import Receive, Scope, Send

from . import log
from .app import create_app
from .daemon import locked
from .errors import StartError
from .service import Service, open_service
from .settings import load

logger = structlog.get_logger(__name__)

BUG = 70


class LifespanApp:
    """The ASGI app. Its service lives from lifespan startup to shutdown."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await self._app(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            async with _running() as service:
                self._app = create_app(service)
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except StartError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})


@asynccontextmanager
async def _running() -> AsyncIterator[Service]:
    settings = load()
    log.setup(settings.log_level, settings.log_format)
    with locked(settings.state_dir) as daemon_id:
        async with open_service(settings, daemon_id) as service:
            started = asyncio.Event()
            core = asyncio.create_task(service.run(started.set), name="boot queue")
            core.add_done_callback(_end_with_the_queue)
            await started.wait()
            drains = _drain_on_signals(service)
            yield service
            await service.drain()
            await asyncio.gather(*drains)
            core.cancel()
            await asyncio.wait({core})


def _drain_on_signals(service: Service) -> list[asyncio.Task[None]]:
    """Hear the signals that hypercorn hears. asyncio's own handler stays: it is told through a wake-up descriptor."""
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def begin() -> None:
        drains.append(loop.create_task(service.drain(), name="drain"))

    def heard(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(begin)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return drains


def _end_with_the_queue(core: asyncio.Task[None]) -> None:
    if core.cancelled():
        return
    logger.critical("the boot queue died; the process ends with it", exc_info=core.exception())
    os._exit(BUG)


app = LifespanApp()
