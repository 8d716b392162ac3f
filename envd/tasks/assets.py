"""Files that tasks name by URL: a cache on disk, filled from mirrors and from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Assets(Protocol):
    async def fetch(self, url: str) -> Path:
        """The file of `url` on this host, read-only. Raises AssetUnavailable."""

    async def has(self, url: str) -> bool:
        """Whether `fetch` would need no network."""
