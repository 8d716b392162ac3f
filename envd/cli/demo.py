"""`envd demo`: a short scripted episode, told step by step: reset, observation, actions, verdict, evidence.

On the server that runs, when it has an env that nobody uses: that is leased, and given back in the end. Else on a
daemon of its own, which is gone afterwards.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync
from rich.console import Console
from rich.text import Text

from ..client import Client, EnvHandle
from ..errors import (
    EnvdError,
    EvaluatorsMissing,
    InfraError,
    LeaseUnavailable,
    RequestError,
    ServerUnreachable,
    StartError,
)
from ..models import Job, Verdict
from ..settings import Settings
from ..tasks.grading import find_interpreter
from .common import NO_SCORE
from .listing import console, print_json
from .own_daemon import own_daemon
from .play import action_line, size_of, suffix, tell_verdict, write_whole
from .watch import clean, clock, watch

FREE_WITHIN = 1.0
"""Seconds in which an env of the server that runs must be free: nobody waits in line for a demo."""
LONG = 60.0
"""Seconds for a boot that are told beforehand."""
SHOWN = 4
"""Envs of which it is told who uses them."""
TITLE = "envd demo"
PROVIDERS = ("local", "sim")
"""Of a daemon of its own: what shows most comes first."""

# A terminal of any of the usual desktops, at a place that is known.
_TERMINAL = (
    f"xterm -T '{TITLE}' -fa Monospace -fs 14 -geometry 90x20+160+160"
    f" || gnome-terminal --title='{TITLE}' --geometry=90x20+160+160"
    f" || lxterminal --title='{TITLE}' --geometry=90x20"
)
# Until its window is there, at most ten seconds. By its class: the title is what the shell in it makes of it.
_IN_FRONT = (
    "command -v wmctrl > /dev/null || exec sleep 3;"
    " for try in $(seq 50); do wmctrl -x -a term && exit 0; sleep 0.2; done"
)
_TASK_SHELL: dict[str, Any] = {
    "id": "demo-greeting",
    "instruction": "Write hello into greeting.txt in your home folder.",
    "config": [
        {"type": "execute", "parameters": {"command": ["bash", "-c", "rm -f ~/greeting.txt"]}},
        {"type": "launch", "parameters": {"command": _TERMINAL, "shell": True}},
        {"type": "execute", "parameters": {"command": ["bash", "-c", _IN_FRONT]}},
    ],
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": ["bash", "-c", "cat ~/greeting.txt 2>/dev/null"]},
        "expected": {"type": "rule", "rules": {"expected": "hello\n"}},
    },
}
_STEPS_SHELL = (
    ("click into the terminal", ("pyautogui.click(420, 320)",)),
    ("type a command", ("pyautogui.write('echo hello > ~/greeting.txt', interval=0.03)", "pyautogui.press('enter')")),
    ("look at what it did", ("pyautogui.write('cat ~/greeting.txt', interval=0.03)", "pyautogui.press('enter')")),
    ("say that it is done", ("DONE",)),
)

# A sim desktop has no terminal; it has a text and a clipboard.
_TASK_SIM: dict[str, Any] = {
    "id": "demo-clipboard",
    "instruction": "Type hello, and copy it to the clipboard.",
    "config": [],
    "evaluator": {
        "func": "exact_match",
        "result": {
            "type": "vm_command_line",
            "command": ["python3", "-c", "import pyperclip; print(pyperclip.paste())"],
        },
        "expected": {"type": "rule", "rules": {"expected": "hello\n"}},
    },
}
_STEPS_SIM = (
    ("click into the window", ("pyautogui.click(420, 320)",)),
    ("type a word", ("pyautogui.write('hello', interval=0.03)",)),
    ("copy it", ("pyautogui.hotkey('ctrl', 'a')", "pyautogui.hotkey('ctrl', 'c')")),
    ("say that it is done", ("DONE",)),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where it is played."""

    client: Client
    env: EnvHandle
    url: str
    provider: str
    own: bool


@dataclass(slots=True)
class Told:
    """What is told, to whom, and what came of it."""

    folder: Path
    pause_s: float
    output: Console
    frames: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None
    evidence: str = ""

    def begin_again(self) -> None:
        self.frames, self.steps, self.verdict, self.evidence = [], [], None, ""


async def demo(
    settings: Settings,
    *,
    url: str | None,
    own: bool,
    provider: str | None,
    pause_s: float,
    folder: Path | None,
    as_json: bool,
    output: Console | None = None,
) -> int:
    """Play it. 0 where it has a score, or none for the want of evaluators alone; 3 where it has none for
    another reason; 1 where it could not be played.

    Raises ServerUnreachable for a `url` that was given and does not answer, StartError when no daemon can be started.
    """
    output = Console(quiet=True) if as_json else output or console()
    began = time.monotonic()
    told = Told(await run_sync(_made, folder), pause_s, output)
    async with AsyncExitStack() as stack:
        stage = None if own or provider else await _of_server(stack, settings, url, output)
        if stage is not None:
            job = await _episode(stage, told)
    if stage is None:
        stage, job = await _on_its_own(settings, (provider,) if provider else PROVIDERS, told)
    seconds = time.monotonic() - began
    _line(output, "frames", f"{told.folder}")
    end = "the daemon and its desktop are gone" if stage.own else "the lease is given back, and its desktop is gone"
    _line(output, "end", f"after {seconds:.1f} s; {end}")
    unjudged = told.verdict is not None and told.verdict.code == EvaluatorsMissing.code
    if unjudged:
        words = "there is no score because no evaluators are installed: `make evaluators`, once, and it is judged, too"
        _line(output, "hint", words)
    if as_json:
        print_json(
            {
                "url": stage.url,
                "provider": stage.provider,
                "own_daemon": stage.own,
                "env": stage.env.number,
                "seconds": round(seconds, 3),
                "job": job.model_dump(mode="json"),
                "steps": told.steps,
                "verdict": told.verdict.model_dump(mode="json") if told.verdict else None,
                "folder": str(told.folder),
                "frames": told.frames,
                "evidence": told.evidence,
            }
        )
    return 0 if told.verdict is not None and (unjudged or not told.verdict.mask) else NO_SCORE


async def _episode(stage: Stage, told: Told) -> Job:
    output = told.output
    _line(output, "watch", f"{stage.url}/ in a browser shows it live, `envd watch --url {stage.url}` the boot")
    job = await _reset(stage, told)
    await _play(stage, told)
    await _judge(stage, told)
    await _keep_evidence(stage, job, told)
    return job


async def _of_server(stack: AsyncExitStack, settings: Settings, url: str | None, output: Console) -> Stage | None:
    """A leased env of the server that runs; None where nothing answers or nothing is free."""
    async with AsyncExitStack() as trying:
        opening = Client(url or settings.url, token=settings.token.get_secret_value())
        client = await trying.enter_async_context(opening)
        try:
            version = await client.version()
            [env] = await trying.enter_async_context(client.lease(1, wait_s=FREE_WITHIN, owner="demo"))
        except ServerUnreachable as error:
            if url is not None:
                raise
            _line(output, "server", f"{clean(error.detail)} So it plays on a daemon of its own.")
            return None
        except LeaseUnavailable:
            words = f"{client.url} has no env that nobody uses{await _used(client)}"
            own = "So this is played on a daemon of its own, and is not seen in that dashboard."
            _line(output, "server", f"{words}. {own}", "yellow")
            free = "an env is free once its episode is over: `envd step ENV DONE`, or `envd evaluate ENV`"
            _line(output, "", f"{free}; a leased one once its lease ends.")
            return None
        provider = str(version.get("provider"))
        _line(output, "server", f"{client.url}, {provider} desktops; env {env.number} is leased for this")
        stack.push_async_exit(trying.pop_all())
        return Stage(client, env, client.url, provider, own=False)


async def _used(client: Client) -> str:
    """By what its envs are used, in brackets. Nothing where that cannot be had."""
    try:
        envs = await client.envs()
    except EnvdError:
        return ""
    told = [
        f"env {env.id} {f'is leased by {env.lease.owner}' if env.lease else f'is {env.state}'}" for env in envs[:SHOWN]
    ]
    more = [f"{len(envs) - SHOWN} more"] if len(envs) > SHOWN else []
    return f" ({', '.join(told + more)})"


async def _on_its_own(settings: Settings, names: Sequence[str], told: Told) -> tuple[Stage, Job]:
    """On a daemon with the first kind of desktops that can be had. Raises StartError, InfraError of the last."""
    python = await run_sync(find_interpreter, settings)
    for name in names:
        environment = {"PROVIDER": name, "ENVD_EVALUATORS": "" if python is None else str(python.absolute())}
        try:
            async with own_daemon(environment) as daemon:
                words = f"{daemon.url}, {name} desktops; a daemon of its own, with its files in a temporary folder"
                _line(told.output, "server", words)
                stage = Stage(daemon.client, daemon.client.env(0), daemon.url, name, own=True)
                return stage, await _episode(stage, told)
        except (StartError, InfraError) as error:
            if name == names[-1]:
                raise
            _line(told.output, "server", f"{name} desktops cannot be had here: {clean(str(error))}", "yellow")
            told.begin_again()
    raise AssertionError("there is a last one")


async def _reset(stage: Stage, told: Told) -> Job:
    """A desktop with the task set up on it, and the first observation."""
    output, task = told.output, _TASK_SIM if stage.provider == "sim" else _TASK_SHELL
    _line(output, "task", task["instruction"])
    job = await stage.env.submit(task)
    if job.eta_s is not None and job.eta_s > LONG:
        words = f"about {clock(job.eta_s)} until there is a desktop; `envd demo --own` has one sooner, of its own"
        _line(output, "patience", words, "yellow")
    if not output.quiet:
        await watch(stage.env.client, job.id, output)
    job = await stage.env.client.wait(job.id)
    path = {"cold": "booted", "restore": "cloned", "spare": "stood by"}.get(str(job.reset_path), str(job.reset_path))
    _line(output, "desktop", f"{job.desktop_id}, {path}, in {(job.ended_at or 0) - job.created_at:.1f} s", "green")
    await _keep_frame(await stage.env.screenshot(), "observation", told)
    return job


async def _play(stage: Stage, told: Told) -> None:
    output = told.output
    for words, programs in _STEPS_SIM if stage.provider == "sim" else _STEPS_SHELL:
        await anyio.sleep(told.pause_s)
        result = await stage.env.act(*programs)
        _line(output, f"step {result.step}", words, "bold")
        for action in result.actions:
            output.print(Text("          ") + action_line(action), soft_wrap=True)
        if result.screenshot is not None:
            await _keep_frame(base64.b64decode(result.screenshot), f"step-{result.step}", told)
        told.steps.append(result.model_dump(mode="json", exclude={"screenshot"}))


async def _judge(stage: Stage, told: Told) -> None:
    output = told.output
    told.verdict = await stage.env.evaluate()
    _line(
        output, "verdict", "the task's own evaluator judged the desktop" if not told.verdict.mask else "there is none"
    )
    if not output.quiet:
        tell_verdict(told.verdict, output)


async def _keep_evidence(stage: Stage, job: Job, told: Told) -> None:
    output = told.output
    if job.episode_id is None:
        return
    try:
        file = await stage.client.bundle(job.episode_id, told.folder / "evidence.tar")
    except EnvdError as error:
        _line(output, "evidence", f"could not be had: {clean(error.detail)}", "yellow")
    else:
        told.evidence = str(file)
        _line(output, "evidence", f"{file}; `envd rescore` judges it again")


async def _keep_frame(picture: bytes, name: str, told: Told) -> None:
    file = told.folder / f"{len(told.frames)}-{name}{suffix(picture)}"
    await run_sync(write_whole, file, picture)
    told.frames.append(str(file))
    width, height = await run_sync(size_of, picture)
    told.output.print(Text(f"          {file.name}, {width}x{height}", "dim"), soft_wrap=True)


def _made(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="envd-demo-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be made: {error.strerror}.", hint="Name another one with -o.") from error
    return folder


def _line(output: Console, what: str, words: str, style: str = "") -> None:
    output.print(Text.assemble((f"{what:<9} ", "bold cyan"), (clean(words), style)), soft_wrap=True)
