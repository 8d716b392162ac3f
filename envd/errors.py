"""The one error tree: class ↔ stable code ↔ HTTP status ↔ whose fault.

    EnvdError
    ├── StartError            the daemon cannot start: bad settings, port taken, second daemon, missing package
    ├── RequestError          the caller must change something            fault: client
    │   └── MalformedJson, InvalidRequest, BodyTooLarge, BodyTooSlow, NotFound, MethodNotAllowed, Unauthorized,
    │       Forbidden, MisdirectedRequest, TooManyRequests, UnknownEnv, UnknownJob, NoEpisode, NoVnc, EpisodeOver,
    │       EnvBusy, JobCancelled, JobSuperseded, EvaluationCancelled, KeyReused, StepRepeated, StepGap, Leased,
    │       LeaseOver
    ├── CapacityError         nobody can be served just now               fault: capacity
    │   └── QueueFull, Draining, StillBooting, JobExpired, TooManyWatchers, DiskLow, DeadlinePassed,
    │       LeaseUnavailable
    ├── InfraError            a machine or a library failed               fault: infra
    │   ├── BootFailed, BootTimeout, InstanceDied, DesktopLost, GuestUnreachable, GuestMisbehaved, ServerUnreachable,
    │   │   AssetUnavailable, EvaluatorError, EvaluationExpired, EvaluationInterrupted, InternalError
    │   ├── (of BootFailed) DockerUnavailable, ImageMissing, DiskUnusable, PortConflict, NoSpace, OutOfMemory
    │   └── (of BootFailed) CloudRefused: NoCredentials, CredentialsExpired, NotAuthorized, AmiUnavailable,
    │       NetworkUnusable, InsufficientCapacity, QuotaExceeded, Throttled, CloudUnreachable, TtlUnavailable,
    │       BudgetExhausted
    └── TaskError             the task file cannot be run as it is        fault: task
        └── TaskInvalid, MissingRequirement, SetupFailed, EvaluationInvalid, NotEvaluable

An error travels as `application/problem+json` (RFC 9457): `Problem` below. The code crosses the wire, the class path
never does; `from_problem` gives the client the class back.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Fault(StrEnum):
    """Whose doing a failure was. A trainer masks all but `agent`."""

    INFRA = "infra"
    CAPACITY = "capacity"
    TASK = "task"
    AGENT = "agent"
    CLIENT = "client"


class Problem(BaseModel):
    """An error as it is sent, and as it is kept in a failed job. Extra members carry the facts of the occurrence."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    fault: Fault
    retryable: bool
    hint: str = ""
    instance: str | None = None
    retry_after: float | None = None


class EnvdError(Exception):
    """What happened (`detail`), what to do (`hint`), and the facts, as attributes and on the wire.

    `retry_after` is in seconds. Facts must be JSON values, and none is named like a field of `Problem`.
    """

    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Error"
    status: int = 500
    fault: Fault = Fault.INFRA
    retryable: bool = False

    def __init__(self, detail: str, *, hint: str = "", retry_after: float | None = None, **facts: Any) -> None:
        assert not facts.keys() & Problem.model_fields.keys(), facts
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.retry_after = retry_after
        self.facts = facts

    def problem(self, instance: str | None = None) -> Problem:
        return Problem(
            type=f"/errors#{self.code}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            fault=self.fault,
            retryable=self.retryable,
            hint=self.hint,
            instance=instance,
            retry_after=self.retry_after,
            **self.facts,
        )

    def __str__(self) -> str:
        between = " " if self.detail.endswith((".", "?", "!", "…")) else ". "
        return f"{self.detail}{between}{self.hint}" if self.hint else self.detail


class StartError(EnvdError):
    """The daemon cannot start. `exit_code` follows sysexits: 78 configuration, 75 try later, 69 something missing."""

    code = "cannot_start"
    title = "The daemon cannot start"
    exit_code: ClassVar[int] = 78


class SettingsError(StartError):
    code = "bad_settings"
    title = "A setting cannot be used"


class AddressInUse(StartError):
    code = "address_in_use"
    title = "The port is taken"
    exit_code = 75


class StateDirLocked(StartError):
    code = "state_dir_locked"
    title = "Another daemon uses this state directory"
    exit_code = 75


class MissingDependency(StartError):
    code = "missing_dependency"
    title = "Something the provider needs is not installed"
    exit_code = 69


class RequestError(EnvdError):
    code = "bad_request"
    title = "The request cannot be served as it is"
    status = 400
    fault = Fault.CLIENT


class MalformedJson(RequestError):
    code = "malformed_json"
    title = "The body is not JSON"


class InvalidRequest(RequestError):
    """`errors` is a list of {"field", "message"}."""

    code = "invalid_request"
    title = "A field is missing, unknown or of the wrong kind"
    status = 422


class BodyTooLarge(RequestError):
    code = "body_too_large"
    title = "The body is too large"
    status = 413


class BodyTooSlow(RequestError):
    """Facts: limit (seconds)."""

    code = "body_too_slow"
    title = "The body did not come in time"
    status = 408
    retryable = True


class NotFound(RequestError):
    code = "not_found"
    title = "No such resource"
    status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    title = "This resource has no such method"
    status = 405


class HttpVersionUnsupported(RequestError):
    code = "http_version_unsupported"
    title = "Streams are served over HTTP/1.1 only"
    status = 505


class Unauthorized(RequestError):
    code = "unauthorized"
    title = "Who asks is not known here"
    status = 401


class Forbidden(RequestError):
    """Facts: needed (the scope), where that is what is missing."""

    code = "forbidden"
    title = "Who asks may not do this"
    status = 403


class MisdirectedRequest(RequestError):
    """The request was meant for another name: a page may have had its own name point here."""

    code = "misdirected_request"
    title = "This daemon is not known by that name"
    status = 421


class TooManyRequests(RequestError):
    """Facts: limit, setting."""

    code = "too_many_requests"
    title = "This client asked too often"
    status = 429
    retryable = True


class UnknownEnv(RequestError):
    code = "unknown_env"
    title = "No such env"
    status = 404


class UnknownJob(RequestError):
    code = "unknown_job"
    title = "No such job"
    status = 404


class NoEpisode(RequestError):
    code = "no_episode"
    title = "The env has no episode"
    status = 409


class NoVnc(RequestError):
    code = "no_vnc"
    title = "The desktop's screen is not served over VNC"
    status = 404


class EpisodeOver(RequestError):
    code = "episode_over"
    title = "The episode has ended"
    status = 409


class EnvBusy(RequestError):
    code = "env_busy"
    title = "The env is busy with another call"
    status = 409
    retryable = True


class JobCancelled(RequestError):
    code = "job_cancelled"
    title = "The job was cancelled"
    status = 409


class JobSuperseded(RequestError):
    code = "job_superseded"
    title = "A newer reset of the same env took this one's place"
    status = 409


class EvaluationCancelled(RequestError):
    code = "evaluation_cancelled"
    title = "The evaluation was cancelled"
    status = 409


class KeyReused(RequestError):
    status = 422
    code = "idempotency_key_reused"
    title = "The idempotency key belongs to another request"


class StepRepeated(RequestError):
    status = 409
    code = "step_repeated"
    title = "A step of that number was another one"


class StepGap(RequestError):
    status = 409
    code = "step_gap"
    title = "Steps before this one are missing"


class Leased(RequestError):
    """Facts: holder, expires_at."""

    status = 423
    code = "leased"
    title = "The env is leased to somebody else"
    retryable = True


class LeaseOver(RequestError):
    """Facts: end_reason (None when it is not known), ended_at."""

    status = 410
    code = "lease_over"
    title = "The lease has ended"


class CapacityError(EnvdError):
    code = "no_capacity"
    title = "Nobody can be served just now"
    status = 503
    fault = Fault.CAPACITY
    retryable = True


class QueueFull(CapacityError):
    code = "queue_full"
    title = "The boot queue is full"


class Draining(CapacityError):
    code = "draining"
    title = "The daemon is shutting down"


class StillBooting(CapacityError):
    """The answer of a legacy reset whose wait ran out. The job goes on."""

    code = "still_booting"
    title = "The desktop is still booting"


class JobExpired(CapacityError):
    code = "job_expired"
    title = "The job waited longer than it was allowed to"


class TooManyWatchers(CapacityError):
    code = "too_many_watchers"
    title = "Too many streams are open"


class DiskLow(CapacityError):
    code = "disk_low"
    title = "The daemon cannot keep what it would promise"


class DeadlinePassed(CapacityError):
    """Of the caller, not of the work: that goes on, and its answer is had by the same call with the same key."""

    code = "deadline_passed"
    title = "The answer was not there within the caller's time"


class LeaseUnavailable(CapacityError):
    """Raised by the client only. Facts: position."""

    code = "lease_unavailable"
    title = "Too few envs became free in time"


class InfraError(EnvdError):
    code = "infra_error"
    title = "A machine failed"
    status = 503
    fault = Fault.INFRA
    retryable = True


class BootFailed(InfraError):
    """Facts: phase, phases (name → seconds), probes (name → last result), notes (what was done and found on the way),
    log (last lines of the instance)."""

    code = "boot_failed"
    title = "The desktop could not be booted"


class BootTimeout(BootFailed):
    code = "boot_timeout"
    title = "The desktop was not ready in time"


class InstanceDied(BootFailed):
    code = "instance_died"
    title = "The desktop's instance died while it booted"


class DockerUnavailable(BootFailed):
    """Facts: cause, one of not_installed, not_running, no_permission, no_answer."""

    code = "docker_unavailable"
    title = "The Docker engine cannot be used"


class ImageMissing(BootFailed):
    """Facts: image."""

    code = "image_missing"
    title = "The image is not on this host"
    retryable = False


class DiskUnusable(BootFailed):
    """Facts: disk (its path), cause, one of absent, unreadable, truncated, not_a_disk, damaged."""

    code = "disk_unusable"
    title = "The virtual machine's disk cannot be used"
    retryable = False


class PortConflict(BootFailed):
    code = "port_conflict"
    title = "A port that the desktop needs is taken"


class NoSpace(BootFailed):
    """Facts: needed_bytes, free_bytes, where."""

    code = "no_space"
    title = "There is too little disk space for a desktop"


class CloudRefused(BootFailed):
    """The cloud said no. Facts, here and below: action (the call's name, as `ec2:RunInstances`), aws_code, request_id.
    This one itself is of answers that nothing below fits."""

    code = "cloud_refused"
    title = "The cloud refused"


class NoCredentials(CloudRefused):
    code = "no_credentials"
    title = "There are no credentials for the cloud"
    retryable = False


class CredentialsExpired(CloudRefused):
    code = "credentials_expired"
    title = "The credentials for the cloud have expired"
    retryable = False


class NotAuthorized(CloudRefused):
    """Facts: identity (its ARN, where AWS told it), resource (likewise)."""

    code = "not_authorized"
    title = "The credentials may not do this"
    retryable = False


class AmiUnavailable(CloudRefused):
    """Facts: ami, region."""

    code = "ami_unavailable"
    title = "The desktops' image cannot be used"
    retryable = False


class NetworkUnusable(CloudRefused):
    """Facts: subnets, security_groups."""

    code = "network_unusable"
    title = "The subnet or security group cannot be used"
    retryable = False


class InsufficientCapacity(CloudRefused):
    """Facts: instance_type, tried (subnet → what it said)."""

    code = "insufficient_capacity"
    title = "The cloud has no such machine free"


class QuotaExceeded(CloudRefused):
    """Facts: quota, one of vcpus, volumes, instances, addresses."""

    code = "quota_exceeded"
    title = "A quota of the account is used up"


class Throttled(CloudRefused):
    code = "throttled"
    title = "The cloud was asked too often"


class CloudUnreachable(CloudRefused):
    """Nothing answered, or not in time. Facts: endpoint."""

    code = "cloud_unreachable"
    title = "The cloud does not answer"


class TtlUnavailable(CloudRefused):
    """No schedule could be made that ends the instance, so it was not kept. Facts: role."""

    code = "ttl_unavailable"
    title = "The instance's end could not be scheduled"


class BudgetExhausted(CloudRefused):
    """A limit of this daemon's own. Facts: limit, wanted, setting."""

    code = "budget_exhausted"
    title = "Another instance would exceed the limit"


class OutOfMemory(InstanceDied):
    """Facts: exit_code, limit_bytes (None where it was the whole host's)."""

    code = "out_of_memory"
    title = "The desktop's instance ran out of memory"


class DesktopLost(InfraError):
    code = "desktop_lost"
    title = "The desktop is gone"


class GuestUnreachable(InfraError):
    code = "guest_unreachable"
    title = "The guest server does not answer"


class GuestMisbehaved(InfraError):
    code = "guest_misbehaved"
    title = "The guest server answered something that cannot be used"


class ServerUnreachable(InfraError):
    """Raised by the client only."""

    code = "server_unreachable"
    title = "The envd server does not answer"


class AssetUnavailable(InfraError):
    """A file that the task names cannot be had. Facts: url, http_status (None when nothing answered), tried."""

    code = "asset_unavailable"
    title = "A file that the task needs cannot be had"


class EvaluatorError(InfraError):
    """Facts: stage (result, expected, metric, process), index, traceback."""

    code = "evaluator_error"
    title = "The evaluator failed"
    status = 500
    retryable = False


class EvaluationExpired(InfraError):
    code = "evaluation_expired"
    title = "The evaluation was not done in time"


class EvaluationInterrupted(InfraError):
    code = "evaluation_interrupted"
    title = "The daemon ended while the episode was judged"


class InternalError(InfraError):
    """A bug of ours. The log has the traceback under the request's id."""

    code = "internal_error"
    title = "The daemon made a mistake"
    status = 500
    retryable = False


class TaskError(EnvdError):
    code = "task_error"
    title = "The task cannot be run"
    status = 422
    fault = Fault.TASK


class TaskInvalid(TaskError):
    code = "task_invalid"
    title = "The task file cannot be used"


class MissingRequirement(TaskError):
    """The task is well-formed and needs what this daemon does not have. Facts: errors (as TaskInvalid)."""

    code = "missing_requirement"
    title = "The task needs something that this daemon does not have"


class SetupFailed(TaskError):
    """Facts: step (index from 0), step_type, cause (the code of the error behind it), records (of the steps so far).

    Its fault and whether a retry may help are those of the error behind it.
    """

    code = "setup_failed"
    title = "The task's set-up failed"
    status = 500

    def __init__(self, detail: str, *, behind: EnvdError | None = None, **facts: Any) -> None:
        if behind is not None:
            facts = {"cause": behind.code, **facts}
        super().__init__(detail, **facts)
        if behind is not None:
            self.fault, self.retryable = behind.fault, behind.retryable
        if self.fault is not Fault.TASK:
            self.status = 503


class EvaluationInvalid(TaskError):
    code = "evaluation_invalid"
    title = "The task's evaluator cannot work as it is written"
    status = 500


class NotEvaluable(TaskError):
    code = "not_evaluable"
    title = "The task cannot be evaluated here"
    status = 500


def error_classes(root: type[EnvdError] = EnvdError) -> dict[str, type[EnvdError]]:
    """Every class of the tree by its code."""
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= error_classes(child)
    return found


def from_problem(problem: Problem) -> EnvdError:
    """The error whose code `problem` carries; an unknown code (a newer server) becomes a plain error of its fault."""
    fallback = {
        Fault.CLIENT: RequestError,
        Fault.CAPACITY: CapacityError,
        Fault.TASK: TaskError,
    }.get(problem.fault, InfraError)
    cls = error_classes().get(problem.code, fallback)
    error = cls(problem.detail, hint=problem.hint, retry_after=problem.retry_after)
    # Not as arguments: a fact may be called as one of them is.
    error.facts = dict(problem.model_extra or {})
    error.fault, error.retryable, error.status = problem.fault, problem.retryable, problem.status
    return error
