"""`envd bench`: what a trainer waits for at a server that runs, measured from here: resets by path, the wait for a
turn, steps, pictures, and the way there and back.

It plays on envs that nobody has: each client leases one, and gives it back in the end. Every client does one thing at a
time, so there are never more calls in flight than clients.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..client import Client, EnvHandle
from ..errors import EnvdError, LeaseUnavailable
from ..models import Job
from .listing import console, print_json, print_list
from .watch import number

FREE_WITHIN = 5.0
"""Seconds in which enough envs must be free: this waits for nobody's episode."""
ROUND_TRIPS = 20
"""Of each client, for what the network and the daemon take by themselves."""
MOST_STEPS = 10_000
"""What a reset allows: so that the episode does not end under the bench."""
LINE_EVERY = 5.0
QUANTILES = (0.5, 0.95, 0.99)

ORDER = ("round trip", "reset", "queue", "step", "screenshot")


@dataclass(frozen=True, slots=True)
class Load:
    """`resets` and `steps` are of each client; steps after each reset, and as many pictures up to ten."""

    resets: int
    clients: int
    steps: int

    @property
    def calls(self) -> int:
        return self.clients * (1 + self.resets * (1 + self.steps + self.pictures))

    @property
    def pictures(self) -> int:
        return min(self.steps, 10)


@dataclass(slots=True)
class Figures:
    """Seconds by what was measured, and failures by their code."""

    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Of each code, what the first one said."""

    def failed(self, error: EnvdError) -> None:
        self.failures[error.code] += 1
        self.first.setdefault(error.code, str(error))

    def add_reset(self, job: Job, took: float) -> None:
        self.seconds[f"reset, {job.reset_path}" if job.reset_path else "reset"].append(took)
        self.seconds["queue"].append(sum(phase.seconds or 0.0 for phase in job.phases if phase.name == "queue"))


async def bench(client: Client, load: Load, *, as_json: bool, output: Console | None = None) -> int:
    """Measure and print. 0 if nothing failed, else 1. Raises LeaseUnavailable when too few envs are free."""
    output = output or console()
    version = await client.version()
    count = len(await client.envs())
    if count < load.clients:
        raise LeaseUnavailable(
            f"The server has {count} env{'s' * (count != 1)}, and {load.clients} clients need one each.",
            hint=f"Give --clients {count}, or start it with a larger ENVD_ENVS.",
        )
    figures = Figures()
    began = time.monotonic()
    try:
        async with (
            client.lease(load.clients, wait_s=FREE_WITHIN, owner="bench") as envs,
            _shown(load.calls, output, quiet=as_json) as advance,
            anyio.create_task_group() as players,
        ):
            for env in envs:
                players.start_soon(_play, env, load, figures, advance)
    except LeaseUnavailable as error:
        error.hint = "Wait until episodes have ended (`envd ls`), or give fewer --clients. " + error.hint
        raise
    took = time.monotonic() - began
    about = {
        "url": client.url,
        "version": version.get("version"),
        "provider": version.get("provider"),
        "envs": count,
        "clients": load.clients,
        "resets": load.resets,
        "steps": load.steps,
        "seconds": round(took, 3),
    }
    if as_json:
        print_json({**about, "measures": _as_json(figures), "failures": dict(figures.failures)})
    else:
        _print(output, about, figures)
    return 1 if figures.failures else 0


async def _play(env: EnvHandle, load: Load, figures: Figures, advance: Callable[[int], None]) -> None:
    for _ in range(ROUND_TRIPS):
        await _timed(figures, "round trip", env.client.alive)
    advance(1)
    for _ in range(load.resets):
        began = time.perf_counter()
        try:
            job = await env.reset({"id": "bench"}, max_steps=MOST_STEPS)
        except EnvdError as error:
            figures.failed(error)
            advance(1 + load.steps + load.pictures)
            continue
        figures.add_reset(job, time.perf_counter() - began)
        advance(1)
        for step in range(load.steps):
            # Each moves the pointer somewhere else: a screen that did not change is cheaper to encode.
            move = f"pyautogui.moveTo({100 + step * 37 % 400}, {100 + step * 53 % 300})"
            await _timed(figures, "step", env.act, move, pause_s=0)
            advance(1)
        for _ in range(load.pictures):
            await _timed(figures, "screenshot", env.screenshot)
            advance(1)


async def _timed(
    figures: Figures, name: str, call: Callable[..., Awaitable[Any]], *arguments: Any, **named: Any
) -> None:
    began = time.perf_counter()
    try:
        await call(*arguments, **named)
    except EnvdError as error:
        figures.failed(error)
    else:
        figures.seconds[name].append(time.perf_counter() - began)


@asynccontextmanager
async def _shown(calls: int, output: Console, *, quiet: bool) -> AsyncIterator[Callable[[int], None]]:
    """A bar on a terminal, now and then a line elsewhere."""
    if quiet or not output.is_terminal:
        done, told = 0, time.monotonic()

        def count(more: int) -> None:
            nonlocal done, told
            done += more
            if not quiet and time.monotonic() > told + LINE_EVERY:
                told = time.monotonic()
                output.out(f"{done} of {calls} calls", highlight=False)

        yield count
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=output, transient=True) as progress:
        task = progress.add_task("calls", total=calls)
        yield lambda done: progress.advance(task, done)


def quantile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that no more than `1 - share` of them are above: one that was measured, not one in between."""
    return sorted_values[max(0, math.ceil(share * len(sorted_values)) - 1)]


def _in_order(figures: Figures) -> list[tuple[str, list[float]]]:
    def place(name: str) -> tuple[int, str]:
        return ORDER.index(name.partition(",")[0]), name

    return [(name, sorted(figures.seconds[name])) for name in sorted(figures.seconds, key=place)]


def _as_json(figures: Figures) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "count": len(values),
            **{f"p{round(share * 100)}_s": round(quantile(values, share), 6) for share in QUANTILES},
            "max_s": round(values[-1], 6),
        }
        for name, values in _in_order(figures)
    ]


def _print(output: Console, about: dict[str, Any], figures: Figures) -> None:
    played = f"{number(about['resets'], 'reset')} each with {number(about['steps'], 'step')}"
    output.out(
        f"{about['url']}: envd {about['version']}, {about['provider']}; {about['clients']} of "
        f"{number(about['envs'], 'env')}, {played}, {about['seconds']:.1f} s in all\n",
        highlight=False,
    )
    rows = [
        (name, str(len(values)), *(_readable(quantile(values, share)) for share in QUANTILES), _readable(values[-1]))
        for name, values in _in_order(figures)
    ]
    print_list(output, ("", "count", "p50", "p95", "p99", "most"), rows)
    for code, times in figures.failures.most_common():
        output.out(f"\n{times} × {code}, the first: {figures.first[code]}", highlight=False)


def _readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
