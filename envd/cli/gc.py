"""`envd gc`: what a daemon that is dead left on this host: containers, virtual machines and their disks, sandboxes.

Only what carries the label of this state directory's daemon, or lies in that directory. Its lock tells whether the
daemon runs; while that is so it sweeps by itself, and nothing is touched. While things are removed it cannot start.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from rich.console import Console
from rich.filesize import decimal

from ..daemon import daemon_id, locked
from ..drivers.sim.hosted import SimHost
from ..errors import EnvdError, InfraError, StateDirLocked
from ..settings import Settings
from .listing import console, print_json, print_list

if TYPE_CHECKING:
    from ..drivers.docker.containers import Containers

ID = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True, slots=True)
class Left:
    """A desktop that there is something of. `size` is bytes of files on this host."""

    provider: str
    desktop: str
    what: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """`ours` is the daemon's id, None where there never was one; `running` why nothing is looked at. `unseen` is what
    could not be looked at, and why."""

    state_dir: Path
    ours: str | None
    running: str
    left: tuple[Left, ...] = ()
    unseen: tuple[str, ...] = ()


async def survey(settings: Settings) -> Survey:
    """What there is. Raises SettingsError for a state directory that cannot be used."""
    state_dir = settings.state_dir.absolute()
    if not await run_sync((state_dir / "daemon-id").exists):
        return Survey(state_dir, None, "")
    async with _closed(settings) as running:
        ours = await run_sync(daemon_id, state_dir)
        if running:
            return Survey(state_dir, ours, running)
        left, unseen = await _look(settings, ours)
    return Survey(state_dir, ours, "", tuple(left), tuple(unseen))


def show(found: Survey, *, dry_run: bool, output: Console | None = None) -> None:
    output = output or console()
    for words in found.unseen:
        output.out(f"Not looked at: {words}", highlight=False)
    if found.ours is None:
        output.out(f"No daemon ever ran with {found.state_dir}, so it left nothing.", highlight=False)
    elif found.running:
        output.out(f"{found.running} It sweeps by itself what nobody uses: nothing to do.", highlight=False)
    elif not found.left:
        output.out(f"Daemon {found.ours} of {found.state_dir} left nothing.", highlight=False)
    else:
        rows = [(one.provider, one.desktop, one.what, decimal(one.size) if one.size else "") for one in found.left]
        print_list(output, ("provider", "desktop", "what there is of it", "on disk"), rows)
        verb = "would be" if dry_run else "to be"
        output.out(f"\n{_number(found.left)} {verb} removed. Daemon {found.ours} does not run.", highlight=False)
        if any(one.provider in ("docker", "sim") for one in found.left):
            output.out("Its next start would take over those that are played on; then they are lost.", highlight=False)


async def remove(
    settings: Settings, agreed: Survey, *, as_json: bool, dry_run: bool, output: Console | None = None
) -> int:
    """Remove what was agreed to, unless the daemon was started meanwhile. 0 if all of it is gone and all was looked at,
    else 1."""
    output = output or console()
    gone: list[str] = []
    kept: dict[str, str] = {}
    if agreed.left and not dry_run:
        async with _closed(settings) as running, AsyncExitStack() as stack:
            if running:
                raise InfraError(f"{running} It was started meanwhile, and sweeps by itself.")
            removers: dict[str, Callable[[str], Awaitable[None]]] = {}
            for one in agreed.left:
                try:
                    if one.provider not in removers:
                        removers[one.provider] = await stack.enter_async_context(
                            _remover(settings, agreed, one.provider)
                        )
                    await removers[one.provider](one.desktop)
                except (EnvdError, OSError) as error:
                    kept[one.desktop] = str(error)
                else:
                    gone.append(one.desktop)
                if not as_json:
                    words = f"not removed: {kept[one.desktop]}" if one.desktop in kept else "removed"
                    output.out(f"{one.desktop} {words}", highlight=False)
    if as_json:
        print_json(
            {
                "state_dir": str(agreed.state_dir),
                "daemon_id": agreed.ours,
                "daemon_runs": bool(agreed.running),
                "dry_run": dry_run,
                "left": [asdict(one) for one in agreed.left],
                "unseen": list(agreed.unseen),
                "removed": gone,
                "kept": kept,
            }
        )
    return 1 if kept or agreed.unseen else 0


async def _look(settings: Settings, ours: str) -> tuple[list[Left], list[str]]:
    state_dir = settings.state_dir.absolute()
    left = [
        Left("local", name, "sandbox", size)
        for name, size in await run_sync(_folders, state_dir / "local" / "desktops")
    ]
    left += [
        Left("qemu", name, "virtual machine", size)
        for name, size in await run_sync(_folders, state_dir / "qemu" / "desktops")
    ]
    left += await _of_sim(state_dir)
    unseen: list[str] = []
    machines = dict(await run_sync(_folders, state_dir / "docker" / "desktops"))
    containers: dict[str, int] = {}
    try:
        containers = await _containers(settings, ours)
    except EnvdError as error:
        # Whoever never had docker desktops has none to miss.
        if settings.provider == "docker" or machines or await run_sync((state_dir / "docker").exists):
            unseen.append(f"containers. {error}")
            machines = {}
    for name in sorted(machines.keys() | containers.keys()):
        number = containers.get(name, 0)
        what = f"{number} container{'s' * (number != 1)}, with volumes" if number else ""
        disk = "disk of a virtual machine" if name in machines else ""
        left.append(Left("docker", name, " and ".join(filter(None, (what, disk))), machines.get(name, 0)))
    return left, unseen


async def _containers(settings: Settings, ours: str) -> dict[str, int]:
    """Desktops that have any → how many. Raises EnvdError when the engine cannot tell."""
    async with _engine(settings, ours) as containers:
        of_desktops = list((await containers.names()).values())
    return {desktop: of_desktops.count(desktop) for desktop in of_desktops}


@asynccontextmanager
async def _engine(settings: Settings, ours: str) -> AsyncIterator[Containers]:
    from ..drivers.docker.containers import Containers
    from ..drivers.docker.engine import Engine

    async with Engine(settings.docker_host) as engine, Containers(engine, ours) as containers:
        yield containers


async def _of_sim(state_dir: Path) -> list[Left]:
    try:
        async with SimHost(state_dir) as host:
            return [Left("sim", name, "simulated, in the sim host") for name in await host.ask("list")]
    except (OSError, EnvdError):
        return []


@asynccontextmanager
async def _remover(
    settings: Settings, agreed: Survey, provider: str
) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Removes one desktop and returns when it is gone. Raises EnvdError, OSError."""
    state_dir, ours = agreed.state_dir, agreed.ours or ""
    match provider:
        case "local":
            from ..drivers.local import LocalDriver

            # Not opened: to remove what is left needs none of the programs that desktops are made of.
            yield LocalDriver(settings, ours).destroy
        case "qemu":
            from ..drivers.qemu.cell import ProcessCell
            from ..vm.running import Machines

            # Opening it ends the processes that a killed daemon left.
            async with ProcessCell.open(state_dir / "qemu", (0, 0, 0)) as cell:
                yield Machines(cell, state_dir / "qemu" / "desktops").end
        case "sim":
            async with SimHost(state_dir) as host:
                yield lambda desktop: host.ask("destroy", id=desktop)
        case _:
            async with _engine(settings, ours) as containers:

                async def remove_one(desktop: str) -> None:
                    await containers.remove(desktop=desktop)
                    await run_sync(_remove_folder, state_dir / "docker" / "desktops" / desktop)

                yield remove_one


@asynccontextmanager
async def _closed(settings: Settings) -> AsyncIterator[str]:
    """Empty, and the daemon cannot start within the block; or that it runs, as a sentence."""
    async with AsyncExitStack() as stack:
        lock = locked(settings.state_dir)
        try:
            await run_sync(lock.__enter__)
        except StateDirLocked as error:
            yield error.detail
            return
        stack.callback(lock.__exit__, None, None, None)
        yield ""


def _folders(root: Path) -> list[tuple[str, int]]:
    """Each with the bytes that its files take. Blocks."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [(name, _size(root / name)) for name in names if ID.fullmatch(name)]


def _size(folder: Path) -> int:
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _remove_folder(folder: Path) -> None:
    """Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)


def _number(left: tuple[Left, ...]) -> str:
    return f"{len(left)} desktop{'s' * (len(left) != 1)}"
