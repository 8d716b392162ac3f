"""The async client of the native API: what a trainer, a script and `envd`'s own commands use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import anyio.to_thread
from pydantic import ValidationError

from ..errors import (
    EnvdError,
    InfraError,
    JobCancelled,
    JobExpired,
    JobSuperseded,
    StillBooting,
    from_problem,
)
from ..models import Counts, Env, Event, Job, JobState, Lease, Model, StepResult, Verdict
from .answers import Answer
from .follow import follow, parsed_job
from .handle import EnvHandle
from .lease import TTL, held, under
from .logs import PATH, Which, lines_of, query
from .logs import follow as follow_logs
from .saving import Into
from .transport import Deadline, OnRetry, Resend, Transport

M = TypeVar("M", bound=Model)

ATTEMPT_SECONDS = 30.0
"""One try of a call that the server answers at once."""
BUNDLE_LIMIT = 1024**3
"""Bytes; servers keep a quarter of that per episode unless they are told otherwise."""


class Limits(TypedDict, total=False):
    """What a reset may say beside its task. The server has a default for what is left out or None."""

    max_steps: int | None
    counts: Counts | None
    """What `max_steps` limits: "actions" or "predictions"."""
    episode_timeout_s: float | None
    """No step begins later than so many seconds after the first observation."""
    screen: tuple[int, int] | None
    """Width and height in pixels that the caller counts on. A server with another screen refuses the reset."""


class Queue(Model):
    """The boot queue: what boots, what waits, first come first, and how many may wait."""

    booting: tuple[Job, ...]
    waiting: tuple[Job, ...]
    limit: int


class Readiness(Model):
    """Whether a reset can be served now, and if not, why."""

    ready: bool
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Drain(Model):
    """How far the end of the daemon is: `envs` are those that it waits for, for `left_s` seconds at most (None: nobody
    asked for its end)."""

    draining: bool
    left_s: float | None = None
    envs: tuple[int, ...] = ()


class Client:
    """One server, over one HTTP session. Use it as `async with Client() as client:`.

    url       default: the environment's ENVD_URL, else http://127.0.0.1:15001
    token     sent with every request; default: the environment's ENVD_TOKEN. "" sends none
    timeout   seconds for each call that is given none of its own, its retries included; the default is what a server
              takes at most to find a verdict. Waiting for a job has no limit unless it is given one: a boot may take
              40 minutes
    patience  seconds during which a server that stopped answering is tried again, enough for a restart of it

    What failed raises an EnvdError with the server's code. Only what is safe is sent twice:
    input whose answer was lost only to a server that keeps idempotency keys, or ServerUnreachable says `outcome`
    "unknown".
    """

    def __init__(
        self, url: str | None = None, *, token: str | None = None, timeout: float = 300.0, patience: float = 60.0
    ) -> None:
        self.http = Transport(url, token=token, patience=patience)
        self._timeout = timeout

    @property
    def url(self) -> str:
        return self.http.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self.http.aclose()

    def env(self, number: int = 0) -> EnvHandle:
        """A face of this client that speaks of one env."""
        return EnvHandle(self, number)

    def lease(
        self,
        count: int = 1,
        *,
        ttl_s: float = TTL,
        wait_s: float | None = None,
        owner: str | None = None,
        on_wait: Callable[[Lease], None] = lambda lease: None,
    ) -> AbstractAsyncContextManager[list[EnvHandle]]:
        """`async with client.lease(4) as envs:` has `count` envs for itself, all or none, for as long as the block
        lasts; their handles play under the lease, which is renewed meanwhile and released at the end. Then their
        episodes end and their desktops are gone.

        ttl_s    how long the envs are kept from others when this process dies
        wait_s   how long to wait for so many envs at once; None waits as long as it takes
        owner    for whom, where no token says that: owners are served in turns
        on_wait  told of the lease each time it is found waiting; its `waits_for` names the envs that are taken

        Raises LeaseUnavailable, which names the envs that are taken, when `wait_s` is over. When the lease is lost the
        block is cancelled, and LeaseOver raised in its place.
        """
        return held(self, count, ttl_s=ttl_s, wait_s=wait_s, owner=owner, on_wait=on_wait)

    def under(self, lease_id: str) -> Client:
        """This client, saying with everything it asks that it does so under a lease which somebody else holds. Its
        session is this one's. Raises SettingsError for what cannot be an id."""
        return under(self, lease_id)

    # Jobs

    async def reset(
        self,
        task: dict[str, Any] | None = None,
        *,
        env: int = 0,
        timeout: float | None = None,
        **limits: Unpack[Limits],
    ) -> Job:
        """Give `env` a clean desktop with `task` (an OSWorld task) set up on it; the job, once it succeeded. Its
        `setup` and `warnings` say how the task's set-up went.

        Raises TaskInvalid and MissingRequirement before a desktop is spent on the task; the error of a job that
        failed (SetupFailed, with the fault of what was behind it), was cancelled, superseded or expired; StillBooting
        when `timeout` seconds went by, in which case the job goes on and may be waited for.
        """
        deadline = Deadline.after(timeout)
        return await self._finish(await self._submit_reset(task, env, limits, deadline), deadline)

    async def submit_reset(
        self,
        task: dict[str, Any] | None = None,
        *,
        env: int = 0,
        timeout: float | None = None,
        **limits: Unpack[Limits],
    ) -> Job:
        """Ask for a reset and return its job at once."""
        return await self._submit_reset(task, env, limits, self._deadline(timeout))

    async def prewarm(self, *, timeout: float | None = None) -> Job:
        """Ask for a clean desktop to stand by, and return its job at once; `wait` waits for it."""
        return await self._submit("/v1/prewarm", None, self._deadline(timeout))

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job, once it succeeded. Raises as `reset` does, and UnknownJob."""
        deadline = Deadline.after(timeout)
        job = await self.job(job_id, timeout=min(deadline.left, self._timeout))
        return await self._finish(job, deadline)

    def watch(
        self,
        job_id: str | None = None,
        *,
        patience: float | None = None,
        on_retry: OnRetry | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Events as they happen, a snapshot first: of one job until the one that shows its end, or of everything.

        Outlives dropped connections and restarts of the daemon; `on_retry` is told of them. Who leaves the loop
        early should do so inside `contextlib.aclosing`.
        """
        return follow(self.http, job_id, patience=patience, on_retry=on_retry)

    async def job(self, job_id: str, *, timeout: float | None = None) -> Job:
        return parsed_job((await self._get(f"/v1/jobs/{job_id}", timeout)).object())

    async def jobs(
        self, *, env: int | None = None, state: JobState | None = None, timeout: float | None = None
    ) -> list[Job]:
        params = {name: str(value) for name, value in (("env", env), ("state", state)) if value is not None}
        answer = await self._get("/v1/jobs", timeout, params=params)
        return _parsed(_Jobs, answer).jobs

    async def cancel(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Ask for the end of a job, and return it as it is now; it may take a moment to end."""
        deadline = self._deadline(timeout)
        answer = await self.http.request(
            "POST", f"/v1/jobs/{job_id}/cancel", deadline=deadline, attempt_timeout=ATTEMPT_SECONDS
        )
        return parsed_job(answer.object())

    # Episodes

    async def step(
        self,
        env: int = 0,
        *,
        prediction: str | None = None,
        actions: list[str] | None = None,
        pause_s: float | None = None,
        include_screenshot: bool = True,
        timeout: float | None = None,
    ) -> StepResult:
        """Act on the desktop: either `prediction`, the model's text, or `actions`, which are pyautogui programs or
        DONE, WAIT, FAIL. Done once: an answer that was lost is asked for again, also over a restart of the server."""
        body: dict[str, Any] = {"prediction": prediction, "actions": actions, "pause_s": pause_s}
        body = {name: value for name, value in body.items() if value is not None}
        answer = await self.http.request(
            "POST",
            f"/v1/envs/{env}/step",
            body=body | {"include_screenshot": include_screenshot},
            resend=Resend.KEYED,
            deadline=self._deadline(timeout),
        )
        return _parsed(StepResult, answer)

    async def screenshot(self, env: int = 0, *, timeout: float | None = None) -> bytes:
        """The screen as it is now: a PNG, or a JPEG when the guest makes those."""
        return (await self._get(f"/v1/envs/{env}/screenshot", timeout)).body

    async def evaluate(self, env: int = 0, *, timeout: float | None = None) -> Verdict:
        """The verdict on the env's episode, which ends with it: a score, or none and why (`status`, `fault`, `code`).

        It is found once and answered again to whoever asks again, so an answer that was lost is asked for again.
        Raises NoEpisode, EnvBusy: what kept the episode from being scored is in the verdict and not raised.
        """
        answer = await self.http.request("POST", f"/v1/envs/{env}/evaluate", deadline=self._deadline(timeout))
        return _parsed(Verdict, answer)

    async def history(self, env: int = 0, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The episode's messages, as they go over the wire: {"role": …, "content": [part, …]}."""
        answer = await self._get(f"/v1/envs/{env}/history", timeout, limit=512 * 1024 * 1024)
        return _parsed(_History, answer).history_messages

    # What episodes leave, for as long as the server keeps it

    async def episodes(self, *, timeout: float | None = None) -> list[str]:
        """Ids of the episodes whose evidence is kept, the newest first."""
        return _parsed(_Episodes, await self._get("/v1/episodes", timeout)).episodes

    async def verdict(self, episode_id: str, *, timeout: float | None = None) -> Verdict:
        """The verdict of an episode that was evaluated, of any env. Raises NotFound."""
        return _parsed(Verdict, await self._get(f"/v1/episodes/{_part(episode_id)}/verdict", timeout))

    async def recorded(self, episode_id: str, *, timeout: float | None = None) -> tuple[dict[str, Any], Verdict | None]:
        """What the evidence of an episode says it was, and its verdict if it was judged. Raises NotFound."""
        # After a step that no episode reaches: what was done in it is not asked for.
        params = {"after": "1000000"}
        told = _parsed(_Recorded, await self._get(f"/v1/episodes/{_part(episode_id)}/steps", timeout, params=params))
        return told.episode, told.verdict

    async def bundle(
        self, episode_id: str, to: Path, *, limit: int = BUNDLE_LIMIT, timeout: float | None = None
    ) -> Path:
        """Save the evidence of an episode as a tar file: `to`, or in `to` under the episode's id where that is a
        folder. Returns the file.

        It is there whole or not at all, and takes the place of one that was there. Raises NotFound; InfraError when
        there is more than `limit` bytes of it; RequestError when the file cannot be written.
        """
        name = _part(episode_id)
        file = to / f"{name}.tar" if await anyio.to_thread.run_sync(os.path.isdir, to) else to
        into = Into(file, "application/x-tar", limit)
        await self.http.request("GET", f"/v1/episodes/{name}/bundle", into=into, deadline=self._deadline(timeout))
        return file

    # The server

    async def envs(self, *, timeout: float | None = None) -> list[Env]:
        return _parsed(_Envs, await self._get("/v1/envs", timeout)).envs

    async def env_state(self, env: int = 0, *, timeout: float | None = None) -> Env:
        return _parsed(Env, await self._get(f"/v1/envs/{env}", timeout))

    async def queue(self, *, timeout: float | None = None) -> Queue:
        return _parsed(Queue, await self._get("/v1/queue", timeout))

    async def alive(self, *, timeout: float | None = None) -> None:
        """Return when the server's event loop has answered. Needs no token."""
        await self._get("/livez", timeout)

    async def ready(self, *, timeout: float | None = None) -> Readiness:
        """Whether a reset can be served now. A server that says no does not raise; one that is not there does."""
        return _parsed(Readiness, await self._get("/readyz", timeout, accept=(503,)))

    async def version(self, *, timeout: float | None = None) -> dict[str, Any]:
        return (await self._get("/version", timeout)).object()

    async def logs(self, *, timeout: float | None = None, **which: Unpack[Which]) -> list[dict[str, Any]]:
        """The last lines of the server's log, oldest first: each has `event`, `level`, `timestamp` and what it is
        about."""
        return lines_of(await self._get(PATH, timeout, params=query(which)))

    def follow_logs(
        self, *, patience: float | None = None, on_retry: OnRetry | None = None, **which: Unpack[Which]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """As `logs`, and then the lines that come, without end. Outlives dropped connections and restarts of the
        daemon; `on_retry` is told of them. Who leaves the loop early should do so inside `contextlib.aclosing`."""
        return follow_logs(self.http, query(which), patience=patience, on_retry=on_retry)

    async def leases(self, *, timeout: float | None = None) -> list[Lease]:
        """Those that are held, and those that wait. The ids of others' are cut short."""
        return _parsed(_Leases, await self._get("/v1/leases", timeout)).leases

    async def drain(self, limit_s: float | None = None, *, timeout: float | None = None) -> Drain:
        """Have the daemon end once its episodes have been judged, after `limit_s` seconds at the latest (None: what
        ENVD_DRAIN_LIMIT says). Asked again it changes that limit."""
        answer = await self.http.request(
            "POST",
            "/v1/drain",
            body={} if limit_s is None else {"limit_s": limit_s},
            deadline=self._deadline(timeout),
            attempt_timeout=ATTEMPT_SECONDS,
        )
        return _parsed(Drain, answer)

    async def drained(self, *, timeout: float | None = None, patience: float | None = None) -> Drain:
        """How far that is. A daemon that has ended is ServerUnreachable, once it was not heard of for `patience`."""
        return _parsed(Drain, await self._get("/v1/drain", timeout, patience=patience))

    # Within

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(self._timeout if timeout is None else timeout)

    async def _get(self, path: str, timeout: float | None, **options: Any) -> Answer:
        return await self.http.request(
            "GET", path, deadline=self._deadline(timeout), attempt_timeout=ATTEMPT_SECONDS, **options
        )

    async def _submit_reset(self, task: dict[str, Any] | None, env: int, limits: Limits, deadline: Deadline) -> Job:
        given = {name: value for name, value in limits.items() if value is not None}
        return await self._submit(f"/v1/envs/{env}/reset", {"task": task or {}} | given, deadline)

    async def _submit(self, path: str, body: Any, deadline: Deadline) -> Job:
        answer = await self.http.request(
            "POST", path, body=body, resend=Resend.KEYED, deadline=deadline, attempt_timeout=ATTEMPT_SECONDS
        )
        return parsed_job(answer.object())

    async def _finish(self, job: Job, deadline: Deadline) -> Job:
        """Follow `job` to its end. At the deadline raises StillBooting, or why the server was not heard of lately."""
        trouble: EnvdError | None = None

        def remember(error: EnvdError, pause: float) -> None:
            nonlocal trouble
            trouble = error

        try:
            async with (
                asyncio.timeout(deadline.left_or_none),
                aclosing(self.watch(job.id, on_retry=remember)) as events,
            ):
                async for event in events:
                    trouble = None
                    job = event.job or job
        except TimeoutError:
            raise trouble or _still_booting(job) from None
        error = _error_of(job)
        if error is not None:
            raise error
        return job


class _Jobs(Model):
    jobs: list[Job]


class _Envs(Model):
    envs: list[Env]


class _Leases(Model):
    leases: list[Lease]


class _Episodes(Model):
    episodes: list[str]


class _Recorded(Model):
    episode: dict[str, Any]
    verdict: Verdict | None = None


class _History(Model):
    history_messages: list[dict[str, Any]]


def _parsed(model: type[M], answer: Answer) -> M:
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        raise InfraError(
            f"{answer.request} was answered with something this client cannot read: {error}",
            hint="Are client and server of about the same version?",
        ) from error


def _part(name: str) -> str:
    """`name` as one part of a path, whatever is in it."""
    return quote(name, safe="")


def _still_booting(job: Job) -> StillBooting:
    eta = "" if job.eta_s is None else f", about {job.eta_s:.0f} s from its end when last heard of"
    return StillBooting(
        f"Job {job.id} is still {job.state}{eta}.",
        hint=f"It goes on. Wait for it with wait({job.id!r}), or end it with cancel({job.id!r}).",
        job=job.model_dump(mode="json"),
    )


def _error_of(job: Job) -> EnvdError | None:
    """Why the job did not succeed, with its id among the facts."""
    if job.state is JobState.SUCCEEDED:
        return None
    if job.error is not None:
        error = from_problem(job.error)
    else:
        ends = {
            JobState.CANCELLED: JobCancelled,
            JobState.SUPERSEDED: JobSuperseded,
            JobState.EXPIRED: JobExpired,
        }
        error = ends.get(job.state, InfraError)(f"Job {job.id} ended {job.state}.")
    error.facts.setdefault("job_id", job.id)
    return error
