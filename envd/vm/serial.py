"""What a guest writes to its serial console: its last lines, and how far its boot has come.

QEMU appends it to a file, for as long as the guest writes. The reader reads on where it stopped, and cuts the file
when it is long, so a guest can fill neither the disk nor this process.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path

import anyio

PHASES = ("firmware", "boot loader", "kernel", "display", "session", "guest server")
"""Of a boot, in their order. The first begins when QEMU runs, the others with a line that tells of them."""

WHILE_BOOTING, AFTERWARDS = 0.2, 3.0
"""Seconds between two looks at it."""

_LINES, _LINE = 200, 300
_READ_AT_ONCE = 256 * 1024
_CUT_AT = 1024 * 1024

# Of our own guest, and of those with systemd and the usual boot loaders.
_TELLS = {
    "boot loader": re.compile(r"SYSLINUX|EXTLINUX|GRUB|Booting from Hard Disk|envd-milestone: boot-loader"),
    "kernel": re.compile(r"\] Linux version |^Linux version |Decompressing Linux|envd-milestone: kernel"),
    "display": re.compile(r"envd-milestone: display|Started .*(Display Manager|display manager)"),
    "session": re.compile(r"envd-milestone: session|(Started|Reached target) .*(Session \w+ of [Uu]ser|Graphical)"),
    "guest server": re.compile(r"envd-milestone: guest-server|Started .*[Oo][Ss][Ww]orld|Running on http://"),
}
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][0-9A-Z]|[\x00-\x08\x0b-\x1f\x7f]")


class SerialLog:
    """Of the machine whose serial console goes to `path`; there need not be such a file."""

    def __init__(self, path: Path, on_phase: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._on_phase = on_phase or _nobody
        self._reached = 0
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._rest = ""
        self._place = 0
        self._turn = anyio.Lock()
        self._read_at = -math.inf
        self._pause = WHILE_BOOTING

    async def read_if_due(self) -> None:
        """`read`, if the last time is long enough ago."""
        if anyio.current_time() - self._read_at >= self._pause:
            await self.read()

    async def read(self) -> None:
        """Take in what was written since the last time, and tell of each phase once, when it begins. Never raises."""
        self._read_at = anyio.current_time()
        async with self._turn:
            data, self._place = await anyio.to_thread.run_sync(_read_on, self.path, self._place)
            self._take(data.decode(errors="replace"))

    def quiet(self) -> None:
        """The boot is over: look at it rarely, and tell of no phase."""
        self._pause, self._on_phase = AFTERWARDS, _nobody

    def tail(self, lines: int) -> tuple[str, ...]:
        """The last lines, oldest first; also one that has no end yet."""
        rest = _plain(self._rest)
        known = [*self._lines, rest] if rest else [*self._lines]
        return tuple(known[-lines:]) if lines > 0 else ()

    def _take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest[-4 * _LINE :]
        for line in lines:
            if plain := _plain(line):
                self._lines.append(plain)
                self._look_for_phase(plain)

    def _look_for_phase(self, line: str) -> None:
        for index in range(len(PHASES) - 1, self._reached, -1):
            if _TELLS[PHASES[index]].search(line):
                self._reached = index
                self._on_phase(PHASES[index])
                return


def _nobody(phase: str) -> None:
    pass


def _plain(line: str) -> str:
    return _CONTROLS.sub("", line).rstrip()[:_LINE]


def _read_on(path: Path, place: int) -> tuple[bytes, int]:
    """What the file has after `place`, at most its last part, and where to go on. The file is QEMU's: it may be
    anything, and a guest that broke out may have put something else there."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b"", place
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return b"", place
        if status.st_size < place:  # it was cut
            place = 0
        place = max(place, status.st_size - _READ_AT_ONCE)
        data = os.pread(fd, _READ_AT_ONCE, place)
        place += len(data)
        if place > _CUT_AT:
            os.ftruncate(fd, 0)
            place = 0
        return data, place
    except OSError:
        return b"", place
    finally:
        os.close(fd)
