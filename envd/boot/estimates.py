"""How long things took on this host, and so how long they will take: the ETA of a job."""

from __future__ import annotations

import statistics
from collections import deque

from ..models import ResetPath


class Estimates:
    """Medians of the last 20 boots of each reset path, and of the last 20 set-ups. Seconds."""

    def __init__(self) -> None:
        self._boots: dict[ResetPath, deque[float]] = {path: deque(maxlen=20) for path in ResetPath}
        self._setups: deque[float] = deque(maxlen=20)

    def booted(self, path: ResetPath, seconds: float) -> None:
        self._boots[path].append(seconds)

    def was_set_up(self, seconds: float) -> None:
        self._setups.append(seconds)

    def boot(self, path: ResetPath = ResetPath.COLD) -> float | None:
        """Expected seconds of one boot; None while none has succeeded."""
        seen = self._boots[path]
        return statistics.median(seen) if seen else None

    def rest_of_boot(self, elapsed: float, path: ResetPath = ResetPath.COLD) -> float | None:
        """Expected seconds until a boot that began `elapsed` seconds ago is ready. One that is late is expected
        soon."""
        expected = self.boot(path)
        return None if expected is None else max(expected - elapsed, expected / 10)

    def set_up(self) -> float:
        """Expected seconds from a booted desktop to the first observation."""
        return statistics.median(self._setups) if self._setups else 0.0
