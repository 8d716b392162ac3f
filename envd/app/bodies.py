"""Reading requests: JSON bodies within the limit, models, and query parameters, each refused by one clear error; and
waiting on behalf of a request."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, HTTPConnection, Request

from ..errors import BodyTooLarge, EnvdError, InvalidRequest, MalformedJson, UnknownEnv
from ..service import Service

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

DEEPEST = 100
"""Levels of nesting in a body. What Python's JSON reads it may not be able to write again: both recurse."""


def service_of(request: HTTPConnection) -> Service:
    service: Service = request.app.state.service
    return service


async def read_json(request: Request) -> Any:
    """The body as JSON; None when there is none. Raises BodyTooLarge and MalformedJson."""
    raw = await _read(request, service_of(request).settings.body_limit)
    if not raw.strip():
        return None
    try:
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
    body = await read_json(request)
    try:
        return model.model_validate({} if body is None else body)
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError) -> InvalidRequest:
    errors = [
        {"field": ".".join(str(part) for part in item["loc"]) or "body", "message": item["msg"]}
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    summary = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:5])
    return InvalidRequest(f"The body cannot be used: {summary}.", errors=errors)


def env_of(request: HTTPConnection) -> int:
    """The env in the path. Raises UnknownEnv."""
    given = request.path_params["env"]
    if not given.isascii() or not given.isdecimal() or len(given) > 6:
        raise UnknownEnv(f"{given!r} is no env; envs are numbered from 0.", env=given)
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
    parts: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(
                    f"The body is larger than {limit} bytes.", hint="Raise ENVD_BODY_LIMIT if it must be.", limit=limit
                )
            parts.append(chunk)
    except ClientDisconnect as error:
        raise MalformedJson("The client went away before its body was complete.") from error
    return b"".join(parts)


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


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
