"""What an episode left, to be looked at: its steps with marks of what they did, and its pictures.

/v1/episodes/{episode}/steps           what was said and done, step by step
/v1/episodes/{episode}/frames/{frame}  the picture after that step; 0 is the first observation
"""

from __future__ import annotations

import re
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ..actions.marks import marks_for
from ..actions.uitars import Frame
from ..errors import NotFound
from ..pictures import smaller
from ..settings import Settings
from .bodies import number_in_query, service_of

STEPS = 200
"""Steps of one answer."""
SAID = 4000
"""Characters of what was said, and of an action, that are told. The bundle has all of it."""
SHRUNK_AT_ONCE = 2
"""Pictures: unpacked each may take 300 MB, and what else waits for a thread does not wait for them."""
LIVES = 3600
"""Seconds that a browser may keep a recorded picture, which does not change."""


async def steps(request: Request) -> Response:
    """What was said and done in an episode: at most 200 steps that follow step `after`, fewer where they are long, and
    whether there are `more`. Each has `marks`, which tell where on the picture before it it clicked, dragged, scrolled
    and typed."""
    service, episode_id = service_of(request), request.path_params["episode"]
    after = int(number_in_query(request, "after", 0, 10**6))
    about, lines, more = await service.bundles.steps(episode_id, after, STEPS)
    verdict = await service.bundles.get_verdict(episode_id)
    told = await anyio.to_thread.run_sync(_told, about, lines, service.settings)
    said = {"episode": about, "steps": told, "more": more, "verdict": verdict and verdict.model_dump(mode="json")}
    return JSONResponse(said, headers={"Cache-Control": "no-store"})


def _told(about: dict[str, Any], lines: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Blocks: a prediction may take a while to read."""
    width, height = about.get("screen") or settings.screen
    frame = Frame(width, height, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)
    return [_step(line, frame) for line in lines]


def _step(line: dict[str, Any], frame: Frame) -> dict[str, Any]:
    said, actions = str(line.get("said", "")), line.get("actions") or []
    marks = marks_for(said, [str(action["action"]) for action in actions], frame)
    named = ("step", "at", "done", "end_reason", "problem", "error", "seconds")
    return {
        **{name: line[name] for name in named if name in line},
        "said": said[:SAID],
        "actions": [
            {
                "action": str(action["action"])[:SAID],
                "outcome": action.get("outcome"),
                "via": action.get("via"),
                "stderr": str(action.get("stderr", ""))[-SAID:],
                "seconds": action.get("seconds"),
            }
            for action in actions
        ],
        "marks": [mark.as_json for mark in marks],
        "has_frame": bool(line.get("frame")),
    }


async def frame(request: Request) -> Response:
    """The picture that was taken after a step of an episode, 0 for its first observation; with `width`, as a JPEG of at
    most so many pixels across."""
    episode_id, number = request.path_params["episode"], request.path_params["frame"]
    width = width_asked(request)
    picture = None
    if re.fullmatch(r"[0-9]{1,6}", number, re.ASCII):
        picture = await service_of(request).bundles.recorded_frame(episode_id, int(number))
    if picture is None or not picture.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        raise NotFound(
            f"There is no picture {number[:20]!r} of the episode {episode_id[:80]!r}.",
            hint="The step that ends an episode has none unless it was asked for; others may not have fitted "
            "ENVD_BUNDLE_LIMIT.",
        )
    return await picture_response(picture, width, f"private, max-age={LIVES}")


def width_asked(request: Request) -> int | None:
    """Raises InvalidRequest."""
    return max(16, int(number_in_query(request, "width", 16, 4096))) if "width" in request.query_params else None


async def picture_response(picture: bytes, width: int | None, keep: str) -> Response:
    """A PNG or JPEG as it is, or smaller. `keep` is for Cache-Control."""
    if width is not None:
        try:
            picture = await anyio.to_thread.run_sync(smaller, picture, width, limiter=_shrinking())
        except ValueError:
            pass  # whoever looks at it as it is sees more than an error would tell
    kind = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
    return Response(picture, media_type=kind, headers={"Cache-Control": keep, "X-Content-Type-Options": "nosniff"})


_limiter = RunVar[anyio.CapacityLimiter]("shrinking")


def _shrinking() -> anyio.CapacityLimiter:
    """Of this event loop."""
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(limiter := anyio.CapacityLimiter(SHRUNK_AT_ONCE))
        return limiter


routes: list[BaseRoute] = [
    Route("/v1/episodes/{episode}/steps", steps),
    Route("/v1/episodes/{episode}/frames/{frame}", frame),
]
