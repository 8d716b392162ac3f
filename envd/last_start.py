"""What a daemon leaves in its state directory when it starts: who it is, and where.

`envd doctor` reads it once it is gone.

Nothing depends on it, and no secret is in it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .settings import KNOWN_PROVIDERS

FILE = "last-start.json"
MOST = 10_000
"""Bytes of it that are read."""


@dataclass(frozen=True, slots=True)
class LastStart:
    """`started_at` in Unix seconds. `url` is empty where the daemon does not know it."""

    provider: str
    version: str
    url: str
    pid: int
    started_at: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started_at))
        return f"with {self.provider} desktops{f' at {self.url}' if self.url else ''}, started at {when}"


def write(state_dir: Path, start: LastStart) -> None:
    """Whole or not at all. Blocks. Raises OSError."""
    fresh = state_dir / f"{FILE}.new"
    fresh.write_text(json.dumps(asdict(start)) + "\n")
    os.replace(fresh, state_dir / FILE)


def read(state_dir: Path) -> LastStart | None:
    """The last one; None where none was, or where what is there tells none. Blocks."""
    try:
        with (state_dir / FILE).open("rb") as file:
            told: Any = json.loads(file.read(MOST))
        start = LastStart(
            str(told["provider"]),
            str(told["version"]),
            str(told["url"]),
            int(told["pid"]),
            float(told["started_at"]),
        )
        str(start)  # a time that no calendar has is none
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return start if start.provider in KNOWN_PROVIDERS else None
