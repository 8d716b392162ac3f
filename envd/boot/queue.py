"""The boot queue: every reset is a job, one consumer takes them in order, and one boot is in flight on this host.

A restore is no boot: beside the boot as many are in flight as the driver allows. Which of the two a job will be is the
driver's plan when it starts, and what it was is known when its instance is made.

    queued ──▶ booting ──▶ setting_up ──▶ succeeded
       │          │             │
       └──────────┴─────────────┴──▶ failed | cancelled        (superseded, expired: only from queued)

* Per env at most one job runs and one waits. An identical reset joins the one that runs or waits; another one takes
  the place in line of the one that waits, which ends superseded.
* A job belongs to no request: whoever waits for it may leave.
* A boot knows nothing of tasks. When its job is cancelled, the next waiting job inherits it; only without an heir is
  it torn down.
* The slot is free again when the desktop is ready, or when a failed one is confirmed gone; set-up runs outside of it.
* A set-up that failed because a machine did is tried again on a fresh desktop, never on the same: the job goes back to
  the head of the line. So it does, once, when a restored machine did not come up.
* Spares are made by jobs that wait behind all others. A reset that finds none takes over the boot of one.
* A job outlives the daemon. Its next life has those that waited wait again in their order, goes on with the boot of one
  whose instance is still there, and puts the others back to the head of the line.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import anyio
import structlog
from anyio.abc import TaskGroup

from ..drivers.base import Traits
from ..errors import (
    AssetUnavailable,
    BootTimeout,
    Draining,
    EnvdError,
    Fault,
    InfraError,
    InternalError,
    JobExpired,
    QueueFull,
    TooManyRequests,
    UnknownEnv,
    UnknownJob,
)
from ..events import EventLog
from ..models import (
    Counts,
    Desktop,
    DesktopState,
    Job,
    JobKind,
    JobState,
    Phase,
    Probe,
    ResetPath,
    Settled,
    SetupRecord,
)
from ..records import KeptReset
from ..settings import Settings
from ..store import Kind, Store
from ..systemd import Pulse
from ..tasks.task import NO_TASK, Task
from .estimates import Estimates
from .fleet import RESET, Fleet, is_cancelled
from .spares import Spares

logger = structlog.get_logger(__name__)


BEAT = 5.0
"""Seconds between two signs of life of a consumer that has nothing to do."""
RESTARTS = 20
"""Lives of the daemon that a job may have seen end: one that ends each of them must not be taken up for ever."""
TOLD = 300
"""Characters of a set-up step's detail that a job carries: every event about the job carries it too."""


class Stage(Protocol):
    """What resets change: the envs. The queue calls these from its own tasks."""

    def vacate(self, env: int, job: Job) -> str | None:
        """A reset of `env` begins: end its episode. Returns the id of the desktop it had, which is no longer used."""

    async def begin(self, job: Job, reset: Reset, desktop: Desktop, progress: Progress) -> Beginning:
        """Set the task up on the clean desktop and take the first observation."""

    def abandon(self, env: int, job: Job) -> None:
        """The reset ended without an episode."""

    def began(self, job: Job) -> Beginning | None:
        """What came of a job of an earlier life, if it came to its episode."""


class Progress(Protocol):
    """Told how a set-up goes."""

    def phase(self, name: str) -> None: ...

    def setup(self, record: SetupRecord) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Beginning:
    """An episode that can be played. `warnings` are failures in its set-up that tasks rely on being ignored."""

    episode_id: str
    warnings: tuple[str, ...] = ()
    settled: Settled | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """What a caller asked for."""

    task: Task = NO_TASK
    max_steps: int | None = None
    counts: Counts | None = None
    episode_timeout_s: float | None = None
    queue_timeout_s: float | None = None
    owner: str = ""
    """Who asked for it: jobs that wait are counted by it."""

    @property
    def fingerprint(self) -> str:
        """The same for resets that would give the same episode."""
        asked = [self.task.hash, self.max_steps, self.counts, self.episode_timeout_s]
        return json.dumps(asked)


@dataclass(eq=False)
class _Ticket:
    """A job that has not ended, with what is needed to run it."""

    job: Job
    reset: Reset
    expires: float
    phase_began: float
    work: anyio.CancelScope | None = None
    restores_failed: int = 0
    changed: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True)
class _Progress:
    """What a set-up tells of itself, put into its job."""

    queue: BootQueue
    ticket: _Ticket

    def phase(self, name: str) -> None:
        self.queue._enter_phase(self.ticket, name)

    def setup(self, record: SetupRecord) -> None:
        record = record.model_copy(update={"detail": record.detail[:TOLD]})
        records = (*self.ticket.job.setup, record)
        message = f"set-up step {record.index} ({record.type}) {record.outcome} after {record.seconds:.2f} s"
        if record.detail:
            message += f": {record.detail}"
        shown = record.model_dump(mode="json")
        self.queue._update(self.ticket, "setup", {"setup": records}, record=shown, message=message)

    def note(self, message: str) -> None:
        self.queue._update(self.ticket, "progress", {}, message=message)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the queue is. Waits and boots in seconds, 0 where there is none; of those who wait, spares, for which
    nobody waits, have no wait."""

    waiting: Counter[JobKind]
    longest_wait: float
    in_flight: Counter[ResetPath]
    longest_boot: float


class _Boot:
    """One boot in flight, for whichever job it serves now. Tells that job how it goes.

    planned   on which path its driver meant to make the instance when it started
    path      on which path it is, as far as is known
    is_made   the instance exists, so that `path` is what it was
    began     (monotonic) when there was room for it; None before
    old       a desktop that is kept until this boot has made another, or has failed
    resumes   an earlier life of the daemon began it
    """

    def __init__(self, queue: BootQueue, ticket: _Ticket, path: ResetPath) -> None:
        self._queue = queue
        self.ticket = ticket
        self.planned = self.path = path
        self.is_made = False
        self.began: float | None = None
        self.old: str | None = None
        self.desktop_id = ""
        self.resumes = False
        self.scope = anyio.CancelScope()
        self.patience = anyio.CancelScope()
        self.waits_for = ""
        self._phase_name = ""
        self._probes: dict[str, Probe] = {}

    @property
    def job_id(self) -> str:
        return self.ticket.job.id

    @property
    def env(self) -> int | None:
        return self.ticket.job.env

    @property
    def elapsed(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    def phase(self, name: str, desktop_id: str) -> None:
        self.desktop_id, self._phase_name = desktop_id, name
        self._queue._enter_phase(self.ticket, name, desktop_id=desktop_id or None)
        # A driver that has made a template, say, can do more from now on.
        self._queue._stir()

    def made(self, path: ResetPath) -> None:
        self.path, self.is_made = path, True
        self._probes.clear()  # those of the template that it was made from
        self._queue._stir()

    def probed(self, probe: Probe) -> None:
        before = self._probes.get(probe.name)
        self._probes[probe.name] = probe
        # Another try with the same result is no news: it is told with the next progress, and wakes nobody before.
        if before is None or (before.result, before.passed, before.detail) != (
            probe.result,
            probe.passed,
            probe.detail,
        ):
            self._queue._update(self.ticket, "probe", self._tried(), probe=probe.model_dump(mode="json"))

    def note(self, message: str) -> None:
        self._queue._update(self.ticket, "note", {}, message=message)

    def progress(self, message: str) -> None:
        if self.began is None:
            self.waits_for = message
        self._queue._update(self.ticket, "progress", self._tried(), message=message)

    def _tried(self) -> dict[str, Any]:
        return {"probes": tuple(self._probes.values())}

    def pass_on(self, heir: _Ticket) -> None:
        """Serve `heir` from here on, as if the boot had been begun for it."""
        before, self.ticket = self.ticket.job, heir
        self.bound_patience()
        if self._phase_name:
            self._queue._enter_phase(heir, self._phase_name, desktop_id=self.desktop_id or None, **self._tried())
        why = "a job that was cancelled" if before.cancel_requested else "a spare"
        self.note(f"This job inherited a boot that was under way for {why}.")

    def bound_patience(self) -> None:
        """Its job waits for room as long as it would wait in line."""
        self.patience.deadline = anyio.current_time() + self.ticket.expires - time.monotonic()


class BootQueue:
    def __init__(self, settings: Settings, fleet: Fleet, stage: Stage, store: Store, events: EventLog) -> None:
        self._settings = settings
        self._fleet = fleet
        self._stage = stage
        self._store = store
        self._events = events
        self._waiting: list[_Ticket] = []
        self._running: list[_Ticket] = []
        self._boots: list[_Boot] = []
        self._tickets: dict[str, _Ticket] = {}
        self._wake = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._closed = self._held = self._leaving = False
        self.pulse = Pulse(6 * BEAT)
        self.estimates = Estimates(settings.state_dir / "boots.json", fleet.driver.image)
        self._spares = Spares(settings.spares, fleet, self, events)
        self.on_boot: Callable[[str, ResetPath, str, float], None] = lambda job_id, path, outcome, seconds: None
        """Told of the end of each boot and restore: the job that it served then, how the desktop was had or was to be,
        `ready`, `failed` or `cancelled`, and after how many seconds."""
        fleet.on_spares = self._stir
        fleet.on_spare_lost = self._spares.lost

    # -- asking -------------------------------------------------------------------------------------------------

    def submit(self, env: int, reset: Reset) -> Job:
        """Accept a reset of `env`, or join an identical one. Raises QueueFull, TooManyRequests and Draining; changes
        nothing then."""
        return self._submit(JobKind.RESET, env, reset)

    def submit_prewarm(self) -> Job:
        """Have a clean desktop stand by for the next reset; at once done if one does."""
        return self._submit(JobKind.PREWARM, None, Reset())

    def _submit(self, kind: JobKind, env: int | None, reset: Reset) -> Job:
        if self._closed:
            raise Draining("The daemon is shutting down and takes no new work.", retry_after=5)
        mine = [t for t in (*self._running, *self._waiting) if t.job.kind is kind and t.job.env == env]
        for ticket in mine:
            if ticket.reset.fingerprint == reset.fingerprint and not ticket.job.cancel_requested:
                return self._update(ticket, None, {"joined": ticket.job.joined + 1})
        waiting = next((t for t in mine if t in self._waiting), None)
        depth = self.callers_waiting
        if waiting is None and depth >= self._settings.queue_limit:
            raise QueueFull(
                f"{depth} jobs wait already, the limit is ENVD_QUEUE_LIMIT={self._settings.queue_limit}.",
                hint="Try again later.",
                retry_after=self._patience(),
                queue_depth=depth,
            )
        self._require_fewer(reset.owner, besides=waiting)
        patience = reset.queue_timeout_s or self._settings.queue_timeout
        ticket = self._accept(kind, env, reset, patience)
        if waiting is None:
            self._waiting.insert(depth, ticket)
        else:
            # The env keeps its place in line: who changes their mind neither loses a turn nor takes one from others.
            self._waiting[self._waiting.index(waiting)] = ticket
            self._end(waiting, JobState.SUPERSEDED, superseded_by=ticket.job.id)
        self._publish_state(ticket)
        self._renumber()
        self._stir()
        return ticket.job

    def _require_fewer(self, owner: str, besides: _Ticket | None) -> None:
        """Raises TooManyRequests."""
        limit = self._settings.client_jobs
        if not (limit and owner):
            return  # a long line is not looked through for nothing
        mine = sum(1 for ticket in self._waiting if ticket is not besides and ticket.reset.owner == owner)
        if mine >= limit:
            raise TooManyRequests(
                f"{mine} jobs of {owner} wait already, the limit is ENVD_CLIENT_JOBS={limit}.",
                hint="Wait for one of them, or cancel it.",
                retry_after=self._patience(),
                limit=limit,
                setting="ENVD_CLIENT_JOBS",
            )

    def submit_spare(self) -> Job:
        """Have one more clean desktop stand by, once nobody else waits."""
        ticket = self._accept(JobKind.SPARE, None, Reset(), patience=math.inf)
        self._waiting.append(ticket)
        self._publish_state(ticket)
        self._renumber()
        self._stir()
        return ticket.job

    def _accept(self, kind: JobKind, env: int | None, reset: Reset, patience: float) -> _Ticket:
        now, began = time.time(), time.monotonic()
        job = Job(
            id=f"job-{secrets.token_hex(6)}",
            kind=kind,
            env=env,
            created_at=now,
            task_id=reset.task.id,
            phases=(Phase(name="queue", started_at=now),),
        )
        ticket = _Ticket(job, reset, expires=began + patience, phase_began=began)
        self._tickets[job.id] = ticket
        self._store.put_job(job)
        self._keep(ticket)
        return ticket

    def _keep(self, ticket: _Ticket) -> None:
        """What was asked for, so that the next life of the daemon can do it."""
        reset, left = ticket.reset, ticket.expires - time.monotonic()
        kept = KeptReset(
            task=dict(reset.task.raw),
            max_steps=reset.max_steps,
            counts=reset.counts,
            episode_timeout_s=reset.episode_timeout_s,
            queue_timeout_s=reset.queue_timeout_s,
            owner=reset.owner,
            expires_at=time.time() + left if math.isfinite(left) else None,
        )
        self._store.put(Kind.REQUESTS, ticket.job.id, kept)

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end. It is `cancelled` once its instance is confirmed gone or serves another job.

        Repeatable; a job that has ended is answered as it is. Raises UnknownJob.
        """
        ticket = self._tickets.get(job_id)
        if ticket is None or ticket.job.cancel_requested:
            return self.get(job_id)
        self._update(ticket, "note", {"cancel_requested": True}, message="Cancel was asked for.")
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._end(ticket, JobState.CANCELLED)
            self._renumber()
        elif boot := next((b for b in self._boots if b.ticket is ticket), None):
            self._cancel_boot(boot)
        elif ticket.work is not None:
            ticket.work.cancel()
        return ticket.job

    def _cancel_boot(self, boot: _Boot) -> None:
        heir = self._next_eligible(leaving=boot.ticket) if self._can_be_passed_on(boot) else None
        if heir is None:
            boot.scope.cancel()
        else:
            self._pass_on(boot, heir, JobState.CANCELLED)

    def _pass_on(self, boot: _Boot, heir: _Ticket, end: JobState, **facts: Any) -> None:
        leaving = boot.ticket
        self._start(heir)
        boot.pass_on(heir)
        self._end(leaving, end, **facts)
        self._vacate(heir)
        self._renumber()

    def _can_be_passed_on(self, boot: _Boot) -> bool:
        """Nobody wants one that has failed and is being cleared away."""
        desktop = self._fleet.get(boot.desktop_id)
        failed = desktop.state is not DesktopState.BOOTING if desktop else bool(boot.desktop_id)
        return not (failed or boot.scope.cancel_called or boot.patience.cancel_called)

    # -- taking up what an earlier life left ---------------------------------------------------------------------

    async def recover(self, again: Callable[[KeptReset], Reset]) -> None:
        """Take up every job that has not ended. The fleet and the envs have taken up theirs by now.

        `again` makes a reset of what was kept of one; it may raise EnvdError, which then ends the job.
        """
        asked = await self._store.all(Kind.REQUESTS, KeptReset)
        left = [job for job in self._store.jobs() if not job.state.terminal]
        # Those that had their turn come first, then the others in their order.
        left.sort(key=lambda job: (job.position or 0, job.created_at))
        for job in left:
            self._take_up(job, asked.get(job.id), again)
        for job_id in asked.keys() - self._tickets.keys():
            self._store.put(Kind.REQUESTS, job_id, None)
        self._renumber()

    def _take_up(self, job: Job, asked: KeptReset | None, again: Callable[[KeptReset], Reset]) -> None:
        now, began = time.time(), time.monotonic()
        never = asked is None or asked.expires_at is None
        expires = math.inf if never else began + asked.expires_at - now  # type: ignore[union-attr, operator]
        ticket = _Ticket(job, Reset(), expires, phase_began=began - (now - job.phases[-1].started_at))
        self._tickets[job.id] = ticket
        if job.state is not JobState.QUEUED or job.position == 1:
            ticket.job = job = job.model_copy(update={"restarts": job.restarts + 1})
        try:
            if job.env is not None and job.env >= self._settings.envs:
                raise UnknownEnv(
                    f"The daemon was restarted, and has no env {job.env} any more.",
                    hint="Start it with a larger ENVD_ENVS to serve more.",
                    env=job.env,
                )
            if asked is None:
                raise InternalError("What the job was asked for is not in the journal.")
            if job.restarts >= RESTARTS:
                raise InternalError(f"The daemon ended {job.restarts} times while this job ran or was next.")
            ticket.reset = again(asked)
        except EnvdError as error:
            if self._is_booting(job.desktop_id):
                self._fleet.retire(job.desktop_id or "", "its job cannot be taken up")
            self._end(ticket, JobState.FAILED, error=error)
            return
        if job.cancel_requested:
            self._end(ticket, JobState.CANCELLED)
        elif beginning := self._stage.began(job):
            self._end(ticket, JobState.SUCCEEDED, **_as_facts(beginning))
        elif job.state is JobState.BOOTING and self._is_booting(job.desktop_id):
            self._go_on(ticket)
        else:
            self._stand_in_line(ticket)

    def _is_booting(self, desktop_id: str | None) -> bool:
        desktop = self._fleet.get(desktop_id or "")
        return desktop is not None and desktop.state is DesktopState.BOOTING

    def _go_on(self, ticket: _Ticket) -> None:
        """With a boot that is under way."""
        self._running.append(ticket)
        self._boots.append(boot := _Boot(self, ticket, ResetPath.COLD))
        boot.desktop_id, boot.resumes = ticket.job.desktop_id or "", True
        boot.began = time.monotonic() - (time.time() - (ticket.job.started_at or time.time()))
        if ticket.job.env is not None:
            self._stage.vacate(ticket.job.env, ticket.job)
        self._update(ticket, "note", {}, message="The daemon was restarted; the boot goes on.")

    def _stand_in_line(self, ticket: _Ticket) -> None:
        spare = ticket.job.kind is JobKind.SPARE
        self._waiting.insert(len(self._waiting) if spare else self.callers_waiting, ticket)
        if ticket.job.state is JobState.QUEUED:
            self._update(ticket, "note", {}, message="The daemon was restarted; the job waits on.")
            return
        ticket.expires = max(ticket.expires, time.monotonic() + self._settings.queue_timeout)
        self._keep(ticket)
        # What was tried when the daemon ended did not fail.
        tried = max(0, ticket.job.attempts - (ticket.job.state is JobState.SETTING_UP))
        self._update(ticket, "note", {}, message="The daemon was restarted; the job begins again, on a fresh desktop.")
        self._enter_phase(ticket, "queue", state=JobState.QUEUED, desktop_id=None, attempts=tried)

    # -- looking ------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        ticket = self._tickets.get(job_id)
        job = ticket.job if ticket else self._store.get_job(job_id)
        if job is None:
            raise UnknownJob(f"There is no job {job_id}; it never existed or is no longer kept.", job_id=job_id)
        return job if job.state.terminal else job.model_copy(update={"eta_s": self._eta(job)})

    async def changed(self, job_id: str, after: int, timeout: float) -> Job:
        """The job as soon as its version is above `after`, or as it is when `timeout` seconds are over."""
        with anyio.move_on_after(timeout):
            while (ticket := self._tickets.get(job_id)) and ticket.job.version <= after:
                await ticket.changed.wait()
        return self.get(job_id)

    async def ended(self, job_id: str) -> Job:
        """The job, once it has ended."""
        while ticket := self._tickets.get(job_id):
            await ticket.changed.wait()
        return self.get(job_id)

    def booting(self) -> tuple[Job, ...]:
        return tuple(self.get(boot.ticket.job.id) for boot in self._boots)

    def waiting(self) -> tuple[Job, ...]:
        return tuple(self.get(ticket.job.id) for ticket in self._waiting)

    @property
    def callers_waiting(self) -> int:
        """How many jobs wait that somebody asked for: all but those for spares, which are last in line."""
        return next((n for n, t in enumerate(self._waiting) if t.job.kind is JobKind.SPARE), len(self._waiting))

    @property
    def spares_coming(self) -> int:
        return sum(1 for ticket in self._tickets.values() if ticket.job.env is None)

    @property
    def spare_width(self) -> int:
        return 0 if self._closed else self._width(self._fleet.next_path())

    async def stirred(self) -> None:
        await self._wake.wait()

    def load(self) -> Load:
        """Counted, without a look at any job's place or prospects: there may be a thousand."""
        now = time.monotonic()
        began = (ticket.phase_began for ticket in self._waiting if ticket.job.kind is not JobKind.SPARE)
        return Load(
            waiting=Counter(ticket.job.kind for ticket in self._waiting),
            longest_wait=max(0.0, now - min(began, default=now)),
            in_flight=Counter(boot.path for boot in self._boots),
            longest_boot=max((boot.elapsed for boot in self._boots), default=0.0),
        )

    def active(self) -> tuple[Job, ...]:
        return tuple(self.get(job_id) for job_id in self._tickets)

    def of_env(self, env: int) -> tuple[Job | None, Job | None]:
        """The job of `env` that runs, and the one that waits."""
        running = next((t.job for t in self._running if t.job.env == env), None)
        return running, next((t.job for t in self._waiting if t.job.env == env), None)

    def _eta(self, job: Job) -> float | None:
        set_up = self.estimates.set_up()
        if job.state is JobState.SETTING_UP:
            return round(set_up, 1)
        mine = next((b for b in self._boots if b.ticket.job.id == job.id), None)
        if mine is not None:
            rest = self.estimates.rest_of_boot(mine.elapsed, mine.path)
            return None if rest is None else round(rest + set_up, 1)
        path = self._fleet.next_path()
        boot, width = self.estimates.boot(path), self._width(path)
        if boot is None:
            return None
        remaining = [self.estimates.rest_of_boot(b.elapsed, b.path) or 0.0 for b in self._in_flight(path)]
        slot_free = 0.0 if len(remaining) < width else min(remaining)
        turns = math.ceil((job.position or 1) / width)
        return round(slot_free + turns * boot + set_up, 1)

    def _patience(self) -> float:
        """When to ask again, in seconds: about one boot."""
        return max(1.0, self.estimates.boot(self._fleet.next_path()) or 30.0)

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self, started: anyio.Event) -> None:
        """The single consumer. Nothing else starts a boot."""
        await self.estimates.load()
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._expire)
            self._tasks.start_soon(self._spares.run)
            for boot in tuple(self._boots):
                self._tasks.start_soon(self._guard, boot, partial(self._boot, boot))
            started.set()
            while True:
                self.pulse.beat()
                while not self._closed and (ticket := self._next_eligible()) and self._serve(ticket, self._tasks):
                    self._renumber()
                with anyio.move_on_after(BEAT):
                    await self._wake.wait()

    def _serve(self, ticket: _Ticket, tasks: TaskGroup) -> bool:
        """Begin what the job wants, if that can be done now."""
        env, path = ticket.job.env, self._fleet.next_path()
        if env is not None and (spare := self._fleet.take_spare(env)):
            self._start(ticket)
            tasks.start_soon(self._guard, ticket, partial(self._finish, ticket, spare, ResetPath.SPARE))
        elif self._stands_by(ticket):
            self._start(ticket)
            tasks.start_soon(self._guard, ticket, partial(self._finish, ticket, None, ResetPath.SPARE))
        elif env is not None and (boot := self._boot_of_a_spare()):
            self._pass_on(boot, ticket, JobState.SUPERSEDED, superseded_by=ticket.job.id)
        elif len(self._in_flight(path)) < self._width(path) and self._has_room(ticket):
            self._start(ticket)
            self._boots.append(boot := _Boot(self, ticket, path))
            tasks.start_soon(self._guard, boot, partial(self._boot, boot))
        else:
            return False
        return True

    @property
    def _traits(self) -> Traits:
        return self._fleet.driver.traits

    def _width(self, path: ResetPath) -> int:
        return self._traits.restore_width if path is ResetPath.RESTORE else self._traits.boot_width

    def _in_flight(self, path: ResetPath) -> list[_Boot]:
        """Those that hold up a new one on `path`. One that was begun as a boot, and is not made yet although there is
        something to restore by now, is making that and will be restored from it."""
        makes = path is ResetPath.RESTORE
        return [boot for boot in self._boots if boot.path is path or (makes and not boot.is_made)]

    def _boot_of_a_spare(self) -> _Boot | None:
        """The one that will be ready first."""
        return next((b for b in self._boots if b.ticket.job.kind is JobKind.SPARE and self._can_be_passed_on(b)), None)

    def _has_room(self, ticket: _Ticket) -> bool:
        """For a provider without room for two desktops of an env, a spare waits until what is being removed is gone."""
        if ticket.job.kind is not JobKind.SPARE or self._traits.make_before_break:
            return True
        return all(desktop.state is not DesktopState.REMOVING for desktop in self._fleet.desktops())

    def close(self) -> None:
        """Take no new work and cancel what waits, then what runs; `idle` waits for the ends."""
        self._closed = True
        # From the back, so that nobody moves up in a line that is being dissolved: with a thousand waiting, half a
        # million changes of position.
        for ticket in (*reversed(self._waiting), *tuple(self._running)):
            self.cancel(ticket.job.id)

    def hold(self) -> None:
        """Take no new work, and begin none of what waits; what runs goes on."""
        self._closed = self._held = True

    def leave(self) -> None:
        """Take no new work, and leave every job as it is: the next life of the daemon takes them up."""
        self._closed = self._leaving = True

    async def idle(self) -> None:
        """Return when no job is left."""
        while self._tickets:
            await self._wake.wait()

    def _stands_by(self, ticket: _Ticket) -> bool:
        """Whether the clean desktop that the job is to leave behind is there already."""
        wanted = {JobKind.PREWARM: 1, JobKind.SPARE: self._settings.spares}.get(ticket.job.kind, math.inf)
        return self._fleet.spares >= wanted

    def _next_eligible(self, leaving: _Ticket | None = None) -> _Ticket | None:
        """The first in line whose env has no job running, other than the one that is `leaving`."""
        busy = {ticket.job.env for ticket in self._running if ticket.job.env is not None and ticket is not leaving}
        return next((ticket for ticket in self._waiting if ticket.job.env not in busy), None)

    def _start(self, ticket: _Ticket) -> None:
        self._waiting.remove(ticket)
        self._running.append(ticket)
        self._update(
            ticket,
            "state",
            {"state": JobState.BOOTING, "started_at": time.time(), "position": None, "ahead": 0},
        )

    async def _guard(self, holder: _Boot | _Ticket, work: Callable[[], Awaitable[None]]) -> None:
        """The boundary of one job: a mistake in it fails that job alone."""
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            ticket = holder.ticket if isinstance(holder, _Boot) else holder
            logger.exception("a job broke", job_id=ticket.job.id)
            self._end(ticket, JobState.FAILED, error=InternalError(f"The daemon made a mistake: {error!r}"))

    async def _boot(self, boot: _Boot) -> None:
        try:
            desktop, failure = await self._boot_in_slot(boot)
        finally:
            self._boots.remove(boot)
            self._renumber()
            self._stir()
        if desktop is not None:
            self._remember(boot)
            await self._finish(boot.ticket, desktop, boot.path)
        elif failure is not None and boot.resumes and self._may_go_on_without(boot, failure):
            self._line_up_again(boot.ticket, f"The boot did not outlive the daemon: {failure.detail} It begins again.")
        elif failure is not None and self._may_boot_again(boot, failure):
            boot.ticket.restores_failed += 1
            self._line_up_again(boot.ticket, f"A restored machine did not come up: {failure.detail} It is tried again.")
        else:
            self._abandon(boot.ticket, failure)

    async def _boot_in_slot(self, boot: _Boot) -> tuple[Desktop | None, EnvdError | None]:
        """A desktop, or none and why; none and None when the boot was cancelled."""
        desktop: Desktop | None = None
        failure: EnvdError | None = None
        try:
            with boot.scope:
                if boot.resumes:
                    desktop = await self._fleet.resume(boot.desktop_id, boot)
                elif not boot.scope.cancel_called:
                    boot.old = self._vacate(boot.ticket, keep=self._traits.keeps_old)
                    await self._room_for(boot)
                    boot.began = time.monotonic()
                    desktop = await self._fleet.boot(boot, boot.old)
        except EnvdError as error:
            failure = error
        finally:
            if boot.old is not None:
                self._fleet.retire(boot.old, RESET)
            if desktop is None:
                # The slot is held until the instance is confirmed gone: the next boot would share this host with it.
                await self._fleet.gone(boot.desktop_id)
        outcome = "ready" if desktop is not None else "failed" if failure is not None else "cancelled"
        self.on_boot(boot.job_id, boot.path, outcome, boot.elapsed)
        return desktop, failure

    def _remember(self, boot: _Boot) -> None:
        """How long it took, by what is expected of a job that is planned as it was: a restore that became a boot, and a
        boot that first made what it was restored from, took as long as a boot. Of one that an earlier life began nobody
        knows how long it stood still."""
        if boot.resumes:
            return
        both = {boot.planned, boot.path}
        self.estimates.booted(ResetPath.COLD if ResetPath.COLD in both else boot.path, boot.elapsed)
        if self._tasks is not None:
            self._tasks.start_soon(self.estimates.save)

    def _may_go_on_without(self, boot: _Boot, failure: EnvdError) -> bool:
        """What ended with the daemon says nothing against a boot; that its time ran out does."""
        return not isinstance(failure, BootTimeout) and self._may_line_up_again(boot.ticket, failure)

    def _may_boot_again(self, boot: _Boot, failure: EnvdError) -> bool:
        """A machine that was restored and did not come up says nothing against the next one: the driver makes that in
        another way if it has to."""
        restored = boot.is_made and boot.path is ResetPath.RESTORE
        return restored and boot.ticket.restores_failed == 0 and self._may_line_up_again(boot.ticket, failure)

    async def _finish(self, ticket: _Ticket, desktop: Desktop | None, path: ResetPath) -> None:
        """From a clean desktop to the job's end."""
        with structlog.contextvars.bound_contextvars(job_id=ticket.job.id, env=ticket.job.env):
            await self._come_to_its_end(ticket, desktop, path)

    async def _come_to_its_end(self, ticket: _Ticket, desktop: Desktop | None, path: ResetPath) -> None:
        if ticket.job.cancel_requested:
            if desktop is not None:
                self._fleet.retire(desktop.id, "its job was cancelled")
                await self._fleet.gone(desktop.id)
            self._end(ticket, JobState.CANCELLED)
        elif ticket.job.env is None:
            if desktop is not None:
                self._fleet.keep(desktop)
            self._end(ticket, JobState.SUCCEEDED)
        else:
            assert desktop is not None
            await self._play(ticket, desktop, ticket.job.env, path)

    async def _play(self, ticket: _Ticket, desktop: Desktop, env: int, path: ResetPath) -> None:
        if path is ResetPath.SPARE:
            if not await self._is_well(ticket, desktop):
                return
            self._vacate(ticket)
            # Only now: until here the making of the next spare would take processors from handing this one out.
            self._stir()
        began = time.monotonic()
        began_with: Beginning | None = None
        failure: EnvdError | None = None
        try:
            with anyio.CancelScope() as ticket.work:
                try:
                    began_with = await self._set_up(ticket, desktop, env, path)
                except EnvdError as error:
                    failure = error
        finally:
            if began_with is None:
                self._fleet.retire(desktop.id, "its reset failed")
        if began_with is None:
            await self._fleet.gone(desktop.id)
            if failure is not None and self._may_try_again(ticket, failure):
                message = f"Set-up attempt {ticket.job.attempts} failed: {failure.detail}"
                self._line_up_again(ticket, f"{message} It is tried on a fresh desktop.")
            else:
                self._abandon(ticket, failure)
        else:
            self.estimates.was_set_up(time.monotonic() - began)
            self._end(ticket, JobState.SUCCEEDED, **_as_facts(began_with))

    async def _is_well(self, ticket: _Ticket, spare: Desktop) -> bool:
        """Whether the job can have the spare. One that fell ill since it was last looked at is retired, and the job
        stays where it was in line: its env has not been touched."""
        well = False
        with anyio.CancelScope() as ticket.work:
            try:
                if self._fleet.is_parked(spare):
                    await self._fleet.unpark(spare, _Boot(self, ticket, ResetPath.SPARE))
                    well = True
                else:
                    well = await self._fleet.is_well(spare)
            except InfraError as error:
                self._update(ticket, "note", {}, message=f"A spare could not be had: {error.detail}")
        ticket.work = None
        if well and not ticket.job.cancel_requested:
            return True
        self._fleet.retire(spare.id, "its job was cancelled" if well else "it no longer answered when it was wanted")
        if ticket.job.cancel_requested:
            await self._fleet.gone(spare.id)
            self._end(ticket, JobState.CANCELLED)
        else:
            self._back_in_line(ticket)
            self._update(ticket, "state", {"state": JobState.QUEUED})
            self._renumber()
            self._stir()
        return False

    async def _set_up(self, ticket: _Ticket, desktop: Desktop, env: int, path: ResetPath) -> Beginning:
        desktop = self._fleet.assign(desktop, env)
        self._enter_phase(
            ticket,
            "set_up",
            state=JobState.SETTING_UP,
            desktop_id=desktop.id,
            reset_path=path,
            attempts=ticket.job.attempts + 1,
            setup=(),
        )
        return await self._stage.begin(ticket.job, ticket.reset, desktop, _Progress(self, ticket))

    def _may_try_again(self, ticket: _Ticket, failure: EnvdError) -> bool:
        """Whether a fresh desktop may do better. It will not for a task that is wrong, or a file that cannot be had;
        and nobody waits for this job any more once a newer reset of its env is in line."""
        return (
            failure.facts.get("cause") != AssetUnavailable.code
            and ticket.job.attempts < self._settings.setup_attempts
            and self._may_line_up_again(ticket, failure)
        )

    def _may_line_up_again(self, ticket: _Ticket, failure: EnvdError) -> bool:
        return (
            failure.fault is Fault.INFRA
            and failure.retryable
            and not ticket.job.cancel_requested
            and (self._held or not self._closed)
            and all(waiting.job.env != ticket.job.env for waiting in self._waiting)
        )

    def _back_in_line(self, ticket: _Ticket) -> None:
        """To the head of the line; for a spare's job, of those for spares."""
        self._running.remove(ticket)
        self._waiting.insert(self.callers_waiting if ticket.job.kind is JobKind.SPARE else 0, ticket)

    def _line_up_again(self, ticket: _Ticket, why: str) -> None:
        ticket.work = None
        ticket.expires = max(ticket.expires, time.monotonic() + self._settings.queue_timeout)
        self._keep(ticket)
        self._back_in_line(ticket)
        self._update(ticket, "note", {}, message=why)
        self._enter_phase(ticket, "queue", state=JobState.QUEUED, desktop_id=None)
        self._renumber()
        self._stir()

    def _vacate(self, ticket: _Ticket, *, keep: bool = False) -> str | None:
        """Begin to take the env's old desktop away; or, to `keep` it for a while, only return its id."""
        old = self._stage.vacate(ticket.job.env, ticket.job) if ticket.job.env is not None else None
        if old is None or keep:
            return old
        self._fleet.retire(old, RESET)
        return None

    async def _room_for(self, boot: _Boot) -> None:
        """Return when the driver has room for another desktop; for a provider without room for two of an env, also
        when the old ones are gone. Raises JobExpired when the job's patience is at its end before."""
        await self._old_ones_gone(boot)
        boot.bound_patience()
        with boot.patience:
            await self._fleet.admit(boot)
        if boot.patience.cancelled_caught:
            raise JobExpired(_waited(boot.ticket.job, "room"), hint=boot.waits_for)
        # Meanwhile the boot may have been passed on to a job of another env.
        await self._old_ones_gone(boot)

    async def _old_ones_gone(self, boot: _Boot) -> None:
        while not self._traits.make_before_break and (old := self._old_desktop(boot)):
            await self._fleet.gone(old.id)

    def _old_desktop(self, boot: _Boot) -> Desktop | None:
        """One of its env that is being taken away."""
        olds = (desktop for desktop in self._fleet.desktops() if boot.env is not None and desktop.env == boot.env)
        return next((desktop for desktop in olds if desktop.id != boot.old), None)

    def _abandon(self, ticket: _Ticket, failure: EnvdError | None) -> None:
        """End a job that has no desktop: because of `failure`, else because it was cancelled."""
        if failure is not None and not ticket.job.cancel_requested:
            expired = isinstance(failure, JobExpired)
            self._end(ticket, JobState.EXPIRED if expired else JobState.FAILED, error=failure)
        else:
            self._end(ticket, JobState.CANCELLED)

    async def _expire(self) -> None:
        """End jobs that waited too long, whatever the consumer is busy with."""
        while True:
            now = time.monotonic()
            late = [t for t in self._waiting if t.expires <= now]
            self._waiting = [t for t in self._waiting if t not in late]
            for ticket in late:
                self._end(ticket, JobState.EXPIRED, error=JobExpired(_waited(ticket.job, "its turn")))
            if late:
                self._renumber()
            soonest = min((t.expires for t in self._waiting), default=now + 3600)
            with anyio.move_on_after(max(0.0, soonest - now)):
                await self._wake.wait()

    def _stir(self) -> None:
        """Something changed that may let a job run."""
        self._wake.set()
        self._wake = anyio.Event()

    # -- writing ------------------------------------------------------------------------------------------------

    def _update(self, ticket: _Ticket, kind: str | None, changes: dict[str, Any], **data: Any) -> Job:
        """The one place where a running job changes: new version, kept, told to whoever waits, published as `kind`."""
        if ticket.job.state.terminal or self._leaving:
            return ticket.job
        ticket.job = ticket.job.model_copy(update={**changes, "version": ticket.job.version + 1})
        self._store.put_job(ticket.job)
        ticket.changed.set()
        ticket.changed = anyio.Event()
        if kind is not None:
            shown = ticket.job if ticket.job.state.terminal else self.get(ticket.job.id)
            self._events.publish(kind, job=shown, **data)
        return ticket.job

    def _enter_phase(self, ticket: _Ticket, name: str, **changes: Any) -> None:
        self._update(ticket, "phase", {"phase": name, "phases": self._phases(ticket, name), **changes}, phase=name)

    def _phases(self, ticket: _Ticket, name: str | None) -> tuple[Phase, ...]:
        """The phases with the last one closed, and `name` begun."""
        now = time.monotonic()
        *before, last = ticket.job.phases
        if last.seconds is None:
            last = last.model_copy(update={"seconds": round(now - ticket.phase_began, 3)})
        ticket.phase_began = now
        return (*before, last, Phase(name=name, started_at=time.time())) if name else (*before, last)

    def _end(
        self,
        ticket: _Ticket,
        state: JobState,
        *,
        error: EnvdError | None = None,
        **facts: Any,
    ) -> None:
        """Give the job its one end. `facts` are fields of it that are known only now."""
        if ticket.job.state.terminal or self._leaving:
            return
        del self._tickets[ticket.job.id]
        self._store.put(Kind.REQUESTS, ticket.job.id, None)
        ran = ticket in self._running
        if ran:
            self._running.remove(ticket)
        self._update(
            ticket,
            "state",
            {
                "state": state,
                "ended_at": time.time(),
                "position": None,
                "ahead": 0,
                "eta_s": None,
                "phases": self._phases(ticket, None),
                "error": error.problem(f"/v1/jobs/{ticket.job.id}") if error else None,
                **facts,
            },
        )
        if ticket.job.kind is JobKind.SPARE:
            self._spares.ended(ticket.job)
        took_the_env = ran or ticket.job.attempts > 0
        if took_the_env and state is not JobState.SUCCEEDED and ticket.job.env is not None:
            self._stage.abandon(ticket.job.env, ticket.job)
        self._stir()

    def _publish_state(self, ticket: _Ticket) -> None:
        self._events.publish("state", job=self.get(ticket.job.id))

    def _renumber(self) -> None:
        """Tell each waiting job its place, if that changed."""
        for place, ticket in enumerate(self._waiting, start=1):
            ahead = place - 1 + len(self._boots)
            if (ticket.job.position, ticket.job.ahead) != (place, ahead):
                self._update(ticket, "position", {"position": place, "ahead": ahead}, position=place, ahead=ahead)


def _as_facts(beginning: Beginning) -> dict[str, Any]:
    """Of a job."""
    return {name: getattr(beginning, name) for name in ("episode_id", "warnings", "settled")}


def _waited(job: Job, what: str) -> str:
    return f"The job waited {time.time() - job.created_at:.0f} s for {what} and was never booted."
