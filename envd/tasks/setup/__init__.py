"""A task's set-up: the steps under `config` that run on a clean desktop before its first observation.

Only types that the guest does by itself are here: launch, execute, command, open, activate_window, close_window,
sleep. A task that needs another one is refused before a desktop is spent on it; no step is ever skipped.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ...errors import EnvdError, GuestMisbehaved, SetupFailed, TaskInvalid
from ...guest import Guest

Parameters = dict[str, Any]
Run = Callable[[Guest, Parameters], Awaitable[str]]
"""Runs one step; answers a warning, or "" when there is nothing to say."""

LONGEST_ID = 200
LONGEST_SLEEP = 600
ERRORS_SHOWN = 100
PLACEHOLDER = re.compile(r"\{(CLIENT_PASSWORD|SCREEN_(?:WIDTH|HEIGHT)(?:_HALF)?)\}")
"""Upstream fills these in; sent as they are, they would do something else than the task means."""

OPEN_TIMEOUT = 300.0
"""Seconds. The newer guest server answers only when the file's window is there."""


def check(task: dict[str, Any]) -> None:
    """Raise TaskInvalid, naming each field at fault, for a task that this daemon cannot set up."""
    errors = [
        {"field": field, "message": message}
        for field, wrong, message in (
            ("id", not _is_name(task.get("id")), f"must be a string of at most {LONGEST_ID} characters"),
            ("task_id", not _is_name(task.get("task_id")), f"must be a string of at most {LONGEST_ID} characters"),
            ("instruction", not isinstance(task.get("instruction", ""), str), "must be a string"),
            ("config", not isinstance(task.get("config") or [], list), "must be a list of set-up steps"),
        )
        if wrong
    ]
    if not any(error["field"] == "config" for error in errors):
        errors += [
            {"field": f"config[{index}]", "message": wrong}
            for index, step in enumerate(task.get("config") or [])
            if (wrong := _wrong(step))
        ]
    if errors:
        summary = "; ".join(f"{error['field']}: {error['message']}" for error in errors[:5])
        raise TaskInvalid(f"The task cannot be set up: {summary}.", errors=errors[:ERRORS_SHOWN])


async def run(task: dict[str, Any], guest: Guest, warn: Callable[[str], None]) -> None:
    """Run the steps in order. Raises SetupFailed with the index and type of the step that failed.

    `warn` is told of failures that tasks rely on being ignored: a command's return code.
    """
    for index, step in enumerate(task.get("config") or []):
        kind = step["type"]
        try:
            warning = await STEPS[kind](guest, step.get("parameters") or {})
        except EnvdError as error:
            raise SetupFailed(
                f"Set-up step {index} ({kind}) failed: {error.detail}", step=index, step_type=kind, cause=error.code
            ) from error
        if warning:
            warn(f"config[{index}] {kind}: {warning}")


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str | int) and len(str(value)) <= LONGEST_ID)


def _wrong(step: object) -> str:
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return "must be an object with a type"
    kind, parameters = step["type"], step.get("parameters") or {}
    if kind not in STEPS:
        return f"this version has no set-up step {kind[:60]!r}; it has {', '.join(sorted(STEPS))}"
    if not isinstance(parameters, dict):
        return "parameters must be an object"
    name, fits, wanted = NEEDS[kind]
    if name not in parameters:
        return f"{kind} needs {name}"
    if not fits(parameters[name]):
        return f"{name} must be {wanted}"
    if parameters.get("until"):
        return "until is not supported by this version"
    if placeholder := PLACEHOLDER.search(str(parameters.get("command", ""))):
        return f"the placeholder {placeholder[0]} is not supported by this version"
    return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_command(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and value != [] and all(isinstance(word, str) for word in value))


def _is_pause(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= LONGEST_SLEEP


async def _launch(guest: Guest, parameters: Parameters) -> str:
    command, shell = parameters["command"], bool(parameters.get("shell"))
    if isinstance(command, str) and not shell and len(command.split()) > 1:
        command = command.split()
    await guest.launch(command, shell=shell)
    return ""


async def _execute(guest: Guest, parameters: Parameters) -> str:
    done = await guest.execute(parameters["command"], shell=bool(parameters.get("shell")))
    return f"ended with {done.returncode}: {done.stderr.strip()[-300:]}" if done.returncode else ""


async def _open(guest: Guest, parameters: Parameters) -> str:
    await guest.post("/setup/open_file", {"path": parameters["path"]}, OPEN_TIMEOUT)
    return ""


async def _sleep(guest: Guest, parameters: Parameters) -> str:
    await anyio.sleep(parameters["seconds"])
    return ""


def _window(path: str) -> Run:
    async def call(guest: Guest, parameters: Parameters) -> str:
        body = {
            "window_name": parameters["window_name"],
            "strict": bool(parameters.get("strict")),
            "by_class": bool(parameters.get("by_class")),
        }
        try:
            await guest.post(path, body, 30)
        except GuestMisbehaved as error:
            # No window of that name: upstream logs it and goes on, and there are tasks that rely on that.
            return error.detail
        return ""

    return call


STEPS: dict[str, Run] = {
    "launch": _launch,
    "execute": _execute,
    "command": _execute,
    "open": _open,
    "sleep": _sleep,
    "activate_window": _window("/setup/activate_window"),
    "close_window": _window("/setup/close_window"),
}
COMMAND = ("command", _is_command, "a command line or a list of words")
WINDOW = ("window_name", _is_text, "the title of a window")
NEEDS: dict[str, tuple[str, Callable[[object], bool], str]] = {
    "launch": COMMAND,
    "execute": COMMAND,
    "command": COMMAND,
    "open": ("path", _is_text, "a path"),
    "sleep": ("seconds", _is_pause, f"a number from 0 to {LONGEST_SLEEP}"),
    "activate_window": WINDOW,
    "close_window": WINDOW,
}
"""The one parameter that each type cannot do without, and what it must be."""
