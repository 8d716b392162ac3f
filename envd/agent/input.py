"""Programs that only move the mouse and press keys, and the warm interpreter that runs them.

A new Python that imports pyautogui costs 0.1 to 0.7 s before it clicks. Most programs a trainer sends are nothing but
calls of pyautogui with literal arguments; those run in a fork of an interpreter that has it loaded (`warm.py`), with
the same result. Anything else runs as it was sent.
"""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
import socket
import time
import warnings
from pathlib import Path

from envd.agent.errors import AgentError
from envd.agent.processes import Finished, NotStarted, Overran, Processes, kill_group, start

# fmt: off
_INPUT = frozenset({
    "moveTo", "move", "moveRel", "dragTo", "drag", "dragRel", "mouseDown", "mouseUp", "scroll", "hscroll", "vscroll",
    "click", "leftClick", "rightClick", "middleClick", "doubleClick", "tripleClick",
    "press", "keyDown", "keyUp", "hotkey", "write", "typewrite", "sleep",
})
# fmt: on
_CALLS = {"pyautogui": _INPUT, "time": {"sleep"}, "pyperclip": {"copy"}}
_SETTINGS = frozenset({"FAILSAFE", "PAUSE"})
_LONGEST = 65536
_START_SECONDS = 15
_START_AGAIN_AFTER = 5.0
_REAP_SECONDS = 2
_PROGRAM = Path(__file__).with_name("warm.py")


def is_input_program(code: str) -> bool:
    """Whether `code` is nothing but imports, FAILSAFE and PAUSE, input calls, sleeps, and filling the clipboard.

    Arguments must be literals, or pyautogui's own easings. Code that does not parse, or that warns when it is compiled,
    is not: a new process prints what is to be said about it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if len(code.encode()) > _LONGEST:
                return False
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError, Warning):
        return False
    return bool(tree.body) and all(map(_is_input, tree.body))


def _is_input(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import(names=names):
            return all(name.name in _CALLS and name.asname is None for name in names)
        case ast.Assign(targets=[ast.Attribute(ast.Name("pyautogui"), setting)], value=ast.Constant(value)):
            return setting in _SETTINGS and isinstance(value, bool | int | float)
        case ast.Expr(ast.Constant()) | ast.Pass():  # a thought in a string
            return True
        case ast.Expr(ast.Call(ast.Attribute(ast.Name(module), name), arguments, keywords)):
            known = name in _CALLS.get(module, ())
            named = all(keyword.arg is not None for keyword in keywords)
            return known and named and all(map(_is_literal, [*arguments, *(k.value for k in keywords)]))
        case _:
            return False


def _is_literal(value: ast.expr) -> bool:
    match value:
        case ast.Constant():
            return True
        case ast.UnaryOp(ast.USub() | ast.UAdd(), ast.Constant(number)):
            return isinstance(number, int | float)
        case ast.List(elements) | ast.Tuple(elements):
            return all(map(_is_literal, elements))
        case ast.Attribute(ast.Name("pyautogui"), name):
            return name == "linear" or name.startswith("ease")
        case _:
            return False


class WarmInterpreter:
    """One process that has pyautogui loaded, started when first wanted or prepared, and started anew when it dies.

    Programs run one at a time, since the desktop has one mouse and one keyboard.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._turn = asyncio.Lock()
        self._running: _Interpreter | None = None
        self._not_before = 0.0

    def speaks_for(self, name: str) -> bool:
        """Whether the command `name` is the very interpreter that is kept warm."""
        ours, theirs = shutil.which("python"), shutil.which(name)
        return ours is not None and theirs is not None and _same_interpreter(ours, theirs)

    async def prepare(self) -> None:
        """Start it now, so that the first program need not wait. Failing is no error: it is tried again later."""
        async with self._turn:
            await self._interpreter()

    async def run(self, code: str, seconds: float) -> Finished | None:
        """Run an input program. None when nothing of it was run, for want of an interpreter or of an X server.

        Raises Overran, when the program was killed and the interpreter stays; InterpreterDied. A caller that is
        cancelled takes the program down with it.
        """
        async with self._turn:
            interpreter = await self._interpreter()
            if interpreter is None:
                return None
            async with self._processes.captured() as capture:
                try:
                    interpreter.send(code, capture.stdout, capture.stderr)
                    capture.handed_over()
                    async with asyncio.timeout(seconds):
                        returncode = await interpreter.result()
                except TimeoutError:
                    await interpreter.stop_program()
                    raise Overran(seconds, capture.output.text()) from None
                except asyncio.CancelledError:  # the client hung up
                    await interpreter.stop_program()
                    raise
                return None if returncode is None else await capture.finished(returncode)

    @property
    def pid(self) -> int | None:
        return self._running.pid if self._running is not None else None

    def kill(self) -> None:
        """End it, and the program in it, at once. Idempotent."""
        if self._running is not None:
            self._running.kill()

    async def close(self) -> None:
        if self._running is not None:
            await self._running.end()
            self._running = None

    async def _interpreter(self) -> _Interpreter | None:
        if self._running is not None and self._running.is_alive():
            return self._running
        await self.close()
        python = shutil.which("python")
        if python is None or time.monotonic() < self._not_before:
            return None
        try:
            self._running = await _Interpreter.start(python)
        except (InterpreterDied, NotStarted, TimeoutError):
            # Such as an X server that is down: every program would wait for the same failure.
            self._not_before = time.monotonic() + _START_AGAIN_AFTER
        return self._running


class InterpreterDied(AgentError):
    """The warm interpreter ended while it had a program: nobody knows how much of it was carried out."""

    def __init__(self) -> None:
        super().__init__(
            "the interpreter that ran the input died; part of the input may have been carried out, "
            "so look at the screen before sending it again"
        )


class _Interpreter:
    """The other end of `warm.py`."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._channel = channel
        self._program: int | None = None

    @classmethod
    async def start(cls, python: str) -> _Interpreter:
        """Raises NotStarted, InterpreterDied or TimeoutError when it did not get as far as being ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                process = await start(
                    [python, "-c", _PROGRAM.read_text(), str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdout=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        interpreter = cls(process, ours)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await interpreter._hear()
        except BaseException:
            await interpreter.end()
            raise
        return interpreter

    def is_alive(self) -> bool:
        if self._process.returncode is not None:
            return False
        try:
            return bool(self._channel.recv(1, socket.MSG_PEEK))
        except BlockingIOError:  # nothing to hear, and not the end either
            return True
        except OSError:
            return False

    def send(self, code: str, stdout: int, stderr: int) -> None:
        try:
            socket.send_fds(self._channel, [code.encode()], [stdout, stderr])
        except OSError as error:
            raise InterpreterDied from error

    async def result(self) -> int | None:
        """The return code of the program that was sent, negative for a signal; None when it declined to run it."""
        declined = False
        while True:
            match (await self._hear()).split():
                case ["pid", pid]:
                    self._program = int(pid)
                case ["declined"]:
                    declined = True
                case ["exit", code]:
                    self._program = None
                    return None if declined else int(code)

    async def stop_program(self) -> None:
        """Kill the program that was sent and hear of its end; should that fail, kill the interpreter too."""
        if self._program is not None:
            kill_group(self._program)
        try:
            async with asyncio.timeout(_REAP_SECONDS):
                await self.result()
        except (TimeoutError, InterpreterDied):
            await self.end()

    def kill(self) -> None:
        """The program dies with it: it asked the kernel for that."""
        if self._process.returncode is None:
            kill_group(self.pid)

    async def end(self) -> None:
        self.kill()
        self._channel.close()
        await asyncio.wait([asyncio.ensure_future(self._process.wait())], timeout=_REAP_SECONDS)

    async def _hear(self) -> str:
        try:
            heard = await asyncio.get_running_loop().sock_recv(self._channel, 64)
        except OSError as error:
            raise InterpreterDied from error
        if not heard:
            raise InterpreterDied
        return heard.decode()


def _same_interpreter(one: str, other: str) -> bool:
    """Links beside each other, such as python and python3 of one virtual environment."""
    return os.path.dirname(one) == os.path.dirname(other) and os.path.samefile(one, other)
