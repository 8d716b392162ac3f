"""A real daemon in a process of its own: started on a free port, watched through its log, ended by real signals.

`daemon(state_dir)` runs `envd serve`; `kind="hypercorn"` runs `hypercorn envd.asgi:app`. A `prelude` is Python that
runs first in the process that serves: that is how a test injects a crash.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any, Literal

import aiohttp

from envd.daemon import bound, locked

ROOT = Path(__file__).parent.parent
"""Daemons under test run the code that the tests lie beside, whatever is installed."""
Kind = Literal["serve", "hypercorn", "hypercorn in-process"]

TO_START = 30.0
"""Seconds within which a daemon answers; a loaded machine of two cores needs a few."""
DRIVER = """
import os, pathlib
import envd.service
from envd.drivers.sim import SimDriver

class MarkedDriver(SimDriver):
    # Its instances outlive the process, as those of a real provider do: each is a folder below $INSTANCES.
    def __init__(self, settings, daemon_id):
        super().__init__(settings, daemon_id)
        self.instances = pathlib.Path(os.environ["INSTANCES"])
        self.instances.mkdir(exist_ok=True)

    async def create(self, spec, report):
        (self.instances / spec.id).mkdir()
        return await super().create(spec, report)

    async def destroy(self, instance_id):
        await super().destroy(instance_id)
        if (self.instances / instance_id).exists():
            (self.instances / instance_id).rmdir()

    async def list(self):
        return frozenset(path.name for path in self.instances.glob(f"envd-{self.daemon_id}-*"))

envd.service.make_driver = MarkedDriver
"""
"""A prelude: sim desktops that leave a mark until they are destroyed."""
CRASH = """
from envd.boot.queue import BootQueue

whole = BootQueue._serve
def crash(self, ticket, tasks):
    if ticket.job.env == 1:
        raise RuntimeError("injected")
    return whole(self, ticket, tasks)

BootQueue._serve = crash
"""
"""A prelude: the queue's consumer breaks when a reset of env 1 has its turn."""
LISTENS = re.compile(r"Running on (http://[\w.:\[\]]+)")


class DaemonProcess:
    """A daemon that was started. `url` is known once it listens; `log` grows as it writes to stderr."""

    def __init__(self, process: asyncio.subprocess.Process, state_dir: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self.url = ""
        self.log: list[str] = []
        self._grew = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.log)

    def records(self) -> list[dict[str, Any]]:
        """The log as JSON. Raises ValueError for a line that is none."""
        return [json.loads(line) for line in self.log]

    async def logged(self, wanted: Callable[[str], Any], seconds: float = TO_START) -> str:
        """The first line that `wanted` likes, as soon as it is there. Raises EOFError when the log ended without."""
        seen = 0
        async with asyncio.timeout(seconds):
            while True:
                for line in self.log[seen:]:
                    if wanted(line):
                        return line
                seen = len(self.log)
                if self._reader.done():
                    raise EOFError(f"the process ended with {await self.process.wait()}, and wrote:\n{self.text}")
                await self._grew.wait()

    async def listening(self) -> None:
        line = await self.logged(LISTENS.search)
        match = LISTENS.search(line)
        assert match is not None
        self.url = match[1]

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Return when `/readyz` says yes."""
        await self.listening()
        async with asyncio.timeout(TO_START):
            while True:
                async with session.get(f"{self.url}/readyz") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.02)

    def signal(self, number: Signals = SIGTERM) -> float:
        """Send it, and return when that was (monotonic clock)."""
        self.process.send_signal(number)
        return time.monotonic()

    def signal_all(self, number: Signals) -> None:
        """Send it to every process of the command."""
        os.killpg(self.pid, number)

    async def ended(self, seconds: float = 10.0) -> int:
        """The exit code, once the process and all its children have closed stderr."""
        async with asyncio.timeout(seconds):
            code = await self.process.wait()
            await self._reader
        return code

    async def left_nothing_taken(self) -> bool:
        """Whether another daemon could take its port and its state directory now. Raises StartError if not."""

        def take() -> bool:
            with locked(self.state_dir), bound("127.0.0.1", int(self.url.rpartition(":")[2])):
                return True

        return await asyncio.to_thread(take)

    async def kill(self) -> None:
        """For the end of a test, whatever came of it: the process group dies."""
        try:
            os.killpg(self.pid, SIGKILL)
        except ProcessLookupError:
            pass
        await self.process.wait()
        self._reader.cancel()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        try:
            async for line in self.process.stderr:
                self.log.append(line.decode(errors="replace").rstrip("\n"))
                self._grew.set()
                self._grew = asyncio.Event()
        finally:
            self._grew.set()


def environment(state_dir: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without settings of whoever runs the tests. An empty value in `extra` takes a name out."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("ENVD_", "PYTHON"))}
    made = mine | {"PROVIDER": "sim", "ENVD_STATE_DIR": str(state_dir), "PYTHONPATH": str(ROOT)} | dict(extra or {})
    return {name: value for name, value in made.items() if value}


async def start(
    state_dir: Path,
    *arguments: str,
    kind: Kind = "serve",
    prelude: str = "",
    python: Path | str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> DaemonProcess:
    """Start one and return at once. It runs in a process group of its own, in the folder above `state_dir`."""
    process = await asyncio.create_subprocess_exec(
        str(python),
        *_command(kind, prelude, state_dir.parent),
        *arguments,
        env=environment(state_dir, env),
        cwd=state_dir.parent,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=1 << 20,
    )
    return DaemonProcess(process, state_dir)


def _command(kind: Kind, prelude: str, folder: Path) -> list[str]:
    if kind == "serve":
        run = "from envd.cli import main; main()"
        return ["-c", f"{prelude}\n{run}", "serve", "--port", "0"]
    app = "envd.asgi:app"
    if prelude:
        # Hypercorn loads the app in a worker process, which knows nothing of what its parent ran.
        (folder / "under_test.py").write_text(f"{prelude}\nfrom envd.asgi import app\n")
        app = "under_test:app"
    workers = ["--workers", "0"] if kind == "hypercorn in-process" else []
    return ["-m", "hypercorn", app, "--bind", "127.0.0.1:0", *workers]


async def reset(session: aiohttp.ClientSession, url: str, env: int = 0) -> dict[str, Any]:
    """The job of a reset, as accepted."""
    async with session.post(f"{url}/v1/envs/{env}/reset", json={}) as answer:
        assert answer.status == 202, await answer.text()
        job: dict[str, Any] = await answer.json()
        return job


async def crash(session: aiohttp.ClientSession, url: str) -> None:
    """A reset of env 1 where `CRASH` was run: what it is answered, if it is, says nothing."""
    try:
        async with session.post(f"{url}/v1/envs/1/reset", json={}):
            pass
    except aiohttp.ClientConnectionError:
        pass


async def ended_job(session: aiohttp.ClientSession, url: str, job_id: str) -> dict[str, Any]:
    """The job once it has ended."""
    after = 0
    async with asyncio.timeout(TO_START):
        while True:
            async with session.get(f"{url}/v1/jobs/{job_id}", params={"wait": 20, "after": after}) as answer:
                job: dict[str, Any] = await answer.json()
            if job["ended_at"] is not None:
                return job
            after = job["version"]


async def watch(session: aiohttp.ClientSession, url: str, opened: asyncio.Event) -> bytes:
    """All that a stream of everything sends until it ends as it should. Sets `opened` when the first of it is there."""
    body = b""
    async with session.get(f"{url}/v1/events") as answer:
        async for chunk in answer.content.iter_any():
            body += chunk
            opened.set()
    return body


@asynccontextmanager
async def daemon(
    state_dir: Path,
    *arguments: str,
    kind: Kind = "serve",
    prelude: str = "",
    python: Path | str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[DaemonProcess, aiohttp.ClientSession]]:
    """A daemon that is ready, with a session whose time is not limited; both end with the block."""
    running = await start(state_dir, *arguments, kind=kind, prelude=prelude, python=python, env=env)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            await running.ready(session)
            yield running, session
    finally:
        await running.kill()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (mine := children.get(todo.pop(), []))
        found += mine
    return found
