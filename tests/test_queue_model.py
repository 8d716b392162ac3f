"""The boot queue, the fleet and the envs against any order of resets, cancels, deaths and failures.

Hypothesis chooses what is done and when; the loop's clock jumps to the next thing that is due, so that hours pass in
milliseconds and a run depends on nothing but its choices. Only the two ports of a desktop are stood in for.
"""

from __future__ import annotations

import asyncio
import io
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Self, TypeVar, cast

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

from envd.access import Access
from envd.boot import account, fleet, queue, spares
from envd.boot.estimates import Estimates
from envd.boot.queue import Reset
from envd.bundles import Bundles
from envd.drivers.base import Death, Driver, InstanceSpec, Made, Report, Traits
from envd.episodes import Envs
from envd.errors import BootFailed, Draining, InfraError, QueueFull
from envd.events import EventLog
from envd.host import Host
from envd.models import (
    DesktopState,
    Endpoints,
    EnvState,
    Event,
    Job,
    JobKind,
    JobState,
    Probe,
    ProbeResult,
    ResetPath,
    Settled,
)
from envd.service import Service
from envd.settings import Settings
from envd.store import MemoryStore
from envd.tasks.abilities import Abilities
from envd.tasks.assets import Assets
from envd.tasks.evaluating import Evaluators
from envd.tasks.schema import parse

T = TypeVar("T")

ENVS = 3
LIMIT = 4
READY_TIMEOUT = 50.0
SETUP_ATTEMPTS = 2


class ImpatientSelector(selectors.DefaultSelector):
    """Waits for nothing: where others would sleep, it moves the clock on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "everything waits, and nothing will ever happen"
            self.now += max(timeout, 0.0)
        return found


class Clockwork(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = ImpatientSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


@dataclass(frozen=True)
class Plan:
    """What becomes of one instance. Times are seconds; None is never."""

    create_s: float = 1.0
    create_raises: type[BaseException] | None = None
    ready_s: float | None = 5.0
    dies_s: float | None = None
    destroy_s: float = 0.1
    destroy_fails: int = 0
    admit_s: float = 0.0
    restore_fails: bool = False


PLANS = st.builds(
    Plan,
    create_s=st.sampled_from([0.0, 1.0, 20.0, 70.0]),
    create_raises=st.sampled_from(
        [None, None, None, None, None, BootFailed, OSError, TimeoutError, asyncio.CancelledError]
    ),
    ready_s=st.sampled_from([0.0, 5.0, 5.0, 5.0, None]),
    dies_s=st.sampled_from([None, None, None, 0.0, 3.0, 10.0]),
    destroy_s=st.sampled_from([0.0, 0.1, 10.0, 50.0]),
    destroy_fails=st.sampled_from([0, 0, 0, 1, 3]),
    admit_s=st.sampled_from([0.0, 0.0, 2.0, 40.0]),
    restore_fails=st.sampled_from([False, False, True]),
)


class Instance:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dead = asyncio.Event()
        self.ready = False
        self.path: ResetPath | None = None
        self.refusals = plan.destroy_fails


class PlannedDriver(Driver):
    """Instances that are nothing but their plan. `begins` is called with each that begins to boot or to be restored.

    One that `clones` makes a template of what it boots, and restores it from then on until the template is lost.
    """

    name = "planned"

    def __init__(self, traits: Traits, *, clones: bool) -> None:
        self.traits = traits
        self.clones = clones
        self.template = False
        self.lost_template = False
        self.turn = asyncio.Lock()
        self.plans: list[Plan] = []
        self.instances: dict[str, Instance] = {}
        self.begins: Callable[[tuple[InstanceSpec, ResetPath]], None] = lambda begun: None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def next_path(self) -> ResetPath:
        return ResetPath.RESTORE if self.template else ResetPath.COLD

    async def admit(self, report: Report) -> None:
        if self.plans and self.plans[0].admit_s:
            report.progress("waiting for room, as planned")
            await asyncio.sleep(self.plans[0].admit_s)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        instance = self.instances[spec.id] = Instance(self.plans.pop(0) if self.plans else Plan())
        endpoints = Endpoints(guest=spec.id, cdp=spec.id)
        if not self.clones:
            await self.boot(spec, instance)
            return Made(endpoints)
        if not self.template:
            async with self.turn:
                if not self.template:
                    report.phase("template")
                    await self.boot_until_ready(spec, instance, report)
                    instance.ready = False
                    self.template = True
        self.begin(spec, instance, ResetPath.RESTORE)
        await asyncio.sleep(0.5)
        if not instance.plan.restore_fails:
            return Made(endpoints, ResetPath.RESTORE, b"a frame")
        instance.path = None
        report.note("as planned")
        async with self.turn:
            await self.boot_until_ready(spec, instance, report)
        return Made(endpoints)

    async def boot_until_ready(self, spec: InstanceSpec, instance: Instance, report: Report) -> None:
        """The turn of whoever boots is over when the guest answers, or the machine does not run any more."""
        try:
            await self.boot(spec, instance)
            await report.ready(Endpoints(guest=spec.id, cdp=spec.id))
        except BaseException:
            instance.path = None
            raise

    async def boot(self, spec: InstanceSpec, instance: Instance) -> None:
        self.begin(spec, instance, ResetPath.COLD)
        await asyncio.sleep(instance.plan.create_s)
        if instance.plan.create_raises is not None:
            raise instance.plan.create_raises("as planned")
        if instance.plan.dies_s is not None:
            asyncio.get_running_loop().call_later(instance.plan.dies_s, instance.dead.set)

    def begin(self, spec: InstanceSpec, instance: Instance, path: ResetPath) -> None:
        instance.path = None
        self.begins((spec, path))
        instance.path = path

    async def destroy(self, instance_id: str) -> None:
        if instance := self.instances.get(instance_id):
            await asyncio.sleep(instance.plan.destroy_s)
            if instance.refusals:
                instance.refusals -= 1
                raise InfraError("not yet")
            instance.dead.set()
            self.instances.pop(instance_id, None)

    async def list(self) -> frozenset[str]:
        return frozenset(self.instances)

    async def wait(self, instance_id: str) -> Death:
        if instance := self.instances.get(instance_id):
            await instance.dead.wait()
        return Death("as planned")

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ("a line",)


class PlannedReadiness:
    """Ready when the plan says so; takes the place of the probes."""

    def __init__(self, driver: PlannedDriver, *, guest: Any, watcher: Any, **how: Any) -> None:
        self.instance = driver.instances[guest.url]
        self.watcher = watcher
        self.probes = {name: Probe(name=name) for name in ("screenshot", "chrome_cdp")}

    async def wait(self) -> None:
        await anyio.sleep(3600 * 24 if self.instance.plan.ready_s is None else self.instance.plan.ready_s)
        for name in self.probes:
            self.probes[name] = Probe(name=name, result=ProbeResult.OK, passed=True, attempts=2)
            self.watcher.probed(self.probes[name])
            await anyio.lowlevel.checkpoint()
        self.instance.ready = True


class LivingChrome:
    def __init__(self, session: Any, url: str) -> None:
        pass

    async def version(self, timeout: float = 5) -> dict[str, Any]:
        return {"Browser": "Chrome"}


class LivingGuest:
    def __init__(self, session: Any, url: str) -> None:
        self.url = url

    async def answers(self, timeout: float) -> None: ...


class NoMemory(Estimates):
    """Boots of this life alone: files would take turns of a clock that is not the loop's."""

    async def load(self) -> None: ...

    async def save(self) -> None: ...


class NoEvidence:
    """Bundles, and each bundle: writing would take turns of a clock that is not the loop's."""

    async def begin(self, episode_id: str, **about: Any) -> NoEvidence:
        return self

    async def about(self, facts: Any) -> None: ...

    async def setup(self, records: Any) -> None: ...

    async def frame(self, number: int, picture: bytes) -> None: ...

    async def guest_log(self, lines: Any) -> None: ...

    async def flushed(self) -> None: ...

    def close(self, **facts: Any) -> None: ...


async def nothing(host: Host) -> None: ...


def wanted(raw: dict[str, Any], **how: Any) -> Reset:
    return Reset(task=parse(raw, Abilities()), **how)


def picture() -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (320, 240)).save(body, "PNG")
    return body.getvalue()


class QueueMachine(RuleBasedStateMachine):
    """Rules act, then let the loop take some turns; the invariants are looked at in between, and at every event."""

    traits: ClassVar[Traits] = Traits(monitor_interval_s=1000)
    clones: ClassVar[bool] = False
    spares: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = Clockwork()
        self.driver = PlannedDriver(self.traits, clones=self.clones)
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(monotonic=self.loop.time, time=lambda: 1e9 + self.loop.time())
        self.patch.setattr(queue, "time", clock)
        self.patch.setattr(fleet, "time", clock)
        self.patch.setattr(spares, "time", clock)
        self.patch.setattr(account, "time", clock)
        # It looks ten times a second, for as many hours as pass, from threads that take turns of another clock.
        self.patch.setattr(Host, "run", nothing)
        self.patch.setattr(queue, "Estimates", NoMemory)
        self.patch.setattr(fleet, "Cdp", LivingChrome)
        self.patch.setattr(fleet, "Guest", LivingGuest)
        self.patch.setattr(fleet, "Readiness", lambda **how: PlannedReadiness(self.driver, **how))
        seen = picture()

        async def look(envs: Envs, guest: Any, **how: Any) -> tuple[bytes, Settled, tuple[int, int]]:
            await asyncio.sleep(0.5)
            return seen, Settled(still=True, seconds=0.5, pictures=2), (320, 240)

        self.patch.setattr(Envs, "at_rest", look)
        self.driver.begins = self.noted(self.boot_begins)
        self.accepted: list[str] = []
        self.broken: list[AssertionError] = []
        self.ends: Counter[str] = Counter()
        self.last: dict[str, Job] = {}
        self.closed = False
        self.run(self.open())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def open(self) -> None:
        chosen = Settings(
            provider="sim",
            state_dir=Path("/nonexistent"),
            envs=ENVS,
            queue_limit=LIMIT,
            ready_timeout=READY_TIMEOUT,
            queue_timeout=2000,
            setup_attempts=SETUP_ATTEMPTS,
            spares=self.spares,
        )
        events = EventLog()
        publish, heard = events.publish, self.noted(self.heard)

        def published(*words: Any, **facts: Any) -> Event:
            event = publish(*words, **facts)
            heard(event)
            return event

        events.publish = published  # type: ignore[method-assign]  # so that each is looked at when it happens
        session = cast(aiohttp.ClientSession, None)
        assets, evaluators = cast(Assets, SimpleNamespace(has_now=bool)), cast(Evaluators, SimpleNamespace(ocr=False))
        bundles = cast(Bundles, NoEvidence())
        self.service = Service(
            chosen, self.driver, MemoryStore(), events, session, assets, bundles, evaluators, "model", Access()
        )
        self.queue, self.fleet, self.envs = self.service.queue, self.service.fleet, self.service.envs
        started = asyncio.Event()
        self.core = asyncio.ensure_future(self.service.run(started.set))
        await started.wait()
        self.tasks_at_rest = len(asyncio.all_tasks())

    # What happens

    @initialize(envs=st.sets(st.integers(0, ENVS - 1)))
    def some_play_already(self, envs: set[int]) -> None:
        for env in envs:
            self.ask(lambda env=env: self.queue.submit(env, wanted({"id": "first"})))  # type: ignore[misc]
            self.run(asyncio.sleep(50))
            assert self.service.env(env).state is EnvState.PLAYING

    @rule(
        env=st.integers(0, ENVS - 1),
        name=st.sampled_from("ab"),
        seconds=st.sampled_from([0.0, 0.0, 7.0, 60.0]),
        patience=st.sampled_from([None, None, 3.0, 30.0]),
    )
    def reset(self, env: int, name: str, seconds: float, patience: float | None) -> None:
        config = [{"type": "sleep", "parameters": {"seconds": seconds}}]
        self.ask(lambda: self.queue.submit(env, wanted({"id": name, "config": config}, queue_timeout_s=patience)))

    @rule()
    def prewarm(self) -> None:
        self.ask(self.queue.submit_prewarm)

    def ask(self, submit: Callable[[], Job]) -> None:
        waiting = self.queue.callers_waiting

        async def asked() -> None:
            try:
                job = submit()
            except Draining:
                assert self.closed
            except QueueFull:
                assert waiting >= LIMIT
            else:
                assert not self.closed
                if job.id not in self.accepted:
                    self.accepted.append(job.id)
                else:
                    assert job.joined > 0
                    assert not job.cancel_requested

        self.run(asked())

    @precondition(lambda self: self.accepted)
    @rule(back=st.integers(1, 6), times=st.integers(1, 2))
    def cancel(self, back: int, times: int) -> None:
        self.cancel_one(self.accepted[-min(back, len(self.accepted))], times)

    @precondition(lambda self: self.queue.booting())
    @rule(number=st.integers(0, 2))
    def cancel_a_boot(self, number: int) -> None:
        booting = self.queue.booting()
        self.cancel_one(booting[number % len(booting)].id, 1)

    @rule(
        plan=PLANS,
        first=st.integers(0, ENVS - 1),
        second=st.integers(0, ENVS - 1),
        turns=st.integers(0, 12),
        seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 25.0, READY_TIMEOUT]),
    )
    def leave_a_boot_to_another(self, plan: Plan, first: int, second: int, turns: int, seconds: float) -> None:
        """Cancel a boot at some moment of its life while another job waits."""
        self.run(asyncio.sleep(500))
        self.driver.plans = [plan]
        self.ask(lambda: self.queue.submit(first, wanted({"id": "first"})))
        self.ask(lambda: self.queue.submit(second, wanted({"id": "second"})))
        self.run(asyncio.sleep(seconds))
        self.turn(turns)
        for job in self.queue.booting()[:1]:
            self.cancel_one(job.id, 1)

    def cancel_one(self, job_id: str, times: int) -> None:
        async def cancelled() -> None:
            for _ in range(times):
                before = self.queue.get(job_id)
                after = self.queue.cancel(job_id)
                assert after == before if before.state.terminal else after.cancel_requested

        self.run(cancelled())

    @precondition(lambda self: self.driver.instances)
    @rule(number=st.integers(0, 5))
    def kill(self, number: int) -> None:
        instances = list(self.driver.instances.values())
        self.loop.call_soon(instances[number % len(instances)].dead.set)

    @rule(plan=PLANS)
    def plan(self, plan: Plan) -> None:
        self.driver.plans.append(plan)

    @precondition(lambda self: self.driver.template)
    @rule()
    def lose_the_template(self) -> None:
        self.driver.template, self.driver.lost_template = False, True

    @rule(turns=st.sampled_from([1, 1, 2, 3, 5, 8, 12]))
    def turn(self, turns: int) -> None:
        async def turned() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turned())

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, 15.0, 100.0, 500.0]))
    def advance(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @precondition(lambda self: len(self.accepted) > 3 and not self.closed)
    @rule(really=st.sampled_from([False] * 9 + [True]))
    def close(self, really: bool) -> None:
        if really:
            self.closed = True

            async def closed() -> None:
                self.queue.close()

            self.run(closed())

    # What must hold

    def noted(self, check: Callable[[T], None]) -> Callable[[T], None]:
        """`check`, called from inside envd: what it finds wrong fails the test, not the job."""

        def checked(fact: T) -> None:
            try:
                check(fact)
            except AssertionError as error:
                self.broken.append(error)

        return checked

    @invariant()
    def nothing_was_found_wrong(self) -> None:
        if self.broken:
            raise self.broken[0]

    def boot_begins(self, begun: tuple[InstanceSpec, ResetPath]) -> None:
        """Invariant 1, restores only as wide as is allowed, and for a provider without room, that the env's old desktop
        is gone."""
        spec, path = begun
        under_way = [one for one in self.driver.instances.values() if not one.ready and one.path is path]
        width = self.traits.boot_width if path is ResetPath.COLD else self.traits.restore_width
        if path is ResetPath.RESTORE and self.driver.lost_template:
            # What was planned as a boot for want of a template may find another's, beside restores planned before.
            width += self.traits.boot_width
        assert len(under_way) < width, f"one {path} too many"
        if not self.traits.make_before_break:
            envs = {job.env for job in self.queue.booting() if job.desktop_id == spec.id and job.env is not None}
            assert not [one for one in self.fleet.desktops() if one.env in envs]

    def heard(self, event: Event) -> None:
        if (job := event.job) is None:
            return
        before = self.last.get(job.id)
        self.last[job.id] = job
        assert before is None or (job.version > before.version and not before.state.terminal), (before, job)
        self.ends[job.id] += event.terminal
        for one, following in zip(job.phases, job.phases[1:], strict=False):
            assert one.seconds is not None
            assert one.started_at + one.seconds == pytest.approx(following.started_at, abs=0.002)
        assert (job.phases[-1].seconds is not None) is job.state.terminal
        tries: list[list[str]] = []
        for phase in job.phases:
            if phase.name == "queue":
                tries.append([])
            tries[-1].append(phase.name)
        assert all(len(set(names)) == len(names) for names in tries), tries
        assert len(tries) <= job.attempts + 1 + self.clones
        assert job.attempts <= SETUP_ATTEMPTS
        assert {probe.name for probe in job.probes} <= {"screenshot", "chrome_cdp"}
        assert (job.error is not None) is (job.state in (JobState.FAILED, JobState.EXPIRED))
        assert job.error is None or job.error.code != "internal_error"
        if event.kind == "state" and job.state is JobState.BOOTING:
            self.first_in_line(before)
        if "inherited" in event.data.get("message", "") and job.desktop_id:
            desktop = self.fleet.get(job.desktop_id)
            assert desktop is not None
            assert desktop.state is DesktopState.BOOTING

    def first_in_line(self, starting: Job | None) -> None:
        """Who starts passes nobody whose env is free."""
        assert starting is not None
        assert starting.position is not None
        for ahead in self.queue.waiting()[: starting.position - 1]:
            assert ahead.env is not None
            assert self.queue.of_env(ahead.env)[0] is not None, (ahead, starting)

    @invariant()
    def the_core_lives(self) -> None:
        if self.core.done():
            self.core.result()
            raise AssertionError("the queue ended by itself")

    @invariant()
    def the_line_is_numbered(self) -> None:
        waiting, booting = self.queue.waiting(), self.queue.booting()
        assert [(job.position, job.ahead) for job in waiting] == [
            (place, place - 1 + len(booting)) for place in range(1, len(waiting) + 1)
        ]
        assert len([job for job in waiting if job.kind is not JobKind.SPARE]) <= LIMIT
        assert len(booting) <= self.traits.boot_width + self.clones * self.traits.restore_width

    @invariant()
    def spares_are_made_behind_everybody_else(self) -> None:
        kinds = [job.kind is JobKind.SPARE for job in self.queue.waiting()]
        assert kinds == sorted(kinds)
        spares = [job for job in self.queue.active() if job.kind is JobKind.SPARE]
        assert len(spares) <= self.spares

    @invariant()
    def an_env_has_one_job_that_runs_and_one_that_waits(self) -> None:
        active = [job for job in self.queue.active() if job.env is not None]
        for waits in (True, False):
            envs = [job.env for job in active if (job.state is JobState.QUEUED) is waits]
            assert len(envs) == len(set(envs))

    @invariant()
    def an_env_agrees_with_its_desktop(self) -> None:
        for env in self.service.all_envs():
            if env.state is EnvState.PLAYING:
                assert env.desktop is not None
                assert env.episode is not None
                assert (env.desktop.state, env.desktop.env) == (DesktopState.IN_USE, env.id)
                assert not env.episode.done
            elif env.state is EnvState.RESETTING:
                assert env.job_id is not None
        for desktop in self.fleet.desktops():
            if desktop.state is DesktopState.IN_USE:
                assert desktop.env is not None
                env = self.service.env(desktop.env)
                assert env.desktop == desktop or env.job_id is not None

    @invariant()
    def every_job_is_kept_and_every_instance_known(self) -> None:
        assert all(self.ends[job_id] == self.queue.get(job_id).state.terminal for job_id in self.accepted)
        assert set(self.driver.instances) <= {desktop.id for desktop in self.fleet.desktops()}

    def teardown(self) -> None:
        try:
            self.driver.plans.clear()
            self.run(self.come_to_rest())
            self.core.cancel()
            self.run(asyncio.wait({self.core}))
            assert set(self.driver.instances) == {desktop.id for desktop in self.fleet.desktops()}
            assert not asyncio.all_tasks(self.loop)
        finally:
            self.patch.undo()
            self.loop.close()

    async def come_to_rest(self) -> None:
        async with asyncio.timeout(20_000):
            await self.queue.idle()
        await asyncio.sleep(2_000)  # as long as four refusals and removals of fifty seconds take
        assert [self.ends[job_id] for job_id in self.accepted] == [1] * len(self.accepted)
        desktops = {desktop.id for desktop in self.fleet.desktops()}
        playing = {env.desktop.id for env in self.service.all_envs() if env.desktop}
        assert desktops == set(self.driver.instances)
        assert not [one for one in self.driver.instances.values() if one.dead.is_set()]
        assert len(desktops) == len(playing) + self.fleet.spares
        assert self.closed or self.fleet.spares >= self.spares
        assert len(asyncio.all_tasks()) - 1 <= self.tasks_at_rest + 4 * len(desktops)
        assert all(env.state is not EnvState.RESETTING for env in self.service.all_envs())
        self.nothing_was_found_wrong()


class WideMachine(QueueMachine):
    traits: ClassVar[Traits] = Traits(boot_width=3, make_before_break=False, monitor_interval_s=1000)


class CloningMachine(QueueMachine):
    traits: ClassVar[Traits] = Traits(restore_width=2, monitor_interval_s=1000)
    clones: ClassVar[bool] = True
    spares: ClassVar[int] = 2


CHOSEN = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)
TestOneBootAtATime = QueueMachine.TestCase
TestOneBootAtATime.settings = CHOSEN
TestRestoresBesideABootAndSpares = CloningMachine.TestCase
TestRestoresBesideABootAndSpares.settings = CHOSEN
TestSeveralBootsWithoutRoomForTheOldDesktop = WideMachine.TestCase
TestSeveralBootsWithoutRoomForTheOldDesktop.settings = CHOSEN
