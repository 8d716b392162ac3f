"""What a shell is offered behind a command: numbers, ids and files. The server is asked for half a second at most;
where it does not answer nothing is offered, and nothing is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

SECONDS = 0.5
"""How long whoever pressed Tab waits."""
SHOWN = 50

Offered = list[tuple[str, str]]
"""What may stand there, each with a word about it."""


def env_numbers(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, [(str(env["id"]), env["state"]) for env in _listed(ctx, "/v1/envs", "envs")])


def jobs(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, [(job["id"], _about(job)) for job in _listed(ctx, "/v1/jobs", "jobs")])


def active_jobs(ctx: typer.Context, incomplete: str) -> Offered:
    active = [job for job in _listed(ctx, "/v1/jobs", "jobs") if job["ended_at"] is None]
    return _begin_with(incomplete, [(job["id"], _about(job)) for job in active])


def episodes(ctx: typer.Context, incomplete: str) -> Offered:
    return _begin_with(incomplete, [(str(episode), "") for episode in _listed(ctx, "/v1/episodes", "episodes")])


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


def _about(job: dict[str, Any]) -> str:
    where = job["kind"] if job["env"] is None else f"env {job['env']}"
    return f"{where}, {job['state']}"


def _begin_with(incomplete: str, offered: Offered) -> Offered:
    return [one for one in offered if one[0].startswith(incomplete)][:SHOWN]


def _listed(ctx: typer.Context, path: str, name: str) -> Iterator[Any]:
    """Nothing, whatever goes wrong: a word about it would stand in the middle of a command line."""
    from urllib.request import ProxyHandler, Request, build_opener

    from ..errors import EnvdError
    from ..settings import load

    try:
        settings = load()
    except EnvdError:
        return iter(())
    token = settings.token.get_secret_value()
    url = (ctx.params.get("url") or settings.url).rstrip("/") + path
    found: list[Any] = []

    def look() -> None:
        try:
            request = Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
            with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
                found.extend(json.load(answer)[name])
        except Exception:  # noqa: BLE001 - see above
            pass

    # In a thread, since a name that does not resolve holds up longer than any timeout of a socket.
    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return iter(tuple(found))
