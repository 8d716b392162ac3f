"""`make bench`: what a user waits for, measured on this machine beside what it is compared to.

Prints a table and, as its last line, one JSON object. Nothing here is a test: figures move with the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from daemon_process import DaemonProcess, daemon
from rich.console import Console
from rich.table import Table

from envd import Client

MOVE = "import pyautogui; import time; pyautogui.FAILSAFE = False; pyautogui.moveTo({x}, {y})"


@dataclass
class Figures:
    """Rows of the table; `values` is the JSON."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, what: str, value: float, unit: str, aim: str, beside: str = "") -> None:
        self.values[name] = round(value, 4)
        self.rows.append((what, f"{value:,.3g} {unit}", aim, beside))

    def show(self) -> None:
        table = Table("what", "measured", "aim", "beside", title="envd on this machine")
        for row in self.rows:
            table.add_row(*row)
        Console(width=120).print(table)
        sys.stdout.write(json.dumps(self.values) + "\n")


async def main(providers: list[str], resets: int, steps: int) -> None:
    figures = Figures()
    start_up(figures)
    for provider in providers:
        with tempfile.TemporaryDirectory(prefix="envd-bench-") as folder:
            settings = {"PROVIDER": provider, "ENVD_ACTION_PAUSE": "0", "ENVD_MAX_STEPS": "10000"}
            async with daemon(Path(folder, "state"), env=settings) as (served, session):
                if provider == providers[-1]:
                    figures.add("idle_rss_mb", "daemon, idle: memory", rss_mb(served), "MB", "< 100 MB")
                await measure_resets(figures, provider, served, resets)
                await measure_steps(figures, provider, served, session, steps)
    figures.show()


def start_up(figures: Figures) -> None:
    """`envd --help` beside a Python that does nothing."""
    envd = str(Path(sys.executable).with_name("envd"))
    with_help = median_ms([timed([envd, "--help"]) for _ in range(11)])
    bare = median_ms([timed([sys.executable, "-c", "pass"]) for _ in range(11)])
    figures.add("help_ms", "envd --help", with_help, "ms", "< 300 ms", f"python -c pass: {bare:.0f} ms")


async def measure_resets(figures: Figures, provider: str, served: DaemonProcess, count: int) -> None:
    """From POST to the first observation, one after another; each ends the desktop before it."""
    took: list[float] = []
    async with Client(served.url) as client:
        for number in range(count):
            began = time.perf_counter()
            await client.reset({"id": f"bench-{number}"}, timeout=120)
            took.append(time.perf_counter() - began)
    took.sort()
    aim = "< 1 s" if provider == "local" else ""
    p95 = took[min(len(took) - 1, round(0.95 * len(took)))]
    figures.add(f"{provider}_reset_p50_s", f"{provider}: reset, p50 of {count}", statistics.median(took), "s", aim)
    figures.add(f"{provider}_reset_p95_s", f"{provider}: reset, p95 of {count}", p95, "s", "")


async def measure_steps(
    figures: Figures, provider: str, served: DaemonProcess, session: aiohttp.ClientSession, count: int
) -> None:
    """One mouse move and a screenshot: through the daemon, and from the guest directly, in turn."""
    async with Client(served.url) as client:
        desktop = (await client.env_state(0)).desktop
        assert desktop is not None
        assert desktop.endpoints is not None
        guest = desktop.endpoints.guest
        through: list[float] = []
        directly: list[float] = []
        for number in range(count):
            # Each moves the pointer somewhere else: a screen that did not change is cheaper to encode.
            through.append(await seconds(_step(session, served.url, MOVE.format(x=100 + 7 * number, y=200))))
            directly.append(await seconds(_direct(session, guest, MOVE.format(x=100 + 7 * number, y=600))))
    step, direct = median_ms(through), median_ms(directly)
    aim = "< 5 ms" if provider == "local" else ""
    figures.add(
        f"{provider}_step_p50_ms", f"{provider}: step, p50 of {count}", step, "ms", "", f"guest: {direct:.1f} ms"
    )
    figures.add(f"{provider}_step_overhead_ms", f"{provider}: of that, the daemon's own", step - direct, "ms", aim)


async def _step(session: aiohttp.ClientSession, url: str, program: str) -> None:
    async with session.post(f"{url}/v1/envs/0/step", json={"actions": [program]}) as answer:
        body = await answer.json()
    assert body["actions"][0]["outcome"] == "ok", body
    base64.b64decode(body["screenshot"])


async def _direct(session: aiohttp.ClientSession, guest: str, program: str) -> None:
    async with session.post(f"{guest}/execute", json={"command": ["python", "-c", program], "shell": False}) as answer:
        assert (await answer.json())["returncode"] == 0
    async with session.get(f"{guest}/screenshot") as answer:
        await answer.read()


async def seconds(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def median_ms(took: list[float]) -> float:
    return statistics.median(took) * 1000


def rss_mb(served: DaemonProcess) -> float:
    status = Path(f"/proc/{served.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--providers", default="sim,local")
    parser.add_argument("--resets", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.providers.split(","), arguments.resets, arguments.steps))
