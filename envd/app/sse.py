"""Server-sent events: `/v1/events` for everything, `/v1/jobs/{job}/events` for one job.

First `retry:` and a snapshot, so that nobody needs a second GET; then what the caller missed, if it says where it
was; then events as they come. A comment breaks the silence. The stream of a job ends with its terminal event, and
asking again after that gives 204, which tells an EventSource to stop. When the daemon ends, so does every stream,
with `server-shutdown`.

`/v1/events?stats=1` is for whoever shows the whole daemon, as the dashboard does: its snapshot tells more, and between
the events there are `env` (an env as it now is) and, every few seconds, `stats`. They have no ids, since they are not
in the log.

Plain ASGI, since a stream then costs one task and no copies: the publisher never waits for a reader, a reader that
does not read is cut off, and HTTP/2 is refused because hypercorn has no backpressure there.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import EnvdError, HttpVersionUnsupported, TooManyWatchers
from ..events import EventLog
from ..host import SAMPLE_SECONDS
from ..models import Event, Job
from ..service import Service
from .dashboard.view import View, concerned
from .problems import problem_response

RETRY_MS = 1000
SEND_LIMIT = 30.0
"""Seconds that a reader may leave a message unread before it is cut off."""
LINE_LIMIT = 16_000
"""Bytes of a data line. Readers have limits of their own, and proxies too."""
PIECE = 32 * 1024
MISSED = "Events were missed; the snapshot is current."

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """The ASGI endpoint of both routes; which one it is, the path parameters say."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        service: Service = scope["app"].state.service
        # What a snapshot tells, the next life of the daemon knows, too.
        await service.store.settle()
        try:
            stream = _open(request, service)
        except EnvdError as error:
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        if stream is None:
            await Response(status_code=204)(scope, receive, send)
        elif scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send({"type": "http.response.body", "body": b""})
        else:
            with counted(service):
                await stream.play(receive, send)


class _Stream:
    """One stream. What it opens with is made at once, so that its header, its snapshot and the event that follows
    agree."""

    def __init__(
        self, service: Service, job: Job | None, after: int | None, asked: bool, view: View | None = None
    ) -> None:
        self._service = service
        self._view = view
        self._events: EventLog = service.events
        self._job = job
        self._stats_due = 0.0
        resumed = after is not None and not self._events.missed(after)
        self._after = after if after is not None and resumed else self._events.last
        self._ended = job is not None and job.state.terminal and not resumed
        self._opening = f"retry: {RETRY_MS}\n\n".encode() + self._snapshot()
        if asked and not resumed:
            self._opening += _message("gap", {"kind": "gap", "data": {"message": MISSED}})
        if self._ended:
            self._opening += _encode(self._terminal_event())

    async def play(self, receive: Receive, send: Send) -> None:
        """Send until the end of the job, of the daemon, or of the reader's patience."""
        # The event before the first one sent, so that the caller can tell whether it lost any.
        headers = [*HEADERS, (b"last-event-id", f"{self._events.epoch}-{self._after}".encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with anyio.create_task_group() as tasks:

            async def watch_for_hangup() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch_for_hangup)
            try:
                async with aclosing(self._pieces()) as pieces:
                    async for piece in pieces:
                        with anyio.fail_after(SEND_LIMIT):
                            await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:
                pass
            tasks.cancel_scope.cancel()
        with anyio.move_on_after(1):
            await send({"type": "http.response.body", "body": b""})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        yield self._opening
        if self._ended:
            return
        silence = self._service.settings.heartbeat if self._view is None else SAMPLE_SECONDS
        following = self._events.follow(self._after, silence, self._concerns)
        async with aclosing(following) as batches:
            async for batch in batches:
                if batch is None and self._view is None:
                    yield b": still here\n\n"
                    continue
                for piece in _packed(batch or []):
                    yield piece
                if self._view is not None:
                    yield self._beside(self._view, batch)
                    continue
                assert batch is not None
                if self._job is not None and any(event.terminal for event in batch):
                    return
        # A reader that fell behind is let go without a word: when it comes back it is told of the gap.
        if self._events.closed:
            retry_s = round(random.uniform(1, 5), 2)
            yield f"retry: {int(retry_s * 1000)}\n".encode() + _message(
                "server-shutdown", {"kind": "server-shutdown", "data": {"retry_s": retry_s}}
            )

    def _beside(self, view: View, batch: list[Event] | None) -> bytes:
        """What a view is told beside these events, or after some time without any."""
        about = None if batch is None else concerned(batch)
        told = b"".join(_message("env", {"kind": "env", "env": env}) for env in view.envs(about))
        now = time.monotonic()
        if batch is None or now >= self._stats_due:
            self._stats_due = now + SAMPLE_SECONDS
            told += _message("stats", {"kind": "stats", **view.stats()})
        return told

    def _concerns(self, event: Event) -> bool:
        return self._job is None or event.job_id == self._job.id

    def _snapshot(self) -> bytes:
        """The state now. Its id is where the events that follow begin, so a reader that drops here resumes without
        loss."""
        if self._job is None:
            data = self._service.snapshot() if self._view is None else self._view.snapshot()
        else:
            data = {"job": self._service.queue.get(self._job.id).model_dump(mode="json")}
        return f"id: {self._events.epoch}-{self._after}\n".encode() + _message("snapshot", data)

    def _terminal_event(self) -> Event:
        """For a watcher that comes after the end: the end again, under the id the log has reached."""
        assert self._job is not None
        return Event(
            id=self._events.last_id,
            kind="state",
            at=self._job.ended_at or 0.0,
            job_id=self._job.id,
            env=self._job.env,
            job=self._job,
        )


def _open(request: Request, service: Service) -> _Stream | None:
    """The stream that was asked for; None when its reader has seen the end already. Raises EnvdError."""
    if request.scope["http_version"] not in ("1.0", "1.1"):
        raise HttpVersionUnsupported("Event streams are served over HTTP/1.1 only.", hint="Let your proxy speak 1.1.")
    refuse_another(service)
    asked = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
    after = service.events.sequence_of(asked)
    job_id = request.path_params.get("job")
    job = service.queue.get(job_id) if job_id is not None else None
    if job is not None and job.state.terminal and _has_seen_end(service.events, job, after):
        return None
    viewed = job is None and request.query_params.get("stats") == "1"
    return _Stream(service, job, after, asked is not None, View(service) if viewed else None)


def _has_seen_end(events: EventLog, job: Job, after: int | None) -> bool:
    if after is None or events.missed(after):
        return False
    ends = (events.sequence_of(event.id) or 0 for event in events.recent() if event.job_id == job.id and event.terminal)
    return after >= next(ends, 0)


def refuse_another(service: Service) -> None:
    """Raises Draining, and TooManyWatchers where as many streams are open as may be."""
    service.refuse_when_draining()
    if service.streams >= service.settings.max_streams:
        raise TooManyWatchers(f"{service.streams} streams are open, the limit is ENVD_MAX_STREAMS.", retry_after=10)


@contextmanager
def counted(service: Service) -> Iterator[None]:
    service.streams += 1
    try:
        yield
    finally:
        service.streams -= 1


def _encode(event: Event) -> bytes:
    return b"id: %b\nevent: %b\n%b\n" % (event.id.encode(), event.kind.encode(), _data(event.encoded))


def _packed(events: list[Event]) -> Iterator[bytes]:
    """The events in pieces of about `PIECE` bytes: what is sent to a reader that does not read stays in memory."""
    held: list[bytes] = []
    size = 0
    for event in events:
        held.append(_encode(event))
        size += len(held[-1])
        if size >= PIECE:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _message(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\n%b\n" % (kind.encode(), _data(json.dumps(data, allow_nan=False).encode()))


def _data(document: bytes) -> bytes:
    """One line; for a large document several, broken where JSON has white space, which readers join again."""
    if len(document) <= LINE_LIMIT:
        return b"data: %b\n" % document
    lines = json.dumps(json.loads(document), indent=0).encode().split(b"\n")
    return b"".join(b"data: %b\n" % line for line in lines)
