"""A task's set-up: the steps under `config` that run on a clean desktop before its first observation.

Only types that the guest does by itself are here: launch, execute, command, open, activate_window, close_window,
sleep. A task that needs another one is refused before a desktop is spent on it; no step is ever skipped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ..errors import EnvdError, SetupFailed, TaskInvalid
from ..guest import Guest

Parameters = dict[str, Any]
Run = Callable[[Guest, Parameters], Awaitable[str]]
"""Runs one step; answers a warning, or "" when there is nothing to say."""

OPEN_TIMEOUT = 300.0
"""Seconds. The newer guest server answers only when the file's window is there."""


def check(task: dict[str, Any]) -> None:
    """Raise TaskInvalid, naming each field at fault, for a task that this daemon cannot set up."""
    config = task.get("config") or []
    if not isinstance(config, list):
        raise TaskInvalid(
            "config is no list.", errors=[{"field": "config", "message": "must be a list of set-up steps"}]
        )
    errors = [
        {"field": f"config[{index}]", "message": wrong} for index, step in enumerate(config) if (wrong := _wrong(step))
    ]
    if not isinstance(task.get("instruction", ""), str):
        errors.append({"field": "instruction", "message": "must be a string"})
    if errors:
        summary = "; ".join(f"{error['field']}: {error['message']}" for error in errors[:5])
        raise TaskInvalid(f"The task cannot be set up: {summary}.", errors=errors)


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
                f"Set-up step {index} ({kind}) failed: {error.detail}", step=index, type=kind, cause=error.code
            ) from error
        if warning:
            warn(f"config[{index}] {kind}: {warning}")


def _wrong(step: object) -> str:
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return "must be an object with a type"
    kind, parameters = step["type"], step.get("parameters") or {}
    if kind not in STEPS:
        return f"this version has no set-up step {kind!r}; it has {', '.join(sorted(STEPS))}"
    if not isinstance(parameters, dict):
        return "parameters must be an object"
    missing = [name for name in NEEDS[kind] if name not in parameters]
    if missing:
        return f"{kind} needs {', '.join(missing)}"
    if kind == "sleep" and not (isinstance(parameters["seconds"], int | float) and 0 <= parameters["seconds"] <= 600):
        return "seconds must be a number from 0 to 600"
    if parameters.get("until"):
        return "until is not supported by this version"
    return ""


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
        await guest.post(path, body, 30)
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
NEEDS: dict[str, tuple[str, ...]] = {
    "launch": ("command",),
    "execute": ("command",),
    "command": ("command",),
    "open": ("path",),
    "sleep": ("seconds",),
    "activate_window": ("window_name",),
    "close_window": ("window_name",),
}
