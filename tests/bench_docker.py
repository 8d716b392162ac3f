"""`make bench-docker`: emulated machines in containers, their templates and clones, spares, and container desktops.

Prints a table and, as its last line, one JSON object; all of it from one run on one host. It stops by itself, and
takes away what it made, also when it is interrupted. Nothing here is a test: figures move with the machine, so its
load is shown with them. Exits 1 if something could not be measured; the JSON says why under that part's name.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from bench_docker_figures import Beside
from bench_docker_service import place, words
from bench_docker_use import measure_containers, measure_hands, measure_spares
from bench_docker_vm import (
    Run,
    measure_bursts,
    measure_clones,
    measure_cold,
    measure_memory,
    measure_template,
)

PARTS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "cold": measure_cold,
    "template": measure_template,
    "clone": measure_clones,
    "burst": measure_bursts,
    "memory": measure_memory,
    "hands": measure_hands,
    "spare": measure_spares,
    "container": measure_containers,
}
"""In the order in which they run: the clone part compares with the cold one, and all after `template` clone its."""


async def main(given: argparse.Namespace) -> bool:
    """Whether everything that was asked for was measured."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    figures = Beside()
    whole = True
    with place(given.templates) as where:
        run = Run(figures, where, given.provider, given.clones, given.resets, tuple(given.bursts))
        machines = run.machines()
        figures.values |= {"provider": given.provider, "guest_memory_bytes": machines.ram_size}
        figures.values["guest_cpus_asked"] = machines.cpu_cores
        try:
            async with asyncio.timeout(given.limit):
                for name in given.only:
                    whole &= await _measured(name, run)
        except TimeoutError:
            figures.note("limit", f"The rest was given up after {given.limit:g} s.")
            whole = False
        finally:
            figures.show()
    return whole


async def _measured(name: str, run: Run) -> bool:
    """Whether all of the part was. One that fails leaves the others theirs."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
    notes = len(run.figures.notes)
    try:
        await PARTS[name](run)
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs beside the figures
        run.figures.note(name, f"{name}: not measured. {words(error)}")
    return len(run.figures.notes) == notes


def parts(given: str) -> list[str]:
    """Names of parts, in the order in which they run."""
    asked = set(given.split(","))
    if unknown := asked - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def numbers(given: str) -> list[int]:
    return [int(word) for word in given.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", default="docker", help="docker, or qemu for the same machines without Docker")
    parser.add_argument("--only", type=parts, default=list(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--resets", type=int, default=10, help="container boots and hand-overs of spares")
    parser.add_argument("--bursts", type=numbers, default=[2, 4, 8, 12])
    parser.add_argument("--templates", type=Path, help="a folder in memory whose templates are used, and stay")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which the rest is given up")
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        sys.exit(0 if asyncio.run(main(parser.parse_args())) else 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
