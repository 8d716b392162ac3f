"""How long boots took on this host, so that the next one can say what to expect."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

_KEPT = 20


@dataclass(frozen=True, slots=True)
class History:
    """A small JSON file: what shaped a machine → its last cold boot in seconds, and when that was. A file that cannot
    be read or written is as good as none. Blocks."""

    path: Path

    def seconds(self, key: str) -> float | None:
        """Of the last cold boot of such a machine."""
        found = self._read().get(key)
        return found[0] if found else None

    def add(self, key: str, seconds: float) -> None:
        boots = self._read() | {key: (round(seconds, 1), time.time())}
        newest = dict(sorted(boots.items(), key=lambda item: item[1][1])[-_KEPT:])
        with contextlib.suppress(OSError):
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(newest, indent=1))
            new.replace(self.path)

    def _read(self) -> dict[str, tuple[float, float]]:
        try:
            boots = json.loads(self.path.read_bytes())
            return {str(key): (float(seconds), float(at)) for key, (seconds, at) in boots.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
