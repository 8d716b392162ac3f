"""`make bench-docker`: the figures, beside what others reach and what was measured before this was built.

Earlier measurements were made on 4 cores without hardware acceleration, 23 GB, with a lean Debian guest of 2 GiB and
1920x1080, on QEMU alone unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench_figures import Figures

ANCHORS = {
    "cold_http": "21-25 s: earlier, guest without a browser, kernel booted directly",
    "cold": "30 s to CDP, 43 s to a picture: earlier; 20-40 min: the stock image, by its users' reports",
    "template": "0.03 s for stop and device state, trials not counted: earlier",
    "frame": "0.13 s: earlier, QEMU alone; 0.41 s: earlier, in a container",
    "http": "0.30-0.41 s: earlier, QEMU alone; 0.68 s: in a container",
    "clone": "0.54 s to CDP: earlier, QEMU alone; 0.86 s: in a container",
    "clone_p95": "1-2 s: QEMU's savevm and loadvm with hardware acceleration, by Microsoft's quicksand",
    "ratio": "79: earlier, QEMU alone",
    "reset": "0.32 s: a Chromium VM on KVM, request to CDP, by its makers (kernel/hypeman)",
    "burst_2": "0.64 s: earlier, QEMU alone",
    "burst_4": "0.99 s: earlier, QEMU alone",
    "burst_8": "2.2 s: earlier, QEMU alone",
    "burst_12": "6.1-6.5 s, the first 1.9 s: earlier, in containers, two resumed at a time; 12-26 s: all at once",
    "memory": "107-200 MB: earlier, right after the clone; 1771 MB: after a full restore",
    "page": "193-316 MB: earlier, after some work",
    "container": "0.57 s: docker start alone, on an SSD (published measurement)",
    "spare": "0.11 s: the fastest hosted sandbox without a desktop, by a public leaderboard",
    "stop": "0.5 ms, 6.5 ms under load: earlier",
    "cont": "0.4 ms, 2.8 ms under load: earlier",
    "click": "2.25-3.6 s in the guest, 2.4-3.9 ms from outside: earlier",
    "picture": "2.3 s in the guest, 25 ms from outside: earlier",
    "step": "4.6-6 s in the guest, 39 ms from outside: earlier",
}


@dataclass
class Beside(Figures):
    """Figures with words to compare them with, by their name in `ANCHORS`."""

    def against(self, anchor: str, name: str, what: str, value: float, unit: str, *, aim: float | None = None) -> None:
        """As `add`; the column that says what is beside has the anchor."""
        self.add(name, what, value, unit, aim=aim)
        self.rows[-1] = (*self.rows[-1][:3], ANCHORS[anchor])

    def spread_against(
        self, anchor: str, name: str, what: str, took: Sequence[float], unit: str, *, aim: float | None = None
    ) -> None:
        """As `spread`."""
        self.spread(name, what, took, unit, aim=aim)
        self.rows[-2] = (*self.rows[-2][:3], ANCHORS[anchor])
