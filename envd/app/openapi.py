"""The OpenAPI document, put together from the models and the routes' docstrings; a test compares its paths to the
routes. A new route is listed here with its answers, parameters and body, gets a tag, and an example on the page
`docs/parts/examples.md`."""

from __future__ import annotations

import re
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
from . import legacy, logs
from .gate import LINK, SAFE
from .sse import EventStream

Schema = dict[str, Any]

TAGS: dict[str, str] = {
    "play": "Reset, step, look and evaluate: the native API of an env.",
    "jobs": "Resets as jobs: their queue, their progress, their end.",
    "events": "Server-sent events, with replay after a dropped connection.",
    "leases": "So many envs for one trainer alone.",
    "desktop": "A desktop's own services through the daemon's port: files, screen, Chrome's DevTools.",
    "evidence": "What episodes leave: verdicts and bundles.",
    "trainers": "The wire of existing trainers: a client of the published OSWorld remote-env servers changes its URL.",
    "daemon": "Health, version, draining, links for browsers.",
    "docs": "These pages, and this API as a document.",
}
"""Tag → what is under it, in the order in which people read."""
_TAGGED = (
    ("/env/", "trainers"),
    ("/health", "trainers"),
    ("/v1/envs/{env}/vnc", "desktop"),
    ("/v1/envs/{env}/cdp", "desktop"),
    ("/v1/envs/{env}/files", "desktop"),
    ("/v1/envs", "play"),
    ("/v1/jobs/{job}/events", "events"),
    ("/v1/events", "events"),
    ("/v1/jobs", "jobs"),
    ("/v1/queue", "jobs"),
    ("/v1/prewarm", "jobs"),
    ("/v1/leases", "leases"),
    ("/v1/episodes", "evidence"),
    ("/openapi.json", "docs"),
    ("/docs", "docs"),
    ("/errors", "docs"),
)
"""Beginnings of paths; the first that fits says the tag. What fits none is of the daemon."""
SUMMARIES: dict[tuple[str, str], str] = {
    ("/v1/leases", "GET"): "The leases that are held or wait; the ids of others' are cut short.",
    ("/v1/leases", "POST"): "Lease `count` envs, all or none.",
    ("/v1/leases/{lease}", "GET"): "The lease, or its next version.",
    ("/v1/leases/{lease}", "DELETE"): "Release the lease; repeatable.",
    ("/v1/logs", "GET"): "The last lines of the log, and those that follow.",
    ("/v1/envs/{env}/screenshot", "GET"): "The screen as it is now.",
    ("/v1/episodes/{episode}/frames/{frame}", "GET"): "The picture that was taken after a step of an episode.",
    ("/v1/drain", "GET"): "How far the draining is.",
    ("/v1/envs/{env}/files", "GET"): "Stream a file of the desktop.",
    ("/v1/envs/{env}/files", "PUT"): "Store a file in the desktop.",
    ("/v1/envs/{env}/cdp/{path}", "PUT"): "Command Chrome, as its DevTools take it.",
}
"""Of what one function does for several methods, whose docstring tells of all of them; and where its first sentence is
long."""
_TASK: Schema = {
    "id": "greeting",
    "instruction": "Write hello into greeting.txt in your home folder.",
    "config": [],
    "evaluator": {"func": "infeasible"},
}
_JOB: Schema = {
    "id": "job-0123456789ab",
    "kind": "reset",
    "env": 0,
    "state": "booting",
    "version": 4,
    "created_at": 1790000000.0,
    "eta_s": 21.5,
    "phase": "probe",
}
EXAMPLES: dict[str, Any] = {
    "/v1/envs/{env}/reset": {"task": _TASK, "max_steps": 30},
    "/v1/envs/{env}/step": {"actions": ["pyautogui.click(960, 540)"], "include_screenshot": False},
    "/v1/drain": {"limit_s": 3600},
    "/v1/links": {"path": "/v1/envs/0/screenshot", "seconds": 300},
    "/v1/leases": {"count": 2, "ttl_s": 300, "wait_s": 60, "owner": "alice"},
    "/env/reset": {"slot_id": 0, "task_config": _TASK},
    "/env/step": {
        "slot_id": 0,
        "prediction": "Thought: The button.\nAction: click(start_box='(100,100)')",
    },
    "/env/evaluate": {"slot_id": 0},
    "/env/history_messages": {"slot_id": 0},
}
"""Bodies that work, by path."""
ANSWERS: dict[str, Any] = {
    "/env/reset": {
        "env_idx": 0,
        "obs_messages": [{"role": "system", "content": []}],
        "is_done": False,
        "format_reward": 0.0,
    },
    "/env/step": {"env_idx": 0, "obs_messages": None, "is_done": True, "format_reward": 0.0},
    "/env/evaluate": 1.0,
    "/health": {"status": "ok", "provider": "docker", "slot_statuses": {"0": "initialized"}},
    "/v1/drain": {"draining": True, "left_s": 3540.2, "envs": [0]},
    "/v1/envs": {"envs": [{"id": 0, "state": "empty"}]},
    "/v1/envs/{env}": {"id": 0, "state": "empty"},
    "/v1/envs/{env}/history": {"history_messages": [{"role": "system", "content": []}]},
    "/v1/episodes": {"episodes": ["episode-0123456789ab"]},
    "/v1/jobs": {"jobs": [_JOB]},
    "/v1/jobs/{job}": _JOB | {"links": {"self": "/v1/jobs/job-0123456789ab"}},
    "/v1/envs/{env}/reset": _JOB | {"links": {"self": "/v1/jobs/job-0123456789ab"}},
    "/v1/envs/{env}/step": {
        "env": 0,
        "episode_id": "episode-0123456789ab",
        "step": 1,
        "done": False,
        "format_reward": 0.0,
        "actions": [{"action": "pyautogui.click(960, 540)", "outcome": "ok", "via": "guest", "seconds": 0.06}],
    },
    "/v1/queue": {"booting": [_JOB], "waiting": [], "limit": 1024},
    "/v1/links": {"path": "/v1/envs/0/screenshot?signature=…"},
    "/livez": {"live": True},
    "/readyz": {"ready": False, "reasons": ["the driver is being opened"], "warnings": []},
}
"""Answers as they may be, by path; fields that say nothing are left out of them."""

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
        200: _object(
            {
                "episode": {"type": "object"},
                "steps": MESSAGES,
                "more": YES_OR_NO,
                "verdict": {"type": ["object", "null"]},
            }
        )
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
    "/v1/logs": ("application/x-ndjson",),
    "/metrics": ("text/plain", "application/openmetrics-text"),
    "/docs": ("text/html",),
    "/docs/{page}": ("text/html",),
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
    "/v1/logs": (
        ("query", "env", NOT_NEGATIVE),
        ("query", "job", STRING),
        ("query", "episode", STRING),
        ("query", "level", {"enum": list(logs.LEVELS)}),
        ("query", "since", NOT_NEGATIVE),
        ("query", "after", STRING),
        ("query", "limit", NOT_NEGATIVE),
        ("query", "follow", {"enum": ["0", "1"]}),
    ),
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
PREFERRING = frozenset({"/v1/envs/{env}/reset", "/v1/prewarm"})
"""Whose answer may wait for the job's end."""
PREFER: tuple[tuple[str, str, Schema], ...] = (
    ("header", "Prefer", {"type": "string", "pattern": "^wait=[0-9]{1,2}$"}),
)
MEANINGS: dict[str, str] = {
    "env": "Number of the env, from 0.",
    "job": "Id of the job.",
    "episode": "Id of the episode.",
    "lease": "Id of the lease.",
    "page": "Name of the page, as the menu has it.",
    "after": "A version: answer as soon as there is a newer one.",
    "wait": "Seconds that the answer may wait for that, at most 60.",
    "state": "Only jobs in this state.",
    "slot_id": "Number of the env, from 0.",
    "frame": "Number of the step after which it was taken; 0 is the first observation.",
    "width": "Pixels across, at most: a smaller JPEG instead of the picture as it was taken.",
    "file": "Name of the part, as the page asks for it.",
    "stats": "1: with samples of the host, and whole envs.",
    "level": "No line below it.",
    "since": "Unix seconds: no line that is older.",
    "limit": "The newest so many lines, 5,000 at most; default 200.",
    "follow": "1: go on with the lines that come.",
    "last_event_id": "As `Last-Event-ID`, for those who can set no header.",
    "Last-Event-ID": "Id of the last event that was seen: what came after it is sent.",
    "If-None-Match": "An `ETag`: 304 while the job is as it was then.",
    "Idempotency-Key": "A UUID, say. Sent again with the same key the call is not done again, but answered as it was.",
    HEADER: "Id of the lease under which the call is made.",
    "X-Request-Deadline": "Seconds that the caller still waits: the answer comes before.",
    "Prefer": "`wait=SECONDS`: answer once the job has ended, or after so many seconds, 60 at most.",
}
"""What parameters are for, by name; `path` is told by each operation."""
MEANINGS_OF: dict[tuple[str, str], str] = {
    ("/v1/logs", "after"): "The line that was read last: what came after it.",
    ("/v1/episodes/{episode}/steps", "after"): "Number of a step: what follows it.",
}
"""Where one of that name means something else."""
IN_PATH: dict[str, Schema] = {
    "env": {"type": "integer", "minimum": 0},
    "job": STRING,
    "episode": STRING,
    "frame": {"type": "integer", "minimum": 0},
    "file": STRING,
    "lease": STRING,
    "path": STRING,
    "page": STRING,
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
        "info": {
            "title": "envd",
            "version": __version__,
            "description": "Desktops for agent trainers: reset, step, evaluate. Everything else is at `/docs`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "security": [{}, {"token": []}, {"link": []}],
        "paths": paths,
        "components": {"schemas": definitions["$defs"], "securitySchemes": SECURITY},
    }


def tag_of(path: str) -> str:
    """What the path is about: one of TAGS."""
    return next((tag for beginning, tag in _TAGGED if path.startswith(beginning)), "daemon")


def _operation(route: Route, method: str) -> Schema:
    path = route.path_format
    stream = isinstance(route.endpoint, EventStream)
    told = "Server-sent events: a snapshot, then each change." if stream else route.endpoint.__doc__ or ""
    told = " ".join(told.split())
    operation: Schema = {
        "operationId": _operation_id(path, method),
        "tags": [tag_of(path)],
        "summary": SUMMARIES.get((path, method)) or first_sentence(told),
        "description": told,
        "parameters": _parameters(path, method),
    }
    if method == "POST" and path in BODIES:
        model = BODIES[path]
        needed = any(field.is_required() for field in model.model_fields.values())
        content = {"schema": _ref(model), "example": EXAMPLES[path]}
        operation["requestBody"] = {"required": needed, "content": {"application/json": content}}
    if method not in SAFE:
        # A link lets somebody look.
        operation["security"] = [{}, {"token": []}]
    operation["responses"] = {
        **{str(status): answer for status, answer in _answers(path, stream).items()},
        "default": {"description": "a problem", "content": {"application/problem+json": {"schema": _ref(Problem)}}},
    }
    return operation


def _operation_id(path: str, method: str) -> str:
    """A name for generated clients: `get_v1_envs`, `post_v1_envs_env_reset`."""
    return "_".join([method.lower(), *re.findall(r"[a-z0-9]+", path)])


def first_sentence(words: str) -> str:
    """Up to the first full stop; a file's name or a shortening may hold others."""
    match = re.match(r".*?[.:](?=\s|$)", words)
    return match[0].removesuffix(":").removesuffix(".") + "." if match else words


def _answers(path: str, stream: bool) -> dict[int, Schema]:
    found: dict[int, Schema] = {}
    if stream or path in OTHER:
        kinds = ("text/event-stream",) if stream else OTHER[path]
        found[200] = {"description": "as the summary says", "content": {kind: {} for kind in kinds}}
    for status, schema in JSON.get(path, {} if found else {200: {}}).items():
        shown = {"example": ANSWERS[path]} if path in ANSWERS else {}
        content = {"application/json": {"schema": schema, **shown} if schema else {}}
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
    if method in ("GET", "PUT"):
        others = PARAMETERS.get(path, ())
    else:
        others = (*(OF_CALLS if path in CALLS else ()), *(PREFER if path in PREFERRING else ()))
    told: list[dict[str, Any]] = [
        *in_path,
        *({"name": name, "in": where, "schema": schema} for where, name, schema in others),
    ]
    for one in told:
        if words := MEANINGS_OF.get((path, one["name"])) or MEANINGS.get(one["name"]):
            one["description"] = words
    return told
