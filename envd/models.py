"""The nouns of the daemon and their JSON: Job, Desktop, Env, Episode, StepResult, Verdict.

Every model is frozen; a change is `model_copy(update=…)`. Times are Unix seconds (wall clock, for people), durations
are seconds and were measured on the monotonic clock.
"""

from __future__ import annotations

import json
import math
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from .errors import Fault, Problem


class Model(BaseModel):
    """Readers ignore what they do not know, so that an old client can talk to a new server."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


Counts = Literal["actions", "predictions"]


class JobState(StrEnum):
    """Where a job is. The last five are ends; a job has exactly one."""

    QUEUED = "queued"  # waits for its turn to boot
    BOOTING = "booting"  # a desktop is being made for it
    SETTING_UP = "setting_up"  # it has a desktop; the task's set-up runs, then the first observation
    SUCCEEDED = "succeeded"  # a reset: the first observation is there; a prewarm or spare: a clean desktop stands by
    FAILED = "failed"  # `error` says why
    CANCELLED = "cancelled"  # somebody asked for that, and its instance is confirmed gone or serves another job
    SUPERSEDED = "superseded"  # another reset of the same env came while it waited; of a spare: a reset took its boot
    EXPIRED = "expired"  # it waited longer than it was allowed to, and was never booted

    @property
    def terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.BOOTING, JobState.SETTING_UP)


class JobKind(StrEnum):
    RESET = "reset"
    PREWARM = "prewarm"
    SPARE = "spare"  # asked for by the daemon itself, so that ENVD_SPARES desktops stand by


class ResetPath(StrEnum):
    """How the desktop was had."""

    SPARE = "spare"  # already booted
    RESTORE = "restore"  # from a memory snapshot
    COLD = "cold"  # booted for this job


class ProbeResult(StrEnum):
    OK = "ok"
    FAIL = "fail"  # the guest answered, and the answer was not good
    UNKNOWN = "unknown"  # nothing to judge: refused, timed out, or our own mistake


class Phase(Model):
    """One stretch of a job: `queue`, `admit` (where the driver had to wait for room), `create`, `probe`, `set_up`,
    `observe`, and between `create` and `set_up` what the driver tells of (`template`, `firmware`, `kernel`, `display`,
    …). `seconds` is None while it lasts."""

    name: str
    started_at: float
    seconds: float | None = None


class Probe(Model):
    """The record of one readiness probe: `screenshot` or `chrome_cdp`."""

    name: str
    result: ProbeResult = ProbeResult.UNKNOWN
    passed: bool = False
    detail: str = "not tried yet"
    attempts: int = 0
    seconds: float | None = None
    """From the start of the boot until the probe passed."""


class SetupOutcome(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it failed in a way that tasks rely on being ignored; `detail` says how
    FAILED = "failed"


class SetupRecord(Model):
    """What became of one step of a task's set-up or post-configuration. `index` counts from 0."""

    index: int
    type: str
    outcome: SetupOutcome
    seconds: float
    detail: str = ""
    """The guest's own words where it has any; cut to 2,000 characters."""


class Settled(Model):
    """How the screen came to rest before a picture that counts. `still` is False when the limit ran out first."""

    still: bool
    seconds: float
    pictures: int


class Job(Model):
    """A reset, prewarm or spare from being accepted to its end. `version` grows with every change and is the ETag."""

    id: str
    kind: JobKind = JobKind.RESET
    env: int | None
    state: JobState = JobState.QUEUED
    version: int = 1
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    task_id: str | None = None
    position: int | None = None
    """1 is next; None once it no longer waits."""
    ahead: int = 0
    """Jobs before this one, the one that is booting included."""
    eta_s: float | None = None
    """Expected seconds until this job ends, from earlier boots of the same kind; None while there were none."""
    phase: str = "queue"
    phases: tuple[Phase, ...] = ()
    probes: tuple[Probe, ...] = ()
    reset_path: ResetPath | None = None
    desktop_id: str | None = None
    episode_id: str | None = None
    joined: int = 0
    """How many identical resets joined this one instead of making a job of their own."""
    restarts: int = 0
    """How often the daemon ended while it ran or was next."""
    cancel_requested: bool = False
    superseded_by: str | None = None
    """The job that took this one's place."""
    attempts: int = 0
    """Desktops that the task's set-up was tried on."""
    setup: tuple[SetupRecord, ...] = ()
    """The set-up on the last of them, as far as it came."""
    settled: Settled | None = None
    warnings: tuple[str, ...] = ()
    error: Problem | None = None

    @property
    def links(self) -> dict[str, str]:
        return {
            "self": f"/v1/jobs/{self.id}",
            "events": f"/v1/jobs/{self.id}/events",
            "cancel": f"/v1/jobs/{self.id}/cancel",
        }


class Endpoints(Model):
    """Where a desktop is reached from this host: base URLs without a trailing slash."""

    guest: str
    cdp: str
    vnc: str | None = None
    vlc: str | None = None


class DesktopState(StrEnum):
    BOOTING = "booting"
    READY = "ready"  # clean, waits for a job
    IN_USE = "in_use"
    LOST = "lost"  # died by itself
    REMOVING = "removing"


class Desktop(Model):
    """A machine of ours. Its id was chosen before it was created and is also the provider's name for it."""

    id: str
    provider: str
    state: DesktopState
    endpoints: Endpoints | None = None
    created_at: float
    ready_at: float | None = None
    env: int | None = None
    chrome_cdp: bool | None = None
    """Whether CDP answered when last looked at; None before readiness."""


class EnvState(StrEnum):
    EMPTY = "empty"  # never reset, or its last reset failed
    RESETTING = "resetting"
    PLAYING = "playing"  # has an episode
    LOST = "lost"  # its desktop died; a reset gives it a new one


class LeaseState(StrEnum):
    WAITING = "waiting"  # for its turn, and for enough envs at once
    HELD = "held"
    ENDED = "ended"


class LeaseEnd(StrEnum):
    RELEASED = "released"  # whoever had it gave it back, or left before being told of it
    EXPIRED = "expired"  # it was neither used nor renewed for its ttl


class LeaseView(Model):
    """A held lease as everybody may see it. `id` is cut short: whoever knows all of it may use the lease."""

    id: str
    owner: str
    expires_at: float


class Taken(Model):
    """Why a lease that waits cannot have an env."""

    env: int
    by: Literal["lease", "episode", "job", "call"]
    """Another lease, an episode that is played without one, a reset, or a call that is in the middle."""
    since: float | None = None
    detail: str
    """In words, with what frees the env."""


class Lease(Model):
    """So many envs for one owner, all or none. Its id is what the holder's calls carry, in the header `X-Lease`."""

    id: str
    owner: str
    count: int
    envs: tuple[int, ...] = ()
    """Empty while it waits; of one that has ended, those it had."""
    state: LeaseState = LeaseState.WAITING
    version: int = 1
    """Grows with every change but a renewal."""
    created_at: float
    ttl_s: float
    expires_at: float
    """Unless it is used or renewed before. One that waits is renewed by asking about it, too."""
    position: int | None = None
    """1 is next; None once it no longer waits."""
    turn: int = 0
    """While it waits, how many leases had been granted when it was asked for; then, the how many-th it was."""
    end_reason: LeaseEnd | None = None
    ended_at: float | None = None
    leaving: tuple[int, ...] = ()
    """Of one that has ended, the envs whose jobs and calls are still being ended; nobody has them yet."""
    waits_for: tuple[Taken, ...] = ()
    """While it waits, the envs that are taken, and by what, as of this answer."""

    @property
    def links(self) -> dict[str, str]:
        return {"self": f"/v1/leases/{self.id}", "renew": f"/v1/leases/{self.id}/renew"}

    @property
    def view(self) -> LeaseView:
        return LeaseView(id=self.short_id, owner=self.owner, expires_at=self.expires_at)

    @property
    def short_id(self) -> str:
        return self.id[:10]


class Env(Model):
    id: int
    state: EnvState
    job_id: str | None = None
    waiting_job_id: str | None = None
    desktop: Desktop | None = None
    episode: Episode | None = None
    lease: LeaseView | None = None
    detail: str = ""


class EndReason(StrEnum):
    DONE = "done"  # the model said finished
    FAIL = "fail"  # the model gave up: call_user, error_env, FAIL
    MAX_STEPS = "max_steps"
    DEADLINE = "deadline"  # the episode's time ran out
    EVALUATED = "evaluated"  # it was evaluated before it had ended by itself
    UNPARSABLE = "unparsable"  # the prediction was not in the grammar
    LOST = "lost"  # the desktop died
    REPLACED = "replaced"  # another reset of the env began
    LEASE_OVER = "lease_over"  # the lease under which it was played ended


class Episode(Model):
    """From one reset of an env to its next. `actions` counts what ran in the guest, `steps` the calls."""

    id: str
    env: int
    desktop_id: str
    task_id: str | None = None
    instruction: str = ""
    started_at: float
    steps: int = 0
    actions: int = 0
    max_steps: int
    counts: Counts = "actions"
    """What `max_steps` limits."""
    deadline_at: float | None = None
    done: bool = False
    end_reason: EndReason | None = None
    screen: tuple[int, int]
    reset_path: ResetPath


class VerdictStatus(StrEnum):
    SCORED = "scored"  # the task's own evaluator returned a number
    INFRA_ERROR = "infra_error"  # the desktop, its guest or a download failed
    EVALUATOR_ERROR = "evaluator_error"  # a getter or a metric raised, was killed or overran
    TASK_ERROR = "task_error"  # the task's own post-configuration or evaluator cannot work as written
    NOT_EVALUABLE = "not_evaluable"  # the task has no evaluator, or this daemon lacks what it takes
    CANCELLED = "cancelled"  # a reset, or the end of a lease, took the desktop away
    EXPIRED = "expired"  # the evaluation's own time ran out


class MetricRecord(Model):
    """One metric of an evaluator. `result` and `expected` are what the getters gave, as JSON (files by their name in
    the bundle); `value` is what the metric returned."""

    index: int
    func: str
    result: Any = None
    expected: Any = None
    options: dict[str, Any] = {}
    value: Any = None
    seconds: dict[str, float] = {}
    traceback: str = ""


class Provenance(Model):
    """What a verdict rests on."""

    server_version: str
    provider: str
    image: str
    """What the desktop was made of, as its driver names it."""
    task_hash: str
    """sha256 of the task as canonical JSON (sorted keys, no blanks, UTF-8)."""
    evaluator_version: str = ""
    screen: tuple[int, int]
    steps: int
    actions: int
    end_reason: EndReason | None
    reset_path: ResetPath
    reset_seconds: dict[str, float] = {}
    """Phase of the reset → seconds."""
    attempts: int = 1


class Verdict(Model):
    """How an episode ended: a score that its task's evaluator really returned, or no number and why.

    `mask` tells a trainer to leave the episode out; it is true of everything that is not `scored`.
    """

    episode_id: str
    env: int
    task_id: str | None = None
    status: VerdictStatus
    score: float | None = None
    raw: tuple[Any, ...] | None = None
    """What each metric returned, in order, before it became one number; None where one was not needed."""
    mask: bool
    fault: Fault | None = None
    code: str | None = None
    detail: str = ""
    """Why there is no score; of a score, by which rule it is one without an evaluator."""
    hint: str = ""
    metrics: tuple[MetricRecord, ...] = ()
    postconfig: tuple[SetupRecord, ...] = ()
    settled: Settled | None = None
    warnings: tuple[str, ...] = ()
    """Of the reset and of the evaluation."""
    provenance: Provenance
    evaluated_at: float
    seconds: dict[str, float] = {}
    """Where the time went: postconfig, settle, prepare (what was waited for: files, the evaluators' imports), getters,
    metrics, overhead (of the evaluator's processes), total."""

    @model_validator(mode="after")
    def _a_number_only_if_scored(self) -> Self:
        scored = self.status is VerdictStatus.SCORED
        if scored != (self.score is not None) or scored == self.mask or scored != (self.code is None):
            raise ValueError(f"a verdict that is {self.status} with score {self.score}, code {self.code}")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score must be finite, not {self.score}")
        return self

    @property
    def links(self) -> dict[str, str]:
        return {"bundle": f"/v1/episodes/{self.episode_id}/bundle"}


class ActionOutcome(StrEnum):
    OK = "ok"
    FAILED = "failed"  # the guest ran it and it ended non-zero
    UNKNOWN = "unknown"  # the answer was lost; it was not sent again
    SPECIAL = "special"  # DONE, WAIT, FAIL: nothing ran in the guest


Way = Literal["guest", "host"]
"""guest: by the server inside the desktop. host: from outside, at the machine's own screen, keyboard and pointer."""


class ActionResult(Model):
    """What became of one program. `stdout` and `stderr` are cut to 4,000 characters."""

    action: str
    outcome: ActionOutcome
    via: Way | None = None
    """None when nothing was done (DONE, WAIT, FAIL)."""
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float


class StepResult(Model):
    env: int
    episode_id: str
    step: int
    """1 for the first step of the episode."""
    done: bool
    end_reason: EndReason | None = None
    format_reward: float
    """0.0 for a prediction that parses, -1.0 for one that does not. Nothing that fails elsewhere changes it."""
    actions: tuple[ActionResult, ...]
    problem: str = ""
    """Why the prediction did not parse."""
    seconds: dict[str, float] = {}
    screenshot_via: Way | None = None
    screenshot: str | None = None
    """base64 of a PNG; None when `include_screenshot` was false."""


class ResetRequest(BaseModel):
    """Body of `POST /v1/envs/{env}/reset`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: dict[str, Any] = Field(
        default_factory=dict, description="An OSWorld task: id, instruction, config, evaluator, …"
    )
    max_steps: int | None = Field(default=None, ge=1, le=10_000)
    counts: Counts | None = Field(default=None, description="What max_steps limits; default ENVD_COUNTS.")
    episode_timeout_s: float | None = Field(
        default=None, gt=0, le=604_800, description="No step begins later than this after the first observation."
    )
    screen: tuple[int, int] | None = Field(
        default=None, description="Width and height in pixels that the caller counts on; the daemon's own, or 422."
    )
    queue_timeout_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Expire instead of booting after so long a wait."
    )


class LeaseRequest(BaseModel):
    """Body of `POST /v1/leases`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=1, ge=1, description="Envs, all or none; at most as many as there are.")
    ttl_s: float = Field(default=300, ge=10, le=86_400, description="The lease ends when it is not used for so long.")
    wait_s: float = Field(
        default=0, ge=0, le=3600, description="How long the answer may wait for the grant. The lease waits on after it."
    )
    owner: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        pattern=r"^[\w.@:-]+$",
        description="For whom it is, where no token says that; default the caller's address.",
    )


class LinkRequest(BaseModel):
    """Body of `POST /v1/links`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        pattern=r"^/([0-9A-Za-z_.~-][0-9A-Za-z_.~/-]*)?$",
        max_length=500,
        description="What is to be read, without a query; what ends in / with all that is below it.",
    )
    seconds: float = Field(default=300, gt=0, le=3600, description="How long the link is good.")


class DrainRequest(BaseModel):
    """Body of `POST /v1/drain`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit_s: float | None = Field(
        default=None, ge=0, le=604_800, description="How long episodes may go on; default ENVD_DRAIN_LIMIT."
    )


class StepRequest(BaseModel):
    """Body of `POST /v1/envs/{env}/step`: exactly one of `prediction` (the model's text) and `actions` (pyautogui
    programs, or DONE, WAIT, FAIL)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prediction: str | None = None
    actions: list[Annotated[str, StringConstraints(min_length=1, max_length=65_536)]] | None = Field(
        default=None, min_length=1, max_length=64
    )
    pause_s: float | None = Field(
        default=None, ge=0, le=60, description="Wait after each action; default ENVD_ACTION_PAUSE."
    )
    include_screenshot: bool = True
    step: int | None = Field(
        default=None,
        ge=1,
        description="Its number in the episode, from 1. Sent again it is answered as it was; out of order refused.",
    )


class Event(Model):
    """One thing that happened. `id` is "<epoch>-<sequence>": the epoch is new when the sequence starts again.

    Kinds: state, position, phase, probe, progress, setup, note, desktop, step, episode, verdict, lease; and, on
    streams only, snapshot, gap, server-shutdown, and for who asks for them env and stats. An event about a job carries
    the whole job as it then was, so a watcher replaces what it has.
    """

    id: str
    kind: str
    at: float
    job_id: str | None = None
    env: int | None = None
    desktop_id: str | None = None
    job: Job | None = None
    data: dict[str, Any] = {}
    request_id: str | None = None
    """Of the request that caused it; None where it came of itself, or of a job that goes on by itself."""

    @property
    def sequence(self) -> int:
        """How many events there were before it in its epoch, and 1."""
        return int(self.id.rpartition("-")[2])

    @property
    def terminal(self) -> bool:
        """Whether this is the last event of its job."""
        return self.kind == "state" and self.job is not None and self.job.state.terminal

    @cached_property
    def encoded(self) -> bytes:
        """Its JSON, made once for all who are sent it. Half a character, which a guest may say, becomes a question
        mark."""
        try:
            return self.model_dump_json().encode()
        except ValueError:
            return json.dumps(self.model_dump(), default=str, ensure_ascii=False).encode(errors="replace")


Env.model_rebuild()
