"""A file that is on its way into the cache: what of it is there, of which content that is, and who may write to it.

A part is continued only with what its server vouches for to be the same content (Range with If-Range, RFC 9110 §13–14),
and never across a restart of the machine, which may have lost what was written last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .blobs import Blobs, Held, NoRoom, try_lock, write_json
from .mirrors import without_secrets

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Part:
    """A file that is being filled, by one owner among all processes. Its methods block; they may be called in threads
    one after another, and `close` waits for one that still runs: a thread goes on when its caller was cancelled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version: Version | None = None
        self.size = 0
        self._private = False
        self._descriptor = -1
        self._closed = False
        self._turn = threading.Lock()

    @property
    def total(self) -> int | None:
        return self.version.total if self.version else None

    def open(self) -> None:
        """Take the part that can be continued, or a private one while another process has it."""
        with self._turn:
            if self._closed:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _own(self.path)
            if self._descriptor < 0:
                self._private = True
                self.path = self.path.with_suffix(f".{uuid.uuid4().hex}.part")
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                return
            self.version = _known_version(self.path.with_suffix(".json"))
            self.size = os.fstat(self._descriptor).st_size
            if self.version is None or self.size > (self.version.total or self.size):
                self.version, self.size = None, 0

    def begin(self, version: Version) -> None:
        """Empty the part; what comes next is `version`."""
        with self._turn:
            self._still_open()
            os.ftruncate(self._descriptor, 0)
            kept = {"boot": _boot(), "source": without_secrets(version.source)}
            self.version, self.size = Version(**asdict(version) | kept), 0
            # Written while the part is empty: bytes never stand under the name of another version.
            if not self._private:
                write_json(self.path.with_suffix(".json"), asdict(self.version))

    def append(self, chunk: bytes) -> None:
        """Raises NoRoom when the disk is full."""
        with self._turn:
            self._still_open()
            rest = memoryview(chunk)
            try:
                while rest:
                    written = os.pwrite(self._descriptor, rest, self.size)
                    self.size, rest = self.size + written, rest[written:]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                needed = max((self.total or 0) - self.size, len(rest))
                free = shutil.disk_usage(self.path.parent).free
                raise NoRoom(needed, free, self.path.parent.parent) from error

    def give(self, blobs: Blobs, url: str) -> Held:
        """The whole file becomes the blob of `url`, and this is closed: under its name another may begin anew."""
        with self._turn:
            self._still_open()
            assert self.version is not None
            version = self.version
            held = blobs.keep(self.path, url, version.source, version.etag, version.last_modified)
            self.path.with_suffix(".json").unlink(missing_ok=True)
            self._closed = True
            os.close(self._descriptor)
            self._descriptor = -1
            return held

    def close(self, remove: bool = False) -> None:
        """What is there stays, to be continued, unless it is private, nothing or to be removed."""
        with self._turn:
            self._closed = True
            if self._descriptor < 0:
                return
            if self._private or remove or not self.size:
                self.path.unlink(missing_ok=True)
                self.path.with_suffix(".json").unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def is_whole_of(self, source: str) -> bool:
        """Whether there is nothing left to ask `source` for."""
        return self._begins(source) and self.total == self.size

    def range_of(self, source: str) -> dict[str, str]:
        """Headers that ask `source` for the rest, when what is there can be continued."""
        if not (self._begins(source) and self.version and self.version.validator and self.size):
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self.version.validator}

    def goes_on_with(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer to `range_of` is the rest of this content: not all servers know If-Range."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
        if found is None or self.version is None or int(found[1]) != self.size:
            return False
        same = [
            (found[2] if found[2] != "*" else None, str(self.total) if self.total is not None else None),
            (headers.get("ETag"), self.version.etag),
            (headers.get("Last-Modified"), self.version.last_modified),
        ]
        return all(now is None or then is None or now == then for now, then in same)

    def so_far(self) -> str:
        """For a sentence about what went wrong."""
        return f" after {self.size} of {self.total if self.total is not None else '?'} bytes" if self.size else ""

    def _begins(self, source: str) -> bool:
        return self.version is not None and self.version.source == without_secrets(source)

    def _still_open(self) -> None:
        if self._closed:
            raise ValueError("the part was closed: whoever filled it was cancelled")


@dataclass(frozen=True)
class Version:
    """What a part is the beginning of: which content of which source, in whose URL no password is kept. `total` is in
    bytes."""

    source: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None
    boot: str = ""

    @property
    def validator(self) -> str | None:
        """What If-Range can be sent; a weak tag cannot."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


def version_in_folder(path: Path) -> Version:
    """Raises FileNotFoundError for what is no file."""
    if not path.is_file():
        raise FileNotFoundError(path)
    there = path.stat()
    return Version(str(path), etag=f"{there.st_size}-{there.st_mtime_ns}", total=there.st_size)


def _own(path: Path) -> int:
    """A descriptor of `path` that holds its lock; -1 while another has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(descriptor):
            os.close(descriptor)
            return -1
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner finished in this moment and moved it away


def _known_version(path: Path) -> Version | None:
    try:
        version = Version(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return version if version.boot == _boot() else None


def _boot() -> str:
    """Which start of the machine this is."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
