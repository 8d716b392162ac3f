"""`make soak-docker`: hundreds of resets in a row, of containers and of cloned machines, and what they leave behind.

Prints a table of what there is before, on the way and after, and as its last line one JSON object. Exits 1 with what
is left, if anything is not where it began.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import structlog
from bench_docker_service import cleared, place, reset, running, settings, words
from bench_figures import percentile
from rich.console import Console
from rich.table import Table
from soak_docker_counts import NAMES, Counts, Ledger

from envd.models import StepRequest
from envd.service import Service
from envd.settings import Settings

WARM_UP = 3
"""Resets before the first count: the template, connections and imports that stay are made in them."""
STEP_EVERY = 10
SETTLE = 45.0
"""Seconds that what is on its way out may take; connections are kept for 30."""
STEP = StepRequest(actions=["import pyautogui; pyautogui.click(400, 400)"])
KINDS: dict[str, dict[str, Any]] = {
    "containers": {"provider": "docker", "docker_image": "envd/desktop"},
    "clones": {"provider": "docker", "docker_image": "envd/qemu"},
}


@dataclass(frozen=True)
class Soaked:
    """`rows` are looks by name, `left` says what is not where it began, `took` is seconds of each reset until its
    desktop was ready; `paths` are how the desktops were had."""

    rows: list[tuple[str, Counts]]
    left: list[str]
    took: list[float]
    paths: set[str]


async def soak(how: Settings, resets: int, every: int = 20) -> Soaked:
    """Reset one env so many times in a row, with a step now and then; count before, on the way, and after."""
    async with running(how) as service:
        ledger = Ledger(how, service.daemon_id)
        for _ in range(WARM_UP):
            await _episode(service, ledger, steps=1)
        await cleared(service)
        before = await _at_rest(ledger)
        rows, took, paths = [("before", before)], list[float](), set[str]()
        for number in range(1, resets + 1):
            seconds, path = await _episode(service, ledger, steps=int(number % STEP_EVERY == 0))
            took.append(seconds)
            paths.add(path)
            if number % every == 0:
                rows.append((str(number), await ledger.look()))
        await cleared(service)
        after = await _settled(ledger, before)
    return Soaked([*rows, ("after", after)], after.since(before), took, paths)


async def _episode(service: Service, ledger: Ledger, steps: int) -> tuple[float, str]:
    timeline = await reset(service)
    await asyncio.to_thread(ledger.note, timeline.desktop.id)
    for _ in range(steps):
        await service.step(0, STEP)
    return timeline.ready, str(timeline.job.reset_path)


async def _at_rest(ledger: Ledger) -> Counts:
    """The counts once they no longer change, in either direction."""
    last = await ledger.look()
    async with asyncio.timeout(SETTLE):
        while True:
            await asyncio.sleep(1)
            now = await ledger.look()
            if not now.since(last) and not last.since(now):
                return now
            last = now


async def _settled(ledger: Ledger, before: Counts) -> Counts:
    """The counts once all is where it was, or when it has had time enough."""
    began = time.monotonic()
    while True:
        counts = await ledger.look()
        if not counts.since(before) or time.monotonic() - began > SETTLE:
            return counts
        await asyncio.sleep(1)


def show(kind: str, resets: int, soaked: Soaked) -> None:
    """The counts as a table: a line for each, a column for each look."""
    names = [name for name, _ in soaked.rows]
    shown = Table("", *names, title=f"{resets} resets in a row: {kind} ({', '.join(sorted(soaked.paths))})")
    for name in NAMES:
        shown.add_row(name, *(f"{getattr(counts, name):,.0f}" for _, counts in soaked.rows))
    Console(width=max(100, 24 + 9 * len(names))).print(shown)
    if soaked.rows[0][1].others != soaked.rows[-1][1].others:
        sys.stdout.write("Totals of the engine and the host are not judged: others came or went meanwhile.\n")


def figures(kind: str, resets: int, soaked: Soaked) -> dict[str, Any]:
    """The same as JSON, flat."""
    before, after = soaked.rows[0][1], soaked.rows[-1][1]
    counts = {
        f"{kind}_{name}_{when}": getattr(one, name)
        for when, one in (("before", before), ("after", after))
        for name in NAMES
    }
    took = {
        f"{kind}_ready_p50_s": round(statistics.median(soaked.took), 4),
        f"{kind}_ready_p95_s": round(percentile(soaked.took, 95), 4),
    }
    return {f"{kind}_resets": resets, **took, **counts}


async def main(given: argparse.Namespace) -> bool:
    """Whether nothing is left of either."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    found: dict[str, Any] = {}
    left: list[str] = []
    for kind in KINDS:
        if resets := getattr(given, kind):
            try:
                soaked = await _soak_one(kind, resets, given)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other kind is to be soaked too
                left.append(f"{kind}: broke off. {words(error)}")
            else:
                show(kind, resets, soaked)
                found |= figures(kind, resets, soaked)
                left += [f"{kind}: {one}" for one in soaked.left]
    sys.stdout.write("".join(f"{line}\n" for line in (*left, json.dumps(found | {"left": left}))))
    return not left


async def _soak_one(kind: str, resets: int, given: argparse.Namespace) -> Soaked:
    instead = {"provider": given.provider} if given.provider else {}
    with place() as where:
        async with asyncio.timeout(given.limit):
            return await soak(settings(where, **(KINDS[kind] | instead)), resets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--containers", type=int, default=200, help="resets of container desktops")
    parser.add_argument("--clones", type=int, default=100, help="resets of virtual machines")
    parser.add_argument("--limit", type=float, default=5400, help="seconds that each may take")
    parser.add_argument("--provider", help="another than docker, for both")
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        sys.exit(0 if asyncio.run(main(parser.parse_args())) else 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
