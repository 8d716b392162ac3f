"""`make bench-docker`: desktops in use. Hands and eyes from outside a machine beside those inside it, warm spares, and
container desktops, which are no machines."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
from bench_docker_figures import Beside
from bench_docker_memory import MB, held
from bench_docker_service import ResetFailed, cleared, reset, running, settings
from bench_docker_vm import Run, tell, with_template
from bench_figures import in_ms, median_ms, seconds

from envd.actions.gestures import Gesture, Move, Press
from envd.drivers.base import Console
from envd.guest import Guest
from envd.models import ActionOutcome, StepRequest
from envd.service import Service
from envd.settings import Settings

FROM_OUTSIDE = 20
INSIDE = 3
"""Tries of what takes an emulated guest seconds."""
GUEST_LIMIT = 120.0
"""Seconds that such a try may take."""
CLICK = "import pyautogui; pyautogui.click({x}, {y})"
REST = 3.0
"""Seconds that a desktop is left alone before it is worked: it was not there a second ago."""
REFILL_LIMIT = 300.0


async def measure_hands(run: Run) -> None:
    """One clone: stopped and let go on, clicked, looked at, stepped; from outside and, as rivals do it, inside."""
    async with running(run.machines()) as service:
        await with_template(service)
        clone = await reset(service)
        console = service.driver.console(clone.desktop.id)
        if console is None:
            run.figures.note("hands", "hands: this desktop has no console that was seen to work.")
            return
        await anyio.sleep(REST)
        await _measure_pause(run.figures, console)
        inside = await _inside(service.fleet.guest(clone.desktop))
        await _measure_console(run.figures, console, inside)
        await _measure_steps(run.figures, service, inside["click"] + inside["picture"])


async def _measure_pause(figures: Beside, console: Console) -> None:
    stops, conts = list[float](), list[float]()
    for _ in range(FROM_OUTSIDE):
        stops.append(await seconds(console.pause()))
        conts.append(await seconds(console.resume()))
    figures.against("stop", "stop_p50_ms", "machine stopped", median_ms(stops), "ms")
    figures.against("cont", "cont_p50_ms", "machine let go on", median_ms(conts), "ms")


async def _measure_console(figures: Beside, console: Console, inside: dict[str, float]) -> None:
    if console.input:
        clicks = [await seconds(console.perform(_click(number))) for number in range(FROM_OUTSIDE)]
        _beside_inside(figures, "click", clicks, inside["click"])
    if console.pictures:
        looks = [await seconds(console.picture()) for _ in range(FROM_OUTSIDE)]
        _beside_inside(figures, "picture", looks, inside["picture"])
    if not (console.input and console.pictures):
        figures.note("hands", f"hands: seen to work: input {console.input}, pictures {console.pictures}.")


def _beside_inside(figures: Beside, name: str, took: list[float], inside: float) -> None:
    figures.spread_against(name, f"{name}_host_{{}}_ms", f"{name} from outside", in_ms(took), "ms")
    figures.add(f"{name}_guest_p50_ms", f"{name} inside, by our own guest server, p50 of {INSIDE}", inside * 1000, "ms")
    figures.add(f"{name}_ratio", f"{name}: inside : from outside", inside / statistics.median(took), "")


async def _measure_steps(figures: Beside, service: Service, inside: float) -> None:
    took, ways = list[float](), set[str]()
    for number in range(FROM_OUTSIDE):
        request = StepRequest(actions=[CLICK.format(x=300 + 13 * number, y=420)])
        began = time.perf_counter()
        result = await service.step(0, request)
        took.append(time.perf_counter() - began)
        assert result.actions[0].outcome is ActionOutcome.OK, result.actions
        ways |= {str(result.actions[0].via), str(result.screenshot_via)}
    what = f"whole step (click and picture), by {' and '.join(sorted(ways))}"
    figures.spread_against("step", "step_{}_ms", what, in_ms(took), "ms")
    figures.add("step_guest_ms", "whole step inside: the click and the picture above", inside * 1000, "ms")
    figures.add("step_ratio", "whole step: inside : as served", inside / statistics.median(took), "")


def _click(number: int) -> tuple[Gesture, ...]:
    return Move(300 + 13 * number, 400), Press("left", down=True), Press("left", down=False)


async def _inside(guest: Guest) -> dict[str, float]:
    """Medians, in seconds."""

    async def click(number: int) -> None:
        ran = await guest.execute(["python", "-c", CLICK.format(x=300 + 13 * number, y=440)], timeout=GUEST_LIMIT)
        assert ran.returncode == 0, ran.stderr

    async def median_of(what: Callable[[int], Awaitable[object]]) -> float:
        return statistics.median([await seconds(what(number)) for number in range(INSIDE)])

    return {"click": await median_of(click), "picture": await median_of(lambda _: guest.screenshot(GUEST_LIMIT))}


async def measure_spares(run: Run) -> None:
    """Machines that stand by: from a reset's being asked for to its set-up."""
    await _hand_over(run, run.machines(spares=1), "", "spare machine", machines=True)


async def _hand_over(run: Run, how: Settings, prefix: str, what: str, *, machines: bool) -> None:
    took = list[float]()
    async with running(how) as service:
        if machines:
            await with_template(service)
        for _ in range(run.resets):
            await _spare(service)
            took.append((await reset(service)).ready)
    name = f"{prefix}spare_{{}}_ms"
    figures = run.figures
    figures.spread_against("spare", name, f"{what}: handed over, before set-up", in_ms(took), "ms", aim=50)


async def _spare(service: Service) -> None:
    """Return when one stands by."""
    with anyio.move_on_after(REFILL_LIMIT):
        while service.fleet.spares == 0:  # noqa: ASYNC110 - a fleet tells nobody but its queue of a new spare
            await asyncio.sleep(0.05)
        return
    raise ResetFailed(f"no spare stood by within {REFILL_LIMIT:g} s")


async def measure_containers(run: Run) -> None:
    """Container desktops, booted cold one after another; then the hand-over of those that stand by."""
    how = {"provider": "docker", "docker_image": "envd/desktop"} if run.provider == "docker" else {}
    if not how:
        run.figures.note("container", f"container desktops were not measured: PROVIDER is {run.provider}.")
        return
    made = []
    async with running(settings(run.where, **how)) as service:
        await reset(service)
        for _ in range(run.resets):
            await cleared(service)
            made.append(await reset(service))
        await anyio.sleep(REST)
        idle = await anyio.to_thread.run_sync(held, made[-1].desktop.id, "docker")
    tell(run.figures, "container", "container desktop: cold boot to both probes", [one.ready for one in made], aim=3.0)
    run.figures.spread("container_reset_{}_s", "container desktop: whole reset", [one.whole for one in made], "s")
    run.figures.add(
        "container_memory_mb", "container desktop, idle: its processes' share (PSS)", idle.beside / MB, "MB"
    )
    await _hand_over(run, settings(run.where, spares=1, **how), "container_", "spare container", machines=False)
