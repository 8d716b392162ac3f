"""One desktop's OSWorld guest server (port 5000), as seen by the daemon.

The guest is not trusted: every answer is bounded in size and time, and nothing of it is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..errors import GuestMisbehaved, GuestUnreachable

LARGEST_ANSWER = 64 * 1024 * 1024
"""Bytes. A 4K screenshot that does not compress at all is 33 MB."""


@dataclass(frozen=True, slots=True)
class Executed:
    """What the guest says of a command it ran to its end."""

    returncode: int
    stdout: str
    stderr: str


class Guest:
    """Calls raise GuestUnreachable when there is no answer and GuestMisbehaved when it cannot be used.

    Nothing is ever sent twice: `GuestUnreachable.facts["sent"]` says whether the guest may have acted on the call.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def screenshot(self, timeout: float = 30) -> bytes:
        """The screen as PNG (or JPEG) bytes, told by their magic number; not decoded."""
        async with self._call("GET", "/screenshot", timeout) as response:
            body = await read_bounded(response, LARGEST_ANSWER)
        if response.status != 200:
            raise GuestMisbehaved(f"{self.url}/screenshot answered {response.status}: {_excerpt(body)}")
        if not body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
            raise GuestMisbehaved(
                f"{self.url}/screenshot answered {len(body)} bytes that are no picture: {_excerpt(body)}"
            )
        return body

    async def execute(self, command: list[str] | str, *, shell: bool = False, timeout: float = 130) -> Executed:
        """Run `command` in the guest and wait for its end (the guest's own limit is 120 s)."""
        answer = await self.post("/execute", {"command": command, "shell": shell}, timeout)
        code = answer.get("returncode")
        if answer.get("status") != "success" or not isinstance(code, int):
            raise GuestMisbehaved(
                f"{self.url}/execute did not run the command: {str(answer.get('message', answer))[:400]}"
            )
        return Executed(code, str(answer.get("output") or ""), str(answer.get("error") or ""))

    async def launch(self, command: list[str] | str, *, shell: bool = False, timeout: float = 30) -> None:
        """Start `command` in the guest without waiting for it."""
        await self.post("/setup/launch", {"command": command, "shell": shell}, timeout)

    async def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """POST JSON; the answer's object, or {"text": …} where this endpoint answers plain text."""
        async with self._call("POST", path, timeout, json=body) as response:
            raw = await read_bounded(response, LARGEST_ANSWER)
        if response.status != 200:
            raise GuestMisbehaved(f"{self.url}{path} answered {response.status}: {_excerpt(raw)}")
        if response.content_type != "application/json":
            return {"text": raw.decode(errors="replace")}
        try:
            answer = parse_json(raw)
        except ValueError as error:
            raise GuestMisbehaved(f"{self.url}{path} answered broken JSON: {_excerpt(raw)}") from error
        if not isinstance(answer, dict):
            raise GuestMisbehaved(f"{self.url}{path} answered {type(answer).__name__} where an object belongs")
        return answer

    @asynccontextmanager
    async def _call(self, method: str, path: str, timeout: float, **how: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, 10))
        try:
            # A redirect would let the guest choose where the daemon connects to.
            async with self._session.request(
                method, self.url + path, timeout=limit, allow_redirects=False, **how
            ) as response:
                yield response
        except aiohttp.ClientConnectorError as error:
            raise GuestUnreachable(f"{self.url} refused the connection: {error.os_error}.", sent=False) from error
        except (aiohttp.ConnectionTimeoutError, aiohttp.SocketTimeoutError, TimeoutError) as error:
            connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            raise GuestUnreachable(
                f"{self.url}{path} did not answer within {timeout:g} s.", sent=not connecting
            ) from error
        except aiohttp.ClientError as error:
            raise GuestUnreachable(f"{self.url}{path} broke off: {type(error).__name__}: {error}", sent=True) from error


async def read_bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, or GuestMisbehaved once it is longer than `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(256 * 1024):
        size += len(chunk)
        if size > limit:
            response.close()
            raise GuestMisbehaved(f"{response.url} answered more than {limit} bytes; the rest was not read.")
        parts.append(chunk)
    return b"".join(parts)


def parse_json(raw: bytes) -> Any:
    """A guest's JSON. Raises ValueError. Halves of surrogate pairs become `?`: in an event or an answer, they could
    not be sent on."""
    try:
        value = json.loads(raw.decode(errors="replace"))
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _excerpt(body: bytes) -> str:
    text = body[:300].decode(errors="replace").strip()
    return repr(text) if text else "nothing"
