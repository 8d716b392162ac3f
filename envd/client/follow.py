"""Following events through dropped connections and restarts of the daemon.

A stream that breaks is opened again with the last id it gave, after full jitter. Where streams do not get through
(too many watchers, a proxy that buffers), a job is followed by long-polls instead, which look like snapshots.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import aiohttp
from pydantic import ValidationError

from ..errors import CapacityError, EnvdError, HttpVersionUnsupported, InfraError, ServerUnreachable, TooManyWatchers
from ..models import Event, Job
from .sse import Message, SseParser
from .transport import Backoff, Deadline, OnRetry, Transport, translated

FIRST_EVENT_SECONDS = 10.0
"""The server sends a snapshot at once; if nothing came by then, something in between holds the stream back."""
POLL_SECONDS = 25.0


class _HeldBack(Exception):
    """Streams do not get through to this client. Long-polls may."""


async def follow(
    http: Transport, job_id: str | None, *, patience: float | None = None, on_retry: OnRetry | None = None
) -> AsyncGenerator[Event, None]:
    """Events of one job up to the one that shows its end, or of everything without end.

    Raises UnknownJob; ServerUnreachable once nothing was heard for `patience` seconds.
    """
    path = f"/v1/jobs/{job_id}/events" if job_id else "/v1/events"
    stream = _Stream(http, path)
    backoff = Backoff()
    lost_since: float | None = None
    while True:
        pause: float | None = None
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    lost_since = None
                    backoff.reset()
                    yield event
                    if _shows_end(event, job_id):
                        return
                    if event.kind == "server-shutdown":
                        pause = _seconds(event.data.get("retry_s"))
            error: EnvdError = ServerUnreachable(f"The event stream {http.url}{path} ended.")
        except (_HeldBack, HttpVersionUnsupported) as obstacle:
            if job_id is None:
                raise InfraError(
                    str(obstacle), hint="Does a proxy in between hold event streams back, or speak HTTP/2 to envd?"
                ) from obstacle
            break
        except CapacityError as busy:
            if isinstance(busy, TooManyWatchers) and job_id is not None:
                break
            error, pause = busy, busy.retry_after
        except ServerUnreachable as unreachable:
            error = unreachable
        if stream.ended and job_id is not None:
            break
        lost_since = lost_since or time.monotonic()
        backoff.base = stream.retry_s
        pause = (pause or 0.0) + backoff.next()
        if time.monotonic() + pause > lost_since + http.patience_of(patience):
            raise error
        if on_retry is not None:
            on_retry(error, pause)
        await asyncio.sleep(pause)
    async with aclosing(_poll(http, job_id, patience, on_retry)) as events:
        async for event in events:
            yield event


class _Stream:
    """What outlives one connection of a stream: the last id, the server's wish for the time between two tries."""

    def __init__(self, http: Transport, path: str) -> None:
        self.retry_s = 0.2
        self.ended = False
        """The server said that everything was delivered (204)."""
        self._http = http
        self._path = path
        self._last_id = ""

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events of one connection, until it breaks or is closed. Raises EnvdError."""
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        async with AsyncExitStack() as stack:
            response = await stack.enter_async_context(self._http.stream(self._path, headers))
            if response.status == 204:
                self.ended = True
                return
            if response.content_type != "text/event-stream":
                raise _HeldBack(f"GET {self._http.url}{self._path} was answered with {response.content_type}.")
            parser = SseParser()
            while chunk := await self._read(response, first=not parser.started):
                for message in self._parsed(parser, chunk):
                    self._last_id = message.id
                    yield _event(message)

    def _parsed(self, parser: SseParser, chunk: bytes) -> list[Message]:
        try:
            messages = parser.feed(chunk)
        except ValueError as error:
            raise InfraError(f"The event stream {self._http.url}{self._path} cannot be used: {error}.") from error
        if parser.retry_ms is not None:
            self.retry_s = min(parser.retry_ms / 1000, 30.0)
        return messages

    async def _read(self, response: aiohttp.ClientResponse, *, first: bool) -> bytes:
        with translated(self._http.url, f"GET {self._http.url}{self._path}"):
            if not first:
                return await response.content.readany()
            try:
                # Opened and closed between two yields: a scope that is open across one would cancel the consumer.
                async with asyncio.timeout(FIRST_EVENT_SECONDS):
                    return await response.content.readany()
            except TimeoutError as error:
                raise _HeldBack(
                    f"{self._http.url}{self._path} sent nothing within {FIRST_EVENT_SECONDS:g} s."
                ) from error


async def _poll(
    http: Transport, job_id: str | None, patience: float | None, on_retry: OnRetry | None
) -> AsyncGenerator[Event, None]:
    seen: Job | None = None
    while True:
        answer = await http.request(
            "GET",
            f"/v1/jobs/{job_id}",
            params={"after": str(seen.version), "wait": f"{POLL_SECONDS:g}"} if seen else None,
            deadline=Deadline.after(None),
            attempt_timeout=POLL_SECONDS + 15,
            patience=patience,
            on_retry=on_retry,
        )
        job = parsed_job(answer.object())
        if seen is None or job.version != seen.version:
            yield Event(
                id="",
                kind="snapshot",
                at=time.time(),
                job_id=job.id,
                env=job.env,
                desktop_id=job.desktop_id,
                job=job,
            )
        elif not job.state.terminal:
            await asyncio.sleep(Backoff(base=1.0).next())  # in case the server answers at once instead of waiting
        if job.state.terminal:
            return
        seen = job


def parsed_job(document: dict[str, Any]) -> Job:
    """Raises InfraError when the document is not a job."""
    try:
        return Job.model_validate(document)
    except ValidationError as error:
        raise InfraError(f"The server sent a job that this client cannot read: {error}") from error


def _event(message: Message) -> Event:
    """A snapshot's data is the state itself; the stream's own messages have no id or time in them."""
    try:
        document = json.loads(message.data)
        if message.event == "snapshot":
            document = {"job": document.get("job"), "data": document}
        job = document.get("job") or {}
        about = {"job_id": job.get("id"), "env": job.get("env"), "desktop_id": job.get("desktop_id")}
        return Event.model_validate({"at": time.time()} | about | document | {"id": message.id, "kind": message.event})
    except (ValueError, AttributeError, RecursionError) as error:  # a ValidationError is a ValueError
        raise InfraError(f"The server sent an event that this client cannot read: {error}") from error


def _shows_end(event: Event, job_id: str | None) -> bool:
    return event.job is not None and event.job.id == job_id and event.job.state.terminal


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 3600 else None
