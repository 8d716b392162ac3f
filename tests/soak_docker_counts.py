"""What desktops leave on their host: counted from outside, by what Docker, the kernel and the file system say.

An engine may serve others too, and a host runs other things. So what belonged to each desktop is noted while it lives,
and looked for when it is gone; totals of the engine and the host are judged only if nobody else was seen to change
them.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from bench_docker_memory import MB, Process, docker, inspected, memory, of_desktop, processes
from bench_figures import rss_mb

from envd.settings import Settings

SLACK = {"template_mb": 16.0, "rss_mb": 48.0, "shmem_mb": 48.0, "available_mb": -768.0, "fds": 8, "tasks": 4}
"""By how much a count may have grown (shrunk, if negative). Allocators keep some memory, the host's caches move, and
connections are kept for half a minute. What is not here may not have changed."""
TOTALS = ("all_volumes", "all_overlays", "shmem_mb", "available_mb")
"""Of the engine and of the host."""


@dataclass(frozen=True)
class Counts:
    """One look at the host. The first six are of the desktops that were noted, dead or alive."""

    containers: int
    volumes: int
    overlays: int
    """Directories of their file systems below Docker's own."""
    proxies: int
    """docker-proxy processes, which listen on their ports."""
    machines: int
    """QEMU processes."""
    processes: int
    """All others."""
    state_files: int
    """Below the state directory; not the evidence of episodes, which is kept on purpose."""
    template_files: int
    template_mb: float
    all_volumes: int
    all_overlays: int
    rss_mb: float
    """Of this process, which is the daemon."""
    fds: int
    tasks: int
    shmem_mb: float
    available_mb: float
    others: frozenset[str] = frozenset()
    """What is not ours and may move the totals: containers, images, machines, and entries of
    /dev/shm, but for semaphores, which take nothing."""

    def since(self, before: Counts) -> list[str]:
        """What is not where it was, in words."""
        found = []
        for name in NAMES:
            was, now = getattr(before, name), getattr(self, name)
            slack = SLACK.get(name, 0)
            moved = now - was < slack if slack < 0 else now - was > slack
            if moved and (name not in TOTALS or self.others == before.others):
                found.append(f"{name}: {was:g} before, {now:g} after")
        return found


NAMES = tuple(one.name for one in fields(Counts) if one.name != "others")


@dataclass
class Ledger:
    """What belonged to the desktops of one daemon. Its methods block, but for `look`."""

    settings: Settings
    daemon: str
    volumes: set[str] = field(default_factory=set)
    overlays: set[Path] = field(default_factory=set)
    processes: set[Process] = field(default_factory=set)

    @property
    def docker(self) -> bool:
        return self.settings.provider == "docker"

    def note(self, desktop_id: str) -> None:
        """The desktop lives: remember what it has."""
        self.processes |= set(of_desktop(desktop_id, self.settings.provider))
        if self.docker:
            [container] = inspected(desktop_id)
            self.volumes |= {mount["Name"] for mount in container["Mounts"] if mount["Type"] == "volume"}
            upper = (container["GraphDriver"]["Data"] or {}).get("UpperDir")
            self.overlays |= {Path(upper).parent} if upper else set()

    async def look(self) -> Counts:
        tasks = len(asyncio.all_tasks())
        return await asyncio.to_thread(self._look, tasks)

    def _look(self, tasks: int) -> Counts:
        every = processes()
        alive = {(one.pid, one.started) for one in every}
        left = [one for one in self.processes if (one.pid, one.started) in alive]
        volumes = set(docker("volume", "ls", "--quiet").split()) if self.docker else set[str]()
        ours = set(self._containers(f"label=io.envd.daemon={self.daemon}"))
        return Counts(
            containers=len(ours),
            volumes=len(self.volumes & volumes),
            overlays=sum(path in self.overlays for path in self._overlays()),
            proxies=sum(one.name == "docker-proxy" for one in left),
            machines=sum(one.is_machine for one in left),
            processes=sum(one.name != "docker-proxy" and not one.is_machine for one in left),
            state_files=_files(self.settings.state_dir, without="episodes"),
            template_files=_files(self.settings.template_dir),
            template_mb=_megabytes(self.settings.template_dir),
            all_volumes=len(volumes),
            all_overlays=len(self._overlays()),
            rss_mb=rss_mb(os.getpid()),
            fds=len(os.listdir("/proc/self/fd")),
            tasks=tasks,
            shmem_mb=memory()["Shmem"] / MB,
            available_mb=memory()["MemAvailable"] / MB,
            others=self._others(ours, every),
        )

    def _others(self, ours: set[str], every: list[Process]) -> frozenset[str]:
        known = {(one.pid, one.started) for one in self.processes}
        machines = {str(one.pid) for one in every if one.is_machine and (one.pid, one.started) not in known}
        mine = (self.settings.template_dir or Path()).name
        shared = {name for name in os.listdir("/dev/shm") if name != mine and not name.startswith("sem.")}
        return frozenset({*self._containers(), *self._images(), *machines, *shared} - ours)

    def _containers(self, *filters: str) -> list[str]:
        chosen = [word for one in filters for word in ("--filter", one)]
        return docker("ps", "--all", "--quiet", "--no-trunc", *chosen).split() if self.docker else []

    def _images(self) -> list[str]:
        return docker("image", "ls", "--all", "--quiet", "--no-trunc").split() if self.docker else []

    def _overlays(self) -> list[Path]:
        """Directories of all containers and layers; none where this user may not look."""
        if not self.docker:
            return []
        root = Path(docker("info", "--format", "{{.DockerRootDir}}").strip(), "overlay2")
        return list(root.iterdir()) if os.access(root, os.R_OK | os.X_OK) else []


def _files(root: Path | None, without: str = "") -> int:
    """How many files and directories are below `root`."""
    if root is None:
        return 0
    found = 0
    for folder, folders, files in os.walk(root):
        if Path(folder) == root and without in folders:
            folders.remove(without)
        found += len(folders) + len(files)
    return found


def _megabytes(root: Path | None) -> float:
    """What the files below `root` take, holes left out."""
    files = (Path(folder, name) for folder, _, names in os.walk(root or "") for name in names)
    return sum(file.lstat().st_blocks * 512 for file in files) / MB
