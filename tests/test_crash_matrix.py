"""The crash matrix: a daemon is killed at every transaction of its journal and at every call of its driver while it
serves a reset, steps and an evaluation, one point in each run, and is started again. Whoever calls and watches it
notices nothing but the time that takes: see `check`.

The points are enumerated: those that a run without a kill passes, and any that another run passes besides.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from anyio import to_thread
from crash_client import Client, client, told_by
from crash_points import BEGIN, GRADE, POINTS, STRIKE, Nursery, nursery
from daemon_process import DaemonProcess
from docker_engine import docker
from figures import FIGURES

from envd.drivers.docker.recipes import DAEMON, DESKTOP
from envd.drivers.sim import Entry
from envd.drivers.sim.driver import Verb
from envd.drivers.sim.hosted import HostGone, SimHost

pytestmark = pytest.mark.timeout(600)
AT_ONCE = 2 * (os.cpu_count() or 1)
"""Runs. Each waits as long as it works."""
TRIES = 2
"""Runs in which a point is waited for: which of two things comes first differs at times."""
RUN_LIMIT = 60.0
"""Seconds that one may take, on a machine that is busy with other things."""
ENV = {
    "ENVD_SIM": "outlive,linger=30,create=0.05",
    "ENVD_SCREEN": "160x120",
    "ENVD_ACTION_PAUSE": "0",
    "ENVD_SETTLE_QUIET": "0",
    "ENVD_LOG_FORMAT": "json",
    "ENVD_DRAIN_LIMIT": "0",
    "ENVD_ENVS": "1",
}
DOCKER = {"PROVIDER": "docker", "ENVD_DOCKER_IMAGE": "envd/desktop", "ENVD_SIM": "", "ENVD_SCREEN": "800x600"}
STEPS = ("alpha ", "beta ")
TASK = {
    "id": "t-1",
    "instruction": "Type.",
    "config": [{"type": "execute", "parameters": {"command": ["true"]}}],
    "evaluator": {"func": "infeasible"},
}
JUDGED = TASK | {
    "evaluator": {
        "postconfig": [{"type": "execute", "parameters": {"command": ["true"]}}],
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": "true"},
        "expected": {"type": "rule", "rules": {"expected": ""}},
    }
}


class Desktops:
    """Those of a state directory. Their host ends when there is neither a daemon nor a desktop."""

    def __init__(self, state: Path) -> None:
        self._state = state

    async def there(self) -> set[str]:
        try:
            async with SimHost(self._state) as host:
                return set(await host.ask("list"))
        except (OSError, HostGone):
            return set()

    async def typed(self, desktop: str) -> str:
        async with SimHost(self._state) as host:
            return await host.typed(desktop)

    async def entries(self) -> list[Entry]:
        async with SimHost(self._state) as host:
            return await host.journal()

    async def clear(self) -> None:
        """Its host ends by itself."""


class Containers(Desktops):
    """The same of docker desktops."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self._began = int(time.time())

    @property
    def _mine(self) -> str:
        return f"label={DAEMON}={(self._state / 'daemon-id').read_text().strip()}"

    async def there(self) -> set[str]:
        shown = '{{.Label "' + DESKTOP + '"}}'
        return set((await to_thread.run_sync(docker, "ps", "--all", "--filter", self._mine, "--format", shown)).split())

    async def clear(self) -> None:
        """For a test that failed."""
        left = await to_thread.run_sync(docker, "ps", "--all", "--quiet", "--filter", self._mine)
        if left:
            await to_thread.run_sync(docker, "rm", "--force", "--volumes", *left.split())

    async def entries(self) -> list[Entry]:
        shown = '{{.TimeNano}} {{.Action}} {{index .Actor.Attributes "' + DESKTOP + '"}}'
        when = ("--since", str(self._began), "--until", str(int(time.time()) + 1))
        about = ("--filter", self._mine, "--filter", "event=create", "--filter", "event=destroy", "--format", shown)
        told = (await to_thread.run_sync(docker, "events", *when, *about)).splitlines()
        verbs: dict[str, Verb] = {"create": "create-begin", "destroy": "destroy-end"}
        return [Entry(0.0, verbs[action], name) for _, action, name in sorted(line.split() for line in told)]


@dataclass
class Run:
    """One run. `host` looks at the desktops; what `play` finds is kept for `check`."""

    state: Path
    nursery: Nursery
    strike: str
    armed_life: int = 0
    adopts: bool = True
    """Whether the driver takes over whatever is there."""
    env: Mapping[str, str] = field(default_factory=dict)
    fails: bool = False
    """Its resets are to fail."""
    jobs: list[str] = field(default_factory=list)
    typed: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    again_at: float | None = None
    """When (monotonic) the second reset was asked for."""
    entries: list[Entry] = field(default_factory=list)
    """What the sim host did."""

    @property
    def passed(self) -> Path:
        return self.state.parent / "points"

    @property
    def begins(self) -> Path:
        return self.state.parent / "begin"

    async def begin(self, life: int) -> DaemonProcess:
        armed = {POINTS: str(self.passed), STRIKE: self.strike} if life == self.armed_life else {}
        return await self.nursery.daemon(self.state, {**ENV, **self.env, **armed})

    def points(self) -> list[str]:
        """Those that were passed."""
        return self.passed.read_text().splitlines() if self.passed.exists() else []

    async def reset(self, caller: Client, task: Mapping[str, Any], host: Desktops) -> str:
        """The id of its desktop, once it has succeeded."""
        key = f"reset-{len(self.jobs)}"
        job = await caller.post("/v1/envs/0/reset", {"task": task}, key)
        self.jobs.append(job["id"])
        ended = await caller.job(job["id"])
        assert ended["state"] == "succeeded", ended
        assert (await caller.post("/v1/envs/0/reset", {"task": task}, key))["id"] == job["id"]
        assert ended["desktop_id"] in await host.there()
        return str(ended["desktop_id"])

    async def step(self, caller: Client, number: int, pause_s: float = 0.0) -> None:
        body = {"actions": [f"pyautogui.write({STEPS[number - 1]!r})"], "step": number, "pause_s": pause_s}
        self.steps.append(await caller.post("/v1/envs/0/step", body, f"step-{number}"))
        assert await caller.post("/v1/envs/0/step", body, f"step-{number}") == self.steps[-1]

    async def evaluate(self, caller: Client) -> None:
        self.verdicts += [await caller.post("/v1/envs/0/evaluate", key="evaluate") for _ in "12"]
        episode_id = self.verdicts[0]["episode_id"]
        self.verdicts.append(await caller.get(f"/v1/episodes/{episode_id}/verdict"))


Play = Callable[[Run, Client, Desktops], Awaitable[None]]


async def episode_and_reset(run: Run, caller: Client, host: Desktops) -> None:
    desktop = await run.reset(caller, TASK, host)
    await run.step(caller, 1)
    await run.step(caller, 2)
    await run.evaluate(caller)
    run.typed = await host.typed(desktop)
    run.again_at = time.monotonic()
    await run.reset(caller, TASK, host)
    await caller.saw(lambda event: event.data["desktop_id"] == desktop and event.data["data"].get("state") == "gone")


async def episode_over_lives(run: Run, caller: Client, host: Desktops) -> None:
    """The life that is armed takes up an episode in the middle of a step."""
    desktop = await run.reset(caller, TASK, host)
    stepping = asyncio.create_task(run.step(caller, 1, pause_s=30))
    while await host.typed(desktop) != STEPS[0]:  # noqa: ASYNC110 - another process's doing
        await asyncio.sleep(0.01)
    caller.lives[-1].process.signal(SIGKILL)
    await stepping
    await run.step(caller, 2)
    await run.evaluate(caller)
    run.typed = await host.typed(desktop)


async def boot_over_lives(run: Run, caller: Client, host: Desktops) -> None:
    """The life that is armed takes up a boot."""
    asked = asyncio.create_task(run.reset(caller, TASK, host))
    while not await host.there():  # noqa: ASYNC110 - another process's doing
        await asyncio.sleep(0.01)
    caller.lives[-1].process.signal(SIGKILL)
    await asked


async def failing_boot(run: Run, caller: Client, host: Desktops) -> None:
    run.fails = True
    job = await caller.post("/v1/envs/0/reset", {"task": TASK}, "reset")
    run.jobs.append(job["id"])
    ended = await caller.job(job["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "boot_failed"), ended


async def judged_episode(run: Run, caller: Client, host: Desktops) -> None:
    """Points count from its evaluation on, for which something is done to the desktop."""
    await run.reset(caller, JUDGED, host)
    run.begins.touch()
    await run.evaluate(caller)


async def docker_episode(run: Run, caller: Client, host: Desktops) -> None:
    await run.reset(caller, TASK, host)
    await run.step(caller, 1)


async def docker_episode_over_lives(run: Run, caller: Client, host: Desktops) -> None:
    """The life that is armed finds a desktop. It goes on with it, or the env is lost and is reset again."""
    await run.reset(caller, TASK, host)
    caller.lives[-1].process.signal(SIGKILL)
    await caller.lives[-1].process.ended()
    while (env := await caller.get("/v1/envs/0"))["state"] not in ("playing", "lost"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    if env["state"] == "lost":
        await run.reset(caller, TASK, host)
    await run.step(caller, 1)


@dataclass
class Outcome:
    point: str
    struck: bool = False
    came: str = ""
    failure: str = ""
    passed: list[str] = field(default_factory=list)


async def outcome_of(run: Run, play: Play, expected_lives: int) -> Outcome:
    """Play it, with one kill at its point, end the daemon as it should end, and see that all is as it should be."""
    outcome = Outcome(run.strike)
    run.state.parent.mkdir(parents=True)
    desktops = Containers(run.state) if run.env.get("PROVIDER") == "docker" else Desktops(run.state)
    if not isinstance(desktops, Containers):
        await run.nursery.sim_host(run.state)
    async with client(run.begin) as (caller, living):

        async def watched() -> None:
            await caller.opened.wait()
            await play(run, caller, desktops)

        playing = asyncio.create_task(watched())
        try:
            async with asyncio.timeout(RUN_LIMIT):
                await asyncio.wait([playing, living], return_when=asyncio.FIRST_COMPLETED)
                if not playing.done():
                    playing.cancel()
                    raise AssertionError(f"the daemon ended by itself: {living!r}")
                await playing
                left = await desktops.there()
                run.entries = await desktops.entries()
                await caller.stopped(living)
                check(run, caller, left)
                assert await desktops.there() == set()
        except (AssertionError, TimeoutError, OSError) as error:
            playing.cancel()
            outcome.failure = f"{type(error).__name__}: {error}\n{told_by(caller)}"
    if outcome.failure:
        await desktops.clear()
    outcome.passed = run.points()
    outcome.struck = caller.killed >= expected_lives
    outcome.came = came_of(run, caller)
    return outcome


def came_of(run: Run, caller: Client) -> str:
    """In a few words, what it was for the client."""
    words = []
    if run.steps and any(step["actions"][0]["outcome"] != "ok" for step in run.steps):
        words.append("a step is unknown")
    for job in run.jobs:
        notes = [one.data["data"].get("message", "") for one in caller.seen if one.data["job_id"] == job]
        if any("begins again, on a fresh desktop" in note for note in notes):
            words.append("the reset begins again")
        if any("the boot goes on" in note for note in notes):
            words.append("the boot goes on")
    if caller.of("episode", state="ended", end_reason="lost"):
        words.append("the desktop is lost")
    if run.verdicts and run.verdicts[0]["mask"]:
        words.append(f"the verdict is {run.verdicts[0]['code']}")
    return ", ".join(words) or "nothing is seen of it"


def check(run: Run, caller: Client, left: set[str]) -> None:
    """What must be so whatever was struck."""
    caller.check_stream()
    caller.check_lives()
    # Each job is one, and ends once.
    begun = {one.data["job_id"] for one in caller.seen if one.data["job_id"]}
    assert begun == set(run.jobs)
    assert caller.ends() == Counter(run.jobs)
    # One desktop at the end, and never more than one for each job that needs it.
    assert len(left) == (0 if run.fails else 1)
    check_desktops(run, caller)
    # Input is sent once.
    for number, (step, text) in enumerate(zip(run.steps, STEPS, strict=False), start=1):
        [action] = step["actions"]
        assert step["step"] == number
        if run.typed is not None:
            typed = action["outcome"], run.typed.count(text)
            assert typed in (("ok", 1), ("unknown", 0), ("unknown", 1)), (step, run.typed)
        assert len(caller.of("step", step=number)) == 1
    # One verdict, told alike whenever it is asked for, and told once.
    if run.verdicts:
        assert all(verdict == run.verdicts[0] for verdict in run.verdicts)
        assert len(caller.of("verdict", episode_id=run.verdicts[0]["episode_id"])) == 1
    began = [one.data["data"]["episode_id"] for one in caller.of("episode", state="began")]
    assert len(began) == len(set(began)) == (0 if run.fails else len(run.jobs))


def check_desktops(run: Run, caller: Client) -> None:
    alive: set[str] = set()
    made: Counter[str] = Counter()
    for at, verb, instance in run.entries:
        if verb == "create-begin":
            alive.add(instance)
            made[instance] += 1
        elif verb == "destroy-end":
            alive.discard(instance)
        again = run.again_at is not None and at > run.again_at
        assert len(alive) <= (2 if again else 1), run.entries
    # A host that had no desktop any more may have ended, and its journal with it.
    assert set(made.values()) == {1} or (run.fails and not made)
    # A second one for a job is made when it was being set up, and so used, on the first; or that has failed.
    of_job = {job: desktops_of(caller, job) for job in run.jobs}
    assert set(made) == {one for desktops in of_job.values() for one in desktops if one in made}
    for job, desktops in of_job.items():
        wasted = [one for one in desktops if one in made][:-1]
        for one in wasted:
            states = [event.data["job"]["state"] for event in caller.seen if is_about(event.data, job, one)]
            assert states[-1] == "setting_up" or run.fails or not run.adopts, (job, one, states)


def desktops_of(caller: Client, job: str) -> list[str]:
    """In the order in which it had them."""
    had = [one.data["job"]["desktop_id"] for one in caller.seen if one.data["job_id"] == job]
    return list(dict.fromkeys(filter(None, had)))


def is_about(event: Mapping[str, Any], job: str, desktop: str) -> bool:
    return bool(event["job_id"] == job and event["job"]["desktop_id"] == desktop)


async def enumerated(
    folder: Path, play: Play, kinds: Callable[[str], bool], env: Mapping[str, str] = ENV, *, armed_life: int = 0
) -> list[Outcome]:
    """What came of a run for each point that `kinds` likes."""
    numbers, turn = itertools.count(), asyncio.Semaphore(AT_ONCE)
    outcomes: dict[str, Outcome] = {}
    tries: Counter[str] = Counter()
    async with nursery() as daemons:

        async def of(strike: str) -> Outcome:
            async with turn:
                where = folder / str(next(numbers))
                own = {name: value.format(folder=where) for name, value in env.items()}
                tries[strike] += 1
                run = Run(where / "state", daemons, strike, armed_life, own.get("PROVIDER") != "docker", own)
                return await outcome_of(run, play, armed_life + 1)

        whole = await of("")
        assert not whole.failure, whole.failure
        passed = dict.fromkeys(whole.passed)
        while todo := [one for one in passed if kinds(one) and one not in outcomes and tries[one] < TRIES]:
            for outcome in await asyncio.gather(*map(of, todo)):
                if outcome.struck or outcome.failure:
                    outcomes[outcome.point] = outcome
                passed |= dict.fromkeys(outcome.passed)
        missed = [one for one in passed if kinds(one) and one not in outcomes]
        FIGURES.extend(f"  came only once: {point}" for point in missed)
    return list(outcomes.values())


def tell(title: str, outcomes: list[Outcome]) -> None:
    """Keep the table for the end of the tests, and fail for what failed."""
    struck = [one for one in outcomes if one.struck]
    FIGURES.append(f"crash matrix, {title}: {len(struck)} points")
    by = Counter((f"{re.split(r'[:# ]', one.point)[0]} {one.point.split()[-1]}", one.came) for one in struck)
    FIGURES.extend(f"  {point:24} {count:4}  {came}" for (point, came), count in sorted(by.items()))
    failed = [f"=== {one.point}: {one.failure}" for one in outcomes if one.failure]
    assert not failed, f"{len(failed)} of {len(outcomes)}\n" + "\n".join(failed)
    assert struck


def of_the_journal(point: str) -> bool:
    return point.startswith("journal:")


def of_the_driver(point: str) -> bool:
    return not of_the_journal(point)


async def test_at_every_write_of_the_journal(tmp_path: Path) -> None:
    tell("journal", await enumerated(tmp_path, episode_and_reset, of_the_journal))


async def test_at_every_call_of_the_driver(tmp_path: Path) -> None:
    tell("driver", await enumerated(tmp_path, episode_and_reset, of_the_driver))


async def test_at_every_renewal(tmp_path: Path) -> None:
    renews = {"ENVD_SIM": f"{ENV['ENVD_SIM']},renews"}
    tell("renewal", await enumerated(tmp_path, episode_and_reset, lambda point: point.startswith("renew "), renews))


async def test_while_a_boot_fails(tmp_path: Path) -> None:
    fails = {"ENVD_SIM": f"{ENV['ENVD_SIM']},create_fails=no machine"}
    tell("failing boot", await enumerated(tmp_path, failing_boot, lambda point: True, fails))


async def test_while_an_episode_is_taken_up(tmp_path: Path) -> None:
    tell("episode taken up", await enumerated(tmp_path, episode_over_lives, lambda point: True, armed_life=1))


async def test_while_a_boot_is_taken_up(tmp_path: Path) -> None:
    slow = {"ENVD_SIM": "outlive,linger=30,create=0.05,boot=0.5"}
    tell("boot taken up", await enumerated(tmp_path, boot_over_lives, lambda point: True, slow, armed_life=1))


async def test_while_a_desktop_is_judged(tmp_path: Path) -> None:
    how = {GRADE: "1.0", BEGIN: "{folder}/begin"}
    tell("judging", await enumerated(tmp_path, judged_episode, lambda point: True, how))


@pytest.mark.docker
async def test_at_calls_of_the_docker_driver(tmp_path: Path) -> None:
    def wanted(point: str) -> bool:
        return point.startswith(("create ", "destroy "))

    tell("docker", await enumerated(tmp_path, docker_episode, wanted, DOCKER))


@pytest.mark.docker
async def test_while_a_docker_desktop_is_taken_up(tmp_path: Path) -> None:
    def wanted(point: str) -> bool:
        return point.startswith(("adopt ", "list "))

    tell("docker desktop taken up", await enumerated(tmp_path, docker_episode_over_lives, wanted, DOCKER, armed_life=1))
