"""The asset cache on disk. Every method blocks: call them in a thread.

    assets/blobs/ab/abcdef…      the content, by its sha256, read-only
    assets/index/<key>.json      what was had under a URL; <key> is the URL's sha256. Its time of change is its last use
    assets/parts/<key>.part      a download that goes on or broke off; <key>.json beside it says of what
    assets/lock                  held for moments by whoever looks a file up, keeps one or removes some

Whole files come into their places by rename, after fsync, the blob before the entry that names it: whatever stops a
process or the machine leaves either nothing or something true. Several processes may use one cache at once. Of a URL
that two of them download at the same time, one has the part that can be continued and the other a private one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK_SECONDS = 20.0
"""The lock is held for milliseconds; only a process that was stopped in that moment holds it longer."""


@dataclass(frozen=True)
class Entry:
    """What was had under a URL, from where (`source`: a URL or a path), and the validators that came with it."""

    url: str
    sha256: str
    size: int
    source: str
    etag: str | None
    last_modified: str | None
    fetched_at: float


@dataclass(frozen=True)
class Held:
    """A blob that is there. `stamp` changes when anybody writes to the file or puts another in its place."""

    entry: Entry
    path: Path
    stamp: tuple[int, int, int]


class NoRoom(Exception):
    """`needed` and `free` are bytes on the disk of `folder`."""

    def __init__(self, needed: int, free: int, folder: Path) -> None:
        super().__init__(f"{needed} bytes are needed and {free} are free in {folder}")
        self.needed, self.free, self.folder = needed, free, folder


@dataclass(frozen=True)
class _Removable:
    """One blob or one part, the files that go with it, and when it was last used."""

    used: float
    size: int
    files: tuple[Path, ...]


class Blobs:
    """`limit` is in bytes. What was used less than `spared` seconds ago is never removed: it may be in use."""

    def __init__(self, folder: Path, limit: int, spared: float) -> None:
        self.folder = folder
        self.limit = limit
        self.spared = spared

    def find(self, url: str, use: bool = True) -> Held | None:
        """The blob of `url`, when it is there in its full size; its content is not read. `use` counts as a use."""
        with self._locked():
            entry = self._read(self._entry_path(url))
            if entry is None or entry.url != url:
                return None
            path = self.blob_path(entry.sha256)
            try:
                there = path.stat()
            except FileNotFoundError:
                return None
            if there.st_size != entry.size:
                return None
            if use:
                os.utime(self._entry_path(url))
            return Held(entry, path, (there.st_ino, there.st_size, there.st_mtime_ns))

    def is_sound(self, held: Held) -> bool:
        """Whether the blob's content is what its name says. One that is not, is removed."""
        try:
            if digest(held.path) == held.entry.sha256:
                return True
        except FileNotFoundError:
            return False
        held.path.unlink(missing_ok=True)
        return False

    def keep(self, part: Path, url: str, source: str, etag: str | None, last_modified: str | None) -> Held:
        """Take the whole file `part` over as what `url` is."""
        sha256 = digest(part)
        with part.open("rb") as file:
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        path = self.blob_path(sha256)
        with self._locked():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
            _sync_folder(path.parent)
            entry = Entry(url, sha256, size, source, etag, last_modified, time.time())
            write_json(self._entry_path(url), asdict(entry))
            there = path.stat()
        return Held(entry, path, (there.st_ino, there.st_size, there.st_mtime_ns))

    def make_room(self, needed: int) -> int:
        """Remove the least recently used until `needed` bytes more stay within the limit and fit on the disk.

        Answers how many bytes were removed. Raises NoRoom when the disk is too full even then. The limit may be
        exceeded for a while when all that is left is in use.
        """
        removed = 0
        with self._locked():
            found = sorted(self._removable(), key=lambda item: item.used)
            size = sum(item.size for item in found)
            for item in found:
                enough = size - removed + needed <= self.limit and needed <= self._free()
                if enough or item.used > time.time() - self.spared:
                    break
                for file in item.files:
                    file.unlink(missing_ok=True)
                removed += item.size
            if needed > (free := self._free()):
                raise NoRoom(needed, free, self.folder)
        return removed

    def entries(self) -> list[Entry]:
        """What the cache holds."""
        read = (self._read(path) for path in (self.folder / "index").glob("*.json"))
        return [entry for entry in read if entry is not None and self.blob_path(entry.sha256).is_file()]

    def size(self) -> int:
        """Bytes, with what broke off and may be continued."""
        return sum(item.size for item in self._removable())

    def part_path(self, url: str) -> Path:
        return self.folder / "parts" / f"{_key(url)}.part"

    def blob_path(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256[:2] / sha256

    def _entry_path(self, url: str) -> Path:
        return self.folder / "index" / f"{_key(url)}.json"

    def _read(self, path: Path) -> Entry | None:
        try:
            entry = Entry(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return entry if len(entry.sha256) == 64 and entry.sha256.isalnum() else None

    def _removable(self) -> Iterator[_Removable]:
        named: dict[str, list[Path]] = {}
        for path in (self.folder / "index").glob("*.json"):
            if entry := self._read(path):
                named.setdefault(entry.sha256, []).append(path)
        for path in (self.folder / "blobs").glob("*/*"):
            # Entries first: an entry without its blob is no harm, yet a blob without entries would be listed for ever.
            yield from _removable_of(path, named.get(path.name, []))
        for path in (self.folder / "parts").glob("*.part"):
            yield from _removable_of(path, [path.with_suffix(".json")])

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, among threads and among processes. Raises BlockingIOError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_SECONDS
        with (self.folder / "lock").open("ab") as file:
            while not try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        errno.EAGAIN, f"another process has held it for {LOCK_SECONDS:g} s", file.name
                    )
                time.sleep(0.005)
            yield


def digest(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(descriptor: int) -> bool:
    """Whether the lock on an open file was had; it goes when the file is closed, so also with its process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_json(path: Path, value: object) -> None:
    """As a whole or not at all. Whoever writes it holds a lock, so nobody else has the name of the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_folder(path.parent)


def _key(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()


def _removable_of(path: Path, beside: list[Path]) -> Iterator[_Removable]:
    try:
        times = [path.stat().st_mtime, *(other.stat().st_mtime for other in beside if other.exists())]
        yield _Removable(max(times), path.stat().st_size, (*beside, path))
    except FileNotFoundError:
        return  # its owner has finished with it in this moment


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
