"""The boot queue: every reset is a job, one consumer takes them in order, and one boot is in flight on this host.

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
  the head of the line.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import anyio
import structlog
from anyio.abc import TaskGroup

from ..drivers.base import Traits
from ..errors import AssetUnavailable, Draining, EnvdError, Fault, InternalError, JobExpired, QueueFull, UnknownJob
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
from ..settings import Settings
from ..store import Store
from ..tasks.task import NO_TASK, Task
from .estimates import Estimates
from .fleet import Fleet, is_cancelled

logger = structlog.get_logger(__name__)


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


class _Boot:
    """One boot in flight, for whichever job it serves now. Tells that job how it goes."""

    def __init__(self, queue: BootQueue, ticket: _Ticket) -> None:
        self._queue = queue
        self.ticket = ticket
        self.job_id = ticket.job.id
        self.began = time.monotonic()
        self.desktop_id = ""
        self.scope = anyio.CancelScope()
        self._phase_name = "create"
        self._probes: dict[str, Probe] = {}

    def phase(self, name: str, desktop_id: str) -> None:
        self.desktop_id, self._phase_name = desktop_id, name
        self._queue._enter_phase(self.ticket, name, desktop_id=desktop_id)

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
        self._queue._update(self.ticket, "progress", self._tried(), message=message)

    def _tried(self) -> dict[str, Any]:
        return {"probes": tuple(self._probes.values())}

    def pass_on(self, heir: _Ticket) -> None:
        """Serve `heir` from here on, as if the boot had been begun for it."""
        self.ticket = heir
        if self.desktop_id:
            self._queue._enter_phase(heir, self._phase_name, desktop_id=self.desktop_id, **self._tried())
        self.note("This job inherited a boot that was under way for a job that was cancelled.")


class BootQueue:
    def __init__(self, settings: Settings, fleet: Fleet, stage: Stage, store: Store, events: EventLog) -> None:
        self._settings = settings
        self._traits: Traits = fleet.driver.traits
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
        self._closed = False
        self.estimates = Estimates()
        fleet.on_spare = self._stir

    # -- asking -------------------------------------------------------------------------------------------------

    def submit(self, env: int, reset: Reset) -> Job:
        """Accept a reset of `env`, or join an identical one. Raises QueueFull and Draining; changes nothing then."""
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
        if waiting is None and len(self._waiting) >= self._settings.queue_limit:
            raise QueueFull(
                f"{len(self._waiting)} jobs wait already, the limit is ENVD_QUEUE_LIMIT={self._settings.queue_limit}.",
                hint="Try again later.",
                retry_after=self._patience(),
                queue_depth=len(self._waiting),
            )
        ticket = self._accept(kind, env, reset)
        if waiting is None:
            self._waiting.append(ticket)
        else:
            # The env keeps its place in line: who changes their mind neither loses a turn nor takes one from others.
            self._waiting[self._waiting.index(waiting)] = ticket
            self._end(waiting, JobState.SUPERSEDED, superseded_by=ticket.job.id)
        self._publish_state(ticket)
        self._renumber()
        self._stir()
        return ticket.job

    def _accept(self, kind: JobKind, env: int | None, reset: Reset) -> _Ticket:
        now, began = time.time(), time.monotonic()
        job = Job(
            id=f"job-{secrets.token_hex(6)}",
            kind=kind,
            env=env,
            created_at=now,
            task_id=reset.task.id,
            phases=(Phase(name="queue", started_at=now),),
        )
        patience = reset.queue_timeout_s or self._settings.queue_timeout
        ticket = _Ticket(job, reset, expires=began + patience, phase_began=began)
        self._tickets[job.id] = ticket
        self._store.put_job(job)
        return ticket

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
        ticket, heir = boot.ticket, self._heir_of(boot)
        if heir is None:
            boot.scope.cancel()
            return
        self._start(heir)
        boot.pass_on(heir)
        self._end(ticket, JobState.CANCELLED)
        self._vacate(heir)
        self._renumber()

    def _heir_of(self, boot: _Boot) -> _Ticket | None:
        """Who takes the boot over; nobody wants one that has failed and is being cleared away."""
        if boot.desktop_id:
            desktop = self._fleet.get(boot.desktop_id)
            if desktop is None or desktop.state is not DesktopState.BOOTING:
                return None
        return self._next_eligible(leaving=boot.ticket)

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

    def active(self) -> tuple[Job, ...]:
        return tuple(self.get(job_id) for job_id in self._tickets)

    def of_env(self, env: int) -> tuple[Job | None, Job | None]:
        """The job of `env` that runs, and the one that waits."""
        running = next((t.job for t in self._running if t.job.env == env), None)
        return running, next((t.job for t in self._waiting if t.job.env == env), None)

    def _eta(self, job: Job) -> float | None:
        boot, set_up = self.estimates.boot(), self.estimates.set_up()
        if job.state is JobState.SETTING_UP:
            return round(set_up, 1)
        if boot is None:
            return None
        if job.state is JobState.BOOTING:
            mine = next((b for b in self._boots if b.ticket.job.id == job.id), None)
            rest = self.estimates.rest_of_boot(time.monotonic() - mine.began) if mine else 0.0
            return round((rest or 0.0) + set_up, 1)
        remaining = [self.estimates.rest_of_boot(time.monotonic() - b.began) or 0.0 for b in self._boots]
        slot_free = 0.0 if len(remaining) < self._traits.boot_width else min(remaining)
        turns = math.ceil((job.position or 1) / self._traits.boot_width)
        return round(slot_free + turns * boot + set_up, 1)

    def _patience(self) -> float:
        """When to ask again, in seconds: about one boot."""
        return max(1.0, self.estimates.boot() or 30.0)

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self, started: anyio.Event) -> None:
        """The single consumer. Nothing else starts a boot."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._expire)
            started.set()
            while True:
                ticket, desktop = await self._next()
                self._start(ticket)
                if desktop is not None or self._stands_by(ticket):
                    work = partial(self._finish, ticket, desktop, ResetPath.SPARE)
                    self._tasks.start_soon(self._guard, ticket, work)
                else:
                    boot = _Boot(self, ticket)
                    self._boots.append(boot)
                    self._tasks.start_soon(self._guard, boot, partial(self._boot, boot))
                self._renumber()

    def close(self) -> None:
        """Take no new work and cancel what waits, then what runs; `idle` waits for the ends."""
        self._closed = True
        # From the back, so that nobody moves up in a line that is being dissolved: with a thousand waiting, half a
        # million changes of position.
        for ticket in (*reversed(self._waiting), *tuple(self._running)):
            self.cancel(ticket.job.id)

    async def idle(self) -> None:
        """Return when no job is left."""
        while self._tickets:
            await self._wake.wait()

    async def _next(self) -> tuple[_Ticket, Desktop | None]:
        """The next job that may run, with a spare if there is one for it; waits until there is such a job."""
        while True:
            ticket = self._next_eligible()
            if ticket is not None:
                if ticket.job.env is not None and (spare := self._fleet.take_spare(ticket.job.env)):
                    return ticket, spare
                if len(self._boots) < self._traits.boot_width or self._stands_by(ticket):
                    return ticket, None
            await self._wake.wait()

    def _stands_by(self, ticket: _Ticket) -> bool:
        """Whether what a prewarm asks for is there already."""
        return ticket.job.kind is JobKind.PREWARM and self._fleet.spares > 0

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
        if desktop is None:
            self._abandon(boot.ticket, failure)
        else:
            self.estimates.booted(ResetPath.COLD, time.monotonic() - boot.began)
            await self._finish(boot.ticket, desktop, ResetPath.COLD)

    async def _boot_in_slot(self, boot: _Boot) -> tuple[Desktop | None, EnvdError | None]:
        """A desktop, or none and why; none and None when the boot was cancelled."""
        desktop: Desktop | None = None
        failure: EnvdError | None = None
        try:
            with boot.scope:
                if not boot.scope.cancel_called:
                    self._vacate(boot.ticket)
                    await self._room_for(boot)
                    desktop = await self._fleet.boot(boot)
        except EnvdError as error:
            failure = error
        finally:
            if desktop is None:
                # The slot is held until the instance is confirmed gone: the next boot would share this host with it.
                await self._fleet.gone(boot.desktop_id)
        return desktop, failure

    async def _finish(self, ticket: _Ticket, desktop: Desktop | None, path: ResetPath) -> None:
        """From a clean desktop to the job's end."""
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
            self._vacate(ticket)
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
                self._line_up_again(ticket, failure)
            else:
                self._abandon(ticket, failure)
        else:
            self.estimates.was_set_up(time.monotonic() - began)
            self._end(
                ticket,
                JobState.SUCCEEDED,
                episode_id=began_with.episode_id,
                warnings=began_with.warnings,
                settled=began_with.settled,
            )

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
            failure.fault is Fault.INFRA
            and failure.retryable
            and failure.facts.get("cause") != AssetUnavailable.code
            and ticket.job.attempts < self._settings.setup_attempts
            and not ticket.job.cancel_requested
            and not self._closed
            and all(waiting.job.env != ticket.job.env for waiting in self._waiting)
        )

    def _line_up_again(self, ticket: _Ticket, failure: EnvdError) -> None:
        ticket.work = None
        ticket.expires = time.monotonic() + self._settings.queue_timeout
        self._running.remove(ticket)
        self._waiting.insert(0, ticket)
        message = f"Set-up attempt {ticket.job.attempts} failed: {failure.detail} It is tried on a fresh desktop."
        self._update(ticket, "note", {}, message=message)
        self._enter_phase(ticket, "queue", state=JobState.QUEUED, desktop_id=None)
        self._renumber()
        self._stir()

    def _vacate(self, ticket: _Ticket) -> None:
        """Begin to take the env's old desktop away."""
        if ticket.job.env is not None and (old := self._stage.vacate(ticket.job.env, ticket.job)):
            self._fleet.retire(old, "its env was reset")

    async def _room_for(self, boot: _Boot) -> None:
        """For a provider without room for two desktops of an env: return when its old ones are gone."""
        while not self._traits.make_before_break and (old := self._old_desktop(boot.ticket.job.env)):
            await self._fleet.gone(old.id)

    def _old_desktop(self, env: int | None) -> Desktop | None:
        return next((desktop for desktop in self._fleet.desktops() if env is not None and desktop.env == env), None)

    def _abandon(self, ticket: _Ticket, failure: EnvdError | None) -> None:
        """End a job that has no desktop: because of `failure`, else because it was cancelled."""
        if failure is not None and not ticket.job.cancel_requested:
            self._end(ticket, JobState.FAILED, error=failure)
        else:
            self._end(ticket, JobState.CANCELLED)

    async def _expire(self) -> None:
        """End jobs that waited too long, whatever the consumer is busy with."""
        while True:
            now = time.monotonic()
            late = [t for t in self._waiting if t.expires <= now]
            self._waiting = [t for t in self._waiting if t not in late]
            for ticket in late:
                waited = time.time() - ticket.job.created_at
                error = JobExpired(f"The job waited {waited:.0f} s for its turn and was never booted.")
                self._end(ticket, JobState.EXPIRED, error=error)
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
        if ticket.job.state.terminal:
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
        if ticket.job.state.terminal:
            return
        del self._tickets[ticket.job.id]
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
