"""The dashboard: a page at `/`, its scripts and its style under `/dashboard/`, all of them files in `static`.

The page holds nothing of this daemon, so anybody may load it; what it shows it asks for over the API, as its caller.
It is of one origin with pages of guests (noVNC), so it keeps no secret where they could read it, is shown in no frame,
and loads and runs nothing but its own files.

    view.py       what the stream of events tells for it, beside them

    index.html    the outline                        style.css    tokens, then parts, then widths
    main.js       puts it together                   theme.js     light or dark, before anything is painted
    stream.js     the stream, for ever               store.js     what is known, changed by each message
    api.js        requests, the token, problems      commands.js  cancel, recycle, drain; links that leave the page
    head.js       readiness and figures              envs.js      the cards
    boots.js      boots and the queue                phases.js    a job's phases and probes
    charts.js     reset times, failures, the host    lists.js     verdicts and activity
    film.js       an episode, step by step           marks.js     what a step did, drawn
    pictures.js   screens, where somebody looks      whole.js     loads the page again where a part was not to be had
    dom.js, format.js, dialogs.js
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ...errors import NotFound

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    file.name: file.read_bytes()
    for file in files(__package__).joinpath("static").iterdir()
    if file.name.endswith(tuple(KINDS))
}
"""Read once: they come with the code."""
PAGE = "index.html"


async def page(request: Request) -> Response:
    """The dashboard, a page for people. It asks for what it shows, with a token where one is needed."""
    return _file(request, PAGE)


async def part(request: Request) -> Response:
    """A script or the style of the dashboard."""
    name = request.path_params["file"]
    if name not in FILES or name == PAGE:
        raise NotFound(f"The dashboard has no part {name[:80]!r}.", hint="It is at /.")
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    tag = f'"{hashlib.sha256(FILES[name]).hexdigest()[:16]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(FILES[name], media_type=KINDS["." + name.rpartition(".")[2]], headers=headers)


routes: list[BaseRoute] = [Route("/", page), Route("/dashboard/{file}", part)]
