"""Where a daemon can be killed: at every transaction of its journal and every call of its driver, counted from its
start. `arm` does so in the daemon's process; `Nursery` starts such daemons, each a fork of one process that has
imported everything, since hundreds of them are needed.

    journal: verdicts, event verdict #1 begins        the first transaction of these has not begun
    journal: verdicts, event verdict #1 uncommitted   the disk is slow; the rows are not there for the next life
    journal: verdicts, event verdict #1 committed     they are, and nobody was told
    create #2 before, create #2 amid, create #2 after the driver was not asked, is being asked, has answered

Until it is killed a daemon that is armed writes to a disk that takes no time: a transaction has what changed at once,
and not what happened to wait together, so that each that can be alone is, and they are the same from run to run.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from daemon_process import DaemonProcess, environment

import envd.service
from envd.drivers import make_driver
from envd.drivers.base import Driver
from envd.journal import Journal
from envd.journal_file import Batch, JournalFile
from envd.settings import Settings
from envd.tasks.evaluating import Evaluators, Grade, Preparation

CALLS = ("create", "renew", "adopt", "destroy", "list", "wait", "admit", "log_tail")
LONG = ("create", "renew", "adopt", "destroy")
"""Calls that are killed also in their middle."""
AMID = 0.03
"""Seconds after its begin until a call is killed in its middle, unless it has ended by then."""
POINTS, STRIKE, BEGIN, GRADE = "CRASH_POINTS", "CRASH_AT", "CRASH_FROM", "GRADE_AT_ONCE"
"""Names in the environment: the file that gets a line for each point that is passed; the point that kills; a file that
must be there for points to count, if any; and the score of every task, in place of asking its evaluator."""


class Points:
    def __init__(self, passed: str, strike: str, begin: str) -> None:
        self._passed = os.open(passed, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._strike, self._begin = strike, begin
        self._numbers: Counter[str] = Counter()

    def number(self, what: str) -> int:
        """Of the next transaction, or call of a method; 0 while none counts."""
        if self._begin and not os.path.exists(self._begin):
            return 0
        self._numbers[what] += 1
        return self._numbers[what]

    def kills(self, what: str, number: int, when: str) -> bool:
        """Whether that point is the one. It is noted down."""
        point = f"{what} #{number} {when}"
        if number:
            os.write(self._passed, f"{point}\n".encode())
        return point == self._strike

    def at(self, what: str, number: int, when: str) -> None:
        """Does not return from the point that kills."""
        if self.kills(what, number, when):
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm() -> None:
    """Count points in this process as its environment says, and die at one."""
    points = Points(os.environ[POINTS], os.environ.get(STRIKE, ""), os.environ.get(BEGIN, ""))
    _arm_journal(points)

    def make(settings: Settings, daemon_id: str) -> Driver:
        driver = make_driver(settings, daemon_id)
        for name in CALLS:
            setattr(driver, name, _counted(points, name, getattr(driver, name)))
        return driver

    vars(envd.service)["make_driver"] = make


def _arm_journal(points: Points) -> None:
    do, turn = Journal._do, threading.Lock()

    def alone(work: Callable[..., Any], *arguments: Any) -> Any:
        with turn:
            return work(*arguments)

    async def counted(self: Journal, work: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(work, "__func__", None) is not JournalFile.write:
            return await do(self, alone, work, *arguments)
        [batch] = arguments
        kinds = {str(kind) for kind, _ in batch.records} | ({"jobs"} if batch.jobs else set())
        what = "journal: " + ", ".join([*sorted(kinds), *sorted({f"event {event.kind}" for event in batch.events})])
        number = points.number(what)
        points.at(what, number, "begins")
        if points.kills(what, number, "uncommitted"):
            # In its thread: whoever does not wait for it goes on meanwhile.
            return await do(self, alone, _up_to_its_commit, self._file, batch)
        # Here and now, without letting anything else happen meanwhile.
        written = alone(work, batch)
        points.at(what, number, "committed")
        return written

    Journal._do = counted  # type: ignore[method-assign]


def _up_to_its_commit(file: JournalFile, batch: Batch) -> None:
    fetch = file._fetch

    def fetch_but_commit(sql: str, *values: Any) -> Any:
        if sql == "COMMIT":
            time.sleep(AMID)
            die()
        return fetch(sql, *values)

    vars(file)["_fetch"] = fetch_but_commit
    file.write(batch)


def _counted(points: Points, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(*arguments: Any) -> Any:
        number = points.number(name)
        points.at(name, number, "before")
        if name not in LONG:
            answer = await method(*arguments)
        else:
            asked = asyncio.ensure_future(method(*arguments))
            try:
                await asyncio.wait([asked], timeout=AMID)
                points.at(name, number, "amid")
                answer = await asked
            finally:
                asked.cancel()
        points.at(name, number, "after")
        return answer

    return call


def grade_at_once(score: float) -> None:
    """All of an evaluation but the evaluator, which takes seconds to import."""

    async def warm(self: Evaluators) -> None:
        pass

    async def grade(self: Preparation, *_: Any) -> Grade:
        return Grade(score, None, (), (score,), (), "none", {}, {}, self.workdir)

    Evaluators.warm = warm  # type: ignore[method-assign]
    Preparation.grade = grade  # type: ignore[method-assign, assignment]


# -- many daemons ---------------------------------------------------------------------------------------------------


class _Forked:
    """What DaemonProcess needs of a process."""

    def __init__(self, pid: int, stderr: asyncio.StreamReader, code: asyncio.Future[int]) -> None:
        self.pid, self.stderr, self._code = pid, stderr, code

    def send_signal(self, number: signal.Signals) -> None:
        if not self._code.done():
            os.kill(self.pid, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._code)


class Nursery:
    """Made by `nursery`."""

    def __init__(self, asking: socket.socket) -> None:
        self._asking = asking
        self._born: asyncio.Queue[int] = asyncio.Queue()
        self._codes: dict[int, asyncio.Future[int]] = defaultdict(asyncio.get_running_loop().create_future)
        self._turn = asyncio.Lock()

    async def daemon(self, state_dir: Path, env: Mapping[str, str]) -> DaemonProcess:
        """`envd serve` on a free port, armed if `env` says so."""
        forked = await self._fork(state_dir, "daemon", environment(state_dir, env))
        return DaemonProcess(cast(asyncio.subprocess.Process, forked), state_dir)

    async def sim_host(self, state_dir: Path) -> None:
        """The sim host of a state directory. It listens when this returns."""
        forked = await self._fork(state_dir, "host", environment(state_dir))
        said = await forked.stderr.read()
        assert await forked.wait() == 0, said

    async def _fork(self, state_dir: Path, what: str, env: Mapping[str, str]) -> _Forked:
        ours, theirs = os.pipe()
        try:
            told = json.dumps([what, str(state_dir), dict(env)]).encode()
            async with self._turn:
                socket.send_fds(self._asking, [told], [theirs])
                pid = await self._born.get()
        finally:
            os.close(theirs)
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb")
        )
        return _Forked(pid, reader, self._codes[pid])

    async def _hear(self) -> None:
        while told := await asyncio.get_running_loop().sock_recv(self._asking, 1000):
            what, pid, code = json.loads(told)
            if what == "born":
                self._born.put_nowait(pid)
            else:
                self._codes[pid].set_result(code)


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        run = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import crash_points"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"{run}; crash_points.bear({theirs.fileno()})",
            env=environment(Path.cwd()),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        made = Nursery(ours)
        hearing = asyncio.create_task(made._hear())
        try:
            yield made
        finally:
            hearing.cancel()
            ours.close()
            await asyncio.wait([hearing])
            await process.wait()


def bear(handle: int) -> None:
    """Fork what is asked for through the socket `handle`, until it is closed, and tell how each ended. Blocks."""

    asked = socket.socket(fileno=handle)

    def tell(*words: str | int) -> None:
        try:
            asked.send(json.dumps(words).encode())
        except OSError:
            pass  # nobody asks any more

    def reap(*_: object) -> None:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                tell("ended", ended[0], os.waitstatus_to_exitcode(ended[1]))
        except ChildProcessError:
            pass

    signal.signal(signal.SIGCHLD, reap)
    gc.freeze()
    while True:
        try:
            told, handles, _, _ = socket.recv_fds(asked, 1 << 16, 1)
        except ConnectionResetError:
            return  # it was left with something unread
        if not told:
            return
        [stderr] = handles
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if pid := os.fork():
            os.close(stderr)
            tell("born", pid, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        asked.close()
        _live(stderr, *json.loads(told))


def _live(stderr: int, what: str, state_dir: str, env: dict[str, str]) -> None:
    """In the fork. It ends with this."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for old, new in ((nothing, 0), (nothing, 1), (stderr, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(stderr)
    os.chdir(Path(state_dir).parent)
    os.environ.clear()
    os.environ.update(env)
    if what == "host":
        from envd.drivers.sim import host

        Path(state_dir).mkdir(mode=0o700, exist_ok=True)
        sys.argv = ["host", state_dir]
        host.main()
    else:
        from envd import cli

        if POINTS in env:
            arm()
        if GRADE in env:
            grade_at_once(float(env[GRADE]))
        sys.argv = ["envd", "serve", "--port", "0"]
        cli.main()
