"""`envd reset`, `step`, `screenshot`, `evaluate` and `bundle`: an episode by hand, a call at a time."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from ..client import Client
from ..errors import EnvdError, RequestError
from ..models import ActionOutcome, ActionResult, Counts, Job, JobState, StepResult, Verdict
from .common import NO_SCORE
from .listing import busy, console, print_json
from .watch import clean, watch

STDIN = "-"
OUTPUT_SHOWN = 2_000
"""Characters of what a program printed."""
VALUE_SHOWN = 160
"""Characters of what a metric was given."""

_OUTCOMES = {
    ActionOutcome.OK: "green",
    ActionOutcome.FAILED: "red",
    ActionOutcome.UNKNOWN: "yellow",
    ActionOutcome.SPECIAL: "cyan",
}


async def reset(
    client: Client,
    env: int,
    task: Path | None,
    *,
    max_steps: int | None,
    counts: Counts | None,
    episode_timeout_s: float | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Ask for it and follow it. 0 if it succeeded or is not waited for, else 1. Raises what `Client.reset` does, and
    RequestError for a file that holds no task."""
    asked = {} if task is None else await run_sync(read_task, task)
    job = await client.submit_reset(
        asked, env=env, max_steps=max_steps, counts=counts, episode_timeout_s=episode_timeout_s
    )
    if wait and as_json:
        return await _ended(client, job)
    if not wait:
        if as_json:
            print_json(job.model_dump(mode="json"))
        else:
            console().out(f"{job.id} {job.state}; `envd watch {job.id}` follows it.", highlight=False)
        return 0
    return await _followed(client, job)


async def prewarm(client: Client, *, as_json: bool) -> int:
    """Ask for a clean desktop to stand by and follow that. 0 if it does, else 1."""
    job = await client.prewarm()
    return await _ended(client, job) if as_json else await _followed(client, job)


async def _followed(client: Client, job: Job) -> int:
    try:
        return await watch(client, job.id)
    except asyncio.CancelledError:
        words = f"{job.id} goes on: `envd watch {job.id}` follows it, `envd cancel {job.id}` ends it."
        Console(stderr=True, markup=False, highlight=False).print(words, soft_wrap=True)
        raise


async def _ended(client: Client, job: Job) -> int:
    """Print the job as JSON once it has ended, however it did."""
    try:
        job = await client.wait(job.id)
    except EnvdError:
        job = await client.job(job.id)
    print_json(job.model_dump(mode="json"))
    return 0 if job.state is JobState.SUCCEEDED else 1


def read_task(path: Path) -> dict[str, Any]:
    """The task in a file, `-` for stdin. Blocks. Raises RequestError."""
    try:
        text = sys.stdin.read() if str(path) == STDIN else path.read_text()
        task = json.loads(text)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(
            f"{path} cannot be read as a task: {why}.", hint="A task is a JSON object; `envd tasks check` looks at it."
        ) from error
    if not isinstance(task, dict):
        raise RequestError(f"{path} holds no task but a JSON {type(task).__name__}.", hint="A task is a JSON object.")
    return task


async def step(
    client: Client,
    env: int,
    actions: list[str],
    *,
    prediction: str | None,
    pause_s: float | None,
    screenshot: Path | None,
    as_json: bool,
    output: Console | None = None,
) -> int:
    """Act and tell what came of it. 0 if all was done, 3 if an action failed, nobody knows of one, or the prediction
    does not parse."""
    if prediction == STDIN:
        prediction = await run_sync(sys.stdin.read)
    elif prediction is None and actions in ([], [STDIN]):
        actions = [await run_sync(sys.stdin.read)]
    if not (prediction or any(action.strip() for action in actions)):
        raise RequestError(
            "There is nothing to do: no action was given, and stdin had none.",
            hint=f'Give one, as in: envd step {env} "pyautogui.click(960, 540)", or a program on stdin.',
        )
    result = await client.step(
        env,
        prediction=prediction,
        actions=None if prediction is not None else actions,
        pause_s=pause_s,
        include_screenshot=screenshot is not None,
    )
    if as_json:
        print_json(result.model_dump(mode="json", exclude={"screenshot"}))
    else:
        _tell_step(result, output or console())
    if screenshot is not None and result.screenshot is not None:
        await _keep(base64.b64decode(result.screenshot), screenshot, quiet=as_json)
    bad = (ActionOutcome.FAILED, ActionOutcome.UNKNOWN)
    return NO_SCORE if result.problem or any(action.outcome in bad for action in result.actions) else 0


def _tell_step(result: StepResult, output: Console) -> None:
    for action in result.actions:
        output.print(action_line(action), soft_wrap=True)
        for stream in (action.stdout, action.stderr):
            for line in stream[:OUTPUT_SHOWN].splitlines():
                output.print(Text(f"    {clean(line)}", "dim"), soft_wrap=True)
    if result.problem:
        output.print(Text(f"The prediction does not parse: {clean(result.problem)}", "red"), soft_wrap=True)
    ended = f", and the episode has ended: {result.end_reason}" if result.done else ""
    took = result.seconds.get("total")
    output.out(f"step {result.step}{'' if took is None else f', {took:.2f} s'}{ended}", highlight=False)


def action_line(action: ActionResult) -> Text:
    """What became of an action: outcome, seconds, which way it went, and the program's beginning."""
    via = f" via {action.via}" if action.via else ""
    code = f" (code {action.returncode})" if action.returncode else ""
    return Text.assemble(
        (f"{action.outcome}", _OUTCOMES[action.outcome]), f" {action.seconds:.2f} s{via}{code}  {brief(action.action)}"
    )


def brief(program: str) -> str:
    """A program in one line of at most 100 characters."""
    line = clean(program)
    return line if len(line) <= 100 else f"{line[:99]}…"


def shortened(value: Any) -> str:
    """What a getter gave, in one line of at most `VALUE_SHOWN` characters, as JSON: it shows where a text ends."""
    line = clean(json.dumps(value, ensure_ascii=False))
    return line if len(line) <= VALUE_SHOWN else f"{line[: VALUE_SHOWN - 1]}…"


async def screenshot(client: Client, env: int, to: Path | None, *, as_json: bool) -> int:
    """Save the screen as it is now. Always 0. Raises NoEpisode, RequestError for a file that cannot be written."""
    picture = await client.screenshot(env)
    if to is not None and str(to) == STDIN:
        if sys.stdout.isatty():
            raise RequestError(
                "A picture is nothing to print on a terminal.", hint="Name a file with -o, or use a pipe."
            )
        await run_sync(_to_stdout, picture)
        return 0
    await _keep(picture, to or Path(f"env-{env}{suffix(picture)}"), quiet=False, as_json=as_json)
    return 0


async def _keep(picture: bytes, to: Path, *, quiet: bool, as_json: bool = False) -> None:
    await run_sync(write_whole, to, picture)
    if quiet:
        return
    width, height = await run_sync(size_of, picture)
    if as_json:
        print_json({"file": str(to), "width": width, "height": height, "bytes": len(picture)})
    else:
        console().out(f"{to}: {width}x{height}, {decimal(len(picture))}", highlight=False)


def suffix(picture: bytes) -> str:
    return ".png" if picture.startswith(b"\x89PNG") else ".jpg"


def size_of(picture: bytes) -> tuple[int, int]:
    """Width and height; zeros of what does not decode. Blocks."""
    from ..pictures import opened

    try:
        with opened(picture) as image:
            return image.width, image.height
    except ValueError:
        return 0, 0


def write_whole(path: Path, data: bytes) -> None:
    """The file is there whole or not at all. Blocks. Raises RequestError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"{path} cannot be written: it is no ordinary file.", hint="Name another one.")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Name a file in a folder that exists and has room.",
        ) from error


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def evaluate(client: Client, env: int, *, as_json: bool, output: Console | None = None) -> int:
    """Print the verdict. 0 if it is a score, 3 if there is none."""
    output = output or console()
    with busy(output, "judging the episode", quiet=as_json):
        verdict = await client.evaluate(env)
    if as_json:
        print_json(verdict.model_dump(mode="json"))
    else:
        tell_verdict(verdict, output)
    return NO_SCORE if verdict.mask else 0


def tell_verdict(verdict: Verdict, output: Console) -> None:
    """The score, or that there is none and why; never a number for a failure."""
    if verdict.score is not None:
        output.print(
            Text.assemble(("score ", "bold"), (f"{verdict.score:g}", "bold green" if verdict.score else "bold"))
        )
        for metric in verdict.metrics:
            output.print(Text(f"    {clean(metric.func)}: {clean(str(metric.value))}", "dim"), soft_wrap=True)
            output.print(Text(f"        seen:     {shortened(metric.result)}", "dim"), soft_wrap=True)
            if metric.expected is not None:
                output.print(Text(f"        expected: {shortened(metric.expected)}", "dim"), soft_wrap=True)
    else:
        why = f"{verdict.status}, fault {verdict.fault} [{verdict.code}]"
        output.print(Text.assemble(("no score ", "bold red"), f"{why}"), soft_wrap=True)
    for line in (verdict.detail, verdict.hint, *(f"warning: {warning}" for warning in verdict.warnings)):
        if line:
            output.print(Text(f"    {clean(line)}"), soft_wrap=True)
    output.out(f"episode {verdict.episode_id}, judged in {verdict.seconds.get('total', 0.0):.1f} s", highlight=False)


async def bundle(
    client: Client,
    episode: str,
    to: Path | None,
    *,
    force: bool = False,
    as_json: bool,
    output: Console | None = None,
) -> int:
    """Save the evidence of an episode, of the one that an env plays where `episode` is a number. Always 0. Raises
    NotFound, RequestError."""
    if episode.isdecimal():
        playing = (await client.env_state(int(episode))).episode
        if playing is None:
            raise RequestError(f"Env {episode} has no episode.", hint="`envd ls --episodes` lists those with evidence.")
        episode = playing.id
    output = output or console()
    target = to or Path()  # under the id, which a server may have made up, as a name that leads nowhere else
    if not force and await run_sync(target.is_file):
        raise RequestError(f"{target} is there already.", hint="Give --force to write over it, or name another one.")
    with busy(output, f"saving the evidence of {episode}", quiet=as_json):
        file = await client.bundle(episode, target)
    size = (await run_sync(file.stat)).st_size
    if as_json:
        print_json({"episode_id": episode, "file": str(file), "bytes": size})
    else:
        output.out(f"{file}: {decimal(size)}", highlight=False)
    return 0
