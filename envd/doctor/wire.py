"""One question to one server, asked once: the client proper would try again, and hide what is to be found."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..client.transport import KEEPS_KEYS

PATIENCE = 10.0
"""Seconds for an answer."""
MOST = 64 * 1024 * 1024
"""Bytes of an answer that are read."""


@dataclass(frozen=True, slots=True)
class Reply:
    """`sent` and `received` are Unix seconds by this host's clock; `seconds` what the whole answer took."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float
    received: float
    seconds: float

    @property
    def envd(self) -> str:
        """The version of the envd that answered; empty where it was something else."""
        return self.headers.get(KEEPS_KEYS, "")

    def json(self) -> dict[str, Any]:
        """Its JSON object, and an empty one for anything else."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


@asynccontextmanager
async def opened(token: str = "", *, verify: bool = True) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that keeps its connections. Without `verify` any certificate will do: for this host's own daemon."""
    headers = {"User-Agent": "envd-doctor"} | ({"Authorization": f"Bearer {token}"} if token else {})
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=verify),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        trust_env=False,
    ) as session:
        yield session


async def ask(session: aiohttp.ClientSession, url: str, within: float | None = None) -> Reply:
    """GET it, within so many seconds (`PATIENCE`). Raises aiohttp.ClientError, TimeoutError, OSError."""
    sent, began = time.time(), time.monotonic()
    timeout = aiohttp.ClientTimeout(total=PATIENCE if within is None else within)
    async with session.get(url, timeout=timeout, allow_redirects=False) as answer:
        received, body = time.time(), bytearray()
        async for piece in answer.content.iter_any():
            body += piece
            if len(body) > MOST:
                break
    return Reply(answer.status, answer.headers, bytes(body), sent, received, time.monotonic() - began)
