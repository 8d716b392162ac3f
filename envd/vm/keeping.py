"""What a daemon knows of its templates: which one is next, which it uses, and which failed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import structlog

from ..drivers.base import Report
from ..errors import EnvdError
from .frozen import Changed
from .templates import FAILURES, Template, Templates

logger = structlog.get_logger(__name__)

_POLL = 1.0


class Keeper:
    """`latest` was found or made last: a plan for the next clone, looked at again before it is cloned."""

    def __init__(self, templates: Templates) -> None:
        self.templates = templates
        self.latest: Template | None = None
        self._makings_failed = 0
        self._uses: dict[str, int] = {}
        """Templates that were cloned here → the descriptor that holds the lock of their use."""

    async def open(self, key: str) -> None:
        """Raises StartError."""
        await anyio.to_thread.run_sync(self.templates.open)
        await self.find(key, Report())

    def close(self) -> None:
        for fd in self._uses.values():
            os.close(fd)
        self._uses.clear()

    @property
    def gave_up(self) -> bool:
        """Whether making one failed so often that it is not tried again in this daemon's life."""
        return self._makings_failed >= FAILURES

    async def find(self, key: str, report: Report) -> Template | None:
        """The template, if there is one that can be cloned; one that cannot is put aside."""
        try:
            template = await anyio.to_thread.run_sync(self.templates.find, key)
        except Changed as error:
            await self._set_aside(key, str(error), report)
            template = None
        self.latest = template
        if template is not None and key not in self._uses:
            fd = await anyio.to_thread.run_sync(lambda: self.templates.lock(key, "use", shared=True))
            if fd is not None:
                self._uses[key] = fd
        return template

    @asynccontextmanager
    async def making(self, key: str, report: Report) -> AsyncIterator[None]:
        """Nobody else of this user makes it meanwhile. How the block ends is remembered."""
        while True:
            fd = await anyio.to_thread.run_sync(self.templates.lock, key, "make")
            if fd is not None:
                break
            report.progress("waiting for the template that another daemon makes")
            await anyio.sleep(_POLL)
        try:
            yield
            self._makings_failed = 0
        except (EnvdError, OSError):
            self._makings_failed += 1
            raise
        finally:
            os.close(fd)

    async def cloned(self, template: Template) -> None:
        await anyio.to_thread.run_sync(self.templates.cloned, template)

    async def clone_failed(self, template: Template, error: Exception, report: Report) -> None:
        report.note(f"A clone of the template failed: {error}")
        logger.warning("clone failed", template=template.key, why=str(error))
        if await anyio.to_thread.run_sync(self.templates.failed, template) >= FAILURES:
            await self._set_aside(template.key, f"{FAILURES} clones of it failed one after another", report)

    async def _set_aside(self, key: str, why: str, report: Report) -> None:
        self.latest = None
        aside = await anyio.to_thread.run_sync(self.templates.set_aside, key)
        report.note(f"The template was put aside as {aside}: {why}. The next boot is a cold one and makes a new one.")
        logger.warning("template put aside", template=key, why=why, kept=str(aside))
