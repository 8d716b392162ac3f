"""`hypercorn envd.asgi:app`: the same service where hypercorn owns the socket and the signals. `envd serve` is the
better choice.

The lifespan runs the supervised half. Two things need care here: hypercorn would go on
answering when the queue has died, so this process ends itself then; and it waits for open streams before it ends the
lifespan, so the streams are ended as soon as it begins to stop. That moment is seen at the task in which hypercorn
waits for it, since no signal need reach this process: unless it is run with `--workers 0`, hypercorn serves in a
child of the one that is told to stop. (Without that, hypercorn 0.18 ends with 0 whatever its child ended with.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import structlog
from hypercorn.utils import raise_shutdown
from starlette.types import Receive, Scope, Send

from . import log
from .app import create_app
from .daemon import HANG_UP, OPEN_FILES, allow_open_files, daemon_id, hang_up, locked
from .errors import StartError
from .service import Service, open_service
from .settings import load

logger = structlog.get_logger(__name__)

BUG = 70
LOOK, LOOKS = 0.001, 5000
"""Seconds between two looks for the task in which hypercorn waits, and how many; it is there a moment after the
lifespan began, and the daemon may be told to stop in the next."""


class LifespanApp:
    """The ASGI app. Its service lives from lifespan startup to shutdown."""

    def __init__(self) -> None:
        self._ports: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            if port := (scope.get("server") or ("", None))[1]:
                self._ports.add(port)
            await self._app(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        stage, trouble = "startup", ""
        try:
            async with _running(self._ports) as service:
                self._app = create_app(service)
                await send({"type": "lifespan.startup.complete"})
                stage = "shutdown"
                await receive()
        except StartError as error:
            trouble = f"{error.detail} {error.hint}".strip()
        except Exception as error:
            # Let through, hypercorn would take it for an app without a lifespan, and serve without a queue.
            logger.exception("envd ended because of a mistake of its own")
            trouble = repr(error)
        if trouble:
            await send({"type": f"lifespan.{stage}.failed", "message": trouble})
        else:
            await send({"type": "lifespan.shutdown.complete"})


@asynccontextmanager
async def _running(ports: set[int]) -> AsyncIterator[Service]:
    log.setup()
    settings = load()
    log.setup(settings.log_level, settings.log_format)
    allow_open_files(OPEN_FILES)
    with locked(settings.state_dir):
        async with open_service(settings, daemon_id(settings.state_dir)) as service:
            started = asyncio.Event()
            core = asyncio.create_task(service.run(started.set), name="boot queue")
            core.add_done_callback(_end_with_the_queue)
            await started.wait()
            _tidy_before_sigterm(service, core)
            drain = asyncio.create_task(_drain_when_hypercorn_stops(service, ports), name="drain")
            try:
                yield service
            finally:
                if not service.draining.is_set():
                    drain.cancel()
                await asyncio.wait({drain})
                await service.drain()
                core.cancel()
                await asyncio.wait({core})


async def _drain_when_hypercorn_stops(service: Service, ports: set[int]) -> None:
    for _ in range(LOOKS):
        if waits := [task for task in asyncio.all_tasks() if _waits_for_the_end(task)]:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            logger.info("shutting down")
            await service.drain()
            asyncio.get_running_loop().call_later(HANG_UP, hang_up, ports)
            return
        await asyncio.sleep(LOOK)
    logger.warning("this server is not the hypercorn that envd knows; open streams may hold up its end")


def _waits_for_the_end(task: asyncio.Task[object]) -> bool:
    work = task.get_coro()
    return isinstance(work, Coroutine) and getattr(work, "cr_code", None) is raise_shutdown.__code__


def _tidy_before_sigterm(service: Service, core: asyncio.Task[None]) -> None:
    """In hypercorn's child, which lets SIGTERM end it on the spot: have it end a moment later, without desktops."""
    loop = asyncio.get_running_loop()
    tidying: list[asyncio.Task[None]] = []

    async def tidy() -> None:
        await service.drain()
        core.cancel()
        await asyncio.wait({core})
        logging.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        loop.add_signal_handler(signal.SIGTERM, lambda: tidying.append(loop.create_task(tidy())))


def _end_with_the_queue(core: asyncio.Task[None]) -> None:
    if core.cancelled():
        return
    logger.critical("the boot queue died; the process ends with it", exc_info=core.exception())
    logging.shutdown()
    os._exit(BUG)


app = LifespanApp()
