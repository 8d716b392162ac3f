"""One desktop's Chrome (DevTools protocol, port 9222 in OSWorld images), as seen by the daemon."""

from __future__ import annotations

from typing import Any

import aiohttp

from ..errors import GuestMisbehaved, GuestUnreachable
from .client import parse_json, read_bounded


class Cdp:
    """The HTTP half of the protocol. Raises GuestUnreachable and GuestMisbehaved."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def version(self, timeout: float = 5) -> dict[str, Any]:
        """`/json/version`: Browser, Protocol-Version, webSocketDebuggerUrl, …"""
        answer = await self._get("/json/version", timeout)
        if not isinstance(answer, dict) or not answer.get("Browser"):
            raise GuestMisbehaved(f"{self.url}/json/version names no browser")
        return answer

    async def pages(self, timeout: float = 5) -> list[dict[str, Any]]:
        """The targets of type `page`, as `/json/list` tells them."""
        answer = await self._get("/json/list", timeout)
        if not isinstance(answer, list):
            raise GuestMisbehaved(f"{self.url}/json/list is no list")
        return [target for target in answer if isinstance(target, dict) and target.get("type") == "page"]

    async def _get(self, path: str, timeout: float) -> Any:
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.get(self.url + path, timeout=limit, allow_redirects=False) as response:
                body = await read_bounded(response, 4 * 1024 * 1024)
        except aiohttp.ClientConnectorError as error:
            raise GuestUnreachable(f"{self.url} refused the connection.") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GuestUnreachable(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        if response.status != 200:
            raise GuestMisbehaved(f"{self.url}{path} answered {response.status}")
        try:
            return parse_json(body)
        except ValueError as error:
            raise GuestMisbehaved(f"{self.url}{path} answered no JSON") from error
