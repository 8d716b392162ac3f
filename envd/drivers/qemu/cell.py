"""Where a QEMU process of `PROVIDER=qemu` runs: in bubblewrap, as the user of the daemon and without any privilege.

It sees the host's programs read-only, its own directory, its template and its disk: no home, no other process, no other
desktop. It ends with the daemon. It has the host's network, since that is what a guest's connections go out by; so what
listens on this host's 127.0.0.1 is reached by a guest at 10.0.2.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from ...bubblewrap import proc_and_dev, system
from ...errors import BootFailed, InfraError, StartError
from ...models import Endpoints
from ...vm.cell import DISK, RUN, TEMPLATE, Cell, CellSpec
from ...vm.kvm import DEVICE
from ...vm.machine import clones_read_only
from ...vm.monitor import Monitor
from ..base import Death, Report

_END_SECONDS = 10.0
_LINES, _LINE = 200, 500
"""Of what a QEMU printed, the last lines, and what is kept of each."""
_ETC = ("ld.so.cache", "resolv.conf")
"""Of /etc: where libraries are, and who answers the guest's questions for names."""

_WHEN_TOLD = 'echo; read -r _ && exec "$@" </dev/null'
"""Runs QEMU once it is told to. bubblewrap binds the sandbox's life to its own only when that stands, so a daemon that
is killed before leaves it behind; then nobody tells it, and it ends without a machine."""


class ProcessCell(Cell):
    """Cells of one daemon, whose files are all under `root`. Made by `open`."""

    def __init__(self, root: Path, qemu: tuple[int, int, int], view: list[str], tasks: TaskGroup) -> None:
        self._root = root
        self._qemu = qemu
        self._view = view
        self._tasks = tasks
        self._processes: dict[str, _Process] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, root: Path, qemu: tuple[int, int, int]) -> AsyncIterator[ProcessCell]:
        """`qemu` is its version. Processes that a daemon left behind here are ended first, and in the end all that are
        left, since they cannot outlive this process. Raises InfraError, StartError where the kernel forbids it."""
        await anyio.to_thread.run_sync(_end_strays, root)
        view = await anyio.to_thread.run_sync(_view)
        await _try(view)
        tasks = await anyio.create_task_group().__aenter__()
        cell = cls(root, qemu, view, tasks)
        try:
            yield cell
        finally:
            with anyio.move_on_after(_END_SECONDS, shield=True):
                for process in cell._processes.values():
                    process.kill("the daemon ended")
                for process in cell._processes.values():
                    await process.over.wait()
            tasks.cancel_scope.cancel()  # of a process that does not end; the others' are done
            # What went wrong in the caller's block is not the group's business, and stays what it is.
            await tasks.__aexit__(None, None, None)

    def forward(self, port: int) -> str:
        return "tcp:127.0.0.1:0"

    async def start(self, spec: CellSpec, report: Report) -> None:
        if spec.name in self._processes:
            raise BootFailed(f"There is a machine {spec.name} already.", phase="create")
        report.progress("starting QEMU")
        with anyio.CancelScope(shield=True):  # takes milliseconds; half of it could not be found again
            try:
                process = await _spawn(spec, self._command(spec))
            except OSError as error:
                raise BootFailed(f"QEMU cannot be started: {error}.", phase="create") from error
            self._processes[spec.name] = process
            self._tasks.start_soon(process.follow)

    async def endpoints(self, name: str, monitor: Monitor) -> Endpoints:
        at = {guest: f"http://127.0.0.1:{host}" for guest, host in (await monitor.forwarded_ports()).items()}
        return Endpoints(guest=at[5000], cdp=at[9222], vlc=at.get(8080))

    async def end(self, name: str) -> None:
        process = self._processes.get(name)
        if process is None:
            return
        process.kill("it was destroyed")
        with anyio.move_on_after(_END_SECONDS):
            await process.over.wait()
        if not process.over.is_set():
            raise InfraError(
                f"QEMU of {name} (process {process.process.pid}) did not end within {_END_SECONDS:g} s of SIGKILL.",
                hint="A process that hangs in the kernel (a dead network mount, a full disk) can only be waited for.",
            )
        self._processes.pop(name, None)

    async def wait(self, name: str) -> Death:
        process = self._processes.get(name)
        if process is None:
            return Death("no such machine")
        await process.over.wait()
        assert process.death is not None
        return process.death

    async def log_tail(self, name: str, lines: int) -> tuple[str, ...]:
        process = self._processes.get(name)
        return tuple(process.printed)[-lines:] if process else ()

    async def names(self) -> dict[str, str]:
        return {name: process.desktop_id for name, process in self._processes.items()}

    def _command(self, spec: CellSpec) -> list[str]:
        return [
            *("bwrap", "--die-with-parent"),
            *self._view,
            *(("--dev-bind", str(DEVICE), str(DEVICE)) if spec.kvm else ()),
            *("--bind", str(spec.run), RUN),
            *(("--ro-bind", str(spec.disk), DISK) if spec.disk else ()),
            *(self._template(spec, spec.template) if spec.template else ()),
            *("--remount-ro", "/", "--chdir", "/"),
        ]

    def _template(self, spec: CellSpec, directory: Path) -> Iterator[str]:
        yield from ("--ro-bind", str(directory), TEMPLATE)
        if spec.role == "template" or not clones_read_only(self._qemu):
            yield from ("--bind", str(directory / "ram"), f"{TEMPLATE}/ram")


@dataclass(eq=False)
class _Process:
    """A cell's bubblewrap, and what is known of its life."""

    desktop_id: str
    process: asyncio.subprocess.Process
    init: int | None
    """pidfd of the namespace's first process. When that is gone, so is all of the cell. None: it never began."""
    status: contextlib.ExitStack
    """The pipe that bubblewrap writes to in the end, which would kill it if nobody held the other side."""
    over: anyio.Event = field(default_factory=anyio.Event)
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    death: Death | None = None
    _reason: str = ""

    def kill(self, reason: str) -> None:
        if self.over.is_set():
            return
        self._reason = self._reason or reason
        with contextlib.suppress(ProcessLookupError):
            if self.init is not None:
                signal.pidfd_send_signal(self.init, signal.SIGKILL)
            else:
                self.process.kill()

    async def follow(self) -> None:
        """Read what QEMU prints, until the end; then say how it ended."""
        try:
            await self._read()
            code = await self.process.wait()
            await self._emptied()
        finally:
            self.status.close()
            if self.init is not None:
                os.close(self.init)
                self.init = None
        code = 128 - code if code > 128 else code  # bubblewrap tells of a signal in the way of shells
        self.death = Death(self._reason or f"QEMU {_ending(code)}", None if self._reason else code)
        self.printed.append(f"envd: {self.death.reason}")
        self.over.set()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        while data := await self.process.stdout.read(4096):
            *lines, rest = (rest + data).split(b"\n")
            self.printed.extend(line[:_LINE].decode(errors="replace") for line in lines)
            rest = rest[:_LINE]
        if rest:
            self.printed.append(rest.decode(errors="replace"))

    async def _emptied(self) -> None:
        """bubblewrap ends when QEMU does, and only then does the namespace begin to die with it."""
        if self.init is None:
            return
        gone, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self.init, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self.init)


def _view() -> list[str]:
    """What every cell sees of the host, and what it shares with nobody. Blocks."""
    return [
        *("--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"),
        *("--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try", "--unshare-uts", "--hostname", "machine"),
        *system(),
        *proc_and_dev(),
        *(word for name in _ETC for word in ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")),
    ]


async def _try(view: list[str]) -> None:
    """Run `true` in the sandbox, so that a host that forbids it says so at start."""
    complaint = f"no answer within {_END_SECONDS:g} s"
    with anyio.move_on_after(_END_SECONDS):
        done = await anyio.run_process(["bwrap", *view, "--", "true"], check=False)
        if done.returncode == 0:
            return
        complaint = done.stderr.decode(errors="replace").strip()
    raise StartError(
        f"bubblewrap cannot make a sandbox here: {complaint}.",
        hint="It needs version 0.8 and user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 (Debian), "
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or in a container --security-opt "
        "seccomp=unconfined.",
    )


async def _spawn(spec: CellSpec, sandbox: list[str]) -> _Process:
    """Raises OSError."""
    with contextlib.ExitStack() as held, contextlib.ExitStack() as given_away:
        read, write = os.pipe()
        held.callback(os.close, read)
        given_away.callback(os.close, write)
        process = await asyncio.create_subprocess_exec(
            *(*sandbox, "--json-status-fd", str(write), "--", "sh", "-c", _WHEN_TOLD, "sh", *spec.argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=[write],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},  # nothing of the daemon's, which holds secrets
            start_new_session=True,
        )
        given_away.close()
        init = await anyio.to_thread.run_sync(_first_process, read)
        made = _Process(spec.desktop_id, process, init, held.pop_all())
    assert process.stdin is not None
    assert process.stdout is not None
    complaint = (await process.stdout.readline()).strip()
    made.printed.extend([complaint.decode(errors="replace")] if complaint else [])
    process.stdin.write(b"\n")
    process.stdin.close()
    return made


def _first_process(status: int) -> int | None:
    """pidfd of the namespace's first process, from the first line that bubblewrap writes, in several pieces, before
    QEMU runs. None where it ends instead. Blocks for milliseconds."""
    told = b""
    while b"\n" not in told and (more := os.read(status, 4096)):
        told += more
    with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
        return os.pidfd_open(json.loads(told.partition(b"\n")[0])["child-pid"])
    return None


def _ending(code: int) -> str:
    """Of a process, by its exit code, or the negative of the signal that killed it."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _end_strays(root: Path) -> None:
    """End cells of a daemon that was killed a moment ago, of which there is one to a `root`. Blocks."""
    deadline = time.monotonic() + _END_SECONDS
    while strays := list(_strays(root)):
        if time.monotonic() > deadline:
            raise InfraError(f"Processes {strays} of an earlier daemon do not end.", hint="Look at what they wait for.")
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _strays(root: Path) -> Iterator[int]:
    """bubblewraps that were given something under `root`. QEMU ends with the second of them, its namespace's first."""
    inside = os.fsencode(root) + b"/"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                if os.path.basename(argv[0]) == b"bwrap" and any(word.startswith(inside) for word in argv):
                    yield int(entry.name)
