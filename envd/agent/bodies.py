"""Reading request bodies: JSON whatever its Content-Type says, forms as they come, and one clear 400 for the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

from envd.agent.errors import BadRequest


async def json_object(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = json.loads(raw)
    except ValueError as error:  # covers bytes that are not UTF-8 as well
        raise BadRequest(f"the body of {request.path} must be JSON: {error}") from None
    except RecursionError:
        raise BadRequest(f"the JSON body of {request.path} is nested too deeply") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body of {request.path} must be a JSON object, not {type(body).__name__}")
    return body


def text(body: dict[str, Any], name: str) -> str:
    """The non-empty string `name` of the body."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} is required and must be a non-empty string")
    return value


def seconds(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise BadRequest(f"{name} must be a number of seconds, 0 or more")
    return float(value)


async def form_text(request: web.Request, name: str) -> str:
    """The form field `name`, from a urlencoded or a multipart body."""
    try:
        value = (await request.post()).get(name)
    except ValueError as error:
        raise BadRequest(f"the form sent to {request.path} cannot be read: {error}") from None
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} is required, as a form field")
    return value


def path_of(value: str) -> Path:
    """A path as clients write it: `~` and `$VARIABLES` are those of the desktop's user."""
    if "\0" in value:
        raise BadRequest("a path cannot contain a NUL character")
    return Path(os.path.expanduser(os.path.expandvars(value)))
