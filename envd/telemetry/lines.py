"""The last lines of the log, at hand for `/v1/logs`: what went to stderr, whoever reads that.

A line is kept as the JSON that it is sent as, so what is kept has a bound and changes no more. Any thread may log; who
follows waits on the event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from structlog.typing import EventDict

KEPT = 5000
KEPT_CHARACTERS = 8_000_000
"""Of all lines together: where they are long, there are fewer of them."""
LONGEST = 16_000
"""Characters of a line. Of a longer one what it is about is kept, and its beginning."""
AUDIT = "envd.audit"
"""The logger of the lines that say who changed what."""
_SHORT = ("timestamp", "level", "logger", "event", "env", "job_id", "episode_id", "request_id", "kind", "code")


@dataclass(frozen=True, slots=True)
class Line:
    """`text` is a JSON object without a line break. `private`: it tells where somebody is, or is of the audit. Callers
    who need no token are named by their addresses."""

    number: int
    at: float
    level: int
    text: str
    env: int | None = None
    job_id: str | None = None
    episode_id: str | None = None
    private: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines somebody wants. None is any."""

    env: int | None = None
    job: str | None = None
    episode: str | None = None
    level: int = 0
    since: float = 0.0
    """In Unix seconds."""
    private: bool = False

    def has(self, line: Line) -> bool:
        return (
            line.level >= self.level
            and line.at >= self.since
            and (self.private or not line.private)
            and (self.env is None or line.env == self.env)
            and (self.job is None or line.job_id == self.job)
            and (self.episode is None or line.episode_id == self.episode)
        )


class Lines:
    """The newest `kept` of this life of the daemon, and of `characters` at most."""

    def __init__(self, kept: int = KEPT, characters: int = KEPT_CHARACTERS) -> None:
        self.life = secrets.token_hex(4)
        """Of a line's id, "<life>-<number>": another one numbers its lines from 1 again."""
        self._lines: deque[Line] = deque()
        self._kept, self._left = kept, characters
        self._number = 0
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def keep(self, facts: Mapping[str, Any], logger: str, level: int) -> None:
        """One more, of a single thread at a time."""
        self._number += 1
        told: dict[str, Any] = {"id": f"{self.life}-{self._number}", **facts, "logger": logger}
        text = as_json(told)
        if len(text) > LONGEST:
            short = {name: _shortened(told[name]) for name in _SHORT if name in told}
            text = as_json({"id": told["id"], **short, "cut": text[:LONGEST]})
        env, job, episode = (told.get(name) for name in ("env", "job_id", "episode_id"))
        self._add(
            Line(
                number=self._number,
                at=time.time(),
                level=level,
                text=text,
                env=env if isinstance(env, int) else None,
                job_id=job if isinstance(job, str) else None,
                episode_id=episode if isinstance(episode, str) else None,
                private=logger == AUDIT or "address" in told or _is_address(told.get("caller")),
            )
        )
        for loop, news in tuple(self._waiting):
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # its loop has ended before it could say so
                self._waiting.discard((loop, news))

    def _add(self, line: Line) -> None:
        self._lines.append(line)
        self._left -= len(line.text)
        while len(self._lines) > self._kept or (self._left < 0 and len(self._lines) > 1):
            self._left += len(self._lines.popleft().text)

    def number_of(self, line_id: str) -> int:
        """Of a line of this life; 0, which is before the first, of any other."""
        life, _, number = line_id.rpartition("-")
        known = life == self.life and number.isascii() and number.isdecimal() and len(number) < 16
        return int(number) if known else 0

    def after(self, number: int, wanted: Wanted) -> tuple[list[Line], int]:
        """Those that are kept and wanted, oldest first, and up to where was looked."""
        lines = tuple(self._lines)
        if not lines:
            return [], number
        # Many may follow, and each looks again for every line: at what is new alone, and no number is left out.
        new = lines[max(0, number + 1 - lines[0].number) :]
        return [line for line in new if wanted.has(line)], max(number, lines[-1].number)

    async def follow(self, number: int, wanted: Wanted, idle: float) -> AsyncGenerator[list[Line], None]:
        """What comes after `number` and is wanted, as it comes: an empty list after `idle` seconds without any. What is
        not kept any more when it is looked for is left out."""
        waiting = asyncio.get_running_loop(), asyncio.Event()
        self._waiting.add(waiting)
        spoke = time.monotonic()
        try:
            while True:
                waiting[1].clear()
                found, number = self.after(number, wanted)
                left = spoke + idle - time.monotonic()
                if found or left <= 0:
                    yield found
                    spoke = time.monotonic()
                    continue
                try:
                    async with asyncio.timeout(left):
                        await waiting[1].wait()
                except TimeoutError:
                    pass
        finally:
            self._waiting.discard(waiting)


def _is_address(caller: Any) -> bool:
    try:
        ipaddress.ip_address(caller)
    except ValueError:
        return False
    return not isinstance(caller, int)


def _shortened(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)[:500]


class Keeper(logging.Handler):
    """Keeps what is logged in `lines`. Its formatter must give the facts of a record to `take`."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.format(record)
        except Exception as error:  # noqa: BLE001 - whatever was logged: a line that cannot be told is told of
            facts = {"event": "a log line could not be made", "error": type(error).__name__}
            self._lines.keep(facts, record.name, record.levelno)

    def take(self, logger: Any, method: str, facts: EventDict) -> str:
        """The last processor of a chain."""
        record: logging.LogRecord = facts.pop("_record")
        facts.pop("_from_structlog", None)
        self._lines.keep(facts, record.name, record.levelno)
        return ""


def as_json(record: Any) -> str:
    """JSON that is JSON: what it has no word for, such as NaN, is sent as text; half a character as an escape."""
    try:
        return json.dumps(record, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(json.loads(json.dumps(record, default=str), parse_constant=str))
