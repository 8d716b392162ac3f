"""`envd cancel` and `envd drain`: how a job and a daemon come to their end."""

from __future__ import annotations

import time
from collections.abc import Callable

from anyio import sleep
from rich.console import Console

from ..client import Client, Drain
from ..errors import ServerUnreachable
from ..models import Job, JobState
from .listing import busy, console, print_json
from .watch import clock

LOOK_EVERY = 0.5
TELL_EVERY = 10.0
"""Seconds between two lines that say the same, where there is no terminal."""


async def cancel(client: Client, job_id: str, *, wait: bool, as_json: bool, output: Console | None = None) -> int:
    """Ask for a job's end, and wait for it. 0 once it has ended or was asked to, also if it had ended before; 1 if it
    ended in another way meanwhile. Raises UnknownJob."""
    output = output or console()
    before = await client.job(job_id)
    if before.state.terminal:
        if as_json:
            print_json(before.model_dump(mode="json"))
        else:
            output.out(f"{job_id} had ended already: {before.state}", highlight=False)
        return 0
    job = await client.cancel(job_id)
    if wait and not job.state.terminal:
        with busy(output, f"{job.id} is being ended: its desktop is removed", quiet=as_json):
            job = await _end_of(client, job)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        words = "is being ended" if not job.state.terminal else f"ended: {job.state}"
        output.out(f"{job.id} {words}", highlight=False)
    return 0 if not job.state.terminal or job.state is JobState.CANCELLED else 1


async def _end_of(client: Client, job: Job) -> Job:
    async for event in client.watch(job.id):
        job = event.job or job
    return job


async def drain(
    client: Client, limit_s: float | None, *, wait: bool, as_json: bool, output: Console | None = None
) -> int:
    """Have the daemon end once its episodes have, and wait for that if asked to. 0."""
    output = output or console()
    now = await client.drain(limit_s)
    if not wait:
        return _tell(now, output, as_json=as_json)
    if output.is_terminal and not as_json:
        with output.status(_words(now)) as status:
            await _until_gone(client, lambda told: status.update(_words(told)))
    else:
        heard = ("", 0.0)

        def tell(told: Drain) -> None:
            nonlocal heard
            envs = ", ".join(map(str, told.envs))
            if not as_json and (envs != heard[0] or time.monotonic() > heard[1] + TELL_EVERY):
                heard = envs, time.monotonic()
                output.out(_words(told), highlight=False)

        tell(now)
        await _until_gone(client, tell)
    if as_json:
        print_json({"draining": True, "ended": True})
    else:
        output.out("The daemon has ended.", highlight=False)
    return 0


async def drain_status(client: Client, *, as_json: bool, output: Console | None = None) -> int:
    """Tell how far it is. Always 0."""
    return _tell(await client.drained(), output or console(), as_json=as_json)


async def _until_gone(client: Client, tell: Callable[[Drain], None]) -> None:
    while True:
        await sleep(LOOK_EVERY)
        try:
            tell(await client.drained(patience=0))
        except ServerUnreachable:
            return


def _tell(now: Drain, output: Console, *, as_json: bool) -> int:
    if as_json:
        print_json(now.model_dump(mode="json"))
    else:
        output.out(_words(now), highlight=False)
    return 0


def _words(now: Drain) -> str:
    if not now.draining:
        return "The daemon takes new work: nobody asked for its end."
    left = "" if now.left_s is None else f", {clock(now.left_s)} at the most"
    if not now.envs:
        return "The daemon ends: nothing is played any more."
    many = "s" if len(now.envs) > 1 else ""
    return f"The daemon ends once env{many} {', '.join(map(str, now.envs))} had a verdict{left}."
