"""How long things took on this host, and so how long they will take: the ETA of a job."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from ..models import ResetPath

logger = structlog.get_logger(__name__)

KEPT = 20
IMAGES = 32
"""So many images' boots are remembered: those that were booted last."""


class Estimates:
    """Medians of the last 20 boots on each reset path, and of the last 20 set-ups. Seconds.

    Boots of `image` are kept in `file` from one life of the daemon to the next, beside those of other images. A file
    that cannot be read or written costs an ETA and nothing else.
    """

    def __init__(self, file: Path, image: str) -> None:
        self._file = file
        self._image = image
        self._boots: dict[ResetPath, deque[float]] = {path: deque(maxlen=KEPT) for path in ResetPath}
        self._setups: deque[float] = deque(maxlen=KEPT)
        self._saving = anyio.Lock()

    async def load(self) -> None:
        """Take up what earlier lives measured."""
        mine = (await anyio.to_thread.run_sync(_read, self._file)).get(self._image, {})
        for path, seconds in mine.items():
            self._boots[ResetPath(path)].extendleft(reversed(seconds))

    async def save(self) -> None:
        """Keep it for later lives."""
        async with self._saving:
            mine = {path.value: [round(one, 3) for one in seen] for path, seen in self._boots.items() if seen}
            await anyio.to_thread.run_sync(_write, self._file, self._image, mine)

    def booted(self, path: ResetPath, seconds: float) -> None:
        self._boots[path].append(seconds)

    def was_set_up(self, seconds: float) -> None:
        self._setups.append(seconds)

    def boot(self, path: ResetPath) -> float | None:
        """Expected seconds of one boot; None while none has succeeded. A spare has been booted."""
        if path is ResetPath.SPARE:
            return 0.0
        seen = self._boots[path]
        return statistics.median(seen) if seen else None

    def rest_of_boot(self, elapsed: float, path: ResetPath) -> float | None:
        """Expected seconds until a boot that began `elapsed` seconds ago is ready. One that is late is expected
        soon."""
        expected = self.boot(path)
        return None if expected is None else max(expected - elapsed, expected / 10)

    def set_up(self) -> float:
        """Expected seconds from a booted desktop to the first observation."""
        return statistics.median(self._setups) if self._setups else 0.0


def _read(file: Path) -> dict[str, dict[str, list[float]]]:
    """Image → path → seconds, oldest first; only what makes sense."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("what is known of earlier boots cannot be read", file=str(file), error=str(error))
        return {}
    paths = {path.value for path in ResetPath}
    return {
        image: {path: _seconds(seen) for path, seen in boots.items() if path in paths}
        for image, boots in (found.items() if isinstance(found, dict) else ())
        if isinstance(boots, dict)
    }


def _seconds(seen: Any) -> list[float]:
    listed = seen if isinstance(seen, list) else []
    return [float(one) for one in listed if isinstance(one, int | float) and math.isfinite(one) and one >= 0][-KEPT:]


def _write(file: Path, image: str, mine: dict[str, list[float]]) -> None:
    """Whole or not at all: a daemon that is killed meanwhile leaves the file of before."""
    others = {name: boots for name, boots in _read(file).items() if name != image}
    newest = dict([*others.items()][-(IMAGES - 1) :]) | {image: mine}
    written = file.with_suffix(".new")
    try:
        written.write_text(json.dumps(newest, indent=1))
        os.replace(written, file)
    except OSError as error:
        logger.warning("how long a boot took cannot be kept", file=str(file), error=str(error))
