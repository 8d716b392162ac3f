"""The first process of our images: starts programs, keeps them alive, prints what they say, and ends with them.

It runs as PID 1 of a container or of a machine, in a bare interpreter (`python3 -E -S`), and imports little, since what
it imports delays every boot. As PID 1 it cannot be killed from within, and of SIGTERM it heeds only one that came from
outside of its process namespace: a desktop's user may well type `killall python3`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MILESTONE = "envd-milestone: "
LONGEST_LINE = 4096
_PATIENCE = (0.1, 0.5, 2.0, 5.0)
"""Seconds before a program is started once more, the further the more often it died in a row."""
_HEALTHY_SECONDS = 30.0


@dataclass
class Program:
    """Something to run."""

    name: str
    argv: list[str]
    essential: bool = False
    """Everything ends when it does, with its exit code, or 1 if that is 0."""
    restart: bool = False
    listener: socket.socket | None = None
    """A listening socket that it inherits as file descriptor 3; connections wait in it while the program is down."""
    on_demand: bool = False
    """Start it at the first connection to the listener, which it gets as standard input (inetd's `wait`)."""
    environment: dict[str, str] = field(default_factory=dict)
    as_root: bool = False
    quiet: bool = False
    """What it prints is of no use to anybody."""
    verbatim: bool = False
    """Its lines are printed without its name."""
    after: float = 0.0
    """Seconds to wait before it is started."""
    milestone: tuple[str, str] | None = None
    """(text, milestone): the first line of output that begins with the text says that the milestone is reached."""


class Runner:
    """Runs programs until an essential one ends. `user` is (uid, gid) of those that are not root's."""

    def __init__(
        self, programs: list[Program], environment: dict[str, str], user: tuple[int, int] | None = None
    ) -> None:
        self._programs = programs
        self._environment = environment
        self._user = user
        self._running: dict[int, tuple[Program, float]] = {}
        self._deaths: dict[str, int] = {}
        self._due: list[tuple[float, Program]] = []
        self._outputs: dict[int, tuple[Program, bytes]] = {}
        self._waiting: dict[int, Program] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._reached: set[str] = set()
        self._poll = select.poll()
        self._child_ended, self._wake = os.pipe()
        self.console = 1

    def add(self, programs: list[Program]) -> None:
        """Have these started too when it runs."""
        self._programs += programs

    def run(self) -> int:
        """Start everything and return the exit code to end with."""
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(self._child_ended, select.POLLIN)
        now = time.monotonic()
        for program in self._programs:
            if program.after:
                self._due.append((now + program.after, program))
            else:
                self._begin(program)
        while True:
            for fd, _ in self._poll.poll(self._until_due()):
                if fd in self._outputs:
                    self._pump(fd)
                elif fd in self._watched:
                    self._watched[fd]()
                elif fd in self._waiting:
                    self._poll.unregister(fd)
                    self._start(self._waiting.pop(fd))
                else:
                    os.read(self._child_ended, 4096)
            ended = self._reap()
            if ended is not None:
                return ended
            self._start_due()

    def watch(self, fd: int, then: Callable[[], None]) -> None:
        """Call `then` whenever there is something to read, which it must do."""
        self._watched[fd] = then
        self._poll.register(fd, select.POLLIN)

    def say(self, who: str, line: str) -> None:
        """One line of the log."""
        self._print(f"{who}: {line}")

    def reach(self, milestone: str) -> None:
        """Print a milestone, alone on its line, once."""
        if milestone not in self._reached:
            self._reached.add(milestone)
            self._print(f"{MILESTONE}{milestone}")

    def _print(self, line: str) -> None:
        try:
            os.write(self.console, line.encode(errors="replace") + b"\n")
        except OSError:
            pass  # nobody reads; a desktop does not end for that

    def _begin(self, program: Program) -> None:
        if program.on_demand and program.listener is not None:
            self._waiting[program.listener.fileno()] = program
            self._poll.register(program.listener, select.POLLIN)
        else:
            self._start(program)

    def _start(self, program: Program) -> None:
        output, childs = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become(program, childs)
        os.close(childs)
        self._running[pid] = program, time.monotonic()
        self._outputs[output] = program, b""
        self._poll.register(output, select.POLLIN)

    def _become(self, program: Program, output: int) -> None:
        """In the child. Never returns."""
        try:
            os.setsid()
            environment = {**self._environment, **program.environment}
            nothing = os.open("/dev/null", os.O_RDWR)
            passed = program.listener.fileno() if program.listener is not None else None
            os.dup2(passed if program.on_demand and passed is not None else nothing, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if passed is not None and not program.on_demand:
                # Not one step: dup2 onto itself leaves close-on-exec as it was.
                os.dup2(os.dup(passed), 3)
                environment.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
            if self._user is not None and not program.as_root:
                uid, gid = self._user
                os.initgroups(environment["USER"], gid)
                os.setgid(gid)
                os.setuid(uid)
            home = environment.get("HOME")
            if home:
                os.chdir(home)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.execvpe(program.argv[0], program.argv, environment)
        except OSError as error:
            os.write(2, f"cannot be started: {program.argv[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def _pump(self, fd: int) -> None:
        program, rest = self._outputs[fd]
        read = os.read(fd, 65536)
        *lines, rest = (rest + read).split(b"\n")
        if len(rest) > LONGEST_LINE or (rest and not read):
            lines, rest = [*lines, rest], b""
        for line in lines:
            self._heard(program, line[:LONGEST_LINE].decode(errors="replace"))
        self._outputs[fd] = program, rest
        if not read:
            self._poll.unregister(fd)
            os.close(fd)
            del self._outputs[fd]

    def _heard(self, program: Program, line: str) -> None:
        if program.verbatim:
            self._print(line)
        elif not program.quiet:
            self.say(program.name, line)
        if program.milestone is not None and line.startswith(program.milestone[0]):
            self.reach(program.milestone[1])

    def _reap(self) -> int | None:
        """Collect what ended, orphans too. The exit code if all ends with it."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid not in self._running:
                continue
            program, since = self._running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if program.essential:
                for fd in [fd for fd, (whose, _) in self._outputs.items() if whose is program]:
                    self._pump(fd)
            self.say(program.name, f"ended with {code}" if code >= 0 else f"killed by signal {-code}")
            if program.essential:
                return self.code_of(program, code)
            if program.on_demand or program.restart:
                self._again(program, time.monotonic() - since)

    def code_of(self, program: Program, code: int) -> int:
        """What to end with when this essential program ended with `code` (negative: the signal)."""
        return code if code > 0 else 128 - code if code < 0 else 1

    def _again(self, program: Program, lived: float) -> None:
        deaths = 0 if lived > _HEALTHY_SECONDS else self._deaths.get(program.name, 0)
        self._deaths[program.name] = deaths + 1
        self._due.append((time.monotonic() + _PATIENCE[min(deaths, len(_PATIENCE) - 1)], program))

    def _until_due(self) -> float | None:
        """Milliseconds."""
        if not self._due:
            return None
        return max(0.0, min(when for when, _ in self._due) - time.monotonic()) * 1000 + 1

    def _start_due(self) -> None:
        now = time.monotonic()
        due = [program for when, program in self._due if when <= now]
        self._due = [(when, program) for when, program in self._due if when > now]
        for program in due:
            self._begin(program)


def listen(port: int) -> socket.socket:
    """A socket that listens on all addresses of IPv4. Raises SystemExit when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0", port))
    except OSError as error:
        raise SystemExit(
            f"Port {port} cannot be had here ({error.strerror}): give this container a network of its own."
        ) from None
    listener.listen(128)
    return listener


def on_termination(then: Callable[[], None]) -> None:
    """Call `then` in a thread at SIGTERM or SIGINT from outside of this process namespace (whose sender is process 0
    here, pid_namespaces(7)). Children that are forked must unblock them."""
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)

    def watch() -> None:
        while True:
            if signal.sigwaitinfo(ending).si_pid == 0 or os.getpid() != 1:
                then()

    threading.Thread(target=watch, daemon=True).start()
