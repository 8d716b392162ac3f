"""`/openapi.json`, `/docs` and `/errors`: pages that are made on the server and load nothing."""

from __future__ import annotations

import html
import json
import re
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..errors import StartError, error_classes
from . import dashboard, leases, legacy, recorded, through, v1
from .openapi import Schema, document_of


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
            name = next(iter(_names(content.get("schema", {}))), "")
            facts.append(f"{where}: {f'<a href=#{name}>{name}</a>' if name else html.escape(media)}")
    return (
        f"<section><h3><b>{method.upper()}</b> <code>{html.escape(path)}</code></h3>"
        f"<p>{html.escape(operation['summary'])}</p><p class=facts>{' · '.join(facts)}</p></section>"
    )


def _names(schema: Schema) -> list[str]:
    """The models that a schema names, the first of them what it is about."""
    return re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema))


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


@cache
def openapi_document() -> dict[str, Any]:
    return document_of(
        (
            *legacy.routes,
            *v1.routes,
            *recorded.routes,
            *through.routes,
            *leases.routes,
            *routes,
            *dashboard.routes,
        )
    )
