"""Who of our containers died, and of what: one stream of the engine's events for all of them.

The stream is begun anew every `RENEW` seconds and whenever it breaks; each time all containers are listed first, and
the events since just before that are asked for, so nothing falls in between. While the engine does not answer, nobody
is known to be dead: whether a container outlived a restart of the engine is seen from the next list.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import anyio
import structlog
from aiodocker.exceptions import DockerError
from anyio.abc import TaskGroup, TaskStatus

from ...errors import BootFailed
from ...vm.disks import in_words
from ..base import Death, Report
from . import logs
from .engine import Engine, is_absent
from .recipes import DAEMON

logger = structlog.get_logger(__name__)

RENEW = 30.0
OVERLAP = 2.0
"""Seconds of events that are asked for once more, since clocks are read at two places."""
PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds before the next list, the longer the more often the engine did not answer."""
POST_MORTEM = 1.4
"""Seconds for finding out what a container died of: its death is told within two."""
EVENTS = ["die", "oom", "kill", "pause", "unpause", "destroy"]
LAST_WORDS = 200


@dataclass(eq=False)
class Life:
    """A container from its creation to its end. `memory` is its limit in bytes."""

    id: str
    name: str
    desktop: str
    memory: int
    over: anyio.Event = field(default_factory=anyio.Event)
    death: Death | None = None
    out_of_memory: bool = False
    """The kernel killed a process in it for that."""
    paused: bool = False
    report: Report | None = None
    """Of the boot that it belongs to, while that goes on."""
    expected: bool = False
    """We are ending it."""
    signalled: int | None = None
    """The last signal that somebody sent it through the engine."""
    concluding: bool = False
    removed: bool = False
    """By somebody else."""

    @property
    def is_alive(self) -> bool:
        """As far as was heard."""
        return self.death is None and not self.concluding

    async def ended(self) -> Death:
        await self.over.wait()
        assert self.death is not None
        return self.death

    def end(self, reason: str, exit_code: int | None = None) -> None:
        if self.death is None:
            self.death = Death(reason, exit_code, self.memory if self.out_of_memory else None)
            self.over.set()


class Watch:
    """`run` must be running for deaths to be noticed."""

    def __init__(self, engine: Engine, daemon_id: str) -> None:
        self._engine = engine
        self._filters = {"label": [f"{DAEMON}={daemon_id}"]}
        self._lives: dict[str, Life] = {}
        self._tasks: TaskGroup

    def add(self, life: Life) -> Life:
        """Watch it from here on. It must not have been started yet, or be looked at (`look`) afterwards."""
        return self._lives.setdefault(life.id, life)

    def get(self, container_id: str) -> Life | None:
        return self._lives.get(container_id)

    def named(self, name: str) -> Life | None:
        """The newest of that name: an earlier one may have been replaced before it was started."""
        return next((life for life in reversed(self._lives.values()) if life.name == name), None)

    def forget(self, *, desktop: str = "", name: str = "") -> None:
        """They were destroyed, and whoever waits for their end is told."""
        for life in [
            each for each in self._lives.values() if each.name == name or (desktop and each.desktop == desktop)
        ]:
            del self._lives[life.id]
            life.end("it was destroyed")

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Follow the events until cancelled."""
        failures = 0
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            while True:
                since = time.time() - OVERLAP
                try:
                    await self._look_at_all()
                    if failures:
                        logger.info("the Docker engine answers again")
                    failures = 0
                    await self._follow(since)
                except BootFailed as error:
                    if not failures:
                        logger.warning("the Docker engine cannot be asked who lives", error=error.detail)
                    failures += 1
                await anyio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])

    async def look(self, life: Life) -> None:
        """Ask once whether it lives. Raises BootFailed when the engine does not answer."""
        try:
            async with self._engine.asking("look at a container") as docker:
                state = (await docker.containers.container(life.id).show())["State"]
        except BootFailed as error:
            if not is_absent(error):
                raise
            life.end("its container was removed from outside")
            return
        if state["Status"] in ("exited", "dead"):
            self._conclude(life, int(state["ExitCode"]))

    async def _look_at_all(self) -> None:
        """End those that died while nobody followed. A container that was made after this began is not judged."""
        known = list(self._lives.values())
        async with self._engine.asking("list containers") as docker:
            listed = await docker.containers.list(all=True, filters=self._filters)
        found = {container.id: container["State"] for container in listed}
        for life in known:
            state = found.get(life.id)
            if state is None:
                life.end("it was destroyed" if life.expected else "its container was removed from outside")
            elif state in ("exited", "dead"):
                self._conclude(life)
            else:
                self._pause(life, state == "paused")

    async def _follow(self, since: float) -> None:
        """Hear what happens, for `RENEW` seconds or until the stream ends."""
        filters = {"type": ["container"], "event": EVENTS, **self._filters}
        async with self._engine.stream() as docker, anyio.create_task_group() as tasks:
            events = docker.events.subscribe(create_task=False)  # type: ignore[no-untyped-call]  # aiodocker has no types here

            async def run() -> None:
                # Driven by us: the task that aiodocker would start is never replaced once it has ended.
                with contextlib.suppress(DockerError, aiohttp.ClientError, OSError, ValueError):
                    await docker.events.run(since=f"{since:.3f}", filters=filters)

            tasks.start_soon(run)
            with anyio.move_on_after(RENEW):
                while (event := await events.get()) is not None:
                    self._hear(event)
            tasks.cancel_scope.cancel()

    def _hear(self, event: dict[str, Any]) -> None:
        actor = event.get("Actor") or {}
        life = self._lives.get(actor.get("ID", ""))
        if life is None:
            return
        attributes = actor.get("Attributes") or {}
        match event.get("Action"):
            case "die":
                code = attributes.get("exitCode", "")
                self._conclude(life, int(code) if code.isdigit() else None)
            case "kill":
                number = attributes.get("signal", "")
                life.signalled = int(number) if number.isdigit() else life.signalled
            case "oom":
                life.out_of_memory = True
                logger.warning("a process was killed for lack of memory", container=life.name, limit=life.memory)
            case "pause" | "unpause" as action:
                self._pause(life, action == "pause")
            case "destroy":
                life.removed = True
                self._conclude(life)

    def _pause(self, life: Life, paused: bool) -> None:
        if life.paused == paused:
            return
        life.paused = paused
        if life.death is not None:
            return
        words = paused_words(life.name) if paused else f"The container {life.name} goes on."
        logger.warning(words)
        if life.report is not None:
            life.report.note(words)

    def _conclude(self, life: Life, exit_code: int | None = None) -> None:
        """Find out what it died of, on the side: others' events wait behind this one."""
        if life.expected:
            life.end("it was destroyed", exit_code)
        elif not life.concluding:
            life.concluding = True
            self._tasks.start_soon(self._post_mortem, life, exit_code)

    async def _post_mortem(self, life: Life, exit_code: int | None) -> None:
        state: dict[str, Any] = {}
        words: Iterable[str] = ()
        gone = False
        with anyio.move_on_after(POST_MORTEM):
            try:
                async with self._engine.asking("look at a container", POST_MORTEM) as docker:
                    state = (await docker.containers.container(life.id).show())["State"]
                words = await logs.tail(self._engine, life.id, 1)
            except BootFailed as error:
                gone = is_absent(error)
        if exit_code is None and state:
            exit_code = int(state["ExitCode"])
        gone = gone or life.removed or state.get("Status") == "removing"
        life.out_of_memory = life.out_of_memory or bool(state.get("OOMKilled"))
        life.end(_reason(life, exit_code, gone=gone, error=state.get("Error", ""), words=words), exit_code)


def paused_words(name: str) -> str:
    return f"The container {name} is paused, and not by envd; `docker unpause {name}` lets it go on."


def _reason(life: Life, exit_code: int | None, *, gone: bool, error: str, words: Iterable[str]) -> str:
    if life.expected:
        return "it was destroyed"
    if gone:
        return "its container was removed from outside"
    limit = in_words(life.memory)
    if life.out_of_memory and exit_code == 128 + signal.SIGKILL:
        reason = f"it ran out of memory: its limit is {limit} (RAM_SIZE)"
    elif life.signalled is not None:
        reason = f"its container was sent signal {life.signalled} from outside"
    elif exit_code == 128 + signal.SIGKILL:
        reason = "its container ended with code 137: killed, and not through Docker. Is this host out of memory?"
    elif life.out_of_memory:
        reason = (
            f"its container ended with code {exit_code}, after a process in it had been killed at the limit of {limit}"
        )
    else:
        reason = f"its container ended with code {exit_code}"
    if error:
        reason += f" ({logs.clean(error)[:LAST_WORDS]})"
    for line in words:
        reason += f"; it last wrote: {line[:LAST_WORDS]}"
    return reason
