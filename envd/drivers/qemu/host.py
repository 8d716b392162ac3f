"""QEMU on this host: is it there, and which."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

import anyio

from ...errors import MissingDependency, StartError

PROGRAM = "qemu-system-x86_64"

_PACKAGES = {PROGRAM: "qemu-system-x86", "qemu-img": "qemu-utils", "bwrap": "bubblewrap"}
_OLDEST = (5, 2, 0)
"""What machines are made of all exists there: memory-backend for the machine (5.0), the events of a state that is
written (2.5), x-ignore-shared (4.0), `rom` and `readonly` where they are used."""
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Qemu:
    """`version` is its own; `name` also names the build, as its first line does."""

    version: tuple[int, int, int]
    name: str


async def find_qemu() -> Qemu:
    """Raises MissingDependency that names every missing package at once, StartError for a QEMU that is of no use."""
    missing = await anyio.to_thread.run_sync(lambda: sorted({p for name, p in _PACKAGES.items() if not _is_here(name)}))
    if missing:
        raise MissingDependency(
            f"PROVIDER=qemu needs Debian packages that are not installed: {', '.join(missing)}.",
            hint=f"Run: apt-get install -y --no-install-recommends {' '.join(missing)}",
        )
    qemu = await _ask()
    if qemu.version < _OLDEST:
        raise StartError(f"{qemu.name} is too old.", hint="envd needs QEMU 5.2 or newer.")
    return qemu


async def _ask() -> Qemu:
    told = ""
    with anyio.move_on_after(_ANSWER_SECONDS):
        done = await anyio.run_process([PROGRAM, "--version"], check=False)
        told = (done.stdout or done.stderr).decode(errors="replace").strip()
    first = told.partition("\n")[0]
    version = re.search(r"version (\d+)\.(\d+)\.(\d+)", first)
    if version is None:
        raise StartError(f"{PROGRAM} --version says {first!r:.200}, which is no version of QEMU.")
    return Qemu((int(version[1]), int(version[2]), int(version[3])), first.replace(" emulator version", ""))


def _is_here(program: str) -> bool:
    return shutil.which(program) is not None
