"""A daemon for one command alone: on a free port of 127.0.0.1, with a state directory that is removed with it.

It reads no .env and no ENVD_ variable of whoever starts it, and ends with the process that started it, also when that
is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import anyio
from anyio.to_thread import run_sync

from ..client import Client
from ..errors import InfraError, ServerUnreachable, StartError

TO_START = 30.0
TO_END = 15.0
"""Seconds in which it removes its desktops. What a kill then leaves, sandboxes and files, goes with it."""
LOOK_EVERY = 0.05
CANNOT_START = (69, 75, 78)

_PROGRAM = """
import ctypes, os, signal
folder, starter = os.getcwd(), int(os.environ.pop("STARTED_BY"))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
try:
    if os.getppid() == starter:
        from envd.cli import main
        main()
finally:
    if os.getppid() != starter:  # it was killed, and can clear nothing away
        from envd.cli.own_daemon import _remove
        _remove(folder)
"""


@dataclass(frozen=True, slots=True)
class OwnDaemon:
    url: str
    state_dir: Path
    client: Client


@asynccontextmanager
async def own_daemon(settings: Mapping[str, str]) -> AsyncIterator[OwnDaemon]:
    """A daemon with these `settings` that is ready. Raises StartError with its own words when it cannot start,
    InfraError when it does not come up."""
    folder = Path(await run_sync(lambda: tempfile.mkdtemp(prefix="envd-")))
    try:
        log = await run_sync(lambda: (folder / "log").open("w"))
        try:
            process = await _started(folder, log, settings)
        finally:
            log.close()
        try:
            url = await _listening(process, folder / "log")
            async with Client(url, token="") as client:
                await _ready(client)
                yield OwnDaemon(url, folder / "state", client)
        finally:
            with anyio.CancelScope(shield=True):
                await _ended(process)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(_remove, folder)


async def _started(folder: Path, log: IO[str], settings: Mapping[str, str]) -> asyncio.subprocess.Process:
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("ENVD_") and name != "PROVIDER"}
    # So that it runs the code that this command is of, also where that is not installed.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), theirs.get("PYTHONPATH", ""))))
    mine = {
        "ENVD_HOST": "127.0.0.1",
        "ENVD_STATE_DIR": str(folder / "state"),
        "ENVD_LOG_FORMAT": "json",
        "PYTHONPATH": path,
        "STARTED_BY": str(os.getpid()),
    }
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROGRAM, "serve", "--port", "0"),
        env=theirs | mine | dict(settings),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        # Ctrl-C is for the command alone: it ends its daemon once it has given back what it had there.
        start_new_session=True,
    )


async def _listening(process: asyncio.subprocess.Process, log: Path) -> str:
    """Where it listens, as its log says."""
    with anyio.move_on_after(TO_START):
        while True:
            ended = process.returncode is not None  # looked at first: a line may be its last
            lines = await run_sync(log.read_text)
            for line in lines.splitlines():
                with suppress(ValueError):
                    record: Any = json.loads(line)
                    if isinstance(record, dict) and record.get("event") == "envd is listening":
                        return str(record["url"])
            if ended:
                raise _cannot_start(process.returncode, lines)
            await anyio.sleep(LOOK_EVERY)
    raise InfraError(f"A daemon of its own did not listen within {TO_START:g} s.")


def _cannot_start(code: int | None, log: str) -> StartError:
    words = [line for line in log.splitlines() if line.strip() and not line.startswith("{")]
    if code in CANNOT_START and words:
        first, *rest = words
        return StartError(first.removeprefix("envd cannot start: "), hint=" ".join(rest))
    said = (words or log.splitlines() or ["nothing was said"])[-1]
    return StartError(f"A daemon of its own ended with {code} instead of starting: {said[:300]}.")


async def _ready(client: Client) -> None:
    with anyio.move_on_after(TO_START):
        while True:
            with suppress(ServerUnreachable):
                if (await client.ready()).ready:
                    return
            await anyio.sleep(LOOK_EVERY)
    raise InfraError(f"A daemon of its own was not ready within {TO_START:g} s.")


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        with anyio.move_on_after(TO_END):
            await process.wait()
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _remove(folder: str | Path) -> None:
    """Blocks. Folders without the right to write, which a browser may leave, are no reason to leave it."""
    for path, _, _ in os.walk(folder):
        with suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
