"""The QMP connection to one QEMU process. QMP is full control of it and of its files: never shown to anyone.

Commands go one after another, each with a deadline of its own. What goes wrong is an InfraError with the facts
`command` and `cause`:

    refused          QEMU answered with an error and goes on
    no_answer        nothing came in time; the command may still be done
    connection_lost  QEMU has ended, or hung up
    nonsense         the other end does not speak QMP

A state is written and read through a file descriptor that is handed over, so QEMU needs neither a shell nor the right
to open the file, and the paths are this host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError
from qemu.qmp.message import Message
from qemu.qmp.protocol import Runstate

from ..errors import InfraError

Event = Mapping[str, Any]

_CLOSE_SECONDS = 2.0
_EVENTS_KEPT = 256
"""Of a listener that does not keep up; what comes then is dropped, since a guest can cause events."""
_UNLIMITED = 1 << 40
"""Bytes per second. QEMU's own limit, 128 MB/s, is meant for networks."""
_FORWARD = re.compile(r"^\s*TCP\[HOST_FORWARD\]\s+\S+\s+\S+\s+(\d+)\s+\S+\s+(\d+)\s", re.MULTILINE)

# It tells of every lost connection at length, at level error; we tell whoever asked.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class Monitor:
    """Made by `open`. May be used, and left, by another task than the one that opened it. Times are seconds."""

    def __init__(self, client: QMPClient, sock: socket.socket) -> None:
        self._client = client
        self._sock = sock
        self._turn = asyncio.Lock()
        self._lost = asyncio.Event()
        self._listeners: set[_Listener] = set()
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, timeout: float = 10.0) -> AsyncIterator[Self]:
        """Connect to the socket `path`, which need not be there yet and may be longer than a socket's path can be.

        Raises InfraError (no_answer, nonsense) when there is no QMP behind it within `timeout`.
        """
        begun = anyio.current_time()
        sock = await _connected(path, timeout)
        client = QMPClient()
        client.events.names = {"none"}  # the library's own listener, which keeps for ever what it hears
        await _negotiate(client, sock, path, begun + timeout - anyio.current_time())
        monitor = cls(client, sock)
        try:
            yield monitor
        finally:
            with anyio.CancelScope(shield=True):
                await monitor._close()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10.0
    ) -> Any:
        """The answer's `return`."""
        return await self._asked(command, arguments, timeout)

    async def human(self, command: str, *, timeout: float = 10.0) -> str:
        """What the human monitor prints, for what QMP has no command for."""
        return str(await self.execute("human-monitor-command", {"command-line": command}, timeout=timeout))

    async def status(self) -> str:
        """QEMU's word for it: running, paused, inmigrate, postmigrate, shutdown, …"""
        return str((await self.execute("query-status"))["status"])

    async def pause(self) -> None:
        """Stop the processors. Idempotent."""
        await self.execute("stop")

    async def resume(self) -> None:
        """Let them run. Idempotent."""
        await self.execute("cont")

    async def screendump(self, path_inside: str, *, timeout: float = 10.0) -> None:
        """Write the screen to a file, as PPM, by the path that QEMU knows. Also while the machine is paused."""
        await self.execute("screendump", {"filename": path_inside}, timeout=timeout)

    async def send_fd(self, fd: int, name: str, *, timeout: float = 10.0) -> None:
        """QEMU gets a copy of a file descriptor, for the next command that names it."""
        await self._asked("getfd", {"fdname": name}, timeout, before=lambda: self._client.send_fd_scm(fd))

    async def save_state(self, path: Path, *, memory: bool = False, timeout: float = 120.0) -> None:
        """Write the devices' state of a paused machine to a file of this host; with `memory` also the memory that is
        shared with a file (plain memory always). The machine cannot go on after that. Its disk is flushed."""
        await self.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
        await self._migrate("migrate", path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, memory, timeout)

    async def load_state(self, path: Path, *, memory: bool = False, timeout: float = 120.0) -> None:
        """Read what `save_state` wrote with the same `memory`, into a machine that was started to wait for it; then
        it is paused. A QEMU that cannot use it ends, and its log says why."""
        await self._migrate("migrate-incoming", path, os.O_RDONLY, memory, timeout)

    async def forwarded_ports(self) -> dict[int, int]:
        """Of user networking: the guest's port → the host's, also where QEMU was to choose it."""
        return {int(guest): int(host) for host, guest in _FORWARD.findall(await self.human("info usernet"))}

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[MemoryObjectReceiveStream[Event]]:
        """Events from now on, of these names or all. The stream ends when the connection does."""
        send, receive = anyio.create_memory_object_stream[Event](_EVENTS_KEPT)
        listener = _Listener(names, send)
        self._listeners.add(listener)
        if self._lost.is_set():
            send.close()
        try:
            with send, receive, self._client.listen(listener):
                yield receive
        finally:
            self._listeners.discard(listener)

    async def lost(self) -> None:
        """Return when the connection is gone."""
        await self._lost.wait()

    async def _asked(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        timeout: float,
        before: Callable[[], None] | None = None,
    ) -> Any:
        try:
            with anyio.fail_after(timeout):
                async with self._turn:
                    if before is not None:
                        before()
                    return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise InfraError(
                f"QEMU did not answer {command} within {timeout:g} s.", cause="no_answer", command=command
            ) from error
        except ExecuteError as error:
            raise InfraError(f"QEMU refused {command}: {error}.", cause="refused", command=command) from error
        except (ExecInterruptedError, StateError, OSError) as error:
            raise _gone(command) from error
        except QMPError as error:
            raise InfraError(
                f"QEMU's answer to {command} cannot be used: {error}.", cause="nonsense", command=command
            ) from error

    async def _migrate(self, command: str, path: Path, flags: int, memory: bool, timeout: float) -> None:
        """A machine's way out of a process and into one is a migration, here with a file between the two."""
        wanted = {"events": True, "x-ignore-shared": not memory}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})
        try:
            async with _opened(path, flags) as fd:
                await self.send_fd(fd, "state")
        except OSError as error:
            raise InfraError(f"{path} cannot be opened: {error.strerror}.", cause="refused", command=command) from error
        async with self.events("MIGRATION") as events:
            await self.execute(command, {"uri": "fd:state"}, timeout=timeout)
            with anyio.move_on_after(timeout):
                async for event in events:
                    status = event["data"]["status"]
                    if status == "completed":
                        return
                    if status in ("failed", "cancelled"):
                        told = (await self.execute("query-migrate")).get("error-desc", "its log says why")
                        raise InfraError(f"QEMU's {command} {status}: {told}.", cause="refused", command=command)
                raise _gone(command)
        raise InfraError(f"QEMU's {command} was not done in {timeout:g} s.", cause="no_answer", command=command)

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._lost.set()
        for listener in self._listeners:
            listener.into.close()

    async def _close(self) -> None:
        """Hang up without waiting for what QEMU may never read; only then let the library put its things away."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with anyio.move_on_after(_CLOSE_SECONDS):
            await self._lost.wait()
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self._client.disconnect()
        self._watcher.cancel()
        await asyncio.wait([self._watcher])


class _Listener(EventListener):
    """Puts events into a stream of ours; the library's own keeps them all."""

    def __init__(self, names: tuple[str, ...], into: MemoryObjectSendStream[Event]) -> None:
        super().__init__(names)
        self.into = into

    async def put(self, event: Message) -> None:
        if self.accept(event):
            with contextlib.suppress(anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.into.send_nowait(event)


def _gone(command: str) -> InfraError:
    return InfraError(
        f"QEMU hung up during {command}.",
        hint="Its log says why it ended.",
        cause="connection_lost",
        command=command,
    )


async def _connected(path: Path, timeout: float) -> socket.socket:
    """A socket's path may have 107 bytes (unix(7)), so it is named by its directory's descriptor. Raises InfraError."""
    pause, complaint = 0.002, ""
    with anyio.move_on_after(timeout):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                async with _opened(path.parent, os.O_PATH | os.O_DIRECTORY) as directory:
                    sock.connect(f"/proc/self/fd/{directory}/{path.name}")
                return sock
            except OSError as error:
                complaint = error.strerror or str(error)
                sock.close()
            except BaseException:
                sock.close()
                raise
            await anyio.sleep(pause)
            pause = min(pause * 1.5, 0.05)
    raise InfraError(
        f"QEMU's monitor {path} could not be reached within {timeout:g} s: {complaint}.",
        cause="no_answer",
        command="connect",
    )


async def _negotiate(client: QMPClient, sock: socket.socket, path: Path, timeout: float) -> None:
    """In a task of its own: the library does not stand being cancelled here, but it does an end of file."""
    connecting = asyncio.create_task(client.connect(sock))
    try:
        await asyncio.wait([connecting], timeout=timeout)
    finally:
        late = not connecting.done()
        if late:
            sock.shutdown(socket.SHUT_RDWR)
            with anyio.CancelScope(shield=True):
                await asyncio.wait([connecting], timeout=_CLOSE_SECONDS)
        failed = connecting.exception() if connecting.done() else TimeoutError()
    if failed is None:
        return
    if not isinstance(failed, ConnectError | TimeoutError):
        raise failed
    raise InfraError(
        f"{path} took the connection and " + ("said nothing." if late else f"spoke no QMP: {failed}."),
        hint="QEMU serves one connection at a time; is another one open?" if late else "",
        cause="no_answer" if late else "nonsense",
        command="connect",
    ) from failed


@asynccontextmanager
async def _opened(path: Path, flags: int) -> AsyncIterator[int]:
    """Raises OSError."""
    fd = await anyio.to_thread.run_sync(lambda: os.open(path, flags | os.O_CLOEXEC, 0o600))
    try:
        yield fd
    finally:
        os.close(fd)
