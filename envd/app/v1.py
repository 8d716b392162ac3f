"""The native API under /v1, and the probes of load balancers: /livez, /readyz, /version."""

from __future__ import annotations

import math
import re
import time

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .. import __version__
from ..boot.queue import Reset
from ..calls import Sent
from ..errors import InvalidRequest
from ..models import DrainRequest, Job, JobState, LinkRequest, ResetRequest, StepRequest, Verdict
from ..settings import effective
from ..telemetry.about import note
from .bodies import (
    LONGEST_POLL,
    about,
    env_of,
    hold,
    number_in_query,
    read_call,
    read_json,
    read_model,
    sent,
    service_of,
    wait_preferred,
)
from .gate import caller_of, needed_scope
from .recorded import picture_response, width_asked
from .sse import EventStream


def job_json(job: Job, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    about(job)
    body = job.model_dump(mode="json") | {"links": job.links}
    return JSONResponse(body, status, {"ETag": f'"{job.version}"', "Cache-Control": "no-store", **(headers or {})})


def verdict_json(verdict: Verdict) -> Response:
    note(env=verdict.env, episode_id=verdict.episode_id)
    return JSONResponse(verdict.model_dump(mode="json") | {"links": verdict.links})


def accepted(job: Job, headers: dict[str, str]) -> Response:
    """202 with where to look, and when looking first makes sense."""
    soon = min(30, math.ceil((job.eta_s or 0) / 4) + 1)
    return job_json(job, 202, {"Location": job.links["self"], "Retry-After": str(soon), **headers})


async def reset(request: Request) -> Response:
    """Ask for a clean desktop with a task set up on it. An identical reset joins the job that runs or waits."""
    asked, how_sent = await read_call(request, ResetRequest)
    service = service_of(request)
    service.refuse_other_screen(asked.screen)
    how = Reset(
        max_steps=asked.max_steps,
        counts=asked.counts,
        episode_timeout_s=asked.episode_timeout_s,
        queue_timeout_s=asked.queue_timeout_s,
    )
    job = await service.reset(env_of(request), asked.task, how, how_sent)
    return await _accepted(request, job, how_sent)


async def _accepted(request: Request, job: Job, how_sent: Sent) -> Response:
    """At once; or, for a caller that would rather wait (`Prefer: wait=…`), once it has ended or the time is over."""
    service, headers = service_of(request), {}
    if (wait := wait_preferred(request)) is not None:
        left = LONGEST_POLL if how_sent.left is None else how_sent.left
        headers = {"Preference-Applied": "wait"}
        with anyio.move_on_after(min(wait, left, LONGEST_POLL)):
            await hold(request, lambda: service.queue.ended(job.id))
    return accepted(service.queue.get(job.id), headers)


async def prewarm(request: Request) -> Response:
    """Have a clean desktop stand by for the next reset."""
    how_sent = sent(request, await read_json(request))
    job = await service_of(request).prewarm(how_sent)
    return await _accepted(request, job, how_sent)


async def job(request: Request) -> Response:
    """The job. With `after` (a version) and `wait` (seconds, at most 60): as soon as it is newer than that."""
    service, job_id = service_of(request), request.path_params["job"]
    found = service.queue.get(job_id)
    wait = number_in_query(request, "wait", 0, LONGEST_POLL)
    after = int(number_in_query(request, "after", 0, 2**53))
    if wait and found.version <= after and not found.state.terminal:
        changed = await hold(request, lambda: service.queue.changed(job_id, after, wait))
        if changed is None:
            service.refuse_when_draining()
        found = changed or service.queue.get(job_id)
    tag = f'"{found.version}"'
    if tag in re.split(r"\s*,\s*|W/", request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers={"ETag": tag})
    return job_json(found)


async def jobs(request: Request) -> Response:
    """The jobs that are kept, newest first, of one `env` or in one `state` if given, at most 1,000."""
    query = request.query_params
    env = number_in_query(request, "env", 0, 10**6) if "env" in query else None
    state = query.get("state")
    if state is not None and state not in list(JobState):
        message = f"must be one of {', '.join(JobState)}"
        raise InvalidRequest(f"state: {message}.", errors=[{"field": "state", "message": message}])
    found = [
        one
        for one in reversed(tuple(service_of(request).store.jobs()))
        if (env is None or one.env == env) and (state is None or one.state == state)
    ]
    return JSONResponse({"jobs": [one.model_dump(mode="json") for one in found[:1000]]})


async def cancel(request: Request) -> Response:
    """Ask for the job's end: 202 while its desktop is being removed, 200 once it has ended."""
    service = service_of(request)
    if service.settings.keep_desktops:
        # The job is left to the next life as it is.
        service.refuse_when_draining()
    found = service.queue.cancel(request.path_params["job"])
    return job_json(found, 200 if found.state.terminal else 202)


async def queue(request: Request) -> Response:
    """What boots, what waits in which order, and how much may wait."""
    return JSONResponse(service_of(request).queue_view())


async def envs(request: Request) -> Response:
    """All envs with their desktops and episodes."""
    return JSONResponse({"envs": [env.model_dump(mode="json") for env in service_of(request).all_envs()]})


async def env(request: Request) -> Response:
    """One env with its desktop and episode."""
    service, number = service_of(request), env_of(request)
    service.about(number)
    return JSONResponse(service.env(number).model_dump(mode="json"))


async def step(request: Request) -> Response:
    """Run a prediction or programs on the env's desktop, once, and look."""
    asked, how_sent = await read_call(request, StepRequest)
    if (asked.prediction is None) == (asked.actions is None):
        message = "give exactly one of prediction and actions"
        raise InvalidRequest(f"{message}.", errors=[{"field": "prediction", "message": message}])
    result = await service_of(request).step(env_of(request), asked, how_sent)
    return Response(result.model_dump_json(), media_type="application/json")


async def screenshot(request: Request) -> Response:
    """The screen as it is now; with `width`, as a JPEG of at most so many pixels across."""
    width = width_asked(request)
    service, number = service_of(request), env_of(request)
    service.about(number)
    picture = await service.envs.screenshot(number)
    return await picture_response(picture, width, "no-store")


async def history(request: Request) -> Response:
    """The messages of the current episode, as models are shown them."""
    service, number = service_of(request), env_of(request)
    service.about(number)
    dialogue = service.envs.dialogue(number)
    messages = dialogue.wire_json() if dialogue else b"[]"
    return Response(b'{"history_messages": ' + messages + b"}", media_type="application/json")


async def evaluate(request: Request) -> Response:
    """Judge the episode with its task's own evaluator: a verdict, with a score or with the reason why there is none.
    Found once: whoever asks again is answered the same."""
    how_sent = sent(request, await read_json(request))
    return verdict_json(await service_of(request).evaluate(env_of(request), how_sent))


async def verdict(request: Request) -> Response:
    """The verdict of an episode that was evaluated, of any env, for as long as its evidence is kept."""
    return verdict_json(await service_of(request).evaluations.verdict(request.path_params["episode"]))


async def bundle(request: Request) -> Response:
    """The evidence that an episode left, as one archive."""
    episode_id = request.path_params["episode"]
    parts = await service_of(request).bundles.archive(episode_id)
    headers = {"Content-Disposition": f'attachment; filename="{episode_id}.tar"', "Cache-Control": "no-store"}
    return StreamingResponse(parts, media_type="application/x-tar", headers=headers)


async def episodes(request: Request) -> Response:
    """Ids of the episodes whose evidence is kept, the newest first."""
    return JSONResponse({"episodes": await service_of(request).bundles.ids()})


async def drain(request: Request) -> Response:
    """End the daemon once what is played has ended, or `limit_s` seconds are over: no new work is taken from here on.
    GET tells how far it is."""
    service = service_of(request)
    if request.method == "POST":
        service.ask_to_drain((await read_model(request, DrainRequest)).limit_s)
    left = None if service.drain_until is None else round(max(0.0, service.drain_until - time.monotonic()), 1)
    told = {"draining": service.closing.is_set(), "left_s": left, "envs": service.going_on}
    return JSONResponse(told, 202 if request.method == "POST" else 200, {"Cache-Control": "no-store"})


async def livez(request: Request) -> Response:
    """The event loop turns."""
    return JSONResponse({"live": True})


async def link(request: Request) -> Response:
    """A path at which a browser, which cannot send a token, may GET for a while what `path` is: a picture, a stream;
    one that ends in / is good for all that is below it. `seconds` is at most an hour. Who asks must be allowed to GET
    it."""
    asked = await read_model(request, LinkRequest)
    needed = needed_scope("GET", asked.path)
    caller_of(request.scope).require(needed, f"A link to {asked.path[:100]}")
    signature = service_of(request).access.link(asked.path, asked.seconds, needed)
    return JSONResponse({"path": f"{asked.path}?signature={signature}"}, 201, {"Cache-Control": "no-store"})


async def readyz(request: Request) -> Response:
    """Whether a reset can be served now, and if not why; with what makes it doubtful, such as boots that failed.
    That there are no evaluators here is among those too."""
    service = service_of(request)
    await service.evaluators.look()
    said = service.readiness()
    return JSONResponse(said, 200 if said["ready"] else 503)


async def whoami(request: Request) -> Response:
    """Who the caller is taken for, and what it may: its name, its scope (read, play, admin), how it was known (token,
    link, cookie, network, open), and until when (Unix seconds; null for ever)."""
    caller = caller_of(request.scope)
    said = {"name": caller.name, "scope": caller.scope.name.lower(), "how": caller.how, "until": caller.until}
    return JSONResponse(said, headers={"Cache-Control": "no-store"})


async def version(request: Request) -> Response:
    """Version, settings with their origins, and the timeouts that clients should use."""
    service = service_of(request)
    return JSONResponse(
        {
            "version": __version__,
            "daemon_id": service.daemon_id,
            "epoch": service.events.epoch,
            "provider": service.driver.name,
            "started_at": service.started_at,
            "client_timeouts_s": {"reset": service.settings.legacy_wait + 50, "step": 300, "evaluate": 300},
            "settings": effective(service.settings),
        }
    )


routes = [
    Route("/v1/envs", envs),
    Route("/v1/envs/{env}", env),
    Route("/v1/envs/{env}/reset", reset, methods=["POST"]),
    Route("/v1/envs/{env}/step", step, methods=["POST"]),
    Route("/v1/envs/{env}/evaluate", evaluate, methods=["POST"]),
    Route("/v1/envs/{env}/screenshot", screenshot),
    Route("/v1/envs/{env}/history", history),
    Route("/v1/episodes", episodes),
    Route("/v1/episodes/{episode}/verdict", verdict),
    Route("/v1/episodes/{episode}/bundle", bundle),
    Route("/v1/jobs", jobs),
    Route("/v1/jobs/{job}", job),
    Route("/v1/jobs/{job}/cancel", cancel, methods=["POST"]),
    Route("/v1/jobs/{job}/events", EventStream(), methods=["GET"]),
    Route("/v1/events", EventStream(), methods=["GET"]),
    Route("/v1/queue", queue),
    Route("/v1/prewarm", prewarm, methods=["POST"]),
    Route("/v1/drain", drain, methods=["GET", "POST"]),
    Route("/livez", livez),
    Route("/v1/whoami", whoami),
    Route("/v1/links", link, methods=["POST"]),
    Route("/readyz", readyz),
    Route("/version", version),
]
