"""Commands: run and wait, run and check, launch and leave; and scripts in Python or bash."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from envd.agent import bodies
from envd.agent.errors import AgentError, BadRequest
from envd.agent.input import WarmInterpreter, is_input_program
from envd.agent.limits import Limits
from envd.agent.processes import Finished, NotStarted, Overran, Processes
from envd.agent.windows import window_titles

_CHECK_SECONDS = 5


class Commands:
    def __init__(self, limits: Limits, processes: Processes, warm: WarmInterpreter) -> None:
        self._limits = limits
        self._processes = processes
        self._warm = warm

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/execute", self.execute),
            web.post("/setup/execute", self.execute),
            web.post("/execute_with_verification", self.execute_with_verification),
            web.post("/setup/execute_with_verification", self.execute_with_verification),
            web.post("/setup/launch", self.launch),
            web.post("/run_python", self.run_python),
            web.post("/run_bash_script", self.run_bash_script),
        ]

    async def execute(self, request: web.Request) -> web.Response:
        """200 whatever the return code: the command was run, and what it says is the caller's to judge."""
        argv = _argv(await bodies.json_object(request))
        finished, ran_by = await self._run(argv)
        return web.json_response(_executed(finished), headers={"X-Envd-Interpreter": ran_by})

    async def execute_with_verification(self, request: web.Request) -> web.Response:
        body = await bodies.json_object(request)
        argv = _argv(body)
        wanted = body.get("verification") or {}
        if not isinstance(wanted, dict):
            raise BadRequest("verification must be an object with window_exists, command_success or both")
        patience = bodies.seconds(body, "max_wait_time", 10)
        pause = bodies.seconds(body, "check_interval", 1)
        finished, ran_by = await self._run(argv)
        answer = _executed(finished)
        headers = {"X-Envd-Interpreter": ran_by}
        if not wanted:
            return web.json_response(answer, headers=headers)
        began = time.monotonic()
        # What is waited for happens in other programs, so it is asked again and again.
        while not (passed := await self._verified(wanted)) and time.monotonic() - began < patience:  # noqa: ASYNC110
            await asyncio.sleep(max(pause, 0.05))
        waited = round(time.monotonic() - began, 3)
        if passed:
            return web.json_response(answer | {"verification": "passed", "wait_time": waited}, headers=headers)
        failed = answer | {
            "status": "verification_failed",
            "verification": "failed",
            "wait_time": waited,
            "message": f"the command ran, but {wanted} did not hold within {patience:g} s",
        }
        return web.json_response(failed, status=500, headers=headers)

    async def launch(self, request: web.Request) -> web.Response:
        body = await bodies.json_object(request)
        await self._processes.launch(_argv(body))
        command = body["command"]
        name = command if isinstance(command, str) else " ".join(command)
        return web.Response(text=f"{name} launched successfully")

    async def run_python(self, request: web.Request) -> web.Response:
        """Run `code` as a file of its own, with the interpreter that the desktop calls `python`."""
        code = bodies.text(await bodies.json_object(request), "code")
        python = shutil.which("python") or shutil.which("python3") or "/usr/bin/python3"
        nothing = {"need_more": False, "output": None}
        try:
            async with _script(code, ".py") as path:
                done = await self._processes.run([python, path], seconds=self._limits.python)
        except Overran as error:
            return web.json_response(
                {"status": "error", "message": error.message, "error": "TimeoutExpired", **nothing}, status=500
            )
        stderr = done.error if done.error or done.returncode == 0 else f"exited with code {done.returncode}"
        return web.json_response(
            {
                "status": "success" if done.returncode == 0 else "error",
                "message": "\n".join(part for part in (done.output, stderr) if part),
                "need_more": False,
                "output": done.output,
                "error": stderr,
                "return_code": done.returncode,
            }
            | _cut(done)
        )

    async def run_bash_script(self, request: web.Request) -> web.Response:
        body = await bodies.json_object(request)
        script = bodies.text(body, "script")
        patience = bodies.seconds(body, "timeout", self._limits.script)
        where = body.get("working_dir") or None
        if where is not None:
            where = str(bodies.path_of(bodies.text(body, "working_dir")))
            if not await asyncio.to_thread(os.path.isdir, where):
                return _script_failed(400, f"working_dir {where} is not a directory")
        try:
            async with _script(script, ".sh") as path:
                done = await self._processes.run(["/bin/bash", path], seconds=patience, cwd=where, merged=True)
        except (Overran, NotStarted) as error:
            return _script_failed(500, error.message)
        return web.json_response(
            {
                "status": "success" if done.returncode == 0 else "error",
                "output": done.output,
                "error": "",
                "returncode": done.returncode,
            }
            | _cut(done)
        )

    async def _run(self, argv: list[str]) -> tuple[Finished, str]:
        """Run a command, in the warm interpreter if it can be, and say which: `warm` or `process`."""
        if len(argv) == 3 and argv[1] == "-c" and is_input_program(argv[2]) and self._warm.speaks_for(argv[0]):
            finished = await self._warm.run(argv[2], self._limits.command)
            if finished is not None:
                return finished, "warm"
        return await self._processes.run(argv, seconds=self._limits.command), "process"

    async def _verified(self, wanted: dict[str, Any]) -> bool:
        window, command = wanted.get("window_exists"), wanted.get("command_success")
        if window is not None:
            titles = (await window_titles(self._processes)).values()
            if not any(str(window).lower() in title.lower() for title in titles):
                return False
        if command is not None:
            try:
                check = await self._processes.run(["/bin/sh", "-c", str(command)], seconds=_CHECK_SECONDS)
            except Overran:
                return False
            return check.returncode == 0
        return True


def _argv(body: dict[str, Any]) -> list[str]:
    """The command of a request as the arguments of a program.

    A string without `shell` is split as a shell would split it. A list with `shell` is a script and its arguments,
    as it is everywhere in POSIX. `~/` at the start of an argument is the home directory, except in a shell's hands.
    """
    command = body.get("command")
    shell = bool(body.get("shell", False))
    if isinstance(command, str) and command.strip():
        try:
            words = [command] if shell else shlex.split(command)
        except ValueError as error:
            raise BadRequest(f"the command cannot be split into words: {error}; quote it, or set shell") from None
    elif isinstance(command, list) and command and all(isinstance(word, str) for word in command):
        words = command
    else:
        raise BadRequest("command is required and must be a non-empty string or list of strings")
    if not words or not words[0]:
        raise BadRequest("command names no program")
    if shell:
        return ["/bin/sh", "-c", *words]
    return [os.path.expanduser(word) if word.startswith("~/") else word for word in words]


def _executed(done: Finished) -> dict[str, Any]:
    answer = {"status": "success", "output": done.output, "error": done.error, "returncode": done.returncode}
    return answer | _cut(done)


def _cut(done: Finished) -> dict[str, Any]:
    if not done.cut:
        return {}
    return {"truncated": True, "hint": "more was printed than is kept; send the output to a file and fetch it by /file"}


def _script_failed(status: int, message: str) -> web.Response:
    answer = {"status": "error", "output": message, "message": message, "error": "", "returncode": -1}
    return web.json_response(answer, status=status)


@contextlib.asynccontextmanager
async def _script(text: str, suffix: str) -> AsyncIterator[str]:
    """A file of its own with the text, for the length of the block."""
    try:
        path = await asyncio.to_thread(_write_script, text.encode(), suffix)
    except UnicodeEncodeError as error:
        raise BadRequest(f"the script is not valid Unicode text: {error}") from None
    except OSError as error:
        raise AgentError(f"cannot write the script to {tempfile.gettempdir()}: {error}") from error
    try:
        yield path
    finally:
        os.unlink(path)


def _write_script(text: bytes, suffix: str) -> str:
    descriptor, path = tempfile.mkstemp(prefix="envd-", suffix=suffix)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
    return path
