"""Running programs: with a deadline, as a group that ends as a whole, and with output that cannot fill the memory."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envd.agent.errors import AgentError, BadRequest
from envd.agent.limits import Limits

_LEFT_OPEN_GRACE = 0.25
"""Seconds to wait for the end of a finished command's output, which a background child of it may hold open."""
_REAP_SECONDS = 2


@dataclass(frozen=True)
class Finished:
    """A command that ended by itself. Output is text: UTF-8 with bad bytes replaced, line ends made `\\n`."""

    returncode: int
    output: str
    error: str
    cut: bool
    """More was printed than is kept."""


class Overran(AgentError):
    """The deadline passed; the command and everything in its process group was killed."""

    def __init__(self, seconds: float, output: str) -> None:
        super().__init__(
            f"the command did not finish within {seconds:g} s and was killed with all its children; "
            "start what runs longer through /setup/launch",
            output=output,
        )


class Processes:
    """Starts programs and sees to it that each one is ended and reaped."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._groups: set[int] = set()
        self._pipes: set[_Pipe] = set()
        self._launched: set[asyncio.Task[int]] = set()

    async def run(
        self, argv: Sequence[str], *, seconds: float, cwd: str | None = None, merged: bool = False
    ) -> Finished:
        """Run `argv` to its end. `merged` sends both streams to `output`.

        A caller that is cancelled takes the command down with it. A background child that outlives the command and
        holds its output open is left alone, and not waited for. Raises Overran; NotStarted or BadRequest when it
        cannot be started.
        """
        _must_exist(argv)
        async with self.captured(merged=merged) as capture:
            child = await start(
                dying_with_us(argv),
                cwd=cwd,
                stdout=capture.stdout,
                stderr=capture.stderr,
                start_new_session=True,
            )
            capture.handed_over()
            async with self.group(child.pid):
                try:
                    async with asyncio.timeout(seconds):
                        returncode = await child.wait()
                except BaseException as error:  # the deadline, or the caller hung up
                    kill_group(child.pid)
                    await asyncio.wait([asyncio.ensure_future(child.wait())], timeout=_REAP_SECONDS)
                    if isinstance(error, TimeoutError):
                        raise Overran(seconds, capture.output.text()) from None
                    raise
            return await capture.finished(returncode)

    async def launch(self, argv: Sequence[str]) -> asyncio.Task[int]:
        """Start `argv` in a session of its own and leave it running; its output goes to the launch log.

        The task ends with its return code. Nobody has to wait for it. Raises NotStarted or BadRequest.
        """
        _must_exist(argv)
        log = await asyncio.to_thread(_open_log, argv)
        try:
            child = await start(argv, stdout=log, stderr=log, start_new_session=True)
        except BaseException:
            os.close(log)
            raise
        task = asyncio.create_task(_reap(child, log, self._limits.launch_log), name=f"launched {argv[0]}")
        self._launched.add(task)
        task.add_done_callback(self._launched.discard)
        return task

    @asynccontextmanager
    async def captured(self, *, merged: bool = False) -> AsyncIterator[Capture]:
        """Two pipes for a child to print to, read all the while."""
        pipes = [await self._pipe() for _ in range(1 if merged else 2)]
        capture = Capture([pipe for pipe, _ in pipes], [fd for _, fd in pipes])
        try:
            yield capture
        finally:
            capture.handed_over()
            for pipe, _ in pipes:
                pipe.stop_keeping()

    @asynccontextmanager
    async def group(self, pid: int) -> AsyncIterator[None]:
        """While inside, `kill_all` ends the process group of `pid`."""
        self._groups.add(pid)
        try:
            yield
        finally:
            self._groups.discard(pid)

    def kill_all(self) -> None:
        """End every command that is waited for. What was launched is left alone: nobody waits for it."""
        for pid in self._groups:
            kill_group(pid)

    async def close(self) -> None:
        self.kill_all()
        for pipe in list(self._pipes):
            pipe.close()
        launched = list(self._launched)
        for task in launched:
            task.cancel()
        await asyncio.gather(*launched, return_exceptions=True)

    async def _pipe(self) -> tuple[_Pipe, int]:
        reader, writer = os.pipe()
        pipe = _Pipe(self._limits.output, self._pipes.discard)
        self._pipes.add(pipe)
        await asyncio.get_running_loop().connect_read_pipe(lambda: pipe, os.fdopen(reader, "rb", 0))
        return pipe, writer


class Capture:
    """The output of one child. `stdout` and `stderr` are the descriptors to give to it."""

    def __init__(self, pipes: list[_Pipe], writers: list[int]) -> None:
        self._pipes = pipes
        self._writers = writers
        self.stdout, self.stderr = writers[0], writers[-1]
        self.output = pipes[0]

    def handed_over(self) -> None:
        """Close our copies of the write ends, so that the pipes end when the child's do."""
        while self._writers:
            os.close(self._writers.pop())

    async def finished(self, returncode: int) -> Finished:
        await asyncio.wait([pipe.ended for pipe in self._pipes], timeout=_LEFT_OPEN_GRACE)
        error = self._pipes[1].text() if len(self._pipes) > 1 else ""
        return Finished(returncode, self.output.text(), error, any(pipe.cut for pipe in self._pipes))


class _Pipe(asyncio.Protocol):
    """Keeps the first bytes that come, up to a limit, and reads the rest away so that the writer never blocks."""

    def __init__(self, limit: int, forget: Callable[[_Pipe], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cut = False
        self._kept: list[bytes] = []
        self._room = limit
        self._forget = forget
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.cut = self.cut or len(data) > self._room
        if self._room > 0:
            self._kept.append(data[: self._room])
            self._room -= len(self._kept[-1])

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def text(self) -> str:
        text = b"".join(self._kept).decode(errors="replace")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def stop_keeping(self) -> None:
        self._kept, self._room = [], 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def start(argv: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
    """Start a program without standard input. Raises NotStarted or BadRequest for what cannot be started."""
    try:
        return await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, **options)
    except FileNotFoundError as error:
        raise NotStarted(argv, f"{error.filename or argv[0]}: no such file or directory") from error
    except OSError as error:
        raise NotStarted(argv, str(error)) from error
    except ValueError as error:  # a NUL, or a lone surrogate that no encoding has
        raise BadRequest(f"the command cannot be passed to a program: {error}") from error


class NotStarted(AgentError):
    """The operating system would not start it: no such program, not executable, and the like."""

    def __init__(self, argv: Sequence[str], reason: str) -> None:
        super().__init__(f"cannot start {argv[0]!r}: {reason}; check the name and the desktop's PATH")


def dying_with_us(argv: Sequence[str]) -> Sequence[str]:
    """A command that the kernel kills when we are killed, where util-linux is there to ask for it.

    It holds for the program itself; its children are the business of the desktop's own process namespace.
    """
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv] if shutil.which("setpriv") else argv


def kill_group(pid: int) -> None:
    """SIGKILL the process group of `pid`, or `pid` alone while it has not made one yet. Idempotent."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        return


def state_directory() -> Path:
    """Where the agent keeps what outlives a request, made if need be."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    directory = Path(home, "envd-agent")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _must_exist(argv: Sequence[str]) -> None:
    """What `start` would find out by itself, were it not setpriv that it starts."""
    if "\0" not in argv[0] and shutil.which(argv[0]) is None:
        raise NotStarted(argv, "no such program")


def _open_log(argv: Sequence[str]) -> int:
    path = state_directory() / "launch.log"
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(log, f"--- {' '.join(argv)}\n".encode(errors="replace"))
    return log


async def _reap(child: asyncio.subprocess.Process, log: int, limit: int) -> int:
    """Wait for a launched program, and start its log again whenever it has grown too large.

    The log is opened for appending, so the program goes on writing at the new end.
    """
    ended = asyncio.ensure_future(child.wait())
    try:
        while not (await asyncio.wait([ended], timeout=5))[0]:
            if os.fstat(log).st_size > limit:
                os.ftruncate(log, 0)
        return ended.result()
    finally:
        ended.cancel()
        os.close(log)
