"""The OpenAPI document, put together from the models and the routes' docstrings; a test compares its paths to the
routes. A new route is listed here with its answers, parameters and body."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..errors import Problem
from ..leases import HEADER
from ..models import (
    DrainRequest,
    Env,
    Event,
    Job,
    JobState,
    Lease,
    LeaseRequest,
    LinkRequest,
    ResetRequest,
    StepRequest,
    StepResult,
    Verdict,
)
from . import legacy
from .gate import LINK, SAFE
from .sse import EventStream

Schema = dict[str, Any]

MODELS: tuple[type[BaseModel], ...] = (
    DrainRequest,
    Env,
    Event,
    Job,
    Lease,
    LeaseRequest,
    LinkRequest,
    Problem,
    ResetRequest,
    StepRequest,
    StepResult,
    Verdict,
    legacy.LegacyReset,
    legacy.LegacyStep,
    legacy.Slot,
)
BODIES: dict[str, type[BaseModel]] = {
    "/v1/envs/{env}/reset": ResetRequest,
    "/v1/envs/{env}/step": StepRequest,
    "/v1/drain": DrainRequest,
    "/v1/links": LinkRequest,
    "/v1/leases": LeaseRequest,
    "/env/reset": legacy.LegacyReset,
    "/env/step": legacy.LegacyStep,
    "/env/evaluate": legacy.Slot,
    "/env/history_messages": legacy.Slot,
}


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


STRING, NUMBER, WHOLE, YES_OR_NO = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
MESSAGES = _list({"type": "object"})
OBSERVATION = _object(
    {
        "env_idx": WHOLE,
        "obs_messages": {"anyOf": [MESSAGES, {"type": "null"}]},
        "is_done": YES_OR_NO,
        "format_reward": NUMBER,
    },
    problem=STRING,
)
DRAINING = _object({"draining": YES_OR_NO, "envs": _list(WHOLE)}, left_s={"type": ["number", "null"]})
READINESS = _object({"ready": YES_OR_NO, "reasons": _list(STRING), "warnings": _list(STRING)})
LINKED: Schema = {"properties": {"links": {"type": "object", "additionalProperties": STRING}}, "required": ["links"]}
JOB: Schema = {"allOf": [_ref(Job), LINKED]}
LEASE: Schema = {"allOf": [_ref(Lease), LINKED]}
VERDICT: Schema = {"allOf": [_ref(Verdict), LINKED]}
JSON: dict[str, dict[int, Schema]] = {
    "/env/reset": {200: OBSERVATION},
    "/env/step": {200: OBSERVATION},
    "/env/evaluate": {200: NUMBER},
    "/env/history_messages": {200: _object({"history_messages": MESSAGES}, messages=MESSAGES, history=MESSAGES)},
    "/health": {200: _object({"status": STRING, "provider": STRING, "slot_statuses": {"type": "object"}})},
    "/v1/drain": {200: DRAINING, 202: DRAINING},
    "/v1/envs": {200: _object({"envs": _list(_ref(Env))})},
    "/v1/envs/{env}": {200: _ref(Env)},
    "/v1/envs/{env}/reset": {202: JOB},
    "/v1/envs/{env}/step": {200: _ref(StepResult)},
    "/v1/envs/{env}/evaluate": {200: VERDICT},
    "/v1/envs/{env}/history": {200: _object({"history_messages": MESSAGES})},
    "/v1/episodes": {200: _object({"episodes": _list(STRING)})},
    "/v1/episodes/{episode}/verdict": {200: VERDICT},
    "/v1/jobs": {200: _object({"jobs": _list(_ref(Job))})},
    "/v1/jobs/{job}": {200: JOB},
    "/v1/jobs/{job}/cancel": {200: JOB, 202: JOB},
    "/v1/episodes/{episode}/steps": {
        200: _object({"episode": {"type": "object"}, "steps": MESSAGES, "verdict": {"type": ["object", "null"]}})
    },
    "/v1/whoami": {
        200: _object({"name": STRING, "scope": STRING, "how": STRING, "until": {"type": ["number", "null"]}})
    },
    "/v1/leases": {200: _object({"leases": _list(_ref(Lease))}), 201: LEASE, 202: LEASE},
    "/v1/leases/{lease}": {200: LEASE},
    "/v1/leases/{lease}/renew": {200: LEASE},
    "/v1/links": {201: _object({"path": STRING})},
    "/v1/prewarm": {202: JOB},
    "/v1/queue": {200: _object({"booting": _list(_ref(Job)), "waiting": _list(_ref(Job)), "limit": WHOLE})},
    "/livez": {200: _object({"live": YES_OR_NO})},
    "/readyz": {200: READINESS, 503: READINESS},
    "/version": {
        200: _object({"version": STRING, "epoch": STRING, "provider": STRING, "settings": {"type": "object"}})
    },
    "/openapi.json": {200: {"type": "object"}},
}
"""The answers that are JSON, by their status. What is not listed here may be any JSON."""
OTHER: dict[str, tuple[str, ...]] = {
    "/v1/envs/{env}/screenshot": ("image/png", "image/jpeg"),
    "/v1/envs/{env}/files": ("application/octet-stream",),
    "/v1/envs/{env}/vnc/{path}": ("*/*",),
    "/v1/envs/{env}/cdp/{path}": ("*/*",),
    "/v1/episodes/{episode}/frames/{frame}": ("image/png", "image/jpeg"),
    "/v1/episodes/{episode}/bundle": ("application/x-tar",),
    "/docs": ("text/html",),
    "/errors": ("text/html",),
    "/": ("text/html",),
    "/dashboard/{file}": ("*/*",),
}
WITHOUT_BODY: dict[str, tuple[int, str]] = {
    "/v1/jobs/{job}": (304, "it is still as If-None-Match says"),
    "/v1/jobs/{job}/events": (204, "the job has ended, and its end was seen"),
}
NOT_NEGATIVE: Schema = {"type": "number", "minimum": 0}
WIDTH: Schema = {"type": "integer", "minimum": 16, "maximum": 4096}
LAST_EVENT_ID = ("query", "last_event_id", STRING), ("header", "Last-Event-ID", STRING)
PARAMETERS: dict[str, tuple[tuple[str, str, Schema], ...]] = {
    "/v1/jobs/{job}": (
        ("query", "after", NOT_NEGATIVE),
        ("query", "wait", NOT_NEGATIVE),
        ("header", "If-None-Match", STRING),
    ),
    "/v1/jobs": (("query", "env", NOT_NEGATIVE), ("query", "state", {"enum": [state.value for state in JobState]})),
    "/v1/jobs/{job}/events": LAST_EVENT_ID,
    "/v1/leases/{lease}": (("query", "after", NOT_NEGATIVE), ("query", "wait", NOT_NEGATIVE)),
    "/v1/events": (*LAST_EVENT_ID, ("query", "stats", {"enum": ["0", "1"]})),
    "/v1/envs/{env}/screenshot": (("query", "width", WIDTH),),
    "/v1/episodes/{episode}/frames/{frame}": (("query", "width", WIDTH),),
    "/v1/episodes/{episode}/steps": (("query", "after", NOT_NEGATIVE),),
    "/v1/envs/{env}/files": (("query", "path", STRING), ("header", HEADER, STRING)),
    "/env/history_messages": (("query", "slot_id", {"type": "integer", "minimum": 0}),),
}
"""Of GET: where each is, its name and what it may be."""
CALLS = frozenset(
    {
        "/env/reset",
        "/env/step",
        "/env/evaluate",
        "/v1/envs/{env}/reset",
        "/v1/envs/{env}/step",
        "/v1/envs/{env}/evaluate",
        "/v1/leases",
        "/v1/prewarm",
    }
)
"""Whose POST is done once for a key, and answered within its caller's time."""
OF_CALLS: tuple[tuple[str, str, Schema], ...] = (
    ("header", "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!#-\\[\\]-~]+$"}),
    ("header", HEADER, STRING),
    ("header", "X-Request-Deadline", {"type": "string", "pattern": "^[0-9]{1,7}([.][0-9]{1,9})?$"}),
)
IN_PATH: dict[str, Schema] = {
    "env": {"type": "integer", "minimum": 0},
    "job": STRING,
    "episode": STRING,
    "frame": {"type": "integer", "minimum": 0},
    "file": STRING,
    "lease": STRING,
    "path": STRING,
}
SECURITY: dict[str, Schema] = {
    "token": {"type": "http", "scheme": "bearer", "description": "ENVD_TOKEN, or one of ENVD_TOKEN_FILE."},
    "link": {"type": "apiKey", "in": "query", "name": LINK, "description": "As `POST /v1/links` answers it."},
}


def document_of(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Of these routes."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route):
            continue  # OpenAPI knows no websockets; each of ours has a path that is there for requests too
        methods = sorted((route.methods or set()) - {"HEAD"})
        paths[route.path_format] = {method.lower(): _operation(route, method) for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "envd", "version": __version__, "description": "Desktops for agent trainers."},
        "security": [{}, {"token": []}, {"link": []}],
        "paths": paths,
        "components": {"schemas": definitions["$defs"], "securitySchemes": SECURITY},
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    path = route.path_format
    stream = isinstance(route.endpoint, EventStream)
    summary = "Server-sent events: a snapshot, then each change." if stream else (route.endpoint.__doc__ or "").strip()
    operation: dict[str, Any] = {"summary": " ".join(summary.split()), "parameters": _parameters(path, method)}
    if method == "POST" and path in BODIES:
        model = BODIES[path]
        needed = any(field.is_required() for field in model.model_fields.values())
        operation["requestBody"] = {"required": needed, "content": {"application/json": {"schema": _ref(model)}}}
    if method not in SAFE:
        # A link lets somebody look.
        operation["security"] = [{}, {"token": []}]
    operation["responses"] = {
        **{str(status): answer for status, answer in _answers(path, stream).items()},
        "default": {"description": "a problem", "content": {"application/problem+json": {"schema": _ref(Problem)}}},
    }
    return operation


def _answers(path: str, stream: bool) -> dict[int, Schema]:
    found: dict[int, Schema] = {}
    if stream or path in OTHER:
        kinds = ("text/event-stream",) if stream else OTHER[path]
        found[200] = {"description": "as the summary says", "content": {kind: {} for kind in kinds}}
    for status, schema in JSON.get(path, {} if found else {200: {}}).items():
        content = {"application/json": {"schema": schema} if schema else {}}
        found[status] = {"description": "as the summary says", "content": content}
    if path in WITHOUT_BODY:
        status, why = WITHOUT_BODY[path]
        found[status] = {"description": why}
    return found


def _parameters(path: str, method: str) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in IN_PATH.items()
        if f"{{{name}}}" in path
    ]
    others = PARAMETERS.get(path, ()) if method in ("GET", "PUT") else OF_CALLS if path in CALLS else ()
    return [*in_path, *({"name": name, "in": where, "schema": schema} for where, name, schema in others)]
