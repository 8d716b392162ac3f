"""Around the clients of the soak: a daemon that is started again whenever it has ended, a network that loses answers,
a watcher of all events, and eyes on the simulated machines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import SIGKILL, SIGTERM, SIGUSR1, Signals
from typing import Any, Literal

import aiohttp
from daemon_process import DaemonProcess, start

from envd.drivers.sim.hosted import SimHost
from envd.errors import EnvdError

CENSUS = """
import asyncio, collections, gc, json, os, signal

def census(*_):
    gc.collect()
    tasks = collections.Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    with open(os.environ["CENSUS"] + ".new", "w") as file:
        json.dump(tasks, file)
    os.replace(file.name, os.environ["CENSUS"])

signal.signal(signal.SIGUSR1, census)
"""
"""A prelude: at SIGUSR1 the daemon writes what its tasks are, by the name of what they run."""


@dataclass(frozen=True)
class Census:
    """What a daemon has. `files` are all descriptors but TCP sockets; `journal` and `state` are bytes on disk, the
    latter of everything in the state directory."""

    rss: int
    files: int
    sockets: int
    threads: int
    tasks: int
    journal: int
    state: int
    doing: Mapping[str, int] = field(repr=False, default_factory=dict)


class Supervisor:
    """Keeps a daemon alive on one port and one state directory, as systemd does. `wrong` has what no daemon may do."""

    def __init__(self, state_dir: Path, port: int, env: Mapping[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.state_dir = state_dir
        self.lives = 0
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()
        """Lines that it logged as errors."""
        self.up = asyncio.Event()
        self.over = False
        """It is not started again."""
        self._port = port
        self._env = dict(env)
        self._life: DaemonProcess | None = None
        self._killed_by_us: set[int] = set()
        self._spawned = asyncio.Event()

    async def run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while not self.over:
                env = {"CENSUS": str(self._census_file), "ENVD_LOG_FORMAT": "json", **self._env}
                life = self._life = await start(
                    self.state_dir, "--port", str(self._port), prelude=CENSUS, env=env | {"ENVD_LOG_LEVEL": "warning"}
                )
                self.lives += 1
                self._spawned.set()
                try:
                    looking = asyncio.create_task(self._look_for_ready(life, session))
                    code = await life.process.wait()
                    looking.cancel()
                    await asyncio.wait([looking])
                    with suppress(TimeoutError):
                        await life.ended()
                finally:
                    self.up.clear()
                    await life.kill()
                self._judge(life, code)

    async def _look_for_ready(self, life: DaemonProcess, session: aiohttp.ClientSession) -> None:
        began = time.monotonic()
        while life.process.returncode is None:
            with suppress(aiohttp.ClientError, OSError):
                async with session.get(f"{self.url}/readyz") as answer:
                    if answer.status == 200:
                        self.up.set()
                        return
            await asyncio.sleep(0.02)
            if time.monotonic() - began > 60:
                self.wrong.append(f"life {self.lives} was not ready after a minute:\n{life.text}")
                return

    def _judge(self, life: DaemonProcess, code: int) -> None:
        if life.pid not in self._killed_by_us:
            self.wrong.append(f"the daemon ended by itself with {code}:\n{life.text[-4000:]}")
        elif code not in (0, -SIGKILL):
            self.wrong.append(f"the daemon was told to end, and ended with {code}:\n{life.text[-4000:]}")
        for line in life.log:
            try:
                record = json.loads(line)
            except ValueError:
                self.wrong.append(f"the daemon wrote: {line}")
                continue
            if record.get("level") in ("error", "critical"):
                self.errors[str(record.get("event"))] += 1
            if "exception" in record:
                self.wrong.append(f"the daemon logged: {line[:4000]}")

    async def signal(self, number: Signals) -> None:
        """To the life that there is, also while it starts."""
        life = self._life
        if life is not None and life.process.returncode is None:
            self._killed_by_us.add(life.pid)
            self._spawned.clear()
            if number is SIGTERM:
                # Before it hears signals they would end it as any process.
                await self.up.wait()
            with suppress(ProcessLookupError):
                life.signal(number)

    async def next_life(self) -> None:
        """Return when one is started after a signal was sent."""
        await self._spawned.wait()

    async def stop(self, seconds: float = 30.0) -> None:
        """A clean end, after which none is started."""
        self.over = True
        await self.signal(SIGTERM)
        assert self._life is not None
        await self._life.ended(seconds)

    def set(self, name: str, value: str) -> None:
        """For the lives to come."""
        self._env[name] = value

    async def census(self) -> Census:
        """Of the life that there is, which must be up."""
        assert self._life is not None
        pid, file = self._life.pid, self._census_file
        file.unlink(missing_ok=True)
        os.kill(pid, SIGUSR1)
        async with asyncio.timeout(20):
            while not file.exists():  # noqa: ASYNC110 - another process's doing
                await asyncio.sleep(0.02)
        return await asyncio.to_thread(_counted, pid, file, self.state_dir)

    @property
    def _census_file(self) -> Path:
        return self.state_dir.parent / "census.json"


def _counted(pid: int, file: Path, state_dir: Path) -> Census:
    doing = json.loads(file.read_text())
    status = Path(f"/proc/{pid}/status").read_text()
    links, tcp = _links(pid), _tcp_sockets(pid)
    sockets = sum(link in tcp for link in links)
    return Census(
        rss=int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024,
        files=len(links) - sockets,
        sockets=sockets,
        threads=int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        tasks=sum(doing.values()),
        journal=_bytes(state_dir, "journal.db*"),
        state=_bytes(state_dir, "**/*"),
        doing=doing,
    )


def _links(pid: int) -> list[str]:
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return found


def _tcp_sockets(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return {f"socket:[{line.split()[9]}]" for line in lines}


def _bytes(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def processes_of(state_dir: Path) -> list[int]:
    """All that were started for this state directory, by what they were started with."""
    found, name = [], str(state_dir).encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if name in (entry / "cmdline").read_bytes() or name in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


Fate = Literal["whole", "left", "unheard", "torn"]
"""Of an answer. left: the connection is cut as soon as the request was handed on, on both sides. unheard: the answer is
read to its end, and not handed on. torn: it is cut in the middle."""
STREAMS_TORN = 0.7
"""Chance that a stream of events is cut after some seconds, while answers are lost at all."""


class Cutter:
    """A network before the daemon: one request a connection, and of some the answer is lost."""

    def __init__(self, port: int, chance: Callable[[], float], random: Random) -> None:
        self.cut: Counter[str] = Counter()
        self.url = ""
        self._port = port
        self._chance = chance
        self._random = random
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Cutter:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=1 << 20, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # the end; whoever waits for this task is none of asyncio's callbacks
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        to_daemon, from_us = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            from_us.write(head + body)
            await from_us.drain()
            await self._answer(_is_stream(head), reader, writer, to_daemon)
        finally:
            from_us.transport.abort()

    async def _answer(
        self, stream: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: asyncio.StreamReader
    ) -> None:
        fate = self._fate(stream)
        if fate == "left":
            self.cut[fate] += 1
            return
        relay = asyncio.create_task(self._relay(source, writer, fate, self._random.uniform(1, 8) if stream else None))
        hang_up = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((relay, hang_up), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (relay, hang_up):
                task.cancel()
            await asyncio.gather(relay, hang_up, return_exceptions=True)

    async def _relay(
        self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, fate: Fate, seconds: float | None
    ) -> None:
        """`seconds` is how long a stream lasts that is to be torn."""
        give_up = None if seconds is None or fate == "whole" else time.monotonic() + seconds
        heard = 0
        while True:
            left = None if give_up is None else max(0.0, give_up - time.monotonic())
            try:
                chunk = await asyncio.wait_for(source.read(1 << 16), left)
            except TimeoutError:
                self.cut["stream"] += 1
                return
            heard += len(chunk)
            if fate == "torn" and give_up is None and chunk:
                writer.write(chunk[: len(chunk) // 2])
                await writer.drain()
                self.cut[fate] += 1
                return
            if not chunk:
                break
            if fate != "unheard":
                writer.write(chunk)
                await writer.drain()
        if fate == "unheard" and heard:
            self.cut[fate] += 1
            return
        writer.close()
        await writer.wait_closed()

    def _fate(self, stream: bool) -> Fate:
        chance = self._chance()
        if stream:
            return "torn" if chance and self._random.random() < STREAMS_TORN else "whole"
        return self._random.choice(("left", "unheard", "torn")) if self._random.random() < chance else "whole"


def _is_stream(head: bytes) -> bool:
    return b" /v1/events" in head.partition(b"\r\n")[0]


class Watcher:
    """Follows everything that happens, over all lives, as a dashboard does: comes back with the last id that it saw."""

    def __init__(self, url: str, wrong: list[str]) -> None:
        self.events = 0
        self.connections = 0
        self.resets: Counter[str] = Counter()
        """Terminal events, by job."""
        self.states: dict[str, str] = {}
        self.last = ""
        self._url = url
        self._wrong = wrong

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=30)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 18) as session:
            while True:
                try:
                    await self._follow(session)
                except (aiohttp.ClientError, OSError, TimeoutError):
                    pass
                await asyncio.sleep(0.05)

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        headers = {"Last-Event-ID": self.last} if self.last else {}
        async with session.get(f"{self._url}/v1/events", headers=headers) as stream:
            if stream.status != 200:
                return
            self.connections += 1
            message: dict[str, str] = {}
            async for raw in stream.content:
                name, _, value = raw.decode().rstrip("\n").partition(": ")
                if name:
                    message[name] = message.get(name, "") + value
                elif message:
                    self._take(message)
                    message = {}

    def _take(self, message: dict[str, str]) -> None:
        kind, found = message.get("event"), message.get("id", "")
        if kind == "snapshot":
            if self.last and found != self.last:
                self._wrong.append(f"a stream that was at {self.last} goes on at {found}")
            self.last = found
        elif kind == "gap":
            self._wrong.append(f"a gap at {self.last}")
        elif kind is not None and kind != "server-shutdown":
            self._take_event(kind, found, message["data"])

    def _take_event(self, kind: str, found: str, data: str) -> None:
        epoch, _, number = found.rpartition("-")
        before_epoch, _, before = self.last.rpartition("-")
        if (epoch, int(number)) != (before_epoch, int(before) + 1):
            self._wrong.append(f"event {found} came after {self.last}")
        self.last = found
        self.events += 1
        if kind == "state":
            job = json.loads(data)["job"]
            if job["ended_at"] is not None:
                self.resets[job["id"]] += 1
                self.states[job["id"]] = job["state"]


class Eyes:
    """What was typed on the machines, looked at from outside the daemon; and how machines die."""

    def __init__(self, state_dir: Path) -> None:
        self.typed: dict[str, str] = {}
        """By desktop, as last seen."""
        self.killed: dict[str, float] = {}
        """Desktops that were killed one by one, and when (Unix seconds) each was dead."""
        self.dead_with_engine: dict[str, float] = {}
        self.engines_killed: list[float] = []
        self._state_dir = state_dir
        self._host: SimHost | None = None
        self._turn = asyncio.Lock()

    async def close(self) -> None:
        if self._host is not None:
            await self._host.close()

    def death(self, desktop_id: str) -> float | None:
        """When it died by our doing."""
        return self.killed.get(desktop_id, self.dead_with_engine.get(desktop_id))

    def died_with_an_engine(self, desktop_id: str, since: float) -> bool:
        """Whether one that is not there any more, and was there at `since`, can have been in an engine that was killed.
        From here on it is known to be."""
        ends = [at for at in self.engines_killed if at >= since]
        if ends and desktop_id not in self.killed:
            self.dead_with_engine.setdefault(desktop_id, ends[0])
        return bool(ends)

    async def look(self, desktop_id: str) -> bool:
        """Whether it was there to be looked at."""
        try:
            self.typed[desktop_id] = await self._do(lambda host: host.typed(desktop_id))
        except EnvdError:
            return False
        return True

    async def desktops(self) -> list[str]:
        found: list[str] = await self._do(lambda host: host.ask("list"))
        return found

    async def kill_one(self, random: Random) -> bool:
        there = [one for one in await self.desktops() if self.death(one) is None]
        if not there:
            return False
        desktop_id = random.choice(there)

        async def look_and_kill(host: SimHost) -> str:
            # Asked in one breath: nothing is typed in between.
            typed, _ = await asyncio.gather(host.typed(desktop_id), host.kill(desktop_id))
            return typed

        try:
            self.typed[desktop_id] = await self._do(look_and_kill)
        except EnvdError:
            return False  # it was removed meanwhile
        self.killed[desktop_id] = time.time()
        return True

    async def kill_engine(self) -> None:
        """All machines die at once. What is typed between the look and the kill is never seen."""
        there = await self.desktops()
        for desktop_id in there:
            await self.look(desktop_id)

        async def kill(host: SimHost) -> int:
            return host.pid

        pid = await self._do(kill)
        now = time.time()
        os.kill(pid, SIGKILL)
        self.engines_killed.append(now)
        self.dead_with_engine |= {one: now for one in there if one not in self.killed}

    async def _do(self, ask: Callable[[SimHost], Awaitable[Any]]) -> Any:
        """Of the engine that there is, or will be in a moment. Raises EnvdError for what it refuses."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await ask(await self._reach())
                except OSError:
                    await asyncio.sleep(0.1)

    async def _reach(self) -> SimHost:
        async with self._turn:
            if self._host is None or self._host.over:
                if self._host is not None:
                    await self._host.close()
                    self._host = None
                self._host = await SimHost(self._state_dir).__aenter__()
            return self._host
