"""A small envd server that keeps to the wire contract, on a real socket, and breaks it on demand.

`server.break_next(...)` queues faults per route; `server.advance(...)` moves a job on; `server.restart()` comes back on
the same port with a new epoch. `server.seen` holds every request, and `server.until` waits for one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from PIL import Image

from envd.errors import Draining, EnvdError, JobCancelled, NotFound, TooManyWatchers, UnknownJob
from envd.errors import Fault as Blame
from envd.models import (
    ActionOutcome,
    ActionResult,
    EndReason,
    Env,
    EnvState,
    Event,
    Job,
    JobKind,
    JobState,
    Provenance,
    ResetPath,
    StepResult,
    Verdict,
    VerdictStatus,
)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()

Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
"""Answers in place of the route; None lets the route answer after all."""


class FakeServer:
    def __init__(self) -> None:
        self.port = 0
        self.epoch = 1
        self.jobs: dict[str, Job] = {}
        self.events: list[Event] = []
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        """(method, path with query, {"body", "last_event_id"})"""
        self.history: list[dict[str, Any]] = []
        self.keeps_keys = False
        """It says of itself that it answers keyed calls again."""
        self.score: Any = 1.0
        self.verdict = verdict()
        self.bundles: dict[str, bytes] = {}
        self.streams = 0
        self._faults: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What tests do with it

    def break_next(self, method: str, path: str, *faults: Fault) -> None:
        self._faults[method, path].extend(faults)

    def new_job(self, **facts: Any) -> Job:
        job = Job(**({"id": f"job-{len(self.jobs) + 1}", "env": 0, "created_at": time.time()} | facts))
        self.jobs[job.id] = job
        self.publish("state", job=job)
        return job

    def advance(self, job_id: str, kind: str = "state", **changes: Any) -> Job:
        job = self.jobs[job_id]
        job = Job.model_validate(job.model_copy(update=changes | {"version": job.version + 1}).model_dump())
        self.jobs[job_id] = job
        self.publish(kind, job=job)
        return job

    def publish(self, kind: str, job: Job | None = None, **data: Any) -> None:
        self.events.append(self._event(kind, len(self.events) + 1, job, data))
        self._notify()

    async def until(self, fact: Callable[[], Any]) -> None:
        """Return once `fact()` is true."""
        async with asyncio.timeout(10):
            while not fact():
                await self._changed.wait()

    def count(self, method: str, path: str) -> int:
        return sum(1 for seen in self.seen if seen[0] == method and seen[1].partition("?")[0] == path)

    async def stop(self) -> None:
        """Abruptly, as a killed daemon does."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def start(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024, middlewares=[self._middleware])
        app.add_routes(
            [
                web.post("/v1/envs/{env}/reset", self._reset),
                web.post("/v1/envs/{env}/step", self._step),
                web.post("/v1/envs/{env}/evaluate", self._evaluate),
                web.get("/v1/envs/{env}/screenshot", self._screenshot),
                web.get("/v1/envs/{env}/history", self._history),
                web.get("/v1/envs/{env}", self._env),
                web.get("/v1/envs", self._envs),
                web.get("/v1/episodes", self._episodes),
                web.get("/v1/episodes/{episode}/verdict", self._verdict),
                web.get("/v1/episodes/{episode}/bundle", self._bundle),
                web.get("/v1/queue", self._queue),
                web.post("/v1/prewarm", self._prewarm),
                web.get("/v1/jobs", self._jobs),
                web.get("/v1/jobs/{job}", self._job),
                web.post("/v1/jobs/{job}/cancel", self._cancel),
                web.get("/v1/jobs/{job}/events", self._job_events),
                web.get("/v1/events", self._all_events),
                web.get("/readyz", self._ready),
                web.get("/version", self._version),
                web.post("/env/reset", self._legacy_reset),
                web.post("/env/step", self._legacy_step),
                web.post("/env/evaluate", self._legacy_evaluate),
                web.post("/env/history_messages", self._legacy_history),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def restart(self, *, forget: bool = False) -> None:
        """What a kill and a start do: streams break, the sequence begins anew; jobs stay unless told otherwise."""
        await self.stop()
        self.epoch += 1
        self.events.clear()
        if forget:
            self.jobs.clear()
        await self.start()

    # Within

    def _event(self, kind: str, sequence: int, job: Job | None, data: dict[str, Any]) -> Event:
        return Event(
            id=f"e{self.epoch}-{sequence}",
            kind=kind,
            at=time.time(),
            job_id=job.id if job else None,
            env=job.env if job else None,
            job=job,
            data=data,
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        text = await request.text()
        facts = {
            "body": json.loads(text) if text else None,
            "last_event_id": request.headers.get("Last-Event-ID"),
            "key": request.headers.get("Idempotency-Key"),
            "deadline": request.headers.get("X-Request-Deadline"),
        }
        self.seen.append((request.method, request.path_qs, facts))
        self._notify()
        faults = self._faults[request.method, request.path]
        try:
            if faults and (broken := await faults.popleft()(request)) is not None:
                return broken
            answer = await handler(request)
        except EnvdError as error:
            answer = problem(error)
        if self.keeps_keys and not answer.prepared:
            answer.headers["Envd-Version"] = "0"
        return answer

    def _find(self, request: web.Request) -> Job:
        job = self.jobs.get(request.match_info["job"])
        if job is None:
            raise UnknownJob(f"There is no job {request.match_info['job']}.")
        return job

    async def _reset(self, request: web.Request) -> web.Response:
        job = self.new_job(env=int(request.match_info["env"]))
        headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": "1"}
        return web.json_response(document(job) | {"links": job.links}, status=202, headers=headers)

    async def _prewarm(self, request: web.Request) -> web.Response:
        job = self.new_job(env=None, kind=JobKind.PREWARM)
        return web.json_response(document(job) | {"links": job.links}, status=202)

    async def _jobs(self, request: web.Request) -> web.Response:
        wanted = request.query.get("env"), request.query.get("state")
        jobs = [j for j in self.jobs.values() if wanted[0] in (None, str(j.env)) and wanted[1] in (None, j.state)]
        return web.json_response({"jobs": [document(job) for job in jobs]})

    async def _job(self, request: web.Request) -> web.Response:
        job = self._find(request)
        try:
            async with asyncio.timeout(float(request.query.get("wait", 0))):
                while job.version <= int(request.query.get("after", 0)):
                    await self._changed.wait()
                    job = self._find(request)
        except TimeoutError:
            pass
        return web.json_response(document(job), headers={"ETag": f'"{job.version}"'})

    async def _cancel(self, request: web.Request) -> web.Response:
        job = self._find(request)
        if job.state.terminal:
            return web.json_response(document(job))
        error = JobCancelled("Somebody asked for that.").problem()
        return web.json_response(document(self.advance(job.id, state=JobState.CANCELLED, error=error)), status=202)

    async def _queue(self, request: web.Request) -> web.Response:
        return web.json_response(self._queue_document())

    def _queue_document(self) -> dict[str, Any]:
        def in_state(state: JobState) -> list[dict[str, Any]]:
            return [document(job) for job in self.jobs.values() if job.state is state]

        return {"booting": in_state(JobState.BOOTING), "waiting": in_state(JobState.QUEUED), "limit": 1024}

    async def _envs(self, request: web.Request) -> web.Response:
        return web.json_response({"envs": [document(Env(id=0, state=EnvState.EMPTY))]})

    async def _env(self, request: web.Request) -> web.Response:
        return web.json_response(document(Env(id=int(request.match_info["env"]), state=EnvState.EMPTY)))

    async def _step(self, request: web.Request) -> web.Response:
        body = await request.json()
        actions = tuple(
            ActionResult(action=action, outcome=ActionOutcome.OK, returncode=0, seconds=0.01)
            for action in body.get("actions", [body.get("prediction")])
        )
        result = StepResult(
            env=int(request.match_info["env"]), episode_id="e1", step=1, done=False, format_reward=0.0, actions=actions
        )
        return web.json_response(document(result))

    async def _screenshot(self, request: web.Request) -> web.Response:
        return web.Response(body=PNG, content_type="image/png")

    async def _history(self, request: web.Request) -> web.Response:
        return web.json_response({"history_messages": self.history})

    async def _evaluate(self, request: web.Request) -> web.Response:
        return web.json_response(document(self.verdict) | {"links": self.verdict.links})

    async def _episodes(self, request: web.Request) -> web.Response:
        return web.json_response({"episodes": list(self.bundles)})

    async def _verdict(self, request: web.Request) -> web.Response:
        if request.match_info["episode"] != self.verdict.episode_id:
            raise NotFound("There is no verdict of that episode.")
        return await self._evaluate(request)

    async def _bundle(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["episode"] not in self.bundles:
            raise NotFound("There is no bundle of that episode.")
        return await _tar(request, self.bundles[request.match_info["episode"]])

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": False, "reasons": ["no desktop yet"]}, status=503)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.1.0"})

    # The legacy dialect

    async def _legacy_reset(self, request: web.Request) -> web.Response:
        self.history = [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": [{"type": "text", "text": "p"}]},
            {"role": "user", "content": [wire_image()]},
        ]
        return web.json_response(self._observation(0, done=False))

    async def _legacy_step(self, request: web.Request) -> web.Response:
        prediction = (await request.json())["prediction"]
        done = "finished" in prediction
        self.history.append({"role": "assistant", "content": [{"type": "text", "text": prediction}]})
        if not done:
            self.history.append({"role": "user", "content": [wire_image()]})
        return web.json_response(self._observation(0, done=done))

    def _observation(self, env: int, *, done: bool) -> dict[str, Any]:
        return {
            "env_idx": env,
            "obs_messages": None if done else self.history,
            "is_done": done,
            "format_reward": 0.0,
            "end_reason": EndReason.DONE if done else None,
        }

    async def _legacy_evaluate(self, request: web.Request) -> web.Response:
        return web.json_response(self.score)

    async def _legacy_history(self, request: web.Request) -> web.Response:
        return web.json_response({"history_messages": self.history})

    # Streams

    async def _job_events(self, request: web.Request) -> web.StreamResponse:
        job = self._find(request)
        return await self._stream(request, job.id)

    async def _all_events(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, None)

    async def _stream(self, request: web.Request, job_id: str | None) -> web.StreamResponse:
        last = request.headers.get("Last-Event-ID", "")
        epoch, _, number = last.rpartition("-")
        known = epoch == f"e{self.epoch}"
        after = int(number) if known else len(self.events)
        if known and any(e.terminal and e.job_id == job_id for e in self.events[:after]):
            return web.Response(status=204)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.streams += 1
        self._notify()
        await response.write(b"retry: 20\n\n")
        await response.write(f"id: e{self.epoch}-{after}\n".encode() + bare("snapshot", self._snapshot(job_id)))
        if last and not known:
            await response.write(written(self._event("gap", after, None, {"reason": "unknown id"})))
        try:
            while True:
                for event in self.events[after:]:
                    after += 1
                    if event.kind == "server-shutdown":
                        await response.write(bare(event.kind, {"kind": event.kind, "data": event.data}))
                        return response
                    if event.kind == "raw":
                        await response.write(event.data["bytes"].encode())
                    elif job_id in (None, event.job_id):
                        await response.write(written(event))
                        if event.terminal and event.job_id == job_id:
                            return response
                await self._changed.wait()
        finally:
            self.streams -= 1
            self._notify()

    def _snapshot(self, job_id: str | None) -> dict[str, Any]:
        if job_id is not None:
            return {"job": document(self.jobs[job_id])}
        active = [document(job) for job in self.jobs.values() if not job.state.terminal]
        envs = [document(Env(id=0, state=EnvState.EMPTY))]
        return {"queue": self._queue_document(), "envs": envs, "jobs": active}


@asynccontextmanager
async def serving() -> AsyncGenerator[FakeServer, None]:
    server = FakeServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def document(model: Any) -> dict[str, Any]:
    result: dict[str, Any] = model.model_dump(mode="json")
    return result


def verdict(**facts: Any) -> Verdict:
    """One with a score, unless `facts` say otherwise."""
    provenance = Provenance(
        server_version="0.1.0",
        provider="sim",
        image="sim",
        task_hash="00",
        screen=(4, 3),
        steps=1,
        actions=1,
        end_reason=EndReason.DONE,
        reset_path=ResetPath.COLD,
    )
    scored = {"status": VerdictStatus.SCORED, "score": 1.0, "raw": (1.0,), "mask": False}
    about = {"episode_id": "e1", "env": 0, "task_id": "t", "provenance": provenance, "evaluated_at": time.time()}
    return Verdict.model_validate(about | scored | facts)


NO_SCORE: dict[str, Any] = {
    "status": VerdictStatus.INFRA_ERROR,
    "score": None,
    "raw": None,
    "mask": True,
    "fault": Blame.INFRA,
    "code": "guest_unreachable",
    "detail": "The guest went away.",
}
"""What makes a verdict one without a score."""


async def _tar(request: web.Request, content: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
    await response.prepare(request)
    await response.write(content)
    return response


def problem(error: EnvdError, **headers: str) -> web.Response:
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    body = error.problem().model_dump_json()
    return web.Response(status=error.status, text=body, content_type="application/problem+json", headers=headers)


def written(event: Event) -> bytes:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()


def bare(kind: str, data: dict[str, Any]) -> bytes:
    """What belongs to one stream alone, and so has no number in the log."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def wire_image() -> dict[str, Any]:
    return {"type": "image", "b64": base64.b64encode(PNG).decode(), "min_pixels": 3136, "max_pixels": 2116800}


# Faults


def answering(error: EnvdError) -> Fault:
    async def fault(request: web.Request) -> web.Response:
        return problem(error)

    return fault


def saying(status: int, text: str, content_type: str = "text/html") -> Fault:
    async def fault(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text, content_type=content_type)

    return fault


async def draining(request: web.Request) -> web.Response:
    return problem(Draining("Shutting down.", retry_after=0.05))


async def too_many(request: web.Request) -> web.Response:
    return problem(TooManyWatchers("Too many.", retry_after=5))


async def reset_connection(request: web.Request) -> None:
    """RST instead of an answer, after the request was read."""
    assert request.transport is not None
    sock = request.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


async def silent(request: web.Request) -> None:
    await asyncio.Event().wait()


async def endless_body(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" " * 1024 * 1024)


async def endless_bundle(request: web.Request) -> web.StreamResponse:
    response = await _tar(request, b"")
    while True:
        await response.write(b"\0" * 1024 * 1024)


async def half_a_bundle(request: web.Request) -> web.StreamResponse:
    """Lost in the middle."""
    response = await _tar(request, b"\0" * 3 * 1024 * 1024)
    await reset_connection(request)
    return response


async def bundle_that_stalls(request: web.Request) -> web.StreamResponse:
    await _tar(request, b"\0" * 3 * 1024 * 1024)
    return await asyncio.Event().wait()  # type: ignore[return-value]  # never comes


async def half_an_event(request: web.Request) -> web.StreamResponse:
    """A stream that breaks off in the middle of a message."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'retry: 20\n\nid: e1-99\nevent: state\ndata: {"id": "e1-')
    await reset_connection(request)
    return response
