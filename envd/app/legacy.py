"""The wire of existing trainers: `/env/reset`, `/env/step`, `/env/evaluate`, `/env/history_messages`, `/health`.

Three dialects are spoken by clients in the field, here called A (the first), B and C (with `slot_id`); these routes
satisfy all three at once. What differs from the old servers: a failure is never a 200 with nulls and never a number,
but `application/problem+json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..actions.dialogue import Dialogue
from ..calls import Sent
from ..errors import (
    DesktopLost,
    Draining,
    EpisodeOver,
    InfraError,
    InvalidRequest,
    JobCancelled,
    JobSuperseded,
    StillBooting,
    from_problem,
)
from ..evaluations import error_of
from ..models import EnvState, Job, JobState, StepRequest
from .bodies import about, hold, number_in_query, read_call, read_model, service_of

KVM_DEVICE = "/dev/kvm" if Path("/dev/kvm").exists() else None


class Slot(BaseModel):
    """Unknown fields are ignored: trainers send more than servers read."""

    model_config = ConfigDict(extra="ignore")
    slot_id: int = Field(default=0, ge=0)


class LegacyReset(Slot):
    task_config: dict[str, Any]


class LegacyStep(Slot):
    prediction: str


def shape(env: int, messages: bytes | None, *, done: bool, format_reward: float, problem: str = "") -> Response:
    """The one answer of reset and step. `messages` is a JSON array, already encoded. `problem` is there only when
    there is one: clients of every dialect ignore what they do not know."""
    body = b'{"env_idx": %d, "obs_messages": %b, "is_done": %b, "format_reward": %b%b}' % (
        env,
        messages or b"null",
        b"true" if done else b"false",
        repr(format_reward).encode(),
        b', "problem": ' + json.dumps(problem).encode() if problem else b"",
    )
    return Response(body, media_type="application/json")


async def reset(request: Request) -> Response:
    """Reset and wait for the observation. The job behind it goes on when the caller leaves or the wait runs out."""
    asked, how_sent = await read_call(request, LegacyReset)
    service = service_of(request)
    job = await service.reset(asked.slot_id, asked.task_config, sent=how_sent, until_told=True)
    job = await _ended(request, job, how_sent)
    if job.state is not JobState.SUCCEEDED:
        raise _failure(job)
    env = service.env(asked.slot_id)
    dialogue = service.envs.dialogue(asked.slot_id)
    if dialogue is None or env.episode is None or env.episode.id != job.episode_id:
        raise JobSuperseded(
            f"Another reset of env {asked.slot_id} followed before this answer was sent.", job=_shown(job)
        )
    service.told(asked.slot_id, job)
    return shape(asked.slot_id, dialogue.wire_json(), done=False, format_reward=0.0)


async def _ended(request: Request, job: Job, how_sent: Sent) -> Job:
    """The job once it has ended. Raises StillBooting when the wait runs out, Draining when the daemon stops first."""
    service, patience = service_of(request), service_of(request).settings.legacy_wait
    if how_sent.left is not None:
        patience = min(patience, how_sent.left)
    with anyio.move_on_after(patience):
        await hold(request, lambda: service.queue.ended(job.id))
    job = service.queue.get(job.id)
    about(job)
    goes_on = service.settings.keep_desktops
    # The drain cancels what runs at once, so the job may have ended by the time its waiter is woken.
    ended_by_it = service.closing.is_set() and not goes_on and job.state is JobState.CANCELLED
    if ended_by_it or (service.draining.is_set() and not job.state.terminal):
        if how_sent.key and not goes_on:
            # Sent again as this answer says, it is another reset, not the one that the end of the daemon cancelled.
            service.calls.forget(how_sent.key)
        words = "the reset goes on when it is back" if goes_on else "the reset is cancelled"
        raise Draining(f"The daemon is shutting down; {words}.", retry_after=10, job=_shown(job))
    if job.state.terminal:
        return job
    raise StillBooting(
        f"{job.id} is {job.state} (phase {job.phase}) after {patience:.0f} s; it goes on.",
        hint=f"Send the same reset again to wait on, or follow {job.links['events']}.",
        retry_after=job.eta_s or 30,
        eta_s=job.eta_s,
        job=_shown(job),
    )


def _failure(job: Job) -> Exception:
    if job.error is not None:
        error = from_problem(job.error)
        error.retry_after = error.retry_after or (5.0 if error.retryable else None)
        error.facts = {**error.facts, "job": _shown(job)}
        return error
    if job.state is JobState.CANCELLED:
        return JobCancelled(f"{job.id} was cancelled.", job=_shown(job))
    if job.state is JobState.SUPERSEDED:
        return JobSuperseded(f"A newer reset of env {job.env} took the place of {job.id}.", job=_shown(job))
    return InfraError(f"{job.id} ended {job.state}.", job=_shown(job))


def _shown(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude={"error"}) | {"links": job.links}


async def step(request: Request) -> Response:
    """Run a prediction. After the episode's end nothing runs any more, and the answer is done again."""
    asked, how_sent = await read_call(request, LegacyStep)
    service = service_of(request)
    step = StepRequest(prediction=asked.prediction, include_screenshot=False)
    try:
        result = await service.step(asked.slot_id, step, how_sent)
    except EpisodeOver:
        return shape(asked.slot_id, None, done=True, format_reward=0.0)
    messages = None if result.done else await service.envs.messages_after(result)
    if messages is None and not result.done:
        raise DesktopLost(
            f"The step was done, and env {asked.slot_id} plays another episode by now.", hint="Go on with that one."
        )
    return shape(asked.slot_id, messages, done=result.done, format_reward=result.format_reward, problem=result.problem)


async def evaluate(request: Request) -> Response:
    """A bare number or a problem; never a number for a failure. Found once: whoever asks again is answered the same."""
    asked, how_sent = await read_call(request, Slot)
    verdict = await service_of(request).evaluate(asked.slot_id, how_sent)
    if verdict.score is None:
        raise error_of(verdict)
    return JSONResponse(verdict.score)


async def history(request: Request) -> Response:
    """The messages of the current episode. POST takes `slot_id` in the body, GET in the query (the list under its
    three names)."""
    slot_id = (await read_model(request, Slot)).slot_id if request.method == "POST" else _slot_in_query(request)
    service = service_of(request)
    service.envs.env(slot_id)
    dialogue: Dialogue | None = service.envs.dialogue(slot_id)
    messages = dialogue.wire_json() if dialogue else b"[]"
    names = (b"history_messages",) if request.method == "POST" else (b"history_messages", b"messages", b"history")
    body = b", ".join(b'"%b": %b' % (name, messages) for name in names)
    return Response(b"{" + body + b"}", media_type="application/json")


def _slot_in_query(request: Request) -> int:
    slot = number_in_query(request, "slot_id", 0, 10**6)
    if slot != int(slot):
        raise InvalidRequest(
            "slot_id: must be a whole number.", errors=[{"field": "slot_id", "message": "must be whole"}]
        )
    return int(slot)


async def health(request: Request) -> Response:
    """The fields of all published servers. `status` says that the daemon answers; `/readyz` says whether a reset can
    be served."""
    service = service_of(request)
    envs = service.all_envs()
    statuses = {str(env.id): "initialized" if env.state is EnvState.PLAYING else "not_initialized" for env in envs}
    reasons = service.not_ready()
    return JSONResponse(
        {
            "status": "ok",
            "provider": service.driver.name,
            "observation_type": "screenshot",
            "screenshot_source": "guest",
            # A device that opens is not yet KVM that works: only where a guest was seen to execute.
            "kvm_available": service.kvm is not None and service.kvm.works,
            "kvm_device": KVM_DEVICE,
            "env_status": statuses["0"],
            "message": "; ".join(reasons) or "ready",
            "pool_size": len(envs),
            "slot_statuses": statuses,
        }
    )


routes = [
    Route("/env/reset", reset, methods=["POST"]),
    Route("/env/step", step, methods=["POST"]),
    Route("/env/evaluate", evaluate, methods=["POST"]),
    Route("/env/history_messages", history, methods=["GET", "POST"]),
    Route("/health", health),
]
