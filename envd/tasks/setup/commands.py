"""Set-up steps that run something in the guest, wait, or move windows: execute, command, execute_with_verification,
launch, sleep, activate_window, close_window.

A command that fails, or that the guest could not run or see the end of, is a warning: upstream only logs it, and there
are tasks that count on it (a program that is not on every image, one that stays open until the guest's 120 s are over).
In a shell, a command that is not there is nothing but return code 127. What is not a warning: no answer, an answer that
makes no sense, a `launch` that starts nothing, a condition that does not come true.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import anyio

from ...errors import GuestMisbehaved, TaskError, TaskInvalid
from ...guest import Executed, Guest
from ..task import Parameters
from .chrome import PROXY
from .context import Context, Run

UNTIL_PAUSE = 0.3
"""Seconds between two tries of a command with `until`, as upstream."""
UNTIL_SECONDS = 280.0
"""How long `until` is tried; upstream knows no end. Below the step's deadline, so that the reason can be told."""
LARGEST_OUTPUTS = 32 * 1024 * 1024
"""Bytes that all outputs kept under a name may have."""
CHECK_SECONDS = 5
"""How long the command in `command_success` may take, as in the guest server that checks it by itself."""
PROXY_OPTION = f"--proxy-server={PROXY}"
PLACEHOLDER = re.compile(r"\{(CLIENT_PASSWORD|SCREEN_(?:WIDTH|HEIGHT)(?:_HALF)?)\}")

Command = str | list[str]


async def launch(context: Context, parameters: Parameters) -> str:
    """Start a program and leave it. A string of several words that is not for a shell is split at its blanks."""
    command, shell = parameters["command"], bool(parameters.get("shell"))
    if isinstance(command, str) and not shell:
        words = command.split()
        command = words if len(words) > 1 or _is_chrome(words) else command
    if context.proxied and isinstance(command, list) and _is_chrome(command):
        command = [*command, PROXY_OPTION]
    await context.guest.launch(command, shell=shell, timeout=None)
    return ""


async def execute(context: Context, parameters: Parameters) -> str:
    """Run a command to its end, once; with `until`, again and again until one of its conditions holds."""
    command, shell = _filled(parameters["command"], context), bool(parameters.get("shell"))
    names = [_plain_name(parameters, stream) for stream in ("stdout", "stderr")]
    done: Executed | GuestMisbehaved
    if until := parameters.get("until"):
        done = await _until(context.guest, command, shell, until)
    else:
        done = await _try(context.guest, command, shell)
    if isinstance(done, GuestMisbehaved):
        return f"the guest did not run it to its end: {done.facts['refused']}"
    warnings = [_of_return_code(done)] if done.returncode and not until else []
    for name, text in zip(names, (done.stdout, done.stderr), strict=True):
        if name and not _keep(context.outputs, name, text.encode(errors="replace")):
            warnings.append(f"{name} was cut: outputs may have {LARGEST_OUTPUTS} bytes in all")
    return "; ".join(warnings)


async def execute_with_verification(context: Context, parameters: Parameters) -> str:
    """Run a command, then wait until a window exists, a second command succeeds, or both."""
    guest, command, shell = context.guest, parameters["command"], bool(parameters.get("shell"))
    wanted = dict(parameters.get("verification") or {})
    patience, pause = float(parameters.get("max_wait_time", 10)), float(parameters.get("check_interval", 1))
    path = "/execute_with_verification"
    body = {"command": command, "shell": shell, "verification": wanted}
    try:
        answer = await guest.post(path, body | {"max_wait_time": patience, "check_interval": pause}, None)
        done = guest.executed(path, answer)
    except GuestMisbehaved as error:
        if error.facts.get("http_status") != 404:
            raise
        # An older guest server, which has no such endpoint.
        done = await guest.execute(command, shell=shell, timeout=None)
        await _verify(guest, wanted, patience, pause)
    return _of_return_code(done) if done.returncode else ""


async def sleep(context: Context, parameters: Parameters) -> str:
    await anyio.sleep(parameters["seconds"])
    return ""


async def activate_window(context: Context, parameters: Parameters) -> str:
    return await _window(context.guest, "/setup/activate_window", parameters)


async def close_window(context: Context, parameters: Parameters) -> str:
    return await _window(context.guest, "/setup/close_window", parameters)


STEPS: dict[str, Run] = {
    "launch": launch,
    "execute": execute,
    "command": execute,
    "execute_with_verification": execute_with_verification,
    "sleep": sleep,
    "activate_window": activate_window,
    "close_window": close_window,
}


def _is_chrome(words: list[str]) -> bool:
    return words[:1] == ["google-chrome"]


def _filled(command: Command, context: Context) -> Command:
    """`command` with its placeholders filled in. Upstream does so in execute and command alone."""
    width, height = context.screen
    values = {
        "CLIENT_PASSWORD": context.settings.client_password,
        "SCREEN_WIDTH": str(width),
        "SCREEN_HEIGHT": str(height),
        "SCREEN_WIDTH_HALF": str(width // 2),
        "SCREEN_HEIGHT_HALF": str(height // 2),
    }

    def fill(text: str) -> str:
        return PLACEHOLDER.sub(lambda found: values[found[1]], text)

    return fill(command) if isinstance(command, str) else [fill(word) for word in command]


def _of_return_code(done: Executed) -> str:
    said = (done.stderr.strip() or done.stdout.strip())[-1500:]
    return f"it ended with {done.returncode}" + (f": {said}" if said else "")


async def _try(guest: Guest, command: Command, shell: bool) -> Executed | GuestMisbehaved:
    """What became of the command, or the guest's own words why it was not run to its end."""
    try:
        return await guest.execute(command, shell=shell, timeout=None)
    except GuestMisbehaved as error:
        if "refused" not in error.facts:
            raise
        return error


async def _until(guest: Guest, command: Command, shell: bool, until: Mapping[str, Any]) -> Executed:
    ends = time.monotonic() + UNTIL_SECONDS
    while True:
        done = await _try(guest, command, shell)
        if isinstance(done, Executed) and _holds(done, until):
            return done
        if time.monotonic() + UNTIL_PAUSE > ends:
            last = done.facts["refused"] if isinstance(done, GuestMisbehaved) else _of_return_code(done)
            raise TaskError(f"until {dict(until)} did not come true in {UNTIL_SECONDS:g} s; the last time, {last}")
        await anyio.sleep(UNTIL_PAUSE)


def _holds(done: Executed, until: Mapping[str, Any]) -> bool:
    return (
        ("returncode" in until and done.returncode == until["returncode"])
        or ("stdout" in until and str(until["stdout"]) in done.stdout)
        or ("stderr" in until and str(until["stderr"]) in done.stderr)
    )


def _plain_name(parameters: Parameters, stream: str) -> str:
    """The name to keep an output under; "" for none. Raises TaskInvalid for one that is a path."""
    name = parameters.get(stream) or ""
    if (
        not isinstance(name, str)
        or name in (".", "..")
        or re.search(r"[/\\\0]", name)
        or len(name.encode(errors="replace")) > 255
    ):
        raise TaskInvalid(f"{stream}: {str(name)[:100]!r} must be the name of a file, without folders")
    return name


def _keep(outputs: dict[str, bytes], name: str, content: bytes) -> bool:
    """False when there was no room for all of it."""
    room = LARGEST_OUTPUTS - sum(len(kept) for other, kept in outputs.items() if other != name)
    outputs[name] = content[:room]
    return len(content) <= room


async def _verify(guest: Guest, wanted: Mapping[str, Any], patience: float, pause: float) -> None:
    ends = time.monotonic() + patience
    while not await _verified(guest, wanted):
        if time.monotonic() > ends:
            raise TaskError(f"the command ran, but {dict(wanted)} did not hold within {patience:g} s")
        await anyio.sleep(max(pause, 0.05))


async def _verified(guest: Guest, wanted: Mapping[str, Any]) -> bool:
    """Whether all that is wanted holds. A window is found by any part of its title, in any case."""
    if "window_exists" in wanted:
        listed = await guest.execute(["wmctrl", "-l"], timeout=None)
        titles = [columns[3].lower() for line in listed.stdout.splitlines() if len(columns := line.split(None, 3)) > 3]
        if not any(str(wanted["window_exists"]).lower() in title for title in titles):
            return False
    if "command_success" in wanted:
        check = ["timeout", str(CHECK_SECONDS), "sh", "-c", str(wanted["command_success"])]
        return (await guest.execute(check, timeout=None)).returncode == 0
    return True


async def _window(guest: Guest, path: str, parameters: Parameters) -> str:
    """Guest servers say the same whether a window matched or not (ours says which), so wmctrl is asked before."""
    name = parameters["window_name"]
    strict, by_class = bool(parameters.get("strict")), bool(parameters.get("by_class"))
    missing = not await _may_match(guest, name, strict, by_class)
    try:
        said = await guest.tell(path, {"window_name": name, "strict": strict, "by_class": by_class}, None)
    except GuestMisbehaved as error:
        if "refused" not in error.facts:
            raise
        return str(error.facts["refused"])
    if said.startswith("No window matched"):
        return said
    return f"wmctrl lists no window {name!r}" if missing else ""


async def _may_match(guest: Guest, name: str, strict: bool, by_class: bool) -> bool:
    """False only if no window is meant for certain. How wmctrl pads its columns, and what blanks a class may have in
    it, is not looked into: a warning that is wrong is worse than none."""
    listed = await _try(guest, ["wmctrl", "-lx" if by_class else "-l"], shell=False)
    if isinstance(listed, GuestMisbehaved) or listed.returncode:
        return True
    lines = listed.stdout.splitlines()
    if strict:
        return any((name in line) if by_class else line.endswith(name) for line in lines)
    return any(name.lower() in line.lower() for line in lines)
