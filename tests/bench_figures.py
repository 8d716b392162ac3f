"""What `make bench` found: a table for people, and one JSON object with the same figures."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Figures:
    """Rows of the table; `values` is the JSON. A figure's aim and what it is compared to are there under its name with
    `_aim` and `_beside`, in the figure's unit."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    values: dict[str, float | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        what: str,
        value: float,
        unit: str,
        *,
        aim: float | None = None,
        beside: tuple[str, float] | None = None,
    ) -> None:
        """`aim` is what the figure should stay below."""
        self.values[name] = round(value, 4)
        if aim is not None:
            self.values[f"{name}_aim"] = aim
        if beside is not None:
            self.values[f"{name}_beside"] = round(beside[1], 4)
        self.rows.append(
            (
                what,
                f"{value:,.3g} {unit}",
                "" if aim is None else f"< {aim:g} {unit}",
                "" if beside is None else f"{beside[0]}: {beside[1]:,.3g} {unit}",
            )
        )

    def spread(
        self,
        name: str,
        what: str,
        took: Sequence[float],
        unit: str,
        *,
        aim: float | None = None,
        beside: tuple[str, float] | None = None,
    ) -> None:
        """The median and the 95th percentile of `took`. NAME has the place of `_p50` and `_p95` in `{}`."""
        self.add(
            name.format("p50"), f"{what}, p50 of {len(took)}", statistics.median(took), unit, aim=aim, beside=beside
        )
        self.add(name.format("p95"), f"{what}, p95", percentile(took, 95), unit)

    def note(self, name: str, words: str) -> None:
        """Why there is no figure."""
        self.values[name] = words
        self.notes.append(words)

    def show(self) -> None:
        """Print both, the JSON as the last line."""
        now, before, _ = os.getloadavg()
        title = f"envd on this machine ({os.cpu_count()} cores; load average {now:.1f}, {before:.1f} over 5 minutes)"
        self.values |= {"cores": os.cpu_count() or 0, "load_1m": round(now, 2), "load_5m": round(before, 2)}
        table = Table("what", "measured", "aim", "beside", title=title)
        for row in self.rows:
            table.add_row(*row)
        Console(width=140).print(table)
        sys.stdout.write("".join(f"{line}\n" for line in (*self.notes, json.dumps(self.values))))


async def seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def percentile(took: Sequence[float], percent: float) -> float:
    """The least of `took` that so many percent of them do not exceed."""
    return sorted(took)[max(0, math.ceil(percent / 100 * len(took)) - 1)]


def median_ms(took: Sequence[float]) -> float:
    return statistics.median(took) * 1000


def in_ms(took: Sequence[float]) -> list[float]:
    return [value * 1000 for value in took]


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
