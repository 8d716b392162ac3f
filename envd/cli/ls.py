"""`envd ls`: what a server has now: its envs, its jobs, the episodes whose evidence it keeps, its leases."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import anyio
from rich.console import Console

from .. import __version__
from ..client import Client
from ..errors import EnvdError, InfraError
from ..models import Env, EnvState, Episode, Job, JobKind, Lease, LeaseState, Verdict
from .listing import ago, console, print_json, print_list
from .watch import clock, number

JOBS_SHOWN = 20
"""Jobs that have ended, beside all that have not."""
EPISODES_SHOWN = 20
AT_ONCE = 8
"""Questions that are put to the server at once."""


async def envs(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print the envs, and in a line what boots and who waits. Always 0."""
    found = await client.envs()
    if as_json:
        print_json({"envs": [env.model_dump(mode="json") for env in found]})
        return 0
    output = output or console()
    now = time.time()
    names = ("env", "state", "task", "played", "since", "desktop", "lease", "job", "detail")
    verdicts = await _verdicts(client, [env.episode.id for env in found if env.episode and env.episode.done])
    print_list(output, *_without_empty(names, [_env_row(env, verdicts, now) for env in found]))
    queue = await client.queue()
    waiting = [lease for lease in await client.leases() if lease.state is LeaseState.WAITING]
    told = [f"{len(queue.booting)} booting, {len(queue.waiting)} waiting for it"]
    told += [f"lease {lease.position} in line: {lease.owner}, {number(lease.count, 'env')}" for lease in waiting]
    output.out(f"\n{'; '.join(told)}", highlight=False)
    return 0


async def jobs(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print the jobs, those that have not ended first, then the newest of the others. Always 0."""
    found = await client.jobs()
    if as_json:
        print_json({"jobs": [job.model_dump(mode="json") for job in found]})
        return 0
    output = output or console()
    active = [job for job in found if not job.state.terminal]
    ended = [job for job in found if job.state.terminal]
    shown = sorted(active, key=lambda job: (job.position or 0, job.created_at)) + ended[:JOBS_SHOWN]
    if not shown:
        output.out("There is no job, and there was none lately.", highlight=False)
        return 0
    now = time.time()
    names = ("job", "of", "state", "task", "age", "took", "path", "about")
    print_list(output, names, [_job_row(job, now) for job in shown])
    if len(ended) > JOBS_SHOWN:
        output.out(f"\n{len(ended) - JOBS_SHOWN} more have ended: --json has them all.", highlight=False)
    return 0


async def episodes(client: Client, *, limit: int = EPISODES_SHOWN, as_json: bool, output: Console | None = None) -> int:
    """Print the newest `limit` episodes with evidence; of their ids alone, all, as JSON. Always 0."""
    found = await client.episodes()
    if as_json:
        print_json({"episodes": found})
        return 0
    output = output or console()
    if not found:
        output.out("No episode left evidence yet.", highlight=False)
        return 0
    now, room = time.time(), anyio.CapacityLimiter(AT_ONCE)
    rows: dict[str, tuple[str, ...]] = {}

    async def look(episode: str) -> None:
        async with room:
            rows[episode] = await _episode_row(client, episode, now)

    async with anyio.create_task_group() as tasks:
        for episode in found[:limit]:
            tasks.start_soon(look, episode)
    print_list(output, ("episode", "env", "task", "began", "played", "verdict"), [rows[one] for one in found[:limit]])
    if len(found) > limit:
        output.out(f"\n{len(found) - limit} older: --limit shows more, --json has the ids of all.", highlight=False)
    return 0


async def _episode_row(client: Client, episode_id: str, now: float) -> tuple[str, ...]:
    """What is not known stays empty: evidence may go while it is looked at, and a server may be older."""
    try:
        about, verdict = await client.recorded(episode_id)
    except EnvdError as error:
        return episode_id, "", "", "", "", f"cannot be looked at: {error.detail}"
    began, steps, ended = about.get("began_at"), about.get("steps"), about.get("end_reason")
    played = number(steps if isinstance(steps, int) else 0, "step")  # it is told with the first of them
    return (
        episode_id,
        str(about.get("env", "")),
        str(about.get("task_id") or ""),
        f"{ago(now - began)} ago" if isinstance(began, int | float) else "",
        ", ".join(str(word) for word in (played, ended) if word),
        _judged(verdict),
    )


async def _verdicts(client: Client, episode_ids: Sequence[str]) -> dict[str, Verdict]:
    """Of those that were judged. What cannot be had is left out: the rest is to be seen all the same."""
    found: dict[str, Verdict] = {}
    room = anyio.CapacityLimiter(AT_ONCE)

    async def look(episode_id: str) -> None:
        async with room:
            with suppress(EnvdError):
                found[episode_id] = await client.verdict(episode_id)

    async with anyio.create_task_group() as tasks:
        for episode_id in episode_ids:
            tasks.start_soon(look, episode_id)
    return found


async def leases(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print the leases that are held or wait. Always 0."""
    found = await client.leases()
    if as_json:
        print_json({"leases": [lease.model_dump(mode="json") for lease in found]})
        return 0
    output = output or console()
    if not found:
        output.out("No env is leased, and nobody waits for one.", highlight=False)
        return 0
    now = time.time()
    names = ("lease", "owner", "state", "envs", "age", "ends unless used")
    print_list(output, names, [_lease_row(lease, now) for lease in found])
    return 0


async def versions(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print ours and the server's. Always 0. Raises InfraError for a server that does not say what it is."""
    theirs = await client.version()
    if as_json:
        print_json({"version": __version__, "server": theirs})
        return 0
    output = output or console()
    output.out(f"envd {__version__}", highlight=False)
    try:
        age = ago(time.time() - theirs["started_at"])
        words = f"envd {theirs['version']}, {theirs['provider']} desktops, daemon {theirs['daemon_id']}"
    except (KeyError, TypeError) as error:
        raise InfraError(f"{client.url} does not say which envd it is.", hint="Is it one, and no older one?") from error
    output.out(f"{client.url}: {words}, started {age} ago", highlight=False)
    return 0


def _env_row(env: Env, verdicts: Mapping[str, Verdict], now: float) -> tuple[str, ...]:
    episode = env.episode
    since = episode.started_at if episode else env.desktop.created_at if env.desktop else None
    over = episode is not None and episode.done and env.state is EnvState.PLAYING
    verdict = verdicts.get(episode.id) if episode is not None else None
    return (
        str(env.id),
        "over" if over else str(env.state),
        (episode.task_id or "") if episode else "",
        "" if episode is None else f"{_played(episode)}{f'; {_judged(verdict)}' if over else ''}",
        "" if since is None else ago(now - since),
        env.desktop.id if env.desktop else "",
        f"{env.lease.owner}, {clock(env.lease.expires_at - now)} left" if env.lease else "",
        ", ".join(filter(None, (env.job_id, env.waiting_job_id and f"then {env.waiting_job_id}"))),
        "" if env.job_id else env.detail,
    )


def _played(episode: Episode) -> str:
    """How far it is, in what its length counts, and how it ended."""
    if episode.counts == "actions":
        told = f"{episode.actions} of {number(episode.max_steps, 'action')}, step {episode.steps}"
    else:
        told = f"{episode.steps} of {number(episode.max_steps, 'step')}"
    return f"{told}, {episode.end_reason}" if episode.end_reason else told


def _judged(verdict: Verdict | None) -> str:
    """A score, or why there is none; never a number for that."""
    if verdict is None:
        return "not judged"
    return f"score {verdict.score:g}" if verdict.score is not None else f"no score: {verdict.code}"


def _job_row(job: Job, now: float) -> tuple[str, ...]:
    end = job.ended_at or now
    about = job.phase if not job.state.terminal else ""
    if job.position is not None:
        about = f"place {job.position}, {job.ahead} ahead"
    if job.eta_s is not None and not job.state.terminal:
        about += f", about {clock(job.eta_s)} left"
    if job.error is not None:
        about = f"{job.error.code}: {job.error.detail}"
    return (
        job.id,
        f"env {job.env}" if job.kind is JobKind.RESET else str(job.kind),
        str(job.state),
        job.task_id or "",
        ago(now - job.created_at),
        f"{end - job.created_at:.1f} s",
        job.reset_path or "",
        about,
    )


def _lease_row(lease: Lease, now: float) -> tuple[str, ...]:
    held = ", ".join(map(str, lease.envs))
    return (
        lease.id,
        lease.owner,
        str(lease.state) if lease.position is None else f"waits, place {lease.position}",
        held or f"wants {lease.count}",
        ago(now - lease.created_at),
        "" if lease.state is LeaseState.ENDED else f"in {clock(lease.expires_at - now)}",
    )


def _without_empty(
    names: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Columns that say nothing of any row are left out: a terminal is narrow."""
    kept = [column for column in range(len(names)) if column < 2 or any(row[column] for row in rows)]
    return [names[column] for column in kept], [[row[column] for column in kept] for row in rows]
