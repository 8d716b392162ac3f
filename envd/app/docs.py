"""`/openapi.json`, and `/docs`: an offline page over it. The document is put together from the models and the
routes' docstrings; a test compares its paths to the routes."""

from __future__ import annotations

import html
import json
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..errors import Problem, StartError, error_classes
from ..leases import HEADER
from ..models import Env, Event, Job, Lease, LeaseRequest, ResetRequest, StepRequest, StepResult, Verdict
from . import leases, legacy, v1
from .sse import EventStream

MODELS: tuple[type[BaseModel], ...] = (
    Env,
    Event,
    Job,
    Lease,
    LeaseRequest,
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
    "/v1/leases": LeaseRequest,
    "/env/reset": legacy.LegacyReset,
    "/env/step": legacy.LegacyStep,
    "/env/evaluate": legacy.Slot,
    "/env/history_messages": legacy.Slot,
}
ANSWERS: dict[str, tuple[int, type[BaseModel]]] = {
    "/v1/envs/{env}": (200, Env),
    "/v1/envs/{env}/reset": (202, Job),
    "/v1/envs/{env}/step": (200, StepResult),
    "/v1/envs/{env}/evaluate": (200, Verdict),
    "/v1/episodes/{episode}/verdict": (200, Verdict),
    "/v1/jobs/{job}": (200, Job),
    "/v1/jobs/{job}/cancel": (202, Job),
    "/v1/leases/{lease}": (200, Lease),
    "/v1/leases/{lease}/renew": (200, Lease),
    "/v1/prewarm": (202, Job),
    "POST /v1/leases": (201, Lease),
}
"""By path, or by method and path."""
LEASED = frozenset(f"{where}/{what}" for where in ("/v1/envs/{env}", "/env") for what in ("reset", "step", "evaluate"))
"""What changes an env, and so carries the id of the lease that the env is in."""
QUERIES: dict[str, tuple[tuple[str, str], ...]] = {
    "/v1/jobs/{job}": (("after", "integer"), ("wait", "number")),
    "/v1/jobs": (("env", "integer"), ("state", "string")),
    "/v1/jobs/{job}/events": (("last_event_id", "string"),),
    "/v1/leases/{lease}": (("after", "integer"), ("wait", "number")),
    "/v1/events": (("last_event_id", "string"),),
    "/env/history_messages": (("slot_id", "integer"),),
}


@cache
def openapi_document() -> dict[str, Any]:
    _, definitions = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in (*legacy.routes, *v1.routes, *leases.routes, *routes):
        assert isinstance(route, Route)
        methods = sorted((route.methods or set()) - {"HEAD"})
        paths[route.path] = {method.lower(): _operation(route, method) for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "envd", "version": __version__, "description": "Desktops for agent trainers."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    path = route.path
    stream = isinstance(route.endpoint, EventStream)
    summary = "Server-sent events: a snapshot, then each change." if stream else (route.endpoint.__doc__ or "").strip()
    operation: dict[str, Any] = {"summary": " ".join(summary.split()), "parameters": _parameters(path, method)}
    if method == "POST" and path in BODIES:
        operation["requestBody"] = {"content": {"application/json": {"schema": _ref(BODIES[path])}}}
    answered = f"{method} {path}"
    status, model = ANSWERS.get(answered if answered in ANSWERS else path, (200, None))
    if stream:
        content: dict[str, Any] = {"text/event-stream": {}}
    elif path.endswith("/screenshot"):
        content = {"image/png": {}}
    elif path.endswith("/bundle"):
        content = {"application/x-tar": {}}
    elif path in ("/docs", "/errors"):
        content = {"text/html": {}}
    else:
        content = {"application/json": {"schema": _ref(model)} if model else {}}
    operation["responses"] = {
        str(status): {"description": "as the summary says", "content": content},
        "default": {"description": "a problem", "content": {"application/problem+json": {"schema": _ref(Problem)}}},
    }
    return operation


def _parameters(path: str, method: str) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": kind}}
        for name, kind in (("env", "integer"), ("job", "string"), ("episode", "string"), ("lease", "string"))
        if f"{{{name}}}" in path
    ]
    queries = QUERIES.get(path, ()) if method == "GET" else ()
    in_header = [{"name": HEADER, "in": "header", "schema": {"type": "string"}}] if path in LEASED else []
    return [
        *in_path,
        *({"name": name, "in": "query", "schema": {"type": kind}} for name, kind in queries),
        *in_header,
    ]


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


async def openapi(request: Request) -> Response:
    """This API as an OpenAPI 3.1 document."""
    return JSONResponse(openapi_document())


async def page(request: Request) -> Response:
    """This API as a page, made on the server; it loads nothing."""
    return HTMLResponse(_page())


@cache
def _page() -> str:
    document = openapi_document()
    sections = [
        _section(path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    schemas = [
        f"<details id='{html.escape(name)}'><summary><code>{html.escape(name)}</code></summary>"
        f"<pre>{html.escape(json.dumps(schema, indent=2))}</pre></details>"
        for name, schema in sorted(document["components"]["schemas"].items())
    ]
    return _TEMPLATE.format(style=_STYLE, version=__version__, routes="".join(sections), schemas="".join(schemas))


def _section(path: str, method: str, operation: dict[str, Any]) -> str:
    facts = [f"<code>{html.escape(p['name'])}</code> in the {p['in']}" for p in operation["parameters"]]
    for where, holder in (
        ("body", operation.get("requestBody")),
        ("answer", next(iter(operation["responses"].values()))),
    ):
        for media, content in (holder or {}).get("content", {}).items():
            name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            facts.append(f"{where}: {f'<a href=#{name}>{name}</a>' if name else html.escape(media)}")
    return (
        f"<section><h3><b>{method.upper()}</b> <code>{html.escape(path)}</code></h3>"
        f"<p>{html.escape(operation['summary'])}</p><p class=facts>{' · '.join(facts)}</p></section>"
    )


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>envd {version} API</title><style>{style}</style></head><body><h1>envd {version}</h1>
<p>As a document: <a href="/openapi.json">/openapi.json</a>. All error codes: <a href="/errors">/errors</a>.</p>
<h2>Routes</h2>{routes}<h2>Schemas</h2>{schemas}</body></html>
"""


async def errors(request: Request) -> Response:
    """Every error code: what it means, its status, whose fault, and whether to try again. `type` of a problem leads
    here."""
    return HTMLResponse(_errors_page())


@cache
def _errors_page() -> str:
    rows = [
        f"<tr id='{code}'><td><code>{code}</code></td><td>{html.escape(error.title)}</td><td>{error.status}</td>"
        f"<td>{error.fault}</td><td>{'yes' if error.retryable else 'no'}</td></tr>"
        for code, error in sorted(error_classes().items())
        if not issubclass(error, StartError)
    ]
    return _ERRORS.format(style=_STYLE, rows="".join(rows))


_STYLE = """:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h3 { margin: 0; font-weight: normal; } h3 b { display: inline-block; min-width: 3.5rem; }
section { border-top: 1px solid #8886; padding: .8rem 0; } section p { margin: .3rem 0 0; }
.facts { opacity: .75; font-size: .9rem; } pre { overflow: auto; font-size: .85rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .3rem .8rem .3rem 0; }
tr { border-top: 1px solid #8886; } tr:target { background: #fc03; }"""

_ERRORS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>envd errors</title><style>{style}</style></head><body><h1>Errors</h1>
<p>Sent as <code>application/problem+json</code> with <code>code</code>, <code>fault</code>, <code>retryable</code>,
what happened (<code>detail</code>) and what to do (<code>hint</code>). <a href="/docs">The API</a></p>
<table><tr><th>code</th><th>meaning</th><th>status</th><th>fault</th><th>try again</th></tr>{rows}</table></body></html>
"""

routes: list[BaseRoute] = [Route("/openapi.json", openapi), Route("/docs", page), Route("/errors", errors)]
