"""`envd logs`: the daemon's log, readable on a terminal, a line for each; with `--json` as it is."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any, Protocol, Unpack

from rich.console import Console
from rich.text import Text

from ..client.logs import Which
from ..client.transport import OnRetry
from ..errors import EnvdError, RequestError
from .watch import clean

STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "red", "critical": "bold red"}
SHOWN_FIRST = ("env", "job_id", "episode_id", "kind", "state", "code", "method", "path", "status", "seconds")
HIDDEN = frozenset({"id", "timestamp", "level", "event", "logger", "exception"})
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Source(Protocol):
    """Where lines come from: `envd.Client`."""

    async def env_state(self, env: int) -> Any: ...

    async def logs(self, **which: Unpack[Which]) -> list[dict[str, Any]]: ...

    def follow_logs(
        self, *, patience: float | None = None, on_retry: OnRetry | None = None, **which: Unpack[Which]
    ) -> AsyncGenerator[dict[str, Any], None]: ...


async def logs(
    client: Source,
    which: Which,
    *,
    follow: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Print the lines that are wanted, and go on with those that come if that is asked for. A server that answered once
    is waited for. Raises UnknownEnv."""
    notices = console or Console(stderr=True)
    console = console or Console()

    def tell(line: Mapping[str, Any]) -> None:
        if as_json:
            console.file.write(f"{json.dumps(line)}\n")
            console.file.flush()
        else:
            console.print(rendered(line), soft_wrap=True)

    lost = False

    def reconnecting(error: EnvdError, pause: float) -> None:
        nonlocal lost
        if not lost:
            notices.print(Text(f"reconnecting: {clean(error.detail)}", "yellow"), soft_wrap=True)
        lost = True

    if (env := which.get("env")) is not None:
        await client.env_state(env)
    try:
        if not follow:
            for line in await client.logs(**which):
                tell(line)
            return 0
        following = client.follow_logs(patience=math.inf, on_retry=reconnecting, **which)
        async with aclosing(following) as lines:
            async for line in lines:
                lost = False
                tell(line)
    except BrokenPipeError:
        # Whoever read it has read enough. Python must not try to write the rest on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def moment(text: str | None) -> float | None:
    """`30s`, `10m`, `2h` or `1d` ago, in Unix seconds. Raises RequestError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text.strip())
    if match is None:
        raise RequestError(f"{text!r} is no span of time.", hint="Say 30s, 10m, 2h or 1d.")
    return time.time() - float(match[1]) * UNITS[match[2]]


def rendered(line: Mapping[str, Any]) -> Text:
    """One line of the log as people read it: when, how bad, what, and the facts; of a failure the traceback below."""
    level = clean(str(line.get("level", "")))
    style = STYLES.get(level, "")
    text = Text()
    text.append(f"{_clock(line.get('timestamp'))} ", "dim")
    text.append(f"{level:<7} ", style)
    text.append(clean(str(line.get("event", ""))), style or "bold")
    facts = [name for name in SHOWN_FIRST if name in line] + [name for name in line if name not in SHOWN_FIRST]
    for name in facts:
        if name not in HIDDEN and line[name] is not None:
            text.append(f"  {clean(name)}=", "dim")
            text.append(clean(_value(line[name])))
    for part in _traceback(line.get("exception")):
        text.append(f"\n    {clean(part)}", style)
    return text


def _clock(timestamp: Any) -> str:
    """Of this machine's day; what is no time as it is."""
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone().strftime("%m-%d %H:%M:%S")
    except ValueError:
        return clean(str(timestamp or ""))[:20]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _traceback(exception: Any) -> list[str]:
    """As a daemon tells one: the exceptions of a chain, each with its frames."""
    if isinstance(exception, str):
        return exception.splitlines()
    told: list[str] = []
    for one in exception if isinstance(exception, list) else []:
        if isinstance(one, dict):
            frames = one.get("frames") or []
            told += [
                f"{at.get('filename')}:{at.get('lineno')} in {at.get('name')}" for at in frames if isinstance(at, dict)
            ]
            told.append(f"{one.get('exc_type')}: {one.get('exc_value')}")
    return told
