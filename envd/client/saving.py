"""A body that is too large for memory goes to a file: whole, or not at all, and written off the loop."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from ..errors import RequestError

PIECE = 1024 * 1024
"""Bytes that one trip to a thread writes."""


@dataclass(frozen=True, slots=True)
class Into:
    """Where a 2xx answer goes: a file in a folder that exists, in place of the file that is there."""

    path: Path
    content_type: str
    """The only one that is taken."""
    limit: int
    """Bytes. More are refused, and nothing is kept."""

    async def take(self, pieces: AsyncIterable[bytes]) -> None:
        """Make `path` of `pieces`. Raises RequestError when the disk does not take it, and what `pieces` raises."""
        await self._do(self._refuse_device)
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            # No file is open between two writes: there is none to leave open when the caller is cancelled.
            await self._do(partial(part.touch, exist_ok=False))
            gathered = bytearray()
            async for piece in pieces:
                gathered += piece
                if len(gathered) >= PIECE:
                    await self._do(partial(_append, part, bytes(gathered)))
                    gathered.clear()
            await self._do(partial(_append, part, bytes(gathered)))
            await self._do(partial(os.replace, part, self.path))
        finally:
            with anyio.CancelScope(shield=True), suppress(OSError):
                await anyio.to_thread.run_sync(partial(part.unlink, missing_ok=True))

    def _refuse_device(self) -> None:
        """Root would otherwise replace /dev/null by a file."""
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"{self.path} cannot be written: it is no ordinary file.", hint="Name another one.")

    async def _do(self, work: Callable[[], None]) -> None:
        try:
            await anyio.to_thread.run_sync(work)
        except OSError as error:
            raise RequestError(
                f"{self.path} cannot be written: {error.strerror or error}.",
                hint="Name a file in a folder that exists and has room.",
            ) from error


def _append(part: Path, data: bytes) -> None:
    with part.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(data)
