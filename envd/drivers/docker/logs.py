"""What a container writes: its last lines, and while it boots the milestones in them. A guest writes as it likes, so
lines, time and bytes are bounded and nothing in them is trusted to be text."""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiodocker import Docker
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
    async with (
        engine.asking("show a log", TAIL) as docker,
        _log(docker, container_id, {"tail": str(lines)}) as pieces,
    ):
        text = "".join([piece async for piece in pieces])
    return tuple(clean(line) for line in text.splitlines()[-lines:])


async def follow(engine: Engine, container_id: str) -> AsyncGenerator[str, None]:
    """Its lines from the first on, until it ends, its connection does, or `FOLLOWED` is reached. Raises nothing. To be
    closed by its reader (`contextlib.aclosing`)."""
    seen, rest = 0, ""
    try:
        async with engine.stream() as docker, _log(docker, container_id, {"follow": "1"}) as pieces:
            async for piece in pieces:
                *whole, rest = (rest + piece).split("\n")
                for line in whole:
                    yield clean(line)
                rest = rest[:LINE]
                seen += len(piece)
                if seen > FOLLOWED:
                    return
    except (DockerError, aiohttp.ClientError, OSError):
        return


@asynccontextmanager
async def _log(docker: Docker, container_id: str, asked: Mapping[str, str]) -> AsyncIterator[AsyncIterator[str]]:
    """Not by aiodocker's own `log`, which keeps its connection when it is left early. Raises DockerError."""
    url = f"{docker.docker_host}/{docker.api_version}/containers/{container_id}/logs"
    async with docker.session.get(url, params={"stdout": "1", "stderr": "1", **asked}) as response:
        if response.status != 200:
            raise DockerError(response.status, (await response.text())[:1000])
        yield _pieces(response.content)


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """Each comes after eight bytes: which stream it is of, and its length (Docker's API, "Attach to a container")."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        while True:
            header = await content.readexactly(8)
            yield decoder.decode(await content.readexactly(int.from_bytes(header[4:], "big")))
    except asyncio.IncompleteReadError:
        return


def clean(line: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in line[:LINE]).rstrip()
