"""A desktop whose processors stand still while nobody needs them (ENVD_PAUSE_IDLE)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import structlog

from ..drivers.base import Console
from ..errors import EnvdError

logger = structlog.get_logger(__name__)


class Idling:
    """Counts who needs one desktop, and pauses it when the last of them has left.

    Nothing in a paused desktop answers, so whoever would take that for a fault looks at `paused` first.
    """

    def __init__(
        self,
        console: Callable[[], Console | None],
        start_soon: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:
        self.paused = False
        """Also while it is being paused or resumed."""
        self._console = console
        self._start_soon = start_soon
        self._needed_by = 0
        self._turn = anyio.Lock()

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """In here the desktop runs. Raises InfraError when it cannot be resumed."""
        self._needed_by += 1
        try:
            await self._resume()
            yield
        finally:
            self._needed_by -= 1
            if not self._needed_by:
                self._start_soon(self.pause)

    async def pause(self) -> None:
        """Unless somebody needs it, or it has no console. A failure is logged: the desktop goes on running."""
        async with self._turn:
            console = self._console()
            if self._needed_by or self.paused or console is None:
                return
            self.paused = True
            try:
                await console.pause()
            except EnvdError as error:
                self.paused = False
                logger.warning("cannot pause a desktop", error=error.detail)

    async def _resume(self) -> None:
        async with self._turn:
            console = self._console()
            if self.paused and console is not None:
                await console.resume()
                self.paused = False
