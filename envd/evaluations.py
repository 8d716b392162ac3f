"""Verdicts: each episode is judged once, which ends it, and whoever asks again is told the same.

A number leaves here only if the task's own evaluator returned it, or if its rules say so without one: an infeasible
task is done by giving up, and giving up does no other task. Everything that fails on the way is a verdict without a
number that says whose doing it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from . import __version__
from .bundles import Bundles
from .drivers.base import Driver
from .episodes import Envs, Judged, Play, warnings_of
from .errors import (
    Draining,
    EnvdError,
    EvaluationCancelled,
    EvaluationExpired,
    EvaluationInterrupted,
    EvaluatorError,
    EvaluatorsMissing,
    Fault,
    InfraError,
    InternalError,
    NotEvaluable,
    NotFound,
    error_classes,
)
from .events import EventLog
from .models import (
    EndReason,
    EnvState,
    Episode,
    MetricRecord,
    Provenance,
    Settled,
    SetupRecord,
    Verdict,
    VerdictStatus,
)
from .settings import Settings
from .store import Kind, Store
from .tasks.evaluating import Evaluators
from .tasks.setup.runner import run as run_steps
from .tasks.task import Task

logger = structlog.get_logger(__name__)

MARGIN = 2.0
"""Seconds before the evaluation's own limit at which the evaluator is stopped, so that its report is still had."""
NO_EVALUATORS = "there are no evaluators here; run `make evaluators`, or set ENVD_EVALUATORS to a Python that has them"


@dataclass
class _Pending:
    """A verdict that is being found, or was."""

    done: anyio.Event = field(default_factory=anyio.Event)
    verdict: Verdict | None = None


@dataclass
class _Findings:
    """What is known so far of an episode that is judged."""

    began: float
    warnings: list[str]
    postconfig: list[SetupRecord] = field(default_factory=list)
    metrics: tuple[MetricRecord, ...] = ()
    raw: tuple[Any, ...] | None = None
    settled: Settled | None = None
    evaluator_version: str = ""
    detail: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class Evaluations:
    """`run` must be running for episodes to be judged."""

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        envs: Envs,
        store: Store,
        bundles: Bundles,
        evaluators: Evaluators,
        events: EventLog,
    ) -> None:
        self._settings = settings
        self._driver = driver
        self._envs = envs
        self._store = store
        self._bundles = bundles
        self._evaluators = evaluators
        self._events = events
        self._pending: dict[str, _Pending] = {}
        envs.on_began = self.expect
        envs.doubt = self.doubt
        self._tasks: TaskGroup | None = None

    async def run(self, started: anyio.Event) -> None:
        """Judge until cancelled: what is being judged then has no verdict, and its callers are told Draining."""
        try:
            async with anyio.create_task_group() as self._tasks:
                started.set()
                await anyio.sleep_forever()
        finally:
            self._tasks = None
            for pending in self._pending.values():
                pending.done.set()

    async def recover(self) -> None:
        """Take up the verdicts of the episodes that the envs have taken up."""
        for env in map(self._envs.env, range(len(self._envs))):
            if env.episode is not None and (found := await self._found(env.episode.id)) is not None:
                self._pending[env.episode.id] = pending = _Pending(verdict=found)
                pending.done.set()
                self._envs.has_verdict(env.episode)

    async def evaluate(self, env: int) -> Verdict:
        """The verdict of the env's episode. The first caller has it found; it is found also when that caller leaves,
        and once, also over lives of the daemon.

        Raises NoEpisode, EnvBusy while resetting, Draining.
        """
        episode, play = self._envs.played(env)
        pending = self._pending.get(episode.id)
        if pending is None:
            if self._tasks is None:
                raise Draining("The daemon is shutting down and takes no new work.", retry_after=5)
            pending = self._pending[episode.id] = _Pending()
            self._tasks.start_soon(self._find, episode, play, pending)
        await pending.done.wait()
        if pending.verdict is None:
            raise Draining("The daemon is shutting down; the evaluation is cut short.", retry_after=5)
        return pending.verdict

    async def verdict(self, episode_id: str) -> Verdict:
        """One that was found, of an episode of any env. Raises NotFound."""
        pending = self._pending.get(episode_id)
        found = pending.verdict if pending else await self._found(episode_id)
        if found is None:
            raise NotFound(
                f"There is no verdict of an episode {episode_id[:80]!r}: it was not evaluated, or is no longer kept."
            )
        return found

    def expect(self, task: Task) -> None:
        """An episode of `task` began: have the evaluators ready by its end. They take seconds to import, once."""
        if self._tasks is not None and task.evaluator is not None and not task.evaluator.infeasible:
            self._tasks.start_soon(self._evaluators.warm)

    async def doubt(self, task: Task) -> str:
        """Why an episode of `task` could be played and not be judged here; "" when nothing is known against it."""
        if task.evaluator is None or task.evaluator.infeasible or await self._evaluators.look():
            return ""
        return f"the episode cannot be judged: {NO_EVALUATORS}"

    def is_over(self, env: int) -> bool:
        """Whether nothing more is to be expected of the env's episode: it has none, or its verdict, or has ended and
        cannot have one."""
        now = self._envs.env(env)
        if now.state is not EnvState.PLAYING or now.episode is None:
            return now.state is not EnvState.RESETTING
        pending = self._pending.get(now.episode.id)
        _, play = self._envs.played(env)
        judged = pending is not None and pending.done.is_set()
        return judged or (now.episode.done and play.task.evaluator is None)

    @property
    def running(self) -> int:
        """How many episodes are being judged."""
        return sum(1 for pending in self._pending.values() if not pending.done.is_set())

    async def idle(self) -> None:
        """Return when nothing is being judged."""
        for pending in tuple(self._pending.values()):
            await pending.done.wait()

    async def _find(self, episode: Episode, play: Play, pending: _Pending) -> None:
        try:
            verdict = await self._found(episode.id)
            found = verdict is not None
            if verdict is None:
                with structlog.contextvars.bound_contextvars(episode_id=episode.id, env=episode.env):
                    verdict = await self._judge(episode, play)
            with anyio.CancelScope(shield=True):
                if not found:
                    # Told together with it: the next life, which finds it, would not tell of it.
                    self._store.put(Kind.VERDICTS, episode.id, verdict)
                    self._tell(verdict)
                    await self._store.settle()
                # Only now: what is in the bundle and not in the journal would be a second one. An earlier life may have
                # ended between the two.
                await play.bundle.verdict(verdict)
                await play.bundle.flushed()
            pending.verdict = verdict
        finally:
            pending.done.set()
            self._forget()

    async def _found(self, episode_id: str) -> Verdict | None:
        """By an earlier life, or for an episode that is no longer played. The journal has it first, and the evidence
        longer."""
        kept = await self._store.get(Kind.VERDICTS, episode_id, Verdict)
        return kept or await self._bundles.get_verdict(episode_id)

    def _forget(self) -> None:
        """Keep the verdicts of episodes that their envs still have: those must never be found twice. The others are
        read from the journal, or their bundles."""
        had = {env.episode.id for env in map(self._envs.env, range(len(self._envs))) if env.episode}
        for episode_id, pending in tuple(self._pending.items()):
            if pending.done.is_set() and episode_id not in had:
                del self._pending[episode_id]

    async def _judge(self, episode: Episode, play: Play) -> Verdict:
        findings = _Findings(time.monotonic(), list(play.warnings))
        score: float | None = None
        error: EnvdError | None = None
        try:
            if play.interrupted:
                raise EvaluationInterrupted(
                    "The daemon ended while this episode was judged, and what was done to its desktop for that is not "
                    "done a second time."
                )
            with anyio.fail_after(self._settings.evaluation_timeout):
                score = await self._score(episode, play, findings)
        except TimeoutError:
            limit = f"{self._settings.evaluation_timeout:g} s"
            error = EvaluationExpired(
                f"The evaluation was not done within {limit}.", hint="ENVD_EVALUATION_TIMEOUT is the limit."
            )
        except EnvdError as failure:
            error = failure
        except Exception as mistake:
            logger.exception("an evaluation broke", episode_id=episode.id)
            error = InternalError(f"The daemon made a mistake: {mistake!r}")
        if error is not None and play.replaced:
            error = EvaluationCancelled(f"The desktop of env {episode.env} was taken away: {play.why}.")
        findings.seconds["total"] = round(time.monotonic() - findings.began, 4)
        self._envs.has_verdict(episode)
        return self._verdict(episode, play, findings, score, error)

    async def _score(self, episode: Episode, play: Play, findings: _Findings) -> float:
        if play.task.evaluator is None:
            await self._envs.between_steps(episode.env)
            raise NotEvaluable(
                f"The task{f' {play.task.id}' if play.task.id else ''} of env {episode.env} has no evaluator.",
                hint="Give its task file one, or judge it yourself by the evidence.",
            )
        evaluator = play.task.evaluator
        async with self._envs.judging(episode) as judged:
            gave_up = judged.episode.end_reason is EndReason.FAIL
            if evaluator.infeasible or gave_up:
                # The desktop has no say in it, so its post-configuration, which could only fail, is not run.
                await judged.while_alive(lambda: self._last_look(judged, play, findings))
                findings.detail = (
                    f"By the rule for giving up: the task is {'in' if evaluator.infeasible else ''}feasible, "
                    f"and the model {'gave up' if gave_up else 'did not give up'}."
                )
                findings.raw = (float(evaluator.infeasible and gave_up),)
                return float(findings.raw[0])
            return await judged.while_alive(lambda: self._ask(judged, play, findings))

    async def _ask(self, judged: Judged, play: Play, findings: _Findings) -> float:
        """Bring the desktop into the state that is judged, and have the task's own evaluator judge it."""
        evaluator = play.task.evaluator
        assert evaluator is not None
        async with self._evaluators.prepare(evaluator) as preparation:
            began = time.monotonic()
            context = self._envs.context(judged.desktop, findings.postconfig.append)
            context.outputs = play.outputs
            if evaluator.postconfig:
                await self._envs.is_being_judged(judged)
            try:
                await run_steps(evaluator.postconfig, context)
            finally:
                findings.seconds["postconfig"] = round(time.monotonic() - began, 4)
                findings.warnings += warnings_of(findings.postconfig, "evaluator.postconfig")
            await self._last_look(judged, play, findings)
            waited = time.monotonic()
            await preparation.ready()
            findings.seconds["prepare"] = round(time.monotonic() - waited, 4)
            left = self._settings.evaluation_timeout - (time.monotonic() - findings.began)
            grade = await preparation.grade(judged.desktop, context, play, judged.episode.started_at, left - MARGIN)
            await play.bundle.grading(grade.report, grade.folder)
        findings.metrics, findings.raw = grade.metrics, grade.raw
        findings.warnings += grade.warnings
        findings.evaluator_version = grade.evaluator_version
        findings.seconds |= grade.seconds
        if grade.failure is not None:
            raise grade.failure
        assert grade.score is not None
        return grade.score

    async def _last_look(self, judged: Judged, play: Play, findings: _Findings) -> None:
        before = None if findings.postconfig else play.last_seen
        picture, settled, _ = await self._envs.at_rest(judged.desktop, before=before)
        findings.settled, findings.seconds["settle"] = settled, settled.seconds
        if not settled.still:
            findings.warnings.append(f"the screen was still changing after {settled.seconds:.1f} s")
        await play.bundle.final(picture)

    def _verdict(
        self, episode: Episode, play: Play, findings: _Findings, score: float | None, error: EnvdError | None
    ) -> Verdict:
        now = self._envs.env(episode.env).episode
        episode = now if now is not None and now.id == episode.id else episode
        return Verdict(
            episode_id=episode.id,
            env=episode.env,
            task_id=play.task.id,
            status=_status(error),
            score=score if error is None else None,
            raw=findings.raw,
            mask=error is not None,
            fault=error.fault if error else None,
            code=error.code if error else None,
            detail=error.detail if error else findings.detail,
            hint=error.hint if error else "",
            metrics=findings.metrics,
            postconfig=tuple(findings.postconfig),
            settled=findings.settled,
            warnings=tuple(findings.warnings),
            provenance=self._provenance(episode, play, findings),
            evaluated_at=time.time(),
            seconds=findings.seconds,
        )

    def _provenance(self, episode: Episode, play: Play, findings: _Findings) -> Provenance:
        job = self._store.get_job(play.job_id)
        spent: dict[str, float] = {}
        for phase in job.phases if job else ():
            spent[phase.name] = round(spent.get(phase.name, 0.0) + (phase.seconds or 0.0), 3)
        image = ", ".join(filter(None, (self._driver.image, play.browser)))
        return Provenance(
            server_version=__version__,
            provider=self._driver.name,
            image=image,
            task_hash=play.task.hash,
            evaluator_version=findings.evaluator_version,
            screen=episode.screen,
            steps=episode.steps,
            actions=episode.actions,
            end_reason=episode.end_reason,
            reset_path=episode.reset_path,
            reset_seconds=spent,
            attempts=job.attempts if job else 1,
        )

    def _tell(self, verdict: Verdict) -> None:
        told = verdict.model_dump(
            mode="json", include={"episode_id", "status", "score", "mask", "fault", "code", "detail", "seconds"}
        )
        message = (
            f"scored {verdict.score:g}"
            if verdict.score is not None
            else f"no score: {verdict.status}: {verdict.detail}"
        )
        self._events.publish("verdict", env=verdict.env, **told, message=message)


def error_of(verdict: Verdict) -> EnvdError:
    """What a caller is answered who can only be given a number or an error. 500 for what asking again cannot change,
    503 for the rest; the fact `verdict` has all of it but the metrics' values."""
    assert verdict.code is not None
    assert verdict.fault is not None
    error = error_classes().get(verdict.code, InfraError)(verdict.detail, hint=verdict.hint)
    error.facts = {"verdict": verdict.model_dump(mode="json", exclude={"metrics", "postconfig"})}
    error.fault = verdict.fault
    # The verdict stays what it is: a retry is answered with the same.
    error.retryable = False
    lasting = (VerdictStatus.EVALUATOR_ERROR, VerdictStatus.TASK_ERROR, VerdictStatus.NOT_EVALUABLE)
    error.status = 500 if verdict.status in lasting else 503
    return error


STATUSES: tuple[tuple[type[EnvdError], VerdictStatus], ...] = (
    (EvaluationCancelled, VerdictStatus.CANCELLED),
    (EvaluationExpired, VerdictStatus.EXPIRED),
    (EvaluatorError, VerdictStatus.EVALUATOR_ERROR),
    (EvaluatorsMissing, VerdictStatus.NOT_EVALUABLE),
    (NotEvaluable, VerdictStatus.NOT_EVALUABLE),
)


def _status(error: EnvdError | None) -> VerdictStatus:
    if error is None:
        return VerdictStatus.SCORED
    for cls, status in STATUSES:
        if isinstance(error, cls):
            return status
    return VerdictStatus.TASK_ERROR if error.fault is Fault.TASK else VerdictStatus.INFRA_ERROR
