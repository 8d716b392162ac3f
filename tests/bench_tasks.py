"""`make bench`, tasks: what set-up steps and evaluations cost beyond the guest, the getters and the metric."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from typing import Any

import aiohttp
from bench_figures import Figures, in_ms, median_ms, percentile, rss_mb, seconds
from daemon_process import DaemonProcess, descendants

from envd import Client
from envd.models import Verdict, VerdictStatus

COMMAND = ["echo", "1"]
EVALUATED = {
    "id": "bench-evaluated",
    "instruction": "Nothing is to be done.",
    "config": [],
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": COMMAND},
        "expected": {"type": "rule", "rules": {"expected": "1\n"}},
    },
}
MOVE = "import pyautogui; pyautogui.moveTo({x}, 400)"
READING = 0.5
"""Seconds. A model that says that it is done has looked at the screen before, for longer than this."""

WINDOW = {"window_name": "envd bench"}
"""That is not there: how long a window manager takes to raise one is not ours."""
STEPS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "execute": ({"command": ["true"]}, "/execute", {"command": ["true"], "shell": False}),
    "activate_window": (WINDOW, "/setup/activate_window", {**WINDOW, "strict": False, "by_class": False}),
    "sleep": ({"seconds": 0}, "", {}),
}
"""Type of step → its parameters; the guest's endpoint that does it ("" for none), and what that is sent."""
STEPS_EACH = 20
RESETS_EACH = 3


async def measure_evaluations(figures: Figures, provider: str, served: DaemonProcess, count: int) -> None:
    """A daemon that has not evaluated yet judges its first episode, then `count` more, one after another."""
    async with Client(served.url) as client, aiohttp.ClientSession() as session:
        first, cold = await _episode(client, 0)
        if first.status is VerdictStatus.NOT_EVALUABLE:
            words = f"{provider}: evaluations were not measured. {first.detail} {first.hint}"
            figures.note(f"{provider}_evaluation", words)
            return
        assert first.score == 1, (first.detail, first.hint)
        figures.add(f"{provider}_evaluation_first_s", f"{provider}: the first evaluation of a daemon", cold, "s")
        verdicts, walls, direct = list[Verdict](), list[float](), list[float]()
        for number in range(count):
            verdict, wall = await _episode(client, number + 1)
            assert verdict.score == 1, (verdict.detail, verdict.hint)
            verdicts.append(verdict)
            walls.append(wall)
            guest = await guest_of(client)
            direct.append(await seconds(post(session, f"{guest}/execute", {"command": COMMAND, "shell": False})))
    _tell_evaluations(figures, provider, verdicts, walls, median_ms(direct))
    evaluator = evaluator_process(served.pid)
    beside = ("the daemon", rss_mb(served.pid))
    figures.add(
        f"{provider}_evaluator_rss_mb", f"{provider}: evaluator, idle: memory", rss_mb(evaluator), "MB", beside=beside
    )


def _tell_evaluations(
    figures: Figures, provider: str, verdicts: list[Verdict], walls: list[float], direct: float
) -> None:
    inside = [one.seconds["getters"] + one.seconds["metrics"] for one in verdicts]
    totals = [one.seconds["total"] for one in verdicts]
    beyond = in_ms([total - own for total, own in zip(totals, inside, strict=True)])
    seen = in_ms([wall - own for wall, own in zip(walls, inside, strict=True)])
    name, what = f"{provider}_evaluation", f"{provider}: evaluation"
    figures.spread(
        f"{name}_beyond_{{}}_ms",
        f"{what} beyond getters and metric",
        beyond,
        "ms",
        aim=150,
        beside=("getters and metric", median_ms(inside)),
    )
    figures.spread(
        f"{name}_beyond_seen_{{}}_ms",
        f"{what}, the same as a client sees it",
        seen,
        "ms",
        aim=150,
        beside=("of that within the daemon", statistics.median(beyond)),
    )
    parts = {
        "settle": "of that the screen's rest",
        "overhead": "of that the evaluator's processes",
        "getters": "the getters",
        "metrics": "the metric, with the process that it has of its own",
    }
    for part, words in parts.items():
        took = [one.seconds[part] for one in verdicts]
        figures.add(f"{name}_{part}_p50_ms", f"{what}, {words}", median_ms(took), "ms")
    beside = ("the getter's command in the guest", direct)
    figures.add(f"{name}_whole_p50_ms", f"{what}, all of it as a client sees it", median_ms(walls), "ms", beside=beside)
    figures.add(f"{name}_whole_p95_ms", f"{what}, all of it, p95", percentile(in_ms(walls), 95), "ms")


async def _episode(client: Client, number: int) -> tuple[Verdict, float]:
    """Reset, one action, done, evaluate: the verdict, and how many seconds a client waited for it."""
    await client.reset({**EVALUATED, "id": f"bench-evaluated-{number}"}, timeout=120)
    await client.step(actions=[MOVE.format(x=300 + 10 * (number % 100))])
    await asyncio.sleep(READING)
    await client.step(actions=["DONE"], include_screenshot=False)
    verdicts: list[Verdict] = []

    async def evaluate() -> None:
        verdicts.append(await client.evaluate(timeout=120))

    wall = await seconds(evaluate())
    return verdicts[0], wall


async def measure_setup(figures: Figures, provider: str, served: DaemonProcess) -> None:
    """Set-ups of one type of step each, beside the same sent to the guest directly."""
    async with Client(served.url) as client, aiohttp.ClientSession() as session:
        for kind, (parameters, path, body) in STEPS.items():
            config = [{"type": kind, "parameters": parameters}] * STEPS_EACH
            each, phases, direct = list[float](), list[float](), list[float]()
            for number in range(RESETS_EACH):
                task = {"id": f"bench-{kind}-{number}", "instruction": "", "config": config}
                job = await client.reset(task, timeout=120)
                each += [record.seconds for record in job.setup]
                phases.append(sum(phase.seconds or 0.0 for phase in job.phases if phase.name == "set_up"))
                guest = await guest_of(client)
                direct += [await seconds(post(session, guest + path, body)) if path else 0.0 for _ in range(STEPS_EACH)]
            own = median_ms(direct)
            per_step = median_ms(phases) / STEPS_EACH - statistics.fmean(direct) * 1000
            name, what = f"{provider}_setup_{kind}", f"{provider}: set-up step {kind}"
            figures.add(
                f"{name}_overhead_ms",
                f"{what}, beyond the guest",
                median_ms(each) - own,
                "ms",
                aim=10,
                beside=("guest", own),
            )
            figures.add(f"{name}_phase_overhead_ms", f"{what}, the same by the whole set-up", per_step, "ms", aim=10)


async def guest_of(client: Client) -> str:
    """URL of the guest that env 0 plays on."""
    desktop = (await client.env_state(0)).desktop
    assert desktop is not None
    assert desktop.endpoints is not None
    return desktop.endpoints.guest


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(url, json=body) as answer:
        await answer.read()
        assert answer.status == 200, url


def evaluator_process(daemon_pid: int) -> int:
    """The process that has the evaluators imported: the largest of those that run them."""
    found = [
        pid for pid in descendants(daemon_pid) if b"grader/__main__.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return max(found, key=rss_mb)
