"""Files that are written once, shared by many, and must never change: how a change is noticed. Blocks."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_CHUNK = 1024**2
_ZEROS = bytes(_CHUNK)


class FileFacts(BaseModel):
    """By `size`, `inode` and `mtime_ns` a file that was written to is told at once; by `sha256` also one that was
    changed through a mapping, which on memory-backed storage leaves no time. The digest leaves out MiBs that are
    zero, since reading a hole through a mapping fills it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    inode: int
    mtime_ns: int
    sha256: str


class Changed(Exception):
    """A file is not what it was. Says which and how."""


def facts_of(path: Path) -> FileFacts:
    """Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        for offset in _chunks_with_data(file.fileno(), before.st_size):
            chunk = os.pread(file.fileno(), _CHUNK, offset)
            if chunk != _ZEROS[: len(chunk)]:
                digest.update(offset.to_bytes(8, "big"))
                digest.update(chunk)
    return FileFacts(size=before.st_size, inode=before.st_ino, mtime_ns=before.st_mtime_ns, sha256=digest.hexdigest())


def _chunks_with_data(fd: int, size: int) -> Iterator[int]:
    place = 0
    while place < size:
        try:
            place = os.lseek(fd, place, os.SEEK_DATA) // _CHUNK * _CHUNK
        except OSError:  # a hole up to the end
            return
        yield place
        place += _CHUNK


def require_unchanged(path: Path, facts: FileFacts) -> None:
    """Raises Changed, by what a look at the folder's entry tells."""
    try:
        status = path.lstat()
    except OSError as error:
        raise Changed(f"{path} is gone: {error.strerror}") from error
    if status.st_size != facts.size:
        raise Changed(f"{path} has {status.st_size} of {facts.size} bytes")
    if (status.st_ino, status.st_mtime_ns) != (facts.inode, facts.mtime_ns) or not stat.S_ISREG(status.st_mode):
        raise Changed(f"{path} was changed after it was made")
