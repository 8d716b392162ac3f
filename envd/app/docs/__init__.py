"""`/docs`, `/errors` and `/openapi.json`: Markdown pages as HTML that needs no script and loads nothing.

The pages are files in `pages/`, so that they are read in the repository as they are served. What follows from the code
(settings, commands, errors, the API) is written there by `make docs`, and a test compares it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ...errors import NotFound
from ..openapi import document_of
from .pages import PAGES


async def openapi(request: Request) -> Response:
    """This API as an OpenAPI 3.1 document."""
    return JSONResponse(openapi_document())


async def front(request: Request) -> Response:
    """What envd is, and a map of its pages."""
    return await _answer("index")


async def page(request: Request) -> Response:
    """One page of the documentation, by its name."""
    return await _answer(request.path_params["page"])


async def errors(request: Request) -> Response:
    """Every error code: what it means, what causes it, what to do. `type` of a problem leads here."""
    return await _answer("errors")


async def _answer(name: str) -> Response:
    if name not in PAGES:
        raise NotFound(f"There is no page {name[:100]!r}.", hint="/docs lists them all.")
    html, policy = await anyio.to_thread.run_sync(_made, name)
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@cache
def _made(name: str) -> tuple[str, str]:
    """The page and its policy. Reads files, and imports what renders Markdown: no start of a daemon waits for that."""
    from .site import policy_of, rendered

    html = rendered(name)
    return html, policy_of(html)


routes: list[BaseRoute] = [
    Route("/openapi.json", openapi),
    Route("/docs", front),
    Route("/docs/{page}", page),
    Route("/errors", errors),
]


@cache
def openapi_document() -> dict[str, Any]:
    from ..routes import ROUTES  # among them are those of this module

    return document_of(ROUTES)
