"""`make bench-docker`: what one desktop more costs in memory, from the host's own books.

A desktop's processes are found from outside: those of its container with what Docker runs for it, or those that were
started with its id on their command line.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 1024 * 1024


@dataclass(frozen=True)
class Process:
    """`name` is cut to 15 characters by the kernel. `started`, in ticks since the host booted, tells it from a later
    one with its number."""

    pid: int
    started: int
    parent: int
    name: str
    command: str

    @property
    def is_machine(self) -> bool:
        return self.name.startswith("qemu-system")


@dataclass(frozen=True)
class Held:
    """Bytes that a desktop holds. `qemu` is the proportional share (PSS) of its virtual machine: pages that several
    processes map are paid by all of them together; `own` is the part of that which nobody else has. `beside` is what
    else runs for it. Of a desktop without a machine `qemu` and `own` are 0."""

    qemu: int
    own: int
    beside: int


def held(desktop_id: str, provider: str) -> Held:
    """What the desktop holds now. Blocks. Raises PermissionError where this user may not look."""
    found = of_desktop(desktop_id, provider)
    machine = [one for one in found if one.is_machine]
    books = [_books(one.pid) for one in machine]
    return Held(
        qemu=sum(book.get("Pss", 0) for book in books),
        own=sum(book.get("Private_Clean", 0) + book.get("Private_Dirty", 0) for book in books),
        beside=sum(_books(one.pid).get("Pss", 0) for one in found if one not in machine),
    )


def of_desktop(desktop_id: str, provider: str) -> list[Process]:
    """What runs for the desktop, in it and around it. Blocks. Raises CalledProcessError for a container that
    does not exist."""
    return _of_container(desktop_id) if provider == "docker" else _of_host(desktop_id)


def processes() -> list[Process]:
    """Every process of this host."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            after_name = rest.split()
            found.append(Process(int(entry.name), int(after_name[19]), int(after_name[1]), name, command))
    return found


def memory() -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in lines}


def _of_container(name: str) -> list[Process]:
    """Its own processes, its shim, and the proxies of its ports."""
    [container] = inspected(name)
    networks = container["NetworkSettings"]["Networks"].values()
    addresses = [f"-container-ip {network['IPAddress']} " for network in networks if network.get("IPAddress")]
    every = processes()
    around = [
        one
        for one in every
        if (one.name.startswith("containerd-shim") and container["Id"] in one.command)
        or (one.name == "docker-proxy" and any(address in one.command for address in addresses))
    ]
    return around + _with_children(every, {container["State"]["Pid"]})


def inspected(*names: str) -> list[dict[str, Any]]:
    """What Docker knows of these containers. Raises CalledProcessError if one does not exist."""
    return list(json.loads(docker("inspect", "--type", "container", *names))) if names else []


def docker(*arguments: str) -> str:
    """What the command line client prints. Blocks. Raises CalledProcessError."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def _of_host(desktop_id: str) -> list[Process]:
    every = processes()
    return _with_children(every, {one.pid for one in every if desktop_id in one.command})


def _with_children(every: Iterable[Process], roots: set[int]) -> list[Process]:
    every = list(every)
    inside = set(roots)
    while more := {one.pid for one in every if one.parent in inside} - inside:
        inside |= more
    return [one for one in every if one.pid in inside]


def _books(pid: int) -> dict[str, int]:
    """The process's smaps_rollup, in bytes; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
