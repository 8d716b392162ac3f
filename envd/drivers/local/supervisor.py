"""The first process of a `local` desktop: starts its programs, keeps their log, and ends with the desktop.

Run as a file by a bare interpreter (`python -I -S supervisor.py CONFIG`). Every import here delays every reset, so it
does without json, signal and typing (each costs 5 to 15 ms) and whatever imports them. CONFIG is a `Config`, marshalled
and in hexadecimal.

Its last word on the status pipe is a JSON line if a program died without which there is no desktop: {"event": "death",
"what": …, "status": …}, where `status` is what subprocess.Popen.returncode would be. It ends when the control pipe
does: when the driver closes it, or dies.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    class Program(TypedDict):
        name: str
        argv: list[str]
        essential: bool
        """Whether the desktop ends with it."""
        socket: int | None
        """A file that it gets as file descriptor 3."""

    class Config(TypedDict):
        status: int
        control: int
        log: int
        programs: list[Program]
        """All are started at once, in this order: X's socket listens already, and holds its clients until X is up. When
        several die together, the first of them is named: X takes its clients with it."""
        subreaper: bool
        """Outside of a pid namespace, the only way to find what was started and left its parent."""


LOG_LIMIT = 1024 * 1024
"""Bytes. A longer log loses its first half."""
LONGEST_LINE = 4096


class Supervisor:
    """The programs of one desktop and their output."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started = time.monotonic()
        self.programs: dict[int, Program] = {}
        self.partial: dict[int, tuple[str, bytes]] = {}
        self.poll = select.poll()

    def run(self) -> None:
        """Returns when the desktop is over."""
        sockets = [program["socket"] for program in self.config["programs"]]
        for fd in (self.config["status"], self.config["control"], self.config["log"], *sockets):
            if fd is not None:
                os.set_inheritable(fd, False)
        self.poll.register(self.config["control"], select.POLLIN)
        for program in self.config["programs"]:
            self._start(program)
        while True:
            for fd, _ in self.poll.poll():
                if fd == self.config["control"]:
                    return
                if fd in self.partial:
                    self._pump(fd)
                else:  # the pidfd of a program that has ended
                    self.poll.unregister(fd)
                    os.close(fd)
            if self._reap():
                return

    def _start(self, program: Program) -> None:
        output, child_output = os.pipe()
        actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, child_output, 1),
            (os.POSIX_SPAWN_DUP2, child_output, 2),
        ]
        passed = program["socket"]
        if passed is not None:
            actions.append((os.POSIX_SPAWN_DUP2, passed, 3))
        try:
            pid = os.posix_spawnp(program["argv"][0], program["argv"], os.environ, file_actions=actions, setsid=True)
        except OSError as error:
            pid = 0
            self._log(program["name"], f"cannot be started: {error}".encode())
        os.close(child_output)
        if passed is not None:
            os.close(passed)
        if pid:
            self.programs[pid] = program
            self.poll.register(os.pidfd_open(pid), select.POLLIN)
        elif program["essential"]:
            self._tell_death(program, 127)
            raise SystemExit(1)
        self.partial[output] = program["name"], b""
        self.poll.register(output, select.POLLIN)

    def _pump(self, fd: int) -> None:
        """Carry what a program printed to the log, line by line."""
        name, rest = self.partial[fd]
        read = os.read(fd, 65536)
        *lines, rest = (rest + read).split(b"\n")
        if len(rest) > LONGEST_LINE or (rest and not read):
            lines, rest = [*lines, rest], b""
        for line in lines:
            self._log(name, line[:LONGEST_LINE])
        self.partial[fd] = name, rest
        if not read:
            self.poll.unregister(fd)
            os.close(fd)
            del self.partial[fd]

    def _log(self, name: str, line: bytes) -> None:
        log = self.config["log"]
        try:
            os.write(log, b"%8.3f %s: %s\n" % (time.monotonic() - self.started, name.encode(), line))
            size = os.fstat(log).st_size
            if size > LOG_LIMIT:
                kept = os.pread(log, LOG_LIMIT // 2, size - LOG_LIMIT // 2)
                os.ftruncate(log, 0)
                os.write(log, kept)  # opened to append
        except OSError:
            pass  # a full disk is no reason to end a desktop

    def _reap(self) -> bool:
        """Collect what ended. True if the desktop ended with it."""
        dead = self._collect()
        if not any(program["essential"] for program, _ in dead):
            return False
        # What needs X follows it at once, and may be seen first.
        first, patience = self.config["programs"][0], time.monotonic() + 0.2
        while all(program is not first for program, _ in dead) and time.monotonic() < patience:
            time.sleep(0.005)
            dead += self._collect()
        essential = [(program, status) for program, status in dead if program["essential"]]
        self._tell_death(*min(essential, key=lambda one: self.config["programs"].index(one[0])))
        return True

    def _collect(self) -> list[tuple[Program, int]]:
        dead: list[tuple[Program, int]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return dead
            if pid == 0:
                return dead
            program = self.programs.pop(pid, None)
            if program is not None:
                code = os.waitstatus_to_exitcode(status)
                dead.append((program, code))
                self._log(program["name"], b"ended with %d" % code if code >= 0 else b"killed by signal %d" % -code)

    def _tell_death(self, program: Program, code: int) -> None:
        event = f'{{"event": "death", "what": "{program["name"]}", "status": {code}}}\n'
        os.write(self.config["status"], event.encode())


def parents() -> dict[int, int]:
    """Process → its parent, for all that can be seen."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] != b"Z":
                found[int(name)] = int(fields[1])
    return found


def descendants(root: int) -> set[int]:
    """All live processes below `root`."""
    parent = parents()
    found: set[int] = set()
    while True:
        more = {pid for pid, its in parent.items() if (its == root or its in found) and pid not in found}
        if not more:
            return found
        found |= more


def kill_descendants() -> None:
    """Until there are none; a program that forks while it is killed is met again in the next round."""
    sigkill = 9
    while below := descendants(os.getpid()):
        for pid in below:
            try:
                os.kill(pid, sigkill)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        time.sleep(0.002)


def main() -> None:
    config: Config = marshal.loads(bytes.fromhex(sys.argv[1]))
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("300")  # a desktop that eats all memory is to die before the daemon
    if config["subreaper"]:
        become_subreaper()
    try:
        Supervisor(config).run()
    finally:
        if config["subreaper"]:
            kill_descendants()


def become_subreaper() -> None:
    """What loses its parent below us becomes our child (prctl(2))."""
    import ctypes

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


if __name__ == "__main__":
    main()
