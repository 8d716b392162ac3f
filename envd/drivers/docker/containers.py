"""Containers of this daemon, found by their labels alone: ids may be lost, names may be others'.

A name is chosen and labels are written before a container is made, and a request to make one is not abandoned, since
the engine would make it all the same. So whatever is interrupted, `remove` finds what there is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import anyio.to_thread

from ...errors import (
    BootFailed,
    DockerUnavailable,
    ImageMissing,
    InfraError,
    InstanceDied,
    OutOfMemory,
    PortConflict,
)
from ...vm.disks import require_space
from ..base import Death, Report
from . import logs
from .engine import ANSWER, Engine, is_absent
from .images import Kind
from .recipes import DAEMON, DESKTOP, KIND
from .watch import Life, Watch, paused_words

START = 120.0
"""Seconds within which a container runs. On an idle host it takes 0.4; many at once on busy disks take their time."""
REMOVE = 50.0
"""Seconds within which containers are gone."""
PORT_TRIES = 3
ENGINE_KEEPS = 64 * 1024**2
"""Disk that the engine itself needs for one container: its log and its records."""

_CANNOT_RUN = 127
"""What shells say of a program that is not there."""
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(eq=False)
class _Making:
    """A container that is being made. Its lock is held while the engine may be making it."""

    desktop: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    unwanted: bool = False


class Containers:
    """Open with `async with`; leaving it ends no container."""

    def __init__(self, engine: Engine, daemon_id: str) -> None:
        self._engine = engine
        self._daemon = f"{DAEMON}={daemon_id}"
        self._watch = Watch(engine, daemon_id)
        self._making: dict[str, _Making] = {}
        self._tasks: anyio.abc.TaskGroup

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        await self._tasks.start(self._watch.run)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def start(self, name: str, recipe: Mapping[str, Any], report: Report, *, disk: int) -> dict[int, int]:
        """Make the container and start it. Returns its ports: of the container → of this host, on 127.0.0.1.

        `disk` is what it may come to take of the engine's disk, in bytes. Raises BootFailed, of whatever class fits;
        what there is of it then is for `remove`.
        """
        if not _ID.fullmatch(name):
            raise BootFailed(f"{name!r} is no name for a container: [a-z0-9-], at most 63 characters.")
        if name in self._making:
            raise BootFailed(f"The container {name} is being made already.", phase="create")
        making = self._making[name] = _Making(recipe["Labels"][DESKTOP])
        try:
            await self._require_space(disk + ENGINE_KEEPS)
            return await self._start(name, recipe, report, making)
        finally:
            del self._making[name]

    async def adopt(self, name: str, kind: Kind) -> dict[int, int] | None:
        """Know a container of an earlier life of this daemon again. Returns its ports as `start` does: the engine chose
        others if it started it anew.

        None if there is none of that name, it is of an image of another kind, or it does not run or stands still.
        Raises InfraError when the engine cannot tell.
        """
        found = await self._found(name=name) if _ID.fullmatch(name) else {}
        if not found:
            return None
        [(container_id, (_, desktop))] = found.items()
        try:
            async with self._engine.asking("look at a container") as docker:
                shown = await docker.containers.container(container_id).show()
        except BootFailed as error:
            if not is_absent(error):
                raise
            return None
        ports = _published(shown)
        runs = shown["State"]["Status"] == "running"
        if not runs or not ports or shown["Config"]["Labels"].get(KIND, "foreign") != kind:
            return None
        life = self._watch.add(Life(container_id, name, desktop, memory=0))
        life.memory = shown["HostConfig"]["Memory"]
        await self._watch.look(life)
        return ports if life.is_alive else None

    async def run(self, name: str, recipe: Mapping[str, Any], within: float) -> tuple[int | None, str]:
        """Run it to its end, for `within` seconds at most, and remove it. Returns its exit code, None if it had to be
        killed, and the end of what it printed. Raises BootFailed when it cannot be made."""
        try:
            life = await self._create(name, recipe, _Making(recipe["Labels"][DESKTOP]))
            try:
                async with self._engine.asking("start a container", START) as docker:
                    await docker.containers.container(life.id).start()
            except BootFailed as error:
                return _CANNOT_RUN, error.detail
            code = None
            with anyio.move_on_after(within):
                code = (await life.ended()).exit_code
            return code, "\n".join(await logs.tail(self._engine, life.id, 20))
        finally:
            with anyio.CancelScope(shield=True):
                await self.remove(name=name)

    async def remove(self, *, desktop: str = "", name: str = "") -> None:
        """End and remove every container that was made for the desktop, or the one of that name, with its volumes.

        Idempotent. Raises InfraError if they are not confirmed gone within `REMOVE` seconds.
        """
        for making in [each for key, each in self._making.items() if key == name or each.desktop == desktop]:
            making.unwanted = True
            async with making.lock:
                pass
        refused = ""
        try:
            with anyio.fail_after(REMOVE):
                while found := await self._found(desktop=desktop, name=name):
                    for container_id in found:
                        refused = await self._remove_one(container_id)
        except TimeoutError as error:
            raise InfraError(
                f"The Docker engine did not remove {name or desktop} within {REMOVE:g} s. {refused}".rstrip(),
                hint=f"`docker inspect {name or desktop}` shows its state, `journalctl -u docker` why.",
            ) from error
        self._watch.forget(desktop=desktop, name=name)

    async def names(self) -> dict[str, str]:
        """Those that exist, in whatever state: name → the desktop that it was made for."""
        return dict((await self._found()).values())

    async def wait(self, name: str) -> Death:
        """Return when it has ended, or does not exist. Raises InfraError when the engine cannot tell."""
        life = self._watch.named(name)
        if life is None:
            found = await self._found(name=name)
            if not found:
                return Death("no such desktop")
            [(container_id, (_, desktop))] = found.items()
            life = self._watch.add(Life(container_id, name, desktop, memory=0))
            await self._watch.look(life)
        return await life.ended()

    async def log_tail(self, name: str, lines: int) -> tuple[str, ...]:
        """Its last words. Never raises."""
        if not _ID.fullmatch(name) or lines < 1:
            return ()
        life = self._watch.named(name)
        try:
            said = await logs.tail(self._engine, life.id if life else name, lines)
        except BootFailed:
            return ()
        return (*said, paused_words(name))[-lines:] if life is not None and life.paused else said

    def follow(self, name: str, report: Report) -> None:
        """Tell the milestones of its boot as phases, from its log."""
        if life := self._watch.named(name):
            life.report = report
            self._tasks.start_soon(self._tell_milestones, life, report)

    async def _start(self, name: str, recipe: Mapping[str, Any], report: Report, making: _Making) -> dict[int, int]:
        for tried in range(1, PORT_TRIES + 1):
            report.progress("creating the container")
            life = await self._create(name, recipe, making)
            report.progress("starting the container")
            try:
                async with self._engine.asking("start a container", START) as docker:
                    await docker.containers.container(life.id).start()
                return await self._ports(life)
            except PortConflict as error:
                if tried == PORT_TRIES:
                    raise
                report.note(f"A port that Docker chose is taken; once more, with others. {error.detail}")
                await self._remove_one(life.id)
            except BootFailed as error:
                if making.unwanted or life.death is not None:
                    raise await self._epitaph(life) from error
                raise
        raise AssertionError("unreachable")

    async def _create(self, name: str, recipe: Mapping[str, Any], making: _Making) -> Life:
        async with making.lock:
            if making.unwanted:
                raise InstanceDied(f"The container {name} was destroyed before it was made.", phase="create")
            try:
                with anyio.CancelScope(shield=True):
                    async with self._engine.asking("make a container") as docker:
                        container = await docker.containers.create(dict(recipe), name=name)
            except ImageMissing as error:
                raise ImageMissing(error.detail, hint=error.hint, image=recipe["Image"]) from error
            except BootFailed as error:
                if f'"/{name}" is already in use' in error.detail:
                    raise BootFailed(f"There is a container {name} already.", phase="create") from error
                raise
            return self._watch.add(Life(container.id, name, making.desktop, recipe["HostConfig"]["Memory"]))

    async def _ports(self, life: Life) -> dict[int, int]:
        """Asked of the engine after each start: it chooses anew every time."""
        async with self._engine.asking("look at a container") as docker:
            shown = await docker.containers.container(life.id).show()
        ports = _published(shown)
        if not ports:
            with anyio.move_on_after(ANSWER):
                await life.ended()
            raise await self._epitaph(life)
        return ports

    async def _epitaph(self, life: Life) -> InstanceDied:
        death = life.death or Death("it was removed while it started" if life.expected else "it does not run")
        log = await self.log_tail(life.name, 40)
        detail = f"The container {life.name} died at once: {death.reason}."
        if life.out_of_memory:
            return OutOfMemory(
                detail,
                hint="Raise RAM_SIZE, or ask less of the desktop.",
                exit_code=death.exit_code,
                limit_bytes=life.memory,
                log=log,
            )
        return InstanceDied(detail, phase="create", exit_code=death.exit_code, log=log)

    async def _require_space(self, needed: int) -> None:
        root = self._engine.about.root
        try:
            await anyio.to_thread.run_sync(require_space, root, needed, "A desktop")
        except OSError:
            pass  # the engine's files are not seen from here: it will say itself what it lacks

    async def _tell_milestones(self, life: Life, report: Report) -> None:
        told: set[str] = set()
        async with aclosing(logs.follow(self._engine, life.id)) as lines:
            async for line in lines:
                name = logs.milestone(line)
                if name is not None and name not in told and len(told) < 12:
                    told.add(name)
                    report.phase(name)
        life.report = None

    async def _found(self, *, desktop: str = "", name: str = "") -> dict[str, tuple[str, str]]:
        """Container ids → (name, desktop)."""
        labels = [self._daemon, *([f"{DESKTOP}={desktop}"] if desktop else [])]
        async with self._engine.asking("list containers") as docker:
            listed = await docker.containers.list(all=True, filters={"label": labels})
        found = {each.id: (each["Names"][0].lstrip("/"), each["Labels"].get(DESKTOP, "")) for each in listed}
        return {key: each for key, each in found.items() if not name or each[0] == name}

    async def _remove_one(self, container_id: str) -> str:
        """Ask for it; it may take a little longer. Returns what the engine had against it, and raises
        DockerUnavailable."""
        if life := self._watch.get(container_id):
            life.expected = True
        try:
            async with self._engine.asking("remove a container", REMOVE) as docker:
                await docker.containers.container(container_id).delete(force=True, v=True)
        except DockerUnavailable:
            raise
        except BootFailed as error:
            if is_absent(error):
                return ""
            await anyio.sleep(0.1)
            return error.detail
        return ""


def _published(shown: Mapping[str, Any]) -> dict[int, int]:
    """Of a container, as the engine shows it: its ports → this host's."""
    published = shown["NetworkSettings"]["Ports"] or {}
    return {int(port.partition("/")[0]): int(to[0]["HostPort"]) for port, to in published.items() if to}
