"""The driver of sim desktops that outlive the daemon, and its connection to the process that they are in (host.py)."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import anyio
import anyio.to_thread

from ...errors import BootFailed, EnvdError, InfraError, StartError
from ...models import Endpoints, ResetPath
from ..base import Death, Driver, InstanceSpec, Made, Report, Traits
from . import wire
from .behaviour import Behaviour
from .driver import TRAITS, Behaviours, Entry, behaviour_of, traits_of
from .wire import LOG, LONGEST_LINE, SOCKET, TAKEN, Message

if TYPE_CHECKING:
    from ...settings import Settings

TO_START = 30.0
"""Seconds in which a sim host that is started listens."""
TO_ANSWER = 30.0
"""Seconds in which one that has the lock answers, or has ended."""


class HostedSimDriver(Driver):
    """Desktops in the sim host of the state directory, which is started where there is none.

    They end with the host, which ends when it was without a daemon for `Behaviour.linger_s`. `behaviours` is as for
    SimDriver; its numbers count what this driver asked for, while those that `Behaviour.fail` strikes are of the host.
    """

    name: ClassVar[str] = "sim"
    traits: Traits = TRAITS

    def __init__(self, settings: Settings, daemon_id: str, behaviour: Behaviours | None = None) -> None:
        """Behaves as `behaviour` says, else as `settings.sim`. Raises SettingsError if that cannot be read."""
        self.behaviours: Behaviours = Behaviour.parse(settings.sim) if behaviour is None else behaviour
        self.daemon_id = daemon_id
        self.state_dir = settings.state_dir
        self._made = 0
        self.traits = traits_of(self.traits, self._next_behaviour(), settings)
        self._host: SimHost | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._reach()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._host is not None:
            await self._host.close()

    def next_path(self) -> ResetPath:
        clones = self._next_behaviour().restore_s is not None
        has_template = self._host is not None and not self._host.over and self._host.template
        return ResetPath.RESTORE if clones and has_template else ResetPath.COLD

    async def admit(self, report: Report) -> None:
        if seconds := self._next_behaviour().admit_s:
            report.progress(f"waiting for room: in {seconds:g} s there is some")
            await asyncio.sleep(seconds)

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        behaviour = self._next_behaviour()
        self._made += 1
        try:
            host = await self._reach()
            told = await host.ask("create", report, spec=asdict(spec), behaviour=wire.behaviour_to(behaviour))
        except HostGone as gone:
            raise BootFailed(f"The sim host ended while it made {spec.id}.") from gone
        except StartError as error:
            raise BootFailed(error.detail, hint=error.hint) from error
        return _made(told)

    async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
        behaviour = self._next_behaviour()
        try:
            told = await self._ask(
                "renew", report, id=instance_id, spec=asdict(spec), behaviour=wire.behaviour_to(behaviour)
            )
        except HostGone:
            return None
        self._made += told is not None
        return wire.made_from(told)

    async def adopt(self, instance_id: str, report: Report) -> Made | None:
        """One that is still being made is waited for."""
        try:
            return wire.made_from(await self._ask("adopt", report, id=instance_id))
        except HostGone:
            return None

    async def park(self, instance_id: str) -> None:
        try:
            await self._ask("park", id=instance_id)
        except HostGone as gone:
            raise InfraError(f"{instance_id} ended with the sim host.") from gone

    async def unpark(self, instance_id: str, report: Report) -> Made:
        try:
            return _made(await self._ask("unpark", id=instance_id))
        except HostGone as gone:
            raise BootFailed(f"{instance_id} ended with the sim host.") from gone

    async def destroy(self, instance_id: str) -> None:
        try:
            await self._ask("destroy", id=instance_id)
        except HostGone:
            pass  # and with it all that was in it

    async def list(self) -> frozenset[str]:
        try:
            return frozenset(await self._ask("list"))
        except HostGone:
            return frozenset()

    async def wait(self, instance_id: str) -> Death:
        try:
            return Death(**await self._ask("wait", id=instance_id))
        except HostGone:
            return Death("the sim host ended")

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        try:
            return tuple(await self._ask("log_tail", id=instance_id, lines=lines))
        except (HostGone, EnvdError):
            return ()

    def _next_behaviour(self) -> Behaviour:
        return behaviour_of(self._made, self.behaviours)

    async def _ask(self, what: str, report: Report | None = None, **about: Any) -> Any:
        """Of the host that there is. Raises HostGone when it has ended: one that is started now would know nothing."""
        if self._host is None:
            raise HostGone
        return await self._host.ask(what, report, **about)

    async def _reach(self) -> SimHost:
        """The host, started where none answers. Raises StartError."""
        async with self._turn:
            if self._host is None or self._host.over:
                if self._host is not None:
                    await self._host.close()
                linger_s = self._next_behaviour().linger_s
                self._host = await reached(self.state_dir, daemon_id=self.daemon_id, linger_s=linger_s)
            return self._host


class HostGone(ConnectionError):
    """The sim host has ended, and every desktop in it."""


class SimHost:
    """A connection to the sim host of a state directory. Only a daemon's keeps it from ending; tests look with one of
    their own, `async with SimHost(state_dir) as host`. Raises OSError when none answers.

    Calls raise HostGone when it ends meanwhile, and whatever EnvdError it answers with.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.pid = 0
        self.over = False
        """Whether its process has ended."""
        self.template = False
        """Whether it has one, as of the last answer."""
        self._closed = False
        self._numbers = itertools.count()
        self._inboxes: dict[int, asyncio.Queue[Message | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._process: int | None = None

    async def __aenter__(self) -> Self:
        try:
            reader, self._writer = await _connect(self._state_dir)
            self._reading = asyncio.create_task(self._read(reader), name="sim host")
            self.pid = await self.ask("pid")
            self._process = os.pidfd_open(self.pid)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave it to itself. Calls that are waited for raise InfraError."""
        self._closed = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            os.close(self._process)
            self._process = None
        self._wake()

    async def ask(self, what: str, report: Report | None = None, **about: Any) -> Any:
        """What it answers. `report` is told what it tells meanwhile."""
        self._must_be_there()
        number = next(self._numbers)
        inbox = self._inboxes[number] = asyncio.Queue()
        judging: set[asyncio.Task[None]] = set()
        try:
            self._say({"call": number, "do": what, **about})
            while True:
                match await inbox.get():
                    case None:
                        self._must_be_there()
                    case {"report": kind, "words": words}:
                        getattr(report, kind)(words)
                    case {"ready": endpoints}:
                        assert report is not None
                        told = about["spec"]["id"] if "spec" in about else about["id"]
                        judge = self._judge(report, Endpoints(**endpoints), {"call": number, "do": "ready", "id": told})
                        judging.add(asyncio.create_task(judge))
                    case {"error": told}:
                        raise wire.error_from(told)
                    case {"done": done}:
                        return done
        except asyncio.CancelledError:
            self._say({"call": number, "do": "cancel"})
            raise
        finally:
            del self._inboxes[number]
            for task in judging:
                task.cancel()
            await asyncio.gather(*judging, return_exceptions=True)

    # For tests

    async def inputs(self, instance_id: str) -> list[str]:
        """Every Python program that was applied there, in order. Raises InfraError for an id that does not exist."""
        programs: list[str] = (await self.ask("look", id=instance_id))["inputs"]
        return programs

    async def typed(self, instance_id: str) -> str:
        """The text that was typed there. Raises InfraError for an id that does not exist."""
        text: str = (await self.ask("look", id=instance_id))["typed"]
        return text

    async def journal(self) -> list[Entry]:
        """All that was done since it began, by whatever daemon."""
        return [Entry(at, verb, instance_id) for at, verb, instance_id in await self.ask("journal")]

    async def kill(self, instance_id: str, reason: str = "killed") -> None:
        """The machine stops as if by itself. Raises InfraError for an id that does not exist."""
        await self.ask("kill", id=instance_id, reason=reason)

    async def _judge(self, report: Report, endpoints: Endpoints, ready: Message) -> None:
        await report.ready(endpoints)
        self._say(ready)

    def _say(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.line(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            async for line in reader:
                message = json.loads(line)
                self.template = message.get("template", self.template)
                if (inbox := self._inboxes.get(message["call"])) is not None:
                    inbox.put_nowait(message)
        except OSError:
            pass  # as when it ends properly
        # The connection ends a moment before the ports of the desktops do.
        if self._process is not None:
            await _readable(self._process)
        self.over = True
        self._wake()

    def _wake(self) -> None:
        """Whoever waits for an answer that cannot come any more."""
        for waiting in self._inboxes.values():
            waiting.put_nowait(None)

    def _must_be_there(self) -> None:
        if self.over:
            raise HostGone
        if self._closed:
            raise InfraError("The connection to the sim host was closed.")


async def reached(state_dir: Path, *, daemon_id: str, linger_s: float) -> SimHost:
    """A daemon's connection to the host, started where none answers. Raises StartError."""
    give_up = asyncio.get_running_loop().time() + TO_ANSWER
    while True:
        try:
            return await _greeted(state_dir, daemon_id, linger_s)
        except InfraError as refused:
            raise StartError(
                f"The sim host of {state_dir} does not serve this daemon: {refused.detail}",
                hint="It ends by itself once its own daemon is gone; or set ENVD_STATE_DIR.",
            ) from refused
        except OSError as error:  # none there, or one that was about to end
            if asyncio.get_running_loop().time() > give_up:
                raise StartError(
                    f"The sim host of {state_dir} does not answer: {error.strerror or 'it ended'}.",
                    hint=f"Its log is {state_dir / LOG}. `fuser {state_dir / wire.LOCK}` tells its process: end that.",
                ) from error
        if not await _started(state_dir):
            await asyncio.sleep(0.02)  # the one that has the lock listens in a moment, or ends


async def _greeted(state_dir: Path, daemon_id: str, linger_s: float) -> SimHost:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(SimHost(state_dir))
        await host.ask("hello", daemon_id=daemon_id, linger_s=linger_s)
        stack.pop_all()
        return host


async def _started(state_dir: Path) -> bool:
    """Whether a host was started, which listens then; False if there is one. Raises StartError."""
    command = [sys.executable, "-m", "envd.drivers.sim.host", str(state_dir)]
    by_hand = f"Run `{' '.join(command)}` to see why."
    try:
        await anyio.to_thread.run_sync(lambda: state_dir.mkdir(parents=True, exist_ok=True, mode=0o700))
        with anyio.fail_after(TO_START):
            # In a session of its own, where no signal to the daemon's processes reaches it.
            ran = await anyio.run_process(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False, start_new_session=True
            )
    except TimeoutError:
        raise StartError(f"The sim host was not up within {TO_START:g} s.", hint=by_hand) from None
    except OSError as error:
        raise StartError(f"The sim host cannot be started: {error}.", hint="Set ENVD_STATE_DIR.") from error
    if ran.returncode not in (0, TAKEN):
        said = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"it ended with {ran.returncode}"
        raise StartError(f"The sim host cannot be started: {said}.", hint=by_hand)
    return ran.returncode == 0


async def _connect(state_dir: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # A socket's path may have 107 bytes; this way it is short wherever the directory is.
    folder = await anyio.to_thread.run_sync(lambda: os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{SOCKET}", limit=LONGEST_LINE)
    finally:
        os.close(folder)


async def _readable(handle: int) -> None:
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, seen.set)
    try:
        await seen.wait()
    finally:
        loop.remove_reader(handle)


def _made(told: Message) -> Made:
    made = wire.made_from(told)
    assert made is not None
    return made
