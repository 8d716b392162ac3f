"""The pictures that QEMU writes, as PNG."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from ..errors import InfraError
from ..png import ScreenEncoder

LARGEST: Final = 256 * 1024**2
"""Bytes of a file. A picture of 8K has 100 MB."""
_HEADER: Final = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
_HEADER_BYTES: Final = 64


class Pictures:
    """Turns one picture after another of one screen into PNG; what did not change costs next to nothing. Not for use
    by two threads at once."""

    def __init__(self) -> None:
        self._encoder = ScreenEncoder()

    def read(self, path: Path) -> bytes:
        """The PPM file `path` (RGB, 8 bits) as PNG. Blocks: call it in a thread.

        QEMU's process may write what it likes there, so nothing but a file of the size that its header tells is read.
        Raises InfraError.
        """
        try:
            raw = _bytes_of(path)
        except OSError as error:
            raise InfraError(f"QEMU's picture {path} cannot be read: {error.strerror or error}.") from error
        header = _HEADER.match(raw)
        width, height = (int(header[1]), int(header[2])) if header else (0, 0)
        if header is None or len(raw) - header.end() != width * height * 3 or not width * height:
            raise InfraError(f"QEMU's picture {path} of {len(raw)} bytes is no whole PPM picture.")
        return self._encoder.encode(memoryview(raw)[header.end() :], width, height, "RGB")


def _bytes_of(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise OSError(f"it is no file of a picture ({status.st_size} bytes)")
        return file.read(status.st_size + 1)
