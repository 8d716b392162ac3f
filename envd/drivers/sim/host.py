"""The sim host: the process of the sim desktops that outlive the daemon, as containers do in the care of their engine.

`python -m envd.drivers.sim.host STATE_DIR` returns when it listens there, and runs on in the background; with 75 when
there is one for that directory. The driver starts it (hosted.py); what the two say to each other is in wire.py.

It ends by itself: when the last daemon leaves and there is no desktop, or when there was no daemon for `linger_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from ...errors import BootFailed, EnvdError, InfraError
from ...models import Endpoints, ResetPath
from ...settings import Settings
from ..base import InstanceSpec, Made, Report
from . import wire
from .behaviour import Behaviour
from .desktop import Desktop
from .driver import SimDriver
from .wire import LOCK, LOG, LONGEST_LINE, SOCKET, TAKEN, Message

logger = logging.getLogger(__name__)
Tell = Callable[[Message], None]
Work = Callable[[Report], Awaitable[Made | None]]
Answer = Callable[[], Awaitable[Any]]


class Host:
    """All sim desktops of one state directory, and the daemons that use them: one, and for a moment perhaps its
    successor too."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.making: dict[str, Making] = {}
        self.parked: set[str] = set()
        self.daemons: set[Connection] = set()
        self.daemon_id = ""
        """Of the first one. No other is served."""
        self.linger_s = Behaviour().linger_s
        self._callers: dict[Connection, asyncio.Task[None] | None] = {}
        self._changed = asyncio.Event()
        self._makers = asyncio.TaskGroup()

    async def serve(self, listener: socket.socket) -> None:
        """Return when it is not wanted any more, and everything in it has ended."""
        async with self.engine, self._makers:
            server = await asyncio.start_unix_server(self._connected, sock=listener, limit=LONGEST_LINE)
            await self._until_unwanted()
            server.close()
            for making in self.making.values():
                making.task.cancel()
            for connection in self._callers:
                connection.hang_up()
            if callers := [task for task in self._callers.values() if task is not None]:
                await asyncio.wait(callers)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, writer)
        self._callers[connection] = asyncio.current_task()
        try:
            await connection.run(reader)
        finally:
            connection.hang_up()
            del self._callers[connection]
            if connection in self.daemons:
                self.daemons.remove(connection)
                self._changed.set()

    async def _until_unwanted(self) -> None:
        while True:
            self._changed.clear()
            idle = self.daemon_id and not self.engine.desktops and not self.making
            try:
                async with asyncio.timeout(None if self.daemons else 0 if idle else self.linger_s):
                    await self._changed.wait()
            except TimeoutError:
                if not self.daemons:
                    return

    # What a daemon may ask. What is begun when a method returns goes on whatever becomes of the call.

    def hello(self, connection: Connection, daemon_id: str, linger_s: float) -> None:
        """Raises InfraError for a daemon of another id."""
        if self.daemon_id not in ("", daemon_id):
            raise InfraError(f"It belongs to the daemon {self.daemon_id}.")
        self.daemon_id, self.linger_s = daemon_id, linger_s
        self.daemons.add(connection)
        self._changed.set()

    def create(self, spec: InstanceSpec, behaviour: Behaviour, tell: Tell) -> Making:
        return self._make(spec, behaviour, partial(self.engine.create, spec), tell)

    def renew(self, instance_id: str, spec: InstanceSpec, behaviour: Behaviour, tell: Tell) -> Making:
        return self._make(spec, behaviour, partial(self.engine.renew, instance_id, spec), tell)

    async def adopt(self, instance_id: str, tell: Tell) -> Made | None:
        """What there is of it that lives, once it is made."""
        made = await self._found(instance_id, tell)
        if made is not None:
            self.engine.note_adopted(instance_id)
        return made

    async def _found(self, instance_id: str, tell: Tell) -> Made | None:
        try:
            if (making := self.making.get(instance_id)) is not None:
                return await making.follow(tell)
            desktop = self.engine.desktops.get(instance_id)
            if desktop is None or desktop.gone.is_set() or desktop.endpoints is None:
                return None
            if instance_id in self.parked:
                await self.unpark(instance_id)
        except BootFailed:
            return None
        return Made(desktop.endpoints, ResetPath.RESTORE if desktop.cloned else ResetPath.COLD)

    async def destroy(self, instance_id: str) -> None:
        if (making := self.making.get(instance_id)) is not None:
            making.task.cancel()
            await asyncio.wait([making.task])
        await self.engine.destroy(instance_id)
        self.parked.discard(instance_id)

    async def park(self, instance_id: str) -> None:
        await self.engine.park(instance_id)
        self.parked.add(instance_id)

    async def unpark(self, instance_id: str) -> Made:
        made = await self.engine.unpark(instance_id, Report())
        self.parked.discard(instance_id)
        return made

    def _make(self, spec: InstanceSpec, behaviour: Behaviour, work: Work, tell: Tell) -> Making:
        if spec.id in self.making:
            raise BootFailed(f"An instance {spec.id} is being made already.", hint="Choose another id.")
        self.engine.told[spec.id] = behaviour
        making = self.making[spec.id] = Making(spec.id, tell)
        making.task = self._makers.create_task(making.run(work), name=f"make {spec.id}")
        making.task.add_done_callback(lambda _: self._made(spec.id))
        return making

    def _made(self, instance_id: str) -> None:
        del self.making[instance_id]
        self.engine.told.pop(instance_id, None)


class Engine(SimDriver):
    """What makes the desktops. How each behaves comes with the call that asks for it: `told`, by id."""

    def __init__(self) -> None:
        super().__init__(Settings(provider="sim"), "", Behaviour())
        self.told: dict[str, Behaviour] = {}

    @property
    def has_template(self) -> bool:
        return self._has_template

    def note_adopted(self, instance_id: str) -> None:
        self._note("adopt", instance_id)

    def _register(self, spec: InstanceSpec, number: int) -> Desktop:
        self.behaviours = self.told[spec.id]
        return super()._register(spec, number)


class Making(Report):
    """An instance that is being made, and whoever follows that: nobody, once the daemon has died, until another adopts
    it. It goes on all the same, but whether a guest is ready needs a daemon to judge."""

    task: asyncio.Task[None]

    def __init__(self, instance_id: str, tell: Tell) -> None:
        self.id = instance_id
        self._outcome: Made | EnvdError | None = BootFailed(f"{instance_id} was destroyed while it was made.")
        self._followers: set[Tell] = {tell}
        self._to_judge: Endpoints | None = None
        self._is_ready = asyncio.Event()

    async def run(self, work: Work) -> None:
        try:
            self._outcome = await work(self)
        except EnvdError as error:
            self._outcome = error
        except Exception as error:
            # A fault of this one is for its asker to hear of, and not the end of the others.
            logger.exception("making %s failed", self.id)
            self._outcome = BootFailed(f"The sim host failed to make {self.id}: {error!r}.")

    async def follow(self, tell: Tell) -> Made | None:
        """What becomes of it. Raises BootFailed."""
        if tell not in self._followers and self._to_judge is not None:
            tell({"ready": wire.endpoints_to(self._to_judge)})
        self._followers.add(tell)
        try:
            await asyncio.wait([self.task])
        finally:
            self._followers.discard(tell)
        if isinstance(self._outcome, EnvdError):
            raise self._outcome
        return self._outcome

    def judged_ready(self) -> None:
        self._is_ready.set()

    def progress(self, words: str) -> None:
        self._tell({"report": "progress", "words": words})

    def phase(self, name: str) -> None:
        self._tell({"report": "phase", "words": name})

    def note(self, words: str) -> None:
        self._tell({"report": "note", "words": words})

    async def ready(self, endpoints: Endpoints) -> None:
        self._to_judge = endpoints
        self._is_ready.clear()
        self._tell({"ready": wire.endpoints_to(endpoints)})
        try:
            await self._is_ready.wait()
        finally:
            self._to_judge = None

    def _tell(self, message: Message) -> None:
        for tell in self._followers:
            tell(message)


class Connection:
    """Somebody who asks: a daemon once it has said hello, else a test that looks."""

    def __init__(self, host: Host, writer: asyncio.StreamWriter) -> None:
        self._host = host
        self._writer = writer
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Return when whoever asks has left. Its calls have ended then."""
        async with asyncio.TaskGroup() as group:
            try:
                async for line in reader:
                    self._take(json.loads(line), group)
            except ConnectionError:
                pass  # it has died with answers unread
            finally:
                for call in self._calls.values():
                    call.cancel()

    def hang_up(self) -> None:
        self._writer.close()

    def _take(self, message: Message, group: asyncio.TaskGroup) -> None:
        number = message["call"]
        match message["do"]:
            case "cancel":
                if number in self._calls:
                    self._calls[number].cancel()
            case "ready":
                if (making := self._host.making.get(message["id"])) is not None:
                    making.judged_ready()
            case _:
                # Begun here and not in the task, so that what is asked next finds it under way.
                try:
                    answer = self._begin(message, partial(self._say, number))
                except EnvdError as error:
                    self._say(number, {"error": wire.error_to(error)})
                    return
                self._calls[number] = task = group.create_task(self._answer(number, answer))
                task.add_done_callback(lambda _: self._calls.pop(number))

    def _begin(self, asked: Message, tell: Tell) -> Answer:
        host, engine = self._host, self._host.engine
        match asked["do"]:
            case "create":
                spec, behaviour = wire.spec_from(asked["spec"]), wire.behaviour_from(asked["behaviour"])
                return _as_made(partial(host.create(spec, behaviour, tell).follow, tell))
            case "renew":
                spec, behaviour = wire.spec_from(asked["spec"]), wire.behaviour_from(asked["behaviour"])
                return _as_made(partial(host.renew(asked["id"], spec, behaviour, tell).follow, tell))
            case "adopt":
                return _as_made(partial(host.adopt, asked["id"], tell))
            case "unpark":
                return _as_made(partial(host.unpark, asked["id"]))
            case "park":
                return partial(host.park, asked["id"])
            case "destroy":
                return partial(host.destroy, asked["id"])
            case "list":
                return _now(lambda: sorted(engine.desktops))
            case "wait":
                return partial(_death, engine, asked["id"])
            case "log_tail":
                return partial(engine.log_tail, asked["id"], asked["lines"])
            case "hello":
                return _now(lambda: host.hello(self, asked["daemon_id"], asked["linger_s"]))
            case "pid":
                return _now(os.getpid)
            case "journal":
                return _now(lambda: engine.journal)
            case "look":
                return _now(lambda: _looked_at(engine.desktops[asked["id"]]))
            case "kill":
                return _now(lambda: engine.kill(asked["id"], asked["reason"]))
            case other:
                raise InfraError(f"The sim host knows no {other}.", hint="It may be of another version of envd.")

    async def _answer(self, number: int, answer: Answer) -> None:
        try:
            self._say(number, {"done": await answer(), "template": self._host.engine.has_template})
        except EnvdError as error:
            self._say(number, {"error": wire.error_to(error)})
        except Exception as error:
            # A fault of one call is for its asker to hear of, and not the end of the host.
            logger.exception("a call failed")
            self._say(number, {"error": wire.error_to(InfraError(f"The sim host failed: {error!r}."))})

    def _say(self, number: int, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(wire.line({"call": number, **message}))


def _as_made(answer: Callable[[], Awaitable[Made | None]]) -> Answer:
    async def made() -> Message | None:
        return wire.made_to(await answer())

    return made


def _now(answer: Callable[[], Any]) -> Answer:
    async def said() -> Any:
        return answer()

    return said


async def _death(engine: Engine, instance_id: str) -> Message:
    return asdict(await engine.wait(instance_id))


def _looked_at(desktop: Desktop) -> Message:
    return {"inputs": desktop.inputs, "typed": desktop.gui.typed}


def main() -> None:
    """Listen, and go on in the background. The way back to the caller is the exit code, and stderr if it is not 0."""
    os.umask(0o077)
    try:
        # From here on the socket's path is short, as it has to be.
        os.chdir(sys.argv[1])
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET)  # of one that was killed: it would hold the lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(SOCKET)
        listener.listen(128)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except BlockingIOError:
        sys.exit(TAKEN)
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename or sys.argv[1]}")
    if os.fork():
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for old, new in ((nothing, 0), (nothing, 1), (log, 2)):
        os.dup2(old, new)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(_run(listener))
    finally:
        with contextlib.suppress(FileNotFoundError):  # with all of its directory
            os.unlink(SOCKET)


async def _run(listener: socket.socket) -> None:
    await Host().serve(listener)


if __name__ == "__main__":
    main()
