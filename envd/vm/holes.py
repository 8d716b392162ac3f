"""Memory files: what holds nothing but zeros takes no memory.

Whoever reads a hole of a file on tmpfs through a mapping fills it with pages of zeros; saving a machine's full state
reads all of its memory so, and the template's file would take the whole size of the machine for ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_UNIT = 64 * 1024
_ZEROS = bytes(_UNIT)


def dig_holes(path: Path) -> int:
    """Give back what holds only zeros, in units of 64 KiB; nobody else may have the file open. Returns bytes given
    back. Blocks: about a second per GiB. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        before = os.fstat(fd).st_blocks
        for start, end in _data(fd):
            for offset, length in _zeros(fd, start, end):
                _punch(fd, offset, length)
        return (before - os.fstat(fd).st_blocks) * 512
    finally:
        os.close(fd)


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """The stretches of the file that are not holes already."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _zeros(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of units that are all zeros, as (offset, length). Read, not mapped: reading a hole leaves it one."""
    began: int | None = None
    for offset in range(start - start % _UNIT, end, _UNIT):
        if os.pread(fd, _UNIT, offset) == _ZEROS:
            began = offset if began is None else began
        elif began is not None:
            yield began, offset - began
            began = None
    if began is not None:
        yield began, end - began


def _punch(fd: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    place, size = ctypes.c_int64(offset), ctypes.c_int64(length)
    if libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, place, size):
        number = ctypes.get_errno()
        if number != errno.EOPNOTSUPP:  # a file system without holes keeps the zeros
            raise OSError(number, os.strerror(number))
