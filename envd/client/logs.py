"""The daemon's log, from afar: its last lines, and those that follow, through dropped connections and restarts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypedDict
from urllib.parse import urlencode

from ..errors import CapacityError, EnvdError, InfraError, ServerUnreachable
from .answers import Answer
from .transport import Backoff, OnRetry, Transport, translated

PATH = "/v1/logs"
ALL = 5000
"""As many lines as a server keeps: who comes back wants every one that was missed."""
LONGEST = 1024 * 1024
"""Bytes of a line; servers cut theirs at a fraction of that."""


class Which(TypedDict, total=False):
    """Lines of the log: about one env, job or episode; what is left out or None leaves none of them out."""

    env: int | None
    job: str | None
    episode: str | None
    level: str | None
    """debug, info, warning or error: no line below it."""
    since: float | None
    """No line before that, in Unix seconds."""
    limit: int | None
    """The newest so many. The server has a default, and keeps about 5,000 lines."""


def query(which: Which) -> dict[str, str]:
    """As parameters."""
    return {name: _text(value) for name, value in which.items() if value is not None}


def _text(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def lines_of(answer: Answer) -> list[dict[str, Any]]:
    """Raises InfraError."""
    return [_line(line, answer.request) for line in answer.body.split(b"\n") if line.strip()]


async def follow(
    http: Transport, asked: dict[str, str], *, patience: float | None = None, on_retry: OnRetry | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """Lines without end, the last ones that are there first.

    Raises ServerUnreachable once nothing was heard for `patience` seconds.
    """
    backoff = Backoff()
    lost_since: float | None = None
    asked = {**asked, "follow": "1"}
    while True:
        error: EnvdError = ServerUnreachable(f"The log {http.url}{PATH} ended.")
        try:
            async with aclosing(_connection(http, asked)) as lines:
                async for line in lines:
                    lost_since = None
                    backoff.reset()
                    if line is not None:
                        asked |= {"after": str(line.get("id", "")), "limit": str(ALL)}
                        yield line
        except (CapacityError, ServerUnreachable) as trouble:
            error = trouble
        lost_since = lost_since or time.monotonic()
        pause = (error.retry_after or 0.0) + backoff.next()
        if time.monotonic() + pause > lost_since + http.patience_of(patience):
            raise error
        if on_retry is not None:
            on_retry(error, pause)
        await asyncio.sleep(pause)


async def _connection(http: Transport, asked: dict[str, str]) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The lines of one connection; None for a sign of life."""
    request = f"GET {http.url}{PATH}"
    rest = b""
    async with http.stream(f"{PATH}?{urlencode(asked)}", {"Accept": "application/x-ndjson"}) as response:
        while True:
            with translated(http.url, request):
                chunk = await response.content.readany()
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > LONGEST:
                raise InfraError(f"{request} was answered with a line of more than {LONGEST} bytes.")
            for line in whole:
                yield _line(line, request) if line.strip() else None


def _line(line: bytes, request: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InfraError(f"{request} was answered with something that is no log: {error}") from error
    if not isinstance(found, dict):
        raise InfraError(f"{request} was answered with something that is no log: {line[:100]!r}")
    return found
