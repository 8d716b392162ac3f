"""`envd ls`: what a server has now: its envs, its jobs, the episodes whose evidence it keeps, its leases."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from .. import __version__
from ..client import Client
from ..errors import InfraError
from ..models import Env, Job, JobKind, Lease, LeaseState
from .listing import ago, console, print_json, print_list
from .watch import clock

JOBS_SHOWN = 20
"""Jobs that have ended, beside all that have not."""
EPISODES_SHOWN = 50


async def envs(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print the envs, and in a line what boots and who waits. Always 0."""
    found = await client.envs()
    if as_json:
        print_json({"envs": [env.model_dump(mode="json") for env in found]})
        return 0
    output = output or console()
    now = time.time()
    names = ("env", "state", "task", "step", "since", "desktop", "lease", "job", "detail")
    print_list(output, *_without_empty(names, [_env_row(env, now) for env in found]))
    queue = await client.queue()
    waiting = [lease for lease in await client.leases() if lease.state is LeaseState.WAITING]
    told = [f"{len(queue.booting)} booting, {len(queue.waiting)} waiting for it"]
    told += [f"lease {lease.position} in line: {lease.owner}, {_number(lease.count, 'env')}" for lease in waiting]
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


async def episodes(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Print the ids of episodes with evidence, the newest first. Always 0."""
    found = await client.episodes()
    if as_json:
        print_json({"episodes": found})
        return 0
    output = output or console()
    for episode in found[:EPISODES_SHOWN]:
        output.out(episode, highlight=False)
    if len(found) > EPISODES_SHOWN:
        output.out(f"\n{len(found) - EPISODES_SHOWN} older ones: --json has them all.", highlight=False)
    if not found:
        output.out("No episode left evidence yet.", highlight=False)
    return 0


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


def _env_row(env: Env, now: float) -> tuple[str, ...]:
    episode = env.episode
    since = episode.started_at if episode else env.desktop.created_at if env.desktop else None
    return (
        str(env.id),
        str(env.state),
        (episode.task_id or "") if episode else "",
        _steps(env),
        "" if since is None else ago(now - since),
        env.desktop.id if env.desktop else "",
        f"{env.lease.owner}, {clock(env.lease.expires_at - now)} left" if env.lease else "",
        ", ".join(filter(None, (env.job_id, env.waiting_job_id and f"then {env.waiting_job_id}"))),
        "" if env.job_id else env.detail,
    )


def _steps(env: Env) -> str:
    episode = env.episode
    if episode is None:
        return ""
    done = episode.actions if episode.counts == "actions" else episode.steps
    ended = f", {episode.end_reason}" if episode.end_reason else ""
    return f"{done}/{episode.max_steps}{ended}"


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


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
