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
    │   │   AssetUnavailable, EvaluatorError, EvaluatorsMissing, EvaluationExpired, EvaluationInterrupted,
    │   │   InternalError
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

    `cause` and `remedy` are Markdown, about the class and not the occurrence: `/errors` explains each code with them.
    """

    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Error"
    cause: ClassVar[str] = "Something went wrong that has no name of its own."
    remedy: ClassVar[str] = "Read `detail` and `hint`; the daemon's log has more under the request's id."
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
    cause = "Something that the daemon needs before it can serve is not as it must be."
    remedy = "The line that was printed says what. Put it right and start again."
    exit_code: ClassVar[int] = 78


class SettingsError(StartError):
    code = "bad_settings"
    title = "A setting cannot be used"
    cause = "A setting has a name that does not exist, or a value that cannot be used."
    remedy = (
        "The line names the setting, where it was set and the nearest valid name. All of them are at `/docs/settings`."
    )


class AddressInUse(StartError):
    code = "address_in_use"
    title = "The port is taken"
    cause = "Another process listens on that address and port."
    remedy = "End it, or choose another port with `ENVD_PORT` or `envd serve --port`."
    exit_code = 75


class StateDirLocked(StartError):
    code = "state_dir_locked"
    title = "Another daemon uses this state directory"
    cause = "Another daemon runs with the same `ENVD_STATE_DIR`."
    remedy = "End that one, or give this one a state directory of its own."
    exit_code = 75


class MissingDependency(StartError):
    code = "missing_dependency"
    title = "Something the provider needs is not installed"
    cause = "A program or a package that the chosen provider needs is not installed."
    remedy = "Install what the line names. `make serve` installs what `local` desktops need on Debian."
    exit_code = 69


class RequestError(EnvdError):
    code = "bad_request"
    title = "The request cannot be served as it is"
    cause = "The request cannot be served as it is, for a reason that `detail` gives."
    remedy = "Change the request; sent again as it is it is refused again."
    status = 400
    fault = Fault.CLIENT


class MalformedJson(RequestError):
    code = "malformed_json"
    title = "The body is not JSON"
    cause = "The body is not JSON, or not UTF-8."
    remedy = "Send a JSON object with `Content-Type: application/json`."


class InvalidRequest(RequestError):
    """`errors` is a list of {"field", "message"}."""

    code = "invalid_request"
    title = "A field is missing, unknown or of the wrong kind"
    cause = "A field of the body, the query or a header is missing, unknown or of the wrong kind."
    remedy = "`errors` names each field and what is wrong with it. The reference has every field."
    status = 422


class BodyTooLarge(RequestError):
    code = "body_too_large"
    title = "The body is too large"
    cause = "The body is larger than `ENVD_BODY_LIMIT`."
    remedy = (
        "Send less, or raise the setting. Files go to a desktop by `PUT /v1/envs/{env}/files`, which has a limit of "
        "its own."
    )
    status = 413


class BodyTooSlow(RequestError):
    """Facts: limit (seconds)."""

    code = "body_too_slow"
    title = "The body did not come in time"
    cause = "The body was not there within its minute: a slow network, or a client that hung."
    remedy = "Send it again. If it happens often, look at what is between client and daemon."
    status = 408
    retryable = True


class NotFound(RequestError):
    code = "not_found"
    title = "No such resource"
    cause = "There is no such path, file or episode; or there was, and what it left is kept no longer."
    remedy = "Compare the path with the reference. How long evidence is kept: `ENVD_BUNDLES`, `ENVD_BUNDLE_DAYS`."
    status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    title = "This resource has no such method"
    cause = "The path exists and does not know this method."
    remedy = "The header `Allow` lists those that it knows."
    status = 405


class HttpVersionUnsupported(RequestError):
    code = "http_version_unsupported"
    title = "Streams are served over HTTP/1.1 only"
    cause = "An event stream or a desktop's own service was asked for over HTTP/2."
    remedy = "Have the client, or the proxy between, speak HTTP/1.1 to the daemon."
    status = 505


class Unauthorized(RequestError):
    code = "unauthorized"
    title = "Who asks is not known here"
    cause = "The daemon wants a token, and none, an unknown one or an expired link was sent."
    remedy = (
        "Send `Authorization: Bearer TOKEN`, or set `ENVD_TOKEN` for our clients. Old trainers that can send none "
        "need `ENVD_ALLOW`."
    )
    status = 401


class Forbidden(RequestError):
    """Facts: needed (the scope), where that is what is missing."""

    code = "forbidden"
    title = "Who asks may not do this"
    cause = (
        "The token's scope is too small for this call (`needed` says which it takes), or a page of another site sent "
        "the request."
    )
    remedy = "Use a token of the scope that is needed; send the request from a program and not from a web page."
    status = 403


class MisdirectedRequest(RequestError):
    """The request was meant for another name: a page may have had its own name point here."""

    code = "misdirected_request"
    title = "This daemon is not known by that name"
    cause = (
        "No token was sent, and the daemon was called by a name that it does not know: a page may have had its own "
        "name point here."
    )
    remedy = "Call it by its address, send a token, or put the name into `ENVD_HOSTS`."
    status = 421


class TooManyRequests(RequestError):
    """Facts: limit, setting."""

    code = "too_many_requests"
    title = "This client asked too often"
    cause = (
        "This client is above a limit of its own: requests in a second (`ENVD_REQUEST_RATE`) or waiting resets "
        "(`ENVD_CLIENT_JOBS`)."
    )
    remedy = "Wait for `Retry-After`. Follow a job's events, or poll it with `wait`, instead of asking again and again."
    status = 429
    retryable = True


class UnknownEnv(RequestError):
    code = "unknown_env"
    title = "No such env"
    cause = "The env's number is not one of those that are served."
    remedy = "Envs are numbered from 0 to `ENVD_ENVS` − 1. `GET /v1/envs` lists them."
    status = 404


class UnknownJob(RequestError):
    code = "unknown_job"
    title = "No such job"
    cause = "There never was such a job, or it ended so long ago that it was forgotten."
    remedy = "`GET /v1/jobs` lists those that are kept. How long: `ENVD_JOURNAL_DAYS`, `ENVD_JOURNAL_JOBS`."
    status = 404


class NoEpisode(RequestError):
    code = "no_episode"
    title = "The env has no episode"
    cause = "The env was not reset yet, or its last reset failed."
    remedy = "Reset it first, and wait until the job has succeeded."
    status = 409


class NoVnc(RequestError):
    code = "no_vnc"
    title = "The desktop's screen is not served over VNC"
    cause = "The desktop's screen is not served over VNC: `local` and `qemu` desktops have none."
    remedy = "`GET /v1/envs/{env}/screenshot` shows any screen."
    status = 404


class EpisodeOver(RequestError):
    code = "episode_over"
    title = "The episode has ended"
    cause = "The episode has ended: the model said so, its steps or its time ran out, or it was evaluated."
    remedy = "Evaluate it if that was not done, then reset the env."
    status = 409


class EnvBusy(RequestError):
    code = "env_busy"
    title = "The env is busy with another call"
    cause = "Another call is at work on this env: a step, a reset or an evaluation."
    remedy = (
        "Send one call at a time to an env; try again in a moment. A cluster of workers wants an env each, or leases."
    )
    status = 409
    retryable = True


class JobCancelled(RequestError):
    code = "job_cancelled"
    title = "The job was cancelled"
    cause = "Somebody cancelled the job, or the daemon ended without `ENVD_KEEP_DESKTOPS`."
    remedy = "Reset again if the env is still wanted. The log's `audit` lines say who cancelled it."
    status = 409


class JobSuperseded(RequestError):
    code = "job_superseded"
    title = "A newer reset of the same env took this one's place"
    cause = "Another reset of the same env came while this one waited."
    remedy = "Wait for the newer job (`superseded_by`). Two workers with the same env number are the usual reason."
    status = 409


class EvaluationCancelled(RequestError):
    code = "evaluation_cancelled"
    title = "The evaluation was cancelled"
    cause = "The episode was taken away while it was judged: by a reset of its env, or by the end of a lease."
    remedy = "Wait for the verdict before the env is reset."
    status = 409


class KeyReused(RequestError):
    status = 422
    code = "idempotency_key_reused"
    title = "The idempotency key belongs to another request"
    cause = "The same `Idempotency-Key` came with another body."
    remedy = "Use a new key for each new call, and the same one only to send the same call again."


class StepRepeated(RequestError):
    status = 409
    code = "step_repeated"
    title = "A step of that number was another one"
    cause = "A step of that number was done already, and was another one."
    remedy = "Number the steps of an episode from 1; `expected` says which is next."


class StepGap(RequestError):
    status = 409
    code = "step_gap"
    title = "Steps before this one are missing"
    cause = "Steps before this one are missing."
    remedy = "Send them in order, each once the one before was answered; `expected` says which is next."


class Leased(RequestError):
    """Facts: holder, expires_at."""

    status = 423
    code = "leased"
    title = "The env is leased to somebody else"
    cause = "The env is leased to somebody else, until `expires_at`."
    remedy = "Take a lease yourself, or use another env. `GET /v1/leases` says who has what."
    retryable = True


class LeaseOver(RequestError):
    """Facts: end_reason (None when it is not known), ended_at."""

    status = 410
    code = "lease_over"
    title = "The lease has ended"
    cause = "The lease was released, or neither used nor renewed for its `ttl_s`."
    remedy = "Ask for a new one. A longer `ttl_s` outlives longer pauses; `client.lease(…)` renews by itself."


class CapacityError(EnvdError):
    code = "no_capacity"
    title = "Nobody can be served just now"
    cause = "Nobody can be served just now."
    remedy = "Try again after `Retry-After`."
    status = 503
    fault = Fault.CAPACITY
    retryable = True


class QueueFull(CapacityError):
    code = "queue_full"
    title = "The boot queue is full"
    cause = "`ENVD_QUEUE_LIMIT` jobs wait already."
    remedy = "Try again after `Retry-After`; have fewer clients reset at once, or raise the limit."


class Draining(CapacityError):
    code = "draining"
    title = "The daemon is shutting down"
    cause = "The daemon is being ended or updated and takes no new work."
    remedy = "Try again: the next daemon goes on where this one stopped. Our clients do so by themselves."


class StillBooting(CapacityError):
    """The answer of a legacy reset whose wait ran out. The job goes on."""

    code = "still_booting"
    title = "The desktop is still booting"
    cause = "The caller's wait ran out before the desktop was ready. The job goes on."
    remedy = "Send the same reset again to wait on, or follow the job's events."


class JobExpired(CapacityError):
    code = "job_expired"
    title = "The job waited longer than it was allowed to"
    cause = "The job waited longer than `ENVD_QUEUE_TIMEOUT`, or than its own `queue_timeout_s`, and was never booted."
    remedy = "Look at `/v1/queue` for what was before it. More envs than the host can boot make everybody wait."


class TooManyWatchers(CapacityError):
    code = "too_many_watchers"
    title = "Too many streams are open"
    cause = "`ENVD_MAX_STREAMS` streams are open."
    remedy = "Close what nobody reads; follow `/v1/events` once instead of each job by itself; or raise the limit."


class DiskLow(CapacityError):
    code = "disk_low"
    title = "The daemon cannot keep what it would promise"
    cause = "The disk of `ENVD_STATE_DIR` is full or cannot be written, so no promise could be kept."
    remedy = "Make room there. What runs goes on, and new work is taken as soon as there is room."


class DeadlinePassed(CapacityError):
    """Of the caller, not of the work: that goes on, and its answer is had by the same call with the same key."""

    code = "deadline_passed"
    title = "The answer was not there within the caller's time"
    cause = "The answer was not there within the seconds that the caller gave (`X-Request-Deadline`). The work goes on."
    remedy = "Send the same call with the same key: it is answered with what became of it."


class LeaseUnavailable(CapacityError):
    """Raised by the client only. Facts: position, waits_for (of each env that is taken: env, by, since, detail)."""

    code = "lease_unavailable"
    title = "Too few envs became free in time"
    cause = "So many envs did not become free together within `wait_s`."
    remedy = (
        "Wait longer or ask for fewer. `detail` says what each env is taken by; one that is played on without a lease "
        "is freed by evaluating its episode (`envd evaluate ENV`), or by a step with DONE or FAIL."
    )


class InfraError(EnvdError):
    code = "infra_error"
    title = "A machine failed"
    cause = "A machine or a service failed in a way that has no code of its own."
    remedy = "Reset and try again; mask the episode. `detail` says what failed."
    status = 503
    fault = Fault.INFRA
    retryable = True


class BootFailed(InfraError):
    """Facts: phase, phases (name → seconds), probes (name → last result), notes (what was done and found on the way),
    log (last lines of the instance)."""

    code = "boot_failed"
    title = "The desktop could not be booted"
    cause = "The provider could not make the desktop, or it did not come up."
    remedy = (
        "`phase`, `probes` and `log` say how far it came. Reset again; if it fails again in the same phase, the cause"
        " is on the host."
    )


class BootTimeout(BootFailed):
    code = "boot_timeout"
    title = "The desktop was not ready in time"
    cause = "The desktop was made and did not pass both probes within `DOCKER_VM_READY_TIMEOUT`."
    remedy = (
        "`probes` says which one it was and what it saw last. Without KVM a stock image takes 20 to 40 minutes: use a"
        " template, or allow more."
    )


class InstanceDied(BootFailed):
    code = "instance_died"
    title = "The desktop's instance died while it booted"
    cause = "The container, machine or process group ended by itself while it booted."
    remedy = (
        "`log` has its last lines, `exit_code` how it ended. An image or a disk that does not fit is the usual reason."
    )


class DockerUnavailable(BootFailed):
    """Facts: cause, one of not_installed, not_running, no_permission, no_answer."""

    code = "docker_unavailable"
    title = "The Docker engine cannot be used"
    cause = "The Docker engine is not installed, does not run, does not answer, or may not be used by this user."
    remedy = (
        "`cause` says which. `docker info`, as the daemon's user, must work; `deploy/docker-engine.sh` installs one "
        "on Debian."
    )


class ImageMissing(BootFailed):
    """Facts: image."""

    code = "image_missing"
    title = "The image is not on this host"
    cause = "The image that `ENVD_DOCKER_IMAGE` names is not on this host; nothing is pulled inside a reset."
    remedy = "`envd images ls` says how to get it: `make images` for ours, `envd images pull` for others."
    retryable = False


class DiskUnusable(BootFailed):
    """Facts: disk (its path), cause, one of absent, unreadable, truncated, not_a_disk, damaged."""

    code = "disk_unusable"
    title = "The virtual machine's disk cannot be used"
    cause = "The virtual machine's disk is absent, unreadable, cut short or damaged."
    remedy = "`disk` and `cause` say which and how. `make images` makes ours; copy or unpack another one again."
    retryable = False


class PortConflict(BootFailed):
    code = "port_conflict"
    title = "A port that the desktop needs is taken"
    cause = "A port that the desktop needs was taken by another process."
    remedy = "Reset again: other ports are chosen. If it stays, look for what listens there."


class NoSpace(BootFailed):
    """Facts: needed_bytes, free_bytes, where."""

    code = "no_space"
    title = "There is too little disk space for a desktop"
    cause = "There is less free disk space than a desktop may need."
    remedy = "Make room at `where`, or lower `DISK_SIZE`. Old images and unused templates are the first to go."


class CloudRefused(BootFailed):
    """The cloud said no. Facts, here and below: action (the call's name, as `ec2:RunInstances`), aws_code, request_id.
    This one itself is of answers that nothing below fits."""

    code = "cloud_refused"
    title = "The cloud refused"
    cause = "AWS answered with an error that none of the codes below fits."
    remedy = (
        "`action`, `aws_code` and `request_id` name the call. `envd aws check` tries everything that a desktop takes."
    )


class NoCredentials(CloudRefused):
    code = "no_credentials"
    title = "There are no credentials for the cloud"
    cause = "No credentials for AWS were found."
    remedy = "Give the host an instance profile, or run `aws configure`; `envd aws check` says what is seen."
    retryable = False


class CredentialsExpired(CloudRefused):
    code = "credentials_expired"
    title = "The credentials for the cloud have expired"
    cause = "The credentials for AWS were temporary, and have expired."
    remedy = "Get new ones, for example with `aws sso login`; an instance profile renews itself."
    retryable = False


class NotAuthorized(CloudRefused):
    """Facts: identity (its ARN, where AWS told it), resource (likewise)."""

    code = "not_authorized"
    title = "The credentials may not do this"
    cause = "The identity may not make this call."
    remedy = "Give `identity` the statement for `action` of `deploy/aws/policy.json`."
    retryable = False


class AmiUnavailable(CloudRefused):
    """Facts: ami, region."""

    code = "ami_unavailable"
    title = "The desktops' image cannot be used"
    cause = "The image of the desktops is not in this region, or may not be used by this account."
    remedy = "Set `ENVD_AWS_AMI` to one that is, or use a region for which OSWorld publishes one."
    retryable = False


class NetworkUnusable(CloudRefused):
    """Facts: subnets, security_groups."""

    code = "network_unusable"
    title = "The subnet or security group cannot be used"
    cause = "A subnet or security group does not exist, is full, or the two are of different networks."
    remedy = "Check `AWS_SUBNET_ID` and `AWS_SECURITY_GROUP_ID`; `envd aws check` looks at them."
    retryable = False


class InsufficientCapacity(CloudRefused):
    """Facts: instance_type, tried (subnet → what it said)."""

    code = "insufficient_capacity"
    title = "The cloud has no such machine free"
    cause = "AWS has no such machine free in any of the subnets that were tried."
    remedy = "Give subnets of several zones in `AWS_SUBNET_ID`, choose another `AWS_INSTANCE_TYPE`, or wait."


class QuotaExceeded(CloudRefused):
    """Facts: quota, one of vcpus, volumes, instances, addresses."""

    code = "quota_exceeded"
    title = "A quota of the account is used up"
    cause = "A quota of the account (`quota`) is used up."
    remedy = "Have it raised in the console of AWS under Service Quotas, or end what is forgotten: `envd aws ls`."


class Throttled(CloudRefused):
    code = "throttled"
    title = "The cloud was asked too often"
    cause = "AWS was asked more often than it allows."
    remedy = "Wait: the daemon itself slows down. Lower `ENVD_AWS_BOOT_WIDTH` if it stays."


class CloudUnreachable(CloudRefused):
    """Nothing answered, or not in time. Facts: endpoint."""

    code = "cloud_unreachable"
    title = "The cloud does not answer"
    cause = "The endpoint of AWS does not answer: no route, no DNS, or a proxy between."
    remedy = "Reach `endpoint` from this host first. In a private subnet that takes a NAT gateway or VPC endpoints."


class TtlUnavailable(CloudRefused):
    """No schedule could be made that ends the instance, so it was not kept. Facts: role."""

    code = "ttl_unavailable"
    title = "The instance's end could not be scheduled"
    cause = "No schedule could be made at AWS that would end the instance, so it was not kept."
    remedy = (
        "Give the daemon the rights for the scheduler and its `role`, or set `ENABLE_TTL=false` and watch the bill "
        "yourself."
    )


class BudgetExhausted(CloudRefused):
    """A limit of this daemon's own. Facts: limit, wanted, setting."""

    code = "budget_exhausted"
    title = "Another instance would exceed the limit"
    cause = "One instance more would exceed a limit that you set."
    remedy = "Wait until one has ended, or raise what `setting` names."


class OutOfMemory(InstanceDied):
    """Facts: exit_code, limit_bytes (None where it was the whole host's)."""

    code = "out_of_memory"
    title = "The desktop's instance ran out of memory"
    cause = "The kernel killed the desktop: at its own limit (`limit_bytes`), or since the host had no memory left."
    remedy = "Give desktops more (`RAM_SIZE`), or have fewer at once (`ENVD_ENVS`, `ENVD_SPARES`)."


class DesktopLost(InfraError):
    code = "desktop_lost"
    title = "The desktop is gone"
    cause = "The desktop died while it was played on, or ended with the daemon."
    remedy = "Reset the env: it gets a new one. Mask the episode."


class GuestUnreachable(InfraError):
    code = "guest_unreachable"
    title = "The guest server does not answer"
    cause = "The server inside the desktop does not answer."
    remedy = "Reset the env. A guest that is starved of memory or processors is the usual reason."


class GuestMisbehaved(InfraError):
    code = "guest_misbehaved"
    title = "The guest server answered something that cannot be used"
    cause = "The server inside the desktop answered something that cannot be used."
    remedy = "`detail` says what it answered. Reset the env; an image with an old server does it again."


class ServerUnreachable(InfraError):
    """Raised by the client only."""

    code = "server_unreachable"
    title = "The envd server does not answer"
    cause = "The client reached no daemon at its address. Raised by our clients; the daemon never sends it."
    remedy = (
        "Check the address, `ENVD_HOST` of the daemon, firewalls and proxies: `curl URL/livez` from the same machine."
    )


class AssetUnavailable(InfraError):
    """A file that the task names cannot be had. Facts: url, http_status (None when nothing answered), tried."""

    code = "asset_unavailable"
    title = "A file that the task needs cannot be had"
    cause = "A file that the task names could not be downloaded."
    remedy = (
        "`url` and `http_status` say which and why. Set `ENVD_ASSET_MIRRORS`, and run `envd tasks prefetch` before "
        "training."
    )


class EvaluatorError(InfraError):
    """Facts: stage (result, expected, metric, process), index, traceback."""

    code = "evaluator_error"
    title = "The evaluator failed"
    cause = "A getter or a metric raised, was killed or gave something that is no score."
    remedy = (
        "`stage`, `index` and `traceback` say where. Asked again the verdict is the same; `envd rescore` judges the "
        "evidence anew."
    )
    status = 500
    retryable = False


class EvaluatorsMissing(InfraError):
    """Facts, where one metric alone lacks something: stage, index."""

    code = "evaluators_missing"
    title = "This daemon lacks what judges the task"
    cause = (
        "The task has an evaluator, and this daemon has no interpreter that runs them, or lacks a library that one of "
        "its metrics reads with. It is no fault of the task's."
    )
    remedy = (
        "Run `make evaluators` once beside the daemon, or set `ENVD_EVALUATORS`; `hint` names a library that is "
        "missing. Until then `/readyz` and the jobs of resets warn of it. The verdict stays as it is: reset, and play "
        "anew."
    )
    status = 500
    retryable = False


class EvaluationExpired(InfraError):
    code = "evaluation_expired"
    title = "The evaluation was not done in time"
    cause = "There was no verdict within `ENVD_EVALUATION_TIMEOUT`."
    remedy = "`seconds` of the verdict says where the time went. Raise the setting if clients wait longer, too."


class EvaluationInterrupted(InfraError):
    code = "evaluation_interrupted"
    title = "The daemon ended while the episode was judged"
    cause = "The daemon ended after the evaluation had begun to change the desktop."
    remedy = "There is no score for this episode. Drain before you end a daemon: `POST /v1/drain`."


class InternalError(InfraError):
    """A bug of ours. The log has the traceback under the request's id."""

    code = "internal_error"
    title = "The daemon made a mistake"
    cause = "A bug in envd."
    remedy = "The log has the traceback under the request's id (`X-Request-Id`). Please report it with that."
    status = 500
    retryable = False


class TaskError(EnvdError):
    code = "task_error"
    title = "The task cannot be run"
    cause = "The task cannot be run, for a reason that has no code of its own."
    remedy = "`detail` says why. Leave the task out until it is mended."
    status = 422
    fault = Fault.TASK


class TaskInvalid(TaskError):
    code = "task_invalid"
    title = "The task file cannot be used"
    cause = "The task file is malformed."
    remedy = "`errors` names each field. `envd tasks check` finds all of them before training."


class MissingRequirement(TaskError):
    """The task is well-formed and needs what this daemon does not have. Facts: errors (as TaskInvalid)."""

    code = "missing_requirement"
    title = "The task needs something that this daemon does not have"
    cause = (
        "The task is well-formed and needs what this daemon does not have: an account, a proxy, a file that is not in"
        " the cache."
    )
    remedy = "`errors` names it. `envd tasks check` says what would make it run."


class SetupFailed(TaskError):
    """Facts: step (index from 0), step_type, cause (the code of the error behind it), records (of the steps so far).

    Its fault and whether a retry may help are those of the error behind it.
    """

    code = "setup_failed"
    title = "The task's set-up failed"
    cause = "A step of the task's set-up failed on every desktop that it was tried on."
    remedy = "`step` and `step_type` say which, `cause` is the code of the error behind it, whose fault this one has."
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
    cause = "The task's post-configuration or evaluator cannot work as it is written."
    remedy = "`detail` names the field. Mend the task file, or leave the task out."
    status = 500


class NotEvaluable(TaskError):
    code = "not_evaluable"
    title = "The task has no evaluator"
    cause = "The task has no evaluator, so nobody can say how well it was done."
    remedy = "Give the task one, or judge it yourself by the evidence of the episode."
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
