"""What a shell is offered behind a command: numbers, ids and files. The server is asked for half a second at most;
where it does not answer nothing is offered, and nothing is said."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..terminal import printable

SECONDS = 0.5
"""How long whoever pressed Tab waits."""
SHOWN = 50
MOST = 8 * 1024 * 1024
"""Bytes of an answer that are read."""
PLAIN = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}", re.ASCII)
"""What is put into a command line, and the shell must find nothing to do in."""

Offer = tuple[str, str]
"""What may stand there, and a word about it."""
Offered = list[Offer]


def env_numbers(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, _listed(ctx, "/v1/envs", "envs", lambda env: (str(env["id"]), env["state"])))


def jobs(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, _listed(ctx, "/v1/jobs", "jobs", _job))


def active_jobs(ctx: typer.Context, incomplete: str) -> Offered:
    def active(job: dict[str, Any]) -> Offer | None:
        return _job(job) if job["ended_at"] is None else None

    return _begin_with(incomplete, _listed(ctx, "/v1/jobs", "jobs", active))


def episodes(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, _listed(ctx, "/v1/episodes", "episodes", lambda episode: (episode, "")))


def files(incomplete: str) -> Offered:
    """Task files, and the folders on the way to them."""
    given = Path(incomplete or ".")
    folder = given if not incomplete or incomplete.endswith("/") else given.parent
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    named = [f"{path}/" if path.is_dir() else str(path) for path in found if not path.name.startswith(".")]
    return _begin_with(incomplete, [(name, "") for name in named if name.endswith(("/", ".json"))])


def _job(job: dict[str, Any]) -> Offer:
    where = job["kind"] if job["env"] is None else f"env {job['env']}"
    return job["id"], f"{where}, {job['state']}"


def _begin_with(incomplete: str, offered: Offered) -> Offered:
    return [one for one in offered if one[0].startswith(incomplete)][:SHOWN]


def _listed(ctx: typer.Context, path: str, name: str, offer: Callable[[Any], Offer | None]) -> Offered:
    """What is offered of each thing that the server lists there. Nothing, whatever goes wrong: a word about it would
    stand in the middle of a command line."""
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    from ..errors import EnvdError
    from ..settings import load

    class Stays(HTTPRedirectHandler):
        """Where a server sends its callers, the token does not go."""

        def redirect_request(self, *_: Any) -> None:
            return None

    try:
        settings = load()
    except EnvdError:
        return []
    token = settings.token.get_secret_value()
    url = (ctx.params.get("url") or settings.url).rstrip("/") + path
    found: Offered = []

    def look() -> None:
        try:
            request = Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
            with build_opener(ProxyHandler({}), Stays()).open(request, timeout=SECONDS) as answer:
                listed = json.loads(answer.read(MOST))[name]
            offered = [one for one in map(offer, listed) if one is not None]
            found.extend((value, _words(word)) for value, word in offered if PLAIN.fullmatch(value))
        except Exception:  # noqa: BLE001 - see above
            pass

    # In a thread, since a name that does not resolve holds up longer than any timeout of a socket.
    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return list(found)


def _words(said: str) -> str:
    return printable(" ".join(said.split()))
