"""Real parts for the tests of the guest agent: an X server, a window manager, the agent, and a client."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from envd.agent.app import AGENT, Agent, create_app, runner_of
from envd.agent.limits import Limits

_servers: dict[str, int] = {}

PREFIX = "import pyautogui; import time; pyautogui.FAILSAFE = False; "


def environment(display: str, home: Path) -> dict[str, str]:
    """Of a desktop: no session bus, a home of its own, and `python` is the one that runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    path = f"{os.path.dirname(sys.executable)}:{kept.pop('PATH')}"
    return kept | {"DISPLAY": display, "HOME": str(home), "PATH": path, "BROWSER": "/bin/false"}


@contextmanager
def running(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, killed with its whole group at the end."""
    process = subprocess.Popen(argv, start_new_session=True, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def x_server(size: str = "1280x720", display: str | None = None) -> Iterator[str]:
    """An Xvfb of its own; yields the name of its display, a free one unless it is given."""
    reader, writer = os.pipe()
    where = ["-displayfd", str(writer)] if display is None else [display, "-displayfd", str(writer)]
    argv = ["Xvfb", *where, "-screen", "0", f"{size}x24", "-nolisten", "tcp", "-noreset"]
    try:
        with running(argv, pass_fds=[writer]) as server:
            os.close(writer)
            number = os.read(reader, 16).decode().strip()
            assert number, "Xvfb did not start"
            _servers[f":{number}"] = server.pid
            yield f":{number}"
    finally:
        os.close(reader)


@dataclass(frozen=True)
class RunningAgent:
    url: str
    process: subprocess.Popen[bytes]
    env: dict[str, str]


@contextmanager
def agent_process(env: dict[str, str]) -> Iterator[RunningAgent]:
    argv = [sys.executable, "-m", "envd.agent", "--port", "0"]
    with running(argv, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert "listening on" in line
        yield RunningAgent(line.split()[-1], process, env)


class Client:
    """Asks an agent as desktop_env does, and hands back status and decoded body."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            return response.status, await _decoded(response)

    async def post(self, path: str, /, **body: Any) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as response:
            return response.status, await _decoded(response)

    async def form(self, path: str, /, **fields: Any) -> tuple[int, Any]:
        async with self.session.post(path, data=fields) as response:
            return response.status, await _decoded(response)

    async def program(self, code: str, python: str = "python") -> tuple[str | None, dict[str, Any]]:
        """What an input program answers, and which interpreter ran it: warm or process."""
        async with self.session.post("/execute", json={"command": [python, "-c", code]}) as response:
            return response.headers.get("X-Envd-Interpreter"), await response.json()


async def _decoded(response: aiohttp.ClientResponse) -> Any:
    if response.content_type == "application/json":
        return await response.json()
    return await response.text() if response.content_type == "text/plain" else await response.read()


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Client(session)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """An application on a port of its own, served as the agent is."""
    runner = runner_of(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def agent_here(limits: Limits | None = None) -> AsyncIterator[tuple[Client, Agent]]:
    """An agent in this process, for this process's DISPLAY."""
    app = create_app(limits, prepare=False)
    async with serving(app) as url, client(url) as asking:
        yield asking, app[AGENT]


def children(pid: int) -> list[int]:
    """The process ids of `pid`'s children, zombies included."""
    return [child for tasks in Path(f"/proc/{pid}/task").iterdir() for child in _numbers(tasks / "children")]


def _numbers(path: Path) -> list[int]:
    try:
        return [int(number) for number in path.read_text().split()]
    except FileNotFoundError:
        return []


def pid_of(display: str) -> int:
    """The process id of an X server of ours."""
    return _servers[display]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(fact: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait for a fact of the outside world that nobody announces, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)
    return value


def home(agent: RunningAgent) -> Path:
    return Path(agent.env["HOME"])


def written(path: Path) -> Callable[[], str]:
    """The fact that a file is there and has something in it."""
    return lambda: path.read_text() if path.exists() else ""
