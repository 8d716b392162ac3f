"""`make bench-docker`: how long a virtual machine takes to be there. Cold, as the first clone of a new template, as one
of many clones one after another, and as one of many that are wanted at once."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from bench_docker_figures import Beside
from bench_docker_memory import MB, Held, held, memory
from bench_docker_service import Place, ResetFailed, Timeline, cleared, reset, running, settings

from envd.guest import Browser
from envd.models import ResetPath
from envd.service import Service
from envd.settings import Settings

TEMPLATE_PHASES = ("settle", "freeze", "trial")
"""Between a machine that is ready and the template that it becomes."""
IDLE = 10.0
"""Seconds that clones rest before their memory is called idle."""
CLONES_WEIGHED = 4
PAGE = """<!doctype html><title>bench</title><style>p{column-count:3;text-shadow:1px 1px 2px #888}</style><canvas id=c
width=800 height=400></canvas><script>
const pen = document.getElementById('c').getContext('2d');
for (let i = 0; i < 500; i++) {
pen.fillStyle = `hsl(${i % 360} 70% 60%)`; pen.fillRect(i * 7 % 800, i * 3 % 400, 20, 20) }
for (let i = 0; i < 60; i++) { const p = document.createElement('p'); p.textContent = `Paragraph ${i}. `.repeat(30);
document.body.append(p) }
</script>"""
"""A page that takes some drawing and some pages of text; it needs no network, which a guest may not
have."""


@dataclass(frozen=True)
class Run:
    """What one run of the bench was asked for, and where its figures go."""

    figures: Beside
    where: Place
    provider: str
    clones: int
    resets: int
    bursts: tuple[int, ...]

    def machines(self, **changes: Any) -> Settings:
        """Settings of a daemon whose desktops are virtual machines."""
        image = {"docker_image": "envd/qemu"} if self.provider == "docker" else {}
        return settings(self.where, provider=self.provider, **image, **changes)


async def measure_cold(run: Run) -> None:
    """A boot as it is where there are no templates."""
    async with running(run.machines(templates="off")) as service:
        cold = await reset(service)
    run.figures.against("cold_http", "cold_http_s", "cold boot: the guest answers", cold.since("probe"), "s")
    if cold.pictured is not None:
        run.figures.add("cold_picture_s", "cold boot: its first picture", cold.pictured, "s")
    run.figures.against("cold", "cold_s", "cold boot: both probes", cold.ready, "s")
    for phase in cold.job.phases[: cold.names().index("set_up")]:
        if phase.seconds is not None:
            run.figures.add(f"cold_phase_{key(phase.name)}_s", f"  of that {phase.name}", phase.seconds, "s")


async def measure_template(run: Run) -> None:
    """The first reset on a host: a cold boot, the template with its trials, and a clone of it."""
    async with running(run.machines()) as service:
        if service.driver.next_path() is ResetPath.RESTORE:
            run.figures.note("template", "template: there was one already, so none was made.")
            return
        first = await reset(service)
    run.figures.add("first_reset_s", "first desktop of a host: boot, template, trials, clone", first.ready, "s")
    for phase in first.job.phases[: first.names().index("set_up")]:
        if phase.seconds is not None:
            run.figures.add(f"first_phase_{key(phase.name)}_s", f"  of that {phase.name}", phase.seconds, "s")
    beyond = sum(phase.seconds or 0.0 for phase in first.job.phases if phase.name in TEMPLATE_PHASES)
    if beyond:
        run.figures.against("template", "template_s", "template, beyond the boot: frozen, tried, admitted", beyond, "s")


async def measure_clones(run: Run) -> None:
    """Clones, each alone on the host: the one before is gone when the next is asked for."""
    async with running(run.machines()) as service:
        await with_template(service)
        made = [await _alone(service) for _ in range(run.clones)]
    clones = [one for one in made if one.cloned]
    figures = run.figures
    if len(clones) < len(made):
        words = f"{len(made) - len(clones)} of {len(made)} resets were no clones and are in no figure of clones."
        figures.note("not_clones", words)
    tell(figures, "frame", "clone: first frame", [one.framed for one in clones], aim=0.3)
    answered = [seconds for one in clones if (seconds := one.probed("screenshot")) is not None]
    tell(figures, "http", "clone: the guest answers", answered)
    ready = [one.ready for one in clones]
    tell(figures, "clone", "clone: both probes", ready, aim=1.0)
    tell(figures, "reset", "clone: whole reset, to the first observation", [one.whole for one in clones])
    for name in dict.fromkeys(name for one in clones for name in one.names()):
        spent = [phase.seconds or 0.0 for one in clones for phase in one.job.phases if phase.name == name]
        figures.add(
            f"clone_phase_{key(name)}_p50_s", f"  of that {name}, p50 of {len(spent)}", statistics.median(spent), "s"
        )
    if (cold := figures.values.get("cold_s")) is not None and ready:
        ratio = float(cold) / statistics.median(ready)
        figures.against("ratio", "restore_ratio", "cold boot : clone, both to both probes (aim: 50 or more)", ratio, "")


async def _alone(service: Service) -> Timeline:
    timeline = await reset(service)
    await cleared(service)
    return timeline


async def measure_bursts(run: Run) -> None:
    """So many resets of as many envs at once, each burst on a host that has no desktop."""
    async with running(run.machines(envs=max(run.bursts))) as service:
        await with_template(service)
        for width in run.bursts:
            made = await asyncio.gather(*(reset(service, env) for env in range(width)), return_exceptions=True)
            await cleared(service)
            ready = [one.ready for one in made if isinstance(one, Timeline) and one.cloned]
            if len(ready) < width:
                failed = next((str(one) for one in made if isinstance(one, BaseException)), "some were booted cold")
                run.figures.note(f"burst_{width}", f"burst of {width}: {len(ready)} clones were ready. {failed}")
                continue
            aim = 6.0 if width == 12 else None
            name, what = f"burst_{width}", f"burst of {width}"
            run.figures.against(name, f"{name}_all_s", f"{what}: all ready", max(ready), "s", aim=aim)
            run.figures.add(f"{name}_first_s", f"{what}: the first ready", min(ready), "s")


async def measure_memory(run: Run) -> None:
    """Clones side by side, as they would be in use: pages of the template are paid by all of them together."""
    async with running(run.machines(envs=CLONES_WEIGHED)) as service:
        await with_template(service)
        before = memory()
        clones = [await reset(service, env) for env in range(CLONES_WEIGHED)]
        await anyio.sleep(IDLE)
        idle = await _weigh(clones, run.provider)
        after = memory()
        for clone in clones:
            await _open_page(service, clone)
        worked = await _weigh(clones, run.provider)
    figures = run.figures
    many = f"one of {CLONES_WEIGHED} clones"
    what = f"{many}, idle: its QEMU's share (PSS)"
    figures.against("memory", "memory_idle_mb", what, idle.qemu / MB, "MB", aim=200)
    figures.add("memory_idle_own_mb", "  of that its alone, which is what one more costs", idle.own / MB, "MB")
    figures.add("memory_beside_mb", "  beside it: container, shim, proxies of its ports", idle.beside / MB, "MB")
    freed = (before["MemAvailable"] - after["MemAvailable"]) / CLONES_WEIGHED / MB
    figures.add("memory_idle_host_mb", "  the same by what the host has left, disk cache included", freed, "MB")
    figures.against("page", "memory_page_mb", f"{many}, after a page in Chromium", worked.qemu / MB, "MB")
    figures.add("memory_page_own_mb", "  of that its alone", worked.own / MB, "MB")


async def _weigh(clones: list[Timeline], provider: str) -> Held:
    """The medians of what each holds."""
    each = [await anyio.to_thread.run_sync(held, clone.desktop.id, provider) for clone in clones]
    median = statistics.median
    return Held(
        int(median(one.qemu for one in each)),
        int(median(one.own for one in each)),
        int(median(one.beside for one in each)),
    )


async def _open_page(service: Service, clone: Timeline) -> None:
    """Have its Chromium load and draw `PAGE`."""
    cdp = service.fleet.cdp(clone.desktop)
    async with cdp.browser(60) as browser:
        [page, *_] = await browser.pages()
        session = await browser.attach(page["targetId"], 60)
        await _navigate(browser, session)
    await cdp.painted(60)


async def _navigate(browser: Browser, session: str) -> None:
    await browser.send("Page.enable", session_id=session, timeout=60)
    with browser.events("Page.loadEventFired", session) as loads:
        url = {"url": f"data:text/html,{PAGE.replace('%', '%25').replace('#', '%23')}"}
        await browser.send("Page.navigate", url, session_id=session, timeout=120)
        with anyio.fail_after(120):
            await loads.receive()


async def with_template(service: Service) -> None:
    """Return when the next reset will be a clone, and nothing runs. Raises ResetFailed when there is no way to it."""
    if service.driver.next_path() is not ResetPath.RESTORE:
        await reset(service)
        await cleared(service)
    if service.driver.next_path() is not ResetPath.RESTORE:
        raise ResetFailed("a desktop was booted, and there is no template to clone")


def tell(figures: Beside, anchor: str, what: str, took: list[float], aim: float | None = None) -> None:
    """Median and 95th percentile, if there is anything."""
    if took:
        figures.spread_against(anchor, f"{anchor}_{{}}_s", what, took, "s", aim=aim)


def key(phase: str) -> str:
    """A phase as part of a figure's name."""
    return phase.replace(" ", "_").replace("-", "_")
