"""What a container writes: its last lines, and while it boots the milestones in them. A guest writes as it likes, so
lines, time and bytes are bounded and nothing in them is trusted to be text."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

import aiohttp
from aiodocker.exceptions import DockerError

from .engine import Engine

LINE = 1000
"""Characters that are kept of one line."""
FOLLOWED = 4 * 1024**2
"""Characters of a boot's log that are looked at: a kernel with all its messages writes some 100 000."""
TAIL = 5.0
"""Seconds within which the last lines are there."""

_OURS = re.compile(r"envd-milestone: ([a-z][a-z -]{0,30})")
_FOREIGN = (
    (re.compile(r"❯ (?:Starting|Booting)\b.*\b(?:QEMU|Docker)\b|\bSeaBIOS\b|\bBdsDxe\b"), "firmware"),
    (re.compile(r"\b(?:GNU )?GRUB\b|\bSYSLINUX\b|\bISOLINUX\b"), "boot loader"),
    (re.compile(r"\bLinux version [0-9]"), "kernel"),
    (re.compile(r"\b(?:Started|Reached target)\b.*\b(?:[Dd]isplay [Mm]anager|[Gg]raphical\b)"), "display"),
)
"""What images that are not ours write when they boot a machine with its serial console on their output: the banner of
qemus/qemu, from which OSWorld's derives, then the firmware, the boot loader, Linux, systemd."""


def milestone(line: str) -> str | None:
    """The stretch of a boot that begins with this line, if one does."""
    if found := _OURS.search(line):
        return found[1].strip().replace("-", " ")
    return next((name for pattern, name in _FOREIGN if pattern.search(line)), None)


async def tail(engine: Engine, container_id: str, lines: int) -> tuple[str, ...]:
    """The last lines, also of a container that ended. Raises BootFailed when there is none."""
    async with engine.asking("show a log", TAIL) as docker:
        container = docker.containers.container(container_id)
        pieces = await container.log(stdout=True, stderr=True, tail=lines)
    return tuple(clean(line) for line in "".join(pieces).splitlines()[-lines:])


async def follow(engine: Engine, container_id: str) -> AsyncGenerator[str, None]:
    """Its lines from the first on, until it ends, its connection does, or `FOLLOWED` is reached. Raises nothing."""
    seen, rest = 0, ""
    try:
        async with engine.stream() as docker:
            container = docker.containers.container(container_id)
            async with aclosing(container.log(stdout=True, stderr=True, follow=True)) as pieces:  # type: ignore[type-var]  # it is a generator
                async for piece in pieces:
                    *whole, rest = (rest + piece).split("\n")
                    for line in whole:
                        yield clean(line)
                    rest = rest[:LINE]
                    seen += len(piece)
                    if seen > FOLLOWED:
                        return
    except (DockerError, aiohttp.ClientError, OSError, ValueError):
        return


def clean(line: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in line[:LINE]).rstrip()
