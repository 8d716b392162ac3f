"""The embedded driver: a desktop is a process group on this host, in bubblewrap (`PROVIDER=local`).

One desktop is a private X server, openbox, Chromium and our guest agent under a supervisor (`supervisor.py`), which
sees what `sandbox.py` gives it. No desktop outlives the daemon: bubblewrap dies with the process that started it, and
takes the desktop's process namespace with it.

Nothing is chosen before it is held, so nobody can take it in between:

* The agent and X inherit sockets that listen already, so all programs start at once: who comes early waits in line.
* Chromium cannot inherit one. A socket of ours is bound to its port and never listens, which by SO_REUSEADDR (Chromium
  sets it too) lets a listener in, and keeps the kernel from giving the port away, also while Chromium is restarted.
* X's display number is held by a socket of ours on its abstract name (unix(7)). The network namespace is shared, so X
  clients would find another server of this host there; now they are refused, and go on to the private /tmp.

With `ENVD_LOCAL_UNSANDBOXED=1` the same processes run without bubblewrap. Weaker then: they see the user's files and
processes, /tmp is shared, `pkill chrome` finds no process of that name, and what a desktop started is found by its
parent and its environment, so a program that gets rid of both and whose supervisor is killed survives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import marshal
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakValueDictionary

import anyio
import anyio.abc

from ...errors import BootFailed, InfraError, StartError
from ...models import Endpoints
from ...settings import Settings
from ..base import Death, Driver, InstanceSpec, Made, Report, Traits
from . import sandbox
from .supervisor import descendants, parents

if TYPE_CHECKING:
    from .supervisor import Config, Program

_ID = re.compile(r"[a-z0-9-]{1,63}")
_SPAWN_SECONDS = 10.0
_END_SECONDS = 10.0
_MARK = "DESKTOP_DIRECTORY"
_LITTER = "litter"
"""Lists a desktop's files outside of its directory, which there are only without a sandbox."""


class LocalDriver(Driver):
    """Desktops of one daemon, under `state_dir/local`. A state directory has one daemon, so all there are ours. They
    end with the daemon, so there are none to adopt."""

    name: ClassVar[str] = "local"
    traits: Traits = Traits(
        boot_width=1, make_before_break=True, prewarm=False, probe_interval_s=0.03, monitor_interval_s=0.5
    )

    def __init__(self, settings: Settings, daemon_id: str) -> None:
        self._sandboxed = not settings.local_unsandboxed
        self._state_dir = settings.state_dir.absolute()
        self._root = self._state_dir / "local"
        self._view: list[str] = []
        self._made_of = ""
        self._desktops: dict[str, _Desktop] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._watchers: anyio.abc.TaskGroup

    @property
    def image(self) -> str:
        return f"local ({self._made_of}{'' if self._sandboxed else ', no sandbox'})"

    async def __aenter__(self) -> Self:
        """Raises MissingDependency for a missing package, StartError where the kernel forbids the sandbox."""
        await anyio.to_thread.run_sync(lambda: sandbox.require_programs(sandboxed=self._sandboxed))
        await anyio.to_thread.run_sync(lambda: sandbox.lay_out_root(self._root, sandboxed=self._sandboxed))
        self._made_of = await anyio.to_thread.run_sync(sandbox.made_of)
        if self._sandboxed:
            self._view = await anyio.to_thread.run_sync(lambda: sandbox.view_of_host(self._root, hide=self._state_dir))
            await self._try_sandbox()
        self._watchers = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The desktops that are left end, since they cannot outlive this process. `list` still tells of them."""
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(desktop.end() for desktop in self._desktops.values()), return_exceptions=True)
        self._watchers.cancel_scope.cancel()  # of a desktop that could not be ended; the others' are done
        # What went wrong in the caller's block is not the group's business.
        await self._watchers.__aexit__(None, None, None)
        self._desktops.clear()

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        if not _ID.fullmatch(spec.id):
            raise BootFailed(f"{spec.id!r} is no id for a desktop: [a-z0-9-], at most 63 characters.")
        report.progress("starting X, Chromium and the guest server")
        async with self._lock(spec.id):
            with anyio.CancelScope(shield=True):  # takes milliseconds; half of it could not be found again
                desktop = await self._start(spec)
        if desktop.death is not None:
            tail = await self.log_tail(spec.id)
            raise BootFailed(f"The desktop died at once: {desktop.death.reason}.", phase="create", log=tail)
        return Made(desktop.endpoints)

    async def destroy(self, instance_id: str) -> None:
        if not _ID.fullmatch(instance_id):
            return
        directory = self._directory(instance_id)
        async with self._lock(instance_id):
            desktop = self._desktops.get(instance_id)
            if desktop is not None:
                await desktop.end()
            try:
                await anyio.to_thread.run_sync(_sweep, directory, desktop is None or not self._sandboxed)
            except OSError as error:
                raise InfraError(
                    f"The desktop {instance_id} could not be removed: {error}.", hint=f"Look at {directory}."
                ) from error
            self._desktops.pop(instance_id, None)

    async def list(self) -> frozenset[str]:
        names = await anyio.to_thread.run_sync(os.listdir, self._root / "desktops")
        return frozenset(name for name in names if _ID.fullmatch(name))

    async def wait(self, instance_id: str) -> Death:
        desktop = self._desktops.get(instance_id)
        if desktop is None:
            return Death("no such desktop")
        return await desktop.dead()

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        if not _ID.fullmatch(instance_id):
            return ()
        return await anyio.to_thread.run_sync(_tail, self._directory(instance_id) / "log", lines)

    def _directory(self, instance_id: str) -> Path:
        return self._root / "desktops" / instance_id

    def _lock(self, instance_id: str) -> asyncio.Lock:
        return self._locks.setdefault(instance_id, asyncio.Lock())

    async def _try_sandbox(self) -> None:
        """Run `true` in the sandbox of a desktop, so that a host that forbids it says so at start."""
        trial = self._directory(".trial")
        await anyio.to_thread.run_sync(sandbox.remove, trial)
        await anyio.to_thread.run_sync(sandbox.lay_out_desktop, trial)
        command = sandbox.bubblewrap(self._view, trial, status=1)
        try:
            with anyio.fail_after(_SPAWN_SECONDS):
                done = await anyio.run_process([*command, "true"], check=False)
            complaint = done.stderr.decode(errors="replace").strip()
            failed = done.returncode != 0
        except TimeoutError:
            complaint, failed = f"no answer within {_SPAWN_SECONDS:g} s", True
        await anyio.to_thread.run_sync(sandbox.remove, trial)
        if failed:
            raise StartError(
                f"bubblewrap cannot make a sandbox here: {complaint}.",
                hint="It needs version 0.8 or newer and user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 "
                "(Debian), sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or in a container "
                "--security-opt seccomp=unconfined. ENVD_LOCAL_UNSANDBOXED=1 runs desktops without a sandbox; they "
                "can then read your files.",
            )

    async def _start(self, spec: InstanceSpec) -> _Desktop:
        try:
            desktop, status = await self._spawn(spec)
        except FileExistsError as error:
            raise BootFailed(f"There is a desktop {spec.id} already.", phase="create") from error
        except OSError as error:
            raise BootFailed(f"The desktop cannot be started: {error}.", phase="create") from error
        self._desktops[spec.id] = desktop
        self._watchers.start_soon(desktop.watch, status)
        await desktop.entered.wait()
        return desktop

    async def _spawn(self, spec: InstanceSpec) -> tuple[_Desktop, IO[bytes]]:
        """Raises OSError. Returns the reading end of the status pipe with the desktop."""
        directory = self._directory(spec.id)
        places = sandbox.INSIDE if self._sandboxed else sandbox.outside(self._root, directory)
        log_fd = await anyio.to_thread.run_sync(_prepare, directory)
        with contextlib.ExitStack() as held, contextlib.ExitStack() as handed_over:
            handed_over.callback(os.close, log_fd)
            agent = handed_over.enter_context(socket.create_server(("127.0.0.1", 0)))
            status, status_write = _pipe()
            held.enter_context(status)
            handed_over.enter_context(status_write)
            cdp = held.enter_context(_reserved_port())
            reserved, x = await anyio.to_thread.run_sync(_display, directory, self._sandboxed)
            held.enter_context(reserved)
            handed_over.enter_context(x)
            display = int(os.path.basename(x.getsockname())[1:])
            inherited = [log_fd, agent.fileno(), x.fileno()]
            environment = _environment(places, display, _port(cdp))
            command = []
            if self._sandboxed:
                inherited.append(os.dup(status_write.fileno()))  # bubblewrap closes it before the desktop begins
                handed_over.callback(os.close, inherited[-1])
                command = sandbox.bubblewrap(self._view, directory, status=inherited[-1])
            else:
                environment |= {"TMPDIR": places.tmp, _MARK: str(directory)}
            config: Any = _config(places, display, spec.screen, log_fd=log_fd, x=x, agent=agent)
            if not self._sandboxed:
                config["subreaper"] = True
            process = await asyncio.create_subprocess_exec(
                *(*command, sys.executable, "-I", "-S", str(sandbox.SUPERVISOR), marshal.dumps(config).hex()),
                stdin=asyncio.subprocess.PIPE,
                stdout=status_write,
                stderr=log_fd,
                pass_fds=inherited,
                env=environment,
                cwd=directory / "home",
                start_new_session=True,
            )
            endpoints = Endpoints(guest=f"http://127.0.0.1:{_port(agent)}", cdp=f"http://127.0.0.1:{_port(cdp)}")
            return _Desktop(endpoints, process, sandboxed=self._sandboxed, held=held.pop_all()), status


@dataclass(eq=False)
class _Desktop:
    """A running desktop: the process that holds it, and what is known of its life."""

    endpoints: Endpoints
    process: asyncio.subprocess.Process
    """bubblewrap, or the supervisor itself. Its stdin is the control pipe."""
    sandboxed: bool
    held: contextlib.ExitStack
    """What keeps its port and its display from being given to anyone else."""
    entered: anyio.Event = field(default_factory=anyio.Event)
    """The namespace's first process is known (or there will be none)."""
    over: anyio.Event = field(default_factory=anyio.Event)
    death: Death | None = None
    _init: int | None = None
    """pidfd of the namespace's first process. When that is gone, so is every process of the desktop."""
    _reason: str = ""
    _code: int | None = None

    async def watch(self, status: IO[bytes]) -> None:
        """Follow the desktop to its end. The guest may write to the status pipe too, so nothing there is trusted but
        the first line, which bubblewrap writes before the guest runs."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), status
        )
        try:
            if self.sandboxed:
                self._enter(await _next_event(reader))
            self.entered.set()
            self._note_death(await _next_event(reader))
            transport.close()
            await self.process.wait()
            await self._emptied()
        finally:
            transport.close()
            self._finish()

    async def dead(self) -> Death:
        await self.over.wait()
        assert self.death is not None
        return self.death

    async def end(self) -> None:
        """Kill the desktop and return when it is gone. Raises InfraError if it does not go."""
        self._reason = self._reason or "it was destroyed"
        if self.over.is_set():
            return
        if self._init is not None:
            self._kill_init(self._init)
        elif self.process.stdin is not None:
            self.process.stdin.close()  # the supervisor ends what it started, then itself
        with anyio.move_on_after(_END_SECONDS / 2):
            await self.over.wait()
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        with anyio.move_on_after(_END_SECONDS / 2):
            await self.over.wait()
            return
        raise InfraError(
            f"Process {self.process.pid} of a desktop did not end within {_END_SECONDS:g} s of SIGKILL.",
            hint="A process that hangs in the kernel (a dead network mount, a full disk) can only be waited for.",
        )

    def _enter(self, first: dict[str, Any]) -> None:
        pid = first.get("child-pid")
        if isinstance(pid, int):
            with contextlib.suppress(ProcessLookupError):
                self._init = os.pidfd_open(pid)

    async def _emptied(self) -> None:
        """bubblewrap ends when its program does, and only then does the namespace begin to die with it."""
        if self._init is None:
            return
        self._kill_init(self._init)
        gone, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self._init, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self._init)

    def _kill_init(self, init: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(init, signal.SIGKILL)

    def _note_death(self, event: dict[str, Any]) -> None:
        what, status = event.get("what"), event.get("status")
        if event.get("event") == "death" and isinstance(status, int) and not self._reason:
            self._reason, self._code = f"{what!s:.80} {_ending(status)}", status

    def _finish(self) -> None:
        status = self.process.returncode
        if not self._reason and status is not None:
            # bubblewrap tells of a signal in the way of shells.
            self._code = 128 - status if self.sandboxed and status > 128 else status
            self._reason = f"the desktop's supervisor {_ending(self._code)}"
        self.death = Death(self._reason, self._code)
        self.held.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self._init is not None:
            os.close(self._init)
            self._init = None
        self.over.set()
        self.entered.set()


async def _next_event(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next JSON object, or an empty one at the end and for anything else."""
    try:
        event = json.loads(await reader.readline() or b"{}")
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _ending(status: int) -> str:
    """Of a process, by its exit code, or the negative of the signal that killed it."""
    if status >= 0:
        return f"ended with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _reserved_port() -> socket.socket:
    """A port of 127.0.0.1 for somebody else to listen on."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation


def _display(directory: Path, sandboxed: bool) -> tuple[socket.socket, socket.socket]:
    """The first display number that no X server of this host has: a socket that holds its abstract name, and the one
    that X is to listen on, which its cookie goes with. Blocks. Raises OSError."""
    sockets = directory / "tmp" / ".X11-unix" if sandboxed else sandbox.X_SOCKETS
    for number in range(10_000):
        if not sandboxed and any(os.path.lexists(path) for path in _x_files(number)):
            continue
        with contextlib.ExitStack() as made:
            held, x = (made.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
            try:
                held.bind(f"\0{sandbox.X_SOCKETS}/X{number}")
                sandbox.listen(x, sockets, f"X{number}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            sandbox.write_cookie(directory / "home" / ".Xauthority", number, sandboxed)
            if not sandboxed:
                (directory / _LITTER).write_text("\n".join(_x_files(number)))
            made.pop_all()
            return held, x
    raise OSError("no X display number is free on this host")


def _x_files(display: int) -> list[str]:
    return [f"/tmp/.X{display}-lock", f"{sandbox.X_SOCKETS}/X{display}"]


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return open(read, "rb", buffering=0), open(write, "wb", buffering=0)


def _port(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _environment(places: sandbox.Places, display: int, cdp_port: int) -> dict[str, str]:
    """Nothing of the daemon's own environment, which holds secrets."""
    return {
        "HOME": places.home,
        "USER": "user",
        "LOGNAME": "user",
        "SHELL": "/bin/bash",
        "PATH": f"{places.programs}:/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games",
        "LANG": "C.UTF-8",
        "DISPLAY": f":{display}",
        "XAUTHORITY": f"{places.home}/.Xauthority",
        "XDG_RUNTIME_DIR": places.runtime,
        "XDG_SESSION_TYPE": "x11",
        "XDG_DATA_DIRS": f"{places.share}:/usr/local/share:/usr/share",
        "ACCESSIBILITY_ENABLED": "1",  # Chromium offers its windows to AT-SPI only if told so when it starts
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={places.runtime}/bus",
        "DESKTOP_CHROME": places.chrome,
        "DESKTOP_CDP_PORT": str(cdp_port),
    }


def _config(
    places: sandbox.Places,
    display: int,
    screen: tuple[int, int],
    *,
    log_fd: int,
    x: socket.socket,
    agent: socket.socket,
) -> Config:
    def program(name: str, *argv: str, essential: bool = False, inherits: socket.socket | None = None) -> Program:
        passed = None if inherits is None else inherits.fileno()
        return {"name": name, "argv": list(argv), "essential": essential, "socket": passed}

    bus = f"unix:path={places.runtime}/bus"
    port = str(_port(agent))
    return {
        "status": 1,
        "control": 0,
        "log": log_fd,
        "subreaper": False,
        "programs": [
            program(
                # File descriptor 3 is handed to X as systemd does it, sd_listen_fds(3).
                *("X server", "sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"'),
                *("Xvfb", f":{display}", "-screen", "0", f"{screen[0]}x{screen[1]}x24", "-noreset", "-s", "0"),
                *("-nolisten", "tcp", "-nolisten", "local", "-auth", f"{places.home}/.Xauthority"),
                essential=True,
                inherits=x,
            ),
            program("dbus", "dbus-daemon", "--session", f"--address={bus}", "--nofork", "--nopidfile", "--nosyslog"),
            program("chromium", "google-chrome", "--remote-debugging-port=1337", "about:blank"),
            program(
                *("guest server", "python", "-m", "envd.agent", "--host", "127.0.0.1", "--port", port, "--fd", "3"),
                essential=True,
                inherits=agent,
            ),
            program("window manager", "openbox", "--sm-disable", essential=True),
            program("background", "xsetroot", "-solid", "#30506a"),
        ],
    }


def _prepare(directory: Path) -> int:
    """Make the desktop's files. Returns its log, open for reading and appending."""
    sandbox.lay_out_desktop(directory)
    return os.open(directory / "log", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _tail(path: Path, lines: int) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-lines:])


def _sweep(directory: Path, search: bool) -> None:
    """Remove a desktop's files and, where no handle tells that they are gone, its processes. Raises OSError."""
    if not directory.exists():
        return
    deadline = time.monotonic() + _END_SECONDS
    while search and (left := set(_processes_of(directory))):
        if time.monotonic() > deadline:
            raise OSError(f"processes {sorted(left)} do not end")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(FileNotFoundError):
        for path in (directory / _LITTER).read_text().splitlines():
            Path(path).unlink(missing_ok=True)
    sandbox.remove(directory)


def _processes_of(directory: Path) -> Iterator[int]:
    """bubblewraps that were given the directory, and what carries its name in its environment, with all below."""
    given, mark = os.fsencode(directory / "home"), os.fsencode(f"{_MARK}={directory}")
    for pid in parents():
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in environ or (os.path.basename(argv[0]) == b"bwrap" and given in argv):
            yield pid
            yield from descendants(pid)
