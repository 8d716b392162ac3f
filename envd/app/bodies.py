"""Reading requests: JSON bodies within the limit, models, and query parameters, each refused by one clear error; and
waiting on behalf of a request."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, HTTPConnection, Request

from ..access import Caller
from ..calls import Sent
from ..errors import BodyTooLarge, BodyTooSlow, EnvdError, InvalidRequest, MalformedJson, UnknownEnv
from ..leases import HEADER
from ..models import Job
from ..service import Service
from ..telemetry.about import SHORT_LEASE, note
from .gate import CALLER

LONGEST_POLL = 60.0
"""Seconds that a request may be held; below the idle limits of proxies."""
MOST_FIELDS = 100
"""Of a body whose fields are all known: each that is not would be told of, at many times its length."""
LONGEST_FIELD = 200
"""Characters of a field's name that are told."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

WAY = 0.5
"""Seconds of a caller's time that are left to the way back, or a tenth of less."""
READ_SECONDS = 60.0
"""For a whole body: who sends it a byte at a time does not keep what waits for it for ever."""
MOST_BRACKETS = 100_000
"""That open a list or an object, in a body. A task may have a fifth of that; 8 MB of empty lists would have the loop
stand still for 3 s."""
DEEPEST = 100
"""Levels of nesting in a body. What Python's JSON reads it may not be able to write again: both recurse."""


def service_of(request: HTTPConnection) -> Service:
    service: Service = request.app.state.service
    return service


async def read_json(request: Request) -> Any:
    """The body as JSON; None when there is none. Raises BodyTooLarge, BodyTooSlow and MalformedJson."""
    try:
        with anyio.fail_after(READ_SECONDS):
            raw = await _read(request, service_of(request).settings.body_limit)
    except TimeoutError as error:
        raise BodyTooSlow(f"The body was not complete after {READ_SECONDS:g} s.", limit=READ_SECONDS) from error
    if not raw.strip():
        return None
    try:
        _refuse_too_many_parts(raw)
        # Given bytes, json would let lone surrogates pass.
        text = raw.decode()
        body = json.loads(text, parse_constant=_no_constants)
        _refuse_what_cannot_be_said_again(text, body)
    except (ValueError, RecursionError) as error:
        raise MalformedJson(
            f"The body is no JSON that can be used: {error}.", hint="Send an object, as Content-Type: application/json."
        ) from error
    return body


async def read_model(request: Request, model: type[M]) -> M:
    """The body as `model`; an absent body is an empty object. Raises InvalidRequest that names each field at fault."""
    return _validated(model, await read_json(request))


def _validated(model: type[M], body: Any) -> M:
    if isinstance(body, dict) and len(body) > MOST_FIELDS and model.model_config.get("extra") == "forbid":
        message = f"has {len(body)} fields, of which most are unknown"
        raise InvalidRequest(f"The body {message}.", errors=[{"field": "body", "message": message}])
    try:
        return model.model_validate({} if body is None else body)
    except ValidationError as error:
        raise invalid(error) from error


async def read_call(request: Request, model: type[M]) -> tuple[M, Sent]:
    """As `read_model`, and how the call was sent."""
    body = await read_json(request)
    return _validated(model, body), sent(request, body)


def sent(request: Request, body: Any = None) -> Sent:
    """By the headers Idempotency-Key and X-Request-Deadline. Raises InvalidRequest."""
    asked = json.dumps([request.method, request.url.path, body or {}], sort_keys=True)
    caller: Caller | None = request.scope.get(CALLER)
    if lease := request.headers.get(HEADER):
        note(lease=lease[:SHORT_LEASE])
    seconds = seconds_left(request)
    return Sent(
        key=_key(request),
        fingerprint=hashlib.sha256(asked.encode()).hexdigest(),
        until=None if seconds is None else time.monotonic() + seconds,
        owner="" if caller is None else caller.name if caller.how == "token" else caller.address,
        lease=request.headers.get(HEADER),
    )


def seconds_left(request: Request) -> float | None:
    """Within which the caller wants its answer, less what the way takes; None if it does not say. Raises
    InvalidRequest."""
    given = request.headers.get("x-request-deadline")
    if given is None:
        return None
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", given.strip()) is None:
        message = f"must be the seconds that the caller still waits, and is {given[:40]!r}"
        raise InvalidRequest(
            f"X-Request-Deadline: {message}.", errors=[{"field": "X-Request-Deadline", "message": message}]
        )
    seconds = float(given)
    return max(0.0, seconds - min(WAY, seconds / 10))


def wait_preferred(request: Request) -> float | None:
    """Seconds for which the caller would rather wait for what it asks for (Prefer: wait=…); None if it does not say. It
    is no deadline: what is not there by then is answered as without it."""
    waits = re.search(r"(?:^|[,;\s])wait\s*=\s*([0-9]{1,6})(?:$|[,;\s])", request.headers.get("prefer", ""))
    return float(waits[1]) if waits else None


def _key(request: Request) -> str:
    """A quoted string, as the standard to be has it, or a bare word."""
    given = request.headers.get("idempotency-key", "").strip()
    key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given
    if given and re.fullmatch(r"[!#-\[\]-~]{1,255}", key) is None:
        message = "must be 1 to 255 visible characters, without quotes or backslashes inside: a UUID, say"
        raise InvalidRequest(f"Idempotency-Key: {message}.", errors=[{"field": "Idempotency-Key", "message": message}])
    return key


def invalid(error: ValidationError) -> InvalidRequest:
    errors = [
        {"field": ".".join(str(part)[:LONGEST_FIELD] for part in item["loc"]) or "body", "message": item["msg"]}
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    summary = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:5])
    return InvalidRequest(f"The body cannot be used: {summary}.", errors=errors)


def about(job: Job) -> None:
    """The request is about this job."""
    note(job_id=job.id, env=job.env, episode_id=job.episode_id, desktop_id=job.desktop_id)


def env_of(request: HTTPConnection) -> int:
    """The env in the path. Raises UnknownEnv."""
    given = request.path_params["env"]
    if not given.isascii() or not given.isdecimal() or len(given) > 6:
        raise UnknownEnv(f"{given!r} is no env; envs are numbered from 0.", env=given)
    note(env=int(given))
    return int(given)


def number_in_query(request: Request, name: str, default: float, largest: float) -> float:
    """A number from 0 to `largest` (larger ones are cut). Raises InvalidRequest."""
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not value >= 0:
        message = f"must be a number that is not negative, and is {given!r}"
        raise InvalidRequest(f"{name}: {message}.", errors=[{"field": name, "message": message}])
    return min(value, largest)


async def hold(request: Request, wait: Callable[[], Awaitable[T]]) -> T | None:
    """The result of `wait`; None if the daemon begins to shut down, or the client hangs up, before it is there."""
    service = service_of(request)
    outcome: list[T] = []
    failure: EnvdError | None = None
    async with anyio.create_task_group() as race:

        async def wake_at_shutdown() -> None:
            await service.draining.wait()
            race.cancel_scope.cancel()

        async def leave_with_the_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            race.cancel_scope.cancel()

        race.start_soon(wake_at_shutdown)
        race.start_soon(leave_with_the_client)
        try:
            outcome.append(await wait())
        except EnvdError as error:
            failure = error
        race.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome[0] if outcome else None


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()  # and no list of what came: of two bytes each, it would take twenty times as much memory
    try:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise BodyTooLarge(
                    f"The body is larger than {limit} bytes.", hint="Raise ENVD_BODY_LIMIT if it must be.", limit=limit
                )
            body += chunk
    except ClientDisconnect as error:
        raise MalformedJson("The client went away before its body was complete.") from error
    return bytes(body)


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_too_many_parts(raw: bytes) -> None:
    """Raise ValueError."""
    if raw.count(b"[") + raw.count(b"{") > MOST_BRACKETS:
        raise ValueError(f"it has more than {MOST_BRACKETS} opening brackets")


def _refuse_what_cannot_be_said_again(text: str, body: Any) -> None:
    """Raise ValueError for JSON that would break every answer it is part of: halves of characters, endless nesting."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a surrogate pair, which is no character") from error
    level, depth = [body], 0
    while level and text.count("[") + text.count("{") > DEEPEST:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer
