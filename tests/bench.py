"""`make bench`: what a user waits for, measured on this machine beside what it is compared to.

Prints a table and, as its last line, one JSON object. Nothing here is a test: figures move with the machine, so its
load is shown with them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from bench_figures import Figures, in_ms, median_ms, rss_mb, seconds
from bench_journal import measure_journal
from bench_tasks import guest_of, measure_evaluations, measure_setup
from daemon_process import DaemonProcess, daemon

from envd import Client

MOVE = "import pyautogui; import time; pyautogui.FAILSAFE = False; pyautogui.moveTo({x}, {y})"


async def main(providers: list[str], resets: int, steps: int, evaluations: int, evaluators: Path | None) -> None:
    task = asyncio.current_task()
    assert task is not None
    # The daemon is in a process group of its own: it ends with this one only if this one unwinds.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    figures = Figures()
    start_up(figures)
    with tempfile.TemporaryDirectory(prefix="envd-bench-") as folder:
        await measure_journal(figures, Path(folder))
    settings = {"ENVD_ACTION_PAUSE": "0", "ENVD_MAX_STEPS": "10000", "ENVD_EVALUATORS": str(evaluators or "")}
    for provider in providers:
        with tempfile.TemporaryDirectory(prefix="envd-bench-") as folder:
            async with daemon(Path(folder, "state"), env={"PROVIDER": provider, **settings}) as (served, session):
                if provider == providers[-1]:
                    figures.add("idle_rss_mb", "daemon, idle: memory", rss_mb(served.pid), "MB", aim=100)
                await measure_resets(figures, provider, served, resets)
                await measure_steps(figures, provider, served, session, steps)
                await measure_setup(figures, provider, served)
                await measure_evaluations(figures, provider, served, evaluations)
    figures.show()


def start_up(figures: Figures) -> None:
    """`envd --help` beside a Python that does nothing."""
    envd = str(Path(sys.executable).with_name("envd"))
    with_help = median_ms([timed([envd, "--help"]) for _ in range(11)])
    bare = median_ms([timed([sys.executable, "-c", "pass"]) for _ in range(11)])
    figures.add("help_ms", "envd --help", with_help, "ms", aim=300, beside=("python -c pass", bare))


async def measure_resets(figures: Figures, provider: str, served: DaemonProcess, count: int) -> None:
    """From POST to the first observation, one after another; each ends the desktop before it."""
    took: list[float] = []
    settled: list[float] = []
    async with Client(served.url) as client:
        for number in range(count):
            began = time.perf_counter()
            job = await client.reset({"id": f"bench-{number}"}, timeout=120)
            took.append(time.perf_counter() - began)
            assert job.settled is not None
            settled.append(job.settled.seconds)
    aim = 1.0 if provider == "local" else None
    rest = ("of that the screen's rest", median_ms(settled) / 1000)
    figures.spread(f"{provider}_reset_{{}}_s", f"{provider}: reset", took, "s", aim=aim, beside=rest)


async def measure_steps(
    figures: Figures, provider: str, served: DaemonProcess, session: aiohttp.ClientSession, count: int
) -> None:
    """One mouse move and a screenshot: through the daemon, and from the guest directly, in turn."""
    async with Client(served.url) as client:
        guest = await guest_of(client)
    through: list[float] = []
    directly: list[float] = []
    for number in range(count):
        # Each moves the pointer somewhere else: a screen that did not change is cheaper to encode.
        through.append(await seconds(_step(session, served.url, MOVE.format(x=100 + 7 * number, y=200))))
        directly.append(await seconds(_direct(session, guest, MOVE.format(x=100 + 7 * number, y=600))))
    direct = median_ms(directly)
    figures.spread(f"{provider}_step_{{}}_ms", f"{provider}: step", in_ms(through), "ms", beside=("guest", direct))
    aim = 5.0 if provider == "local" else None
    own = median_ms(through) - direct
    figures.add(f"{provider}_step_overhead_ms", f"{provider}: of that, the daemon's own", own, "ms", aim=aim)


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


def absolute(path: str) -> Path:
    """The daemon runs in a folder of its own."""
    return Path(path).absolute()


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--providers", default="sim,local")
    parser.add_argument("--resets", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--evaluators", type=absolute, help="their Python; by default the one that the daemon finds")
    given = parser.parse_args()
    asyncio.run(main(given.providers.split(","), given.resets, given.steps, given.evaluations, given.evaluators))
