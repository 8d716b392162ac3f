"""The files of a bundle: how they are written, bounded, read as an archive and removed. All of it blocks, and runs in
threads. What a bundle holds is told in bundles.py."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import structlog
from pydantic import BaseModel

from .models import StepResult
from .settings import Settings, secret_password

logger = structlog.get_logger(__name__)

Write = Callable[[], None]

FORMAT = 1
RESERVE = 1 / 8
"""Share of a bundle's limit that pictures and files leave to what is told in words."""
FILES_KEPT = 1000
"""Files that one folder of the evaluator's may bring in."""
REASONS_KEPT = 20
CHUNK = 256 * 1024
"""Bytes of a file that are in memory at once."""
STEPS_BYTES = 8 * 1024 * 1024
"""Of the steps of one answer: a prediction may be as large as a body."""
GOING = ".going-"
"""What a bundle is called while it is removed."""
TEMPORARY = ".tmp"
DEPTH = 20
SUFFIXES = (".png", ".jpg", ".bin")
"""Of pictures, and of what was sent for one."""


class Folder:
    """One bundle on disk. Used by one thread at a time.

    Pictures and files take their turn within the limit less `RESERVE`, words within the limit; episode.json and
    verdict.json are always written. What does not fit is dropped and counted.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._limit = settings.bundle_limit
        self._password = secret_password(settings)
        self._made = False
        self._sizes: dict[str, int] = {}
        self._used = 0
        self._facts: dict[str, Any] = {}
        self._stale = False
        self._frames: dict[int, str] = {}
        self._dropped: Counter[str] = Counter()
        self._incomplete: list[str] = []

    def run(self, writes: Sequence[Write]) -> None:
        """Do all of them, whatever becomes of each; then write episode.json if it is no longer right."""
        for write in (self._make, *writes, self._write_facts):
            try:
                write()
            except OSError as error:
                self._failed(f"{error.filename}: {error.strerror}")
            except Exception as error:
                # A mistake of ours must not cost an episode more than evidence.
                logger.exception("evidence could not be put into words", bundle=str(self._path))
                self._failed(f"a mistake of envd: {error!r}")

    def resume(self) -> None:
        """Go on with a bundle that an earlier life of the daemon began. Raises OSError, ValueError."""
        told = json.loads((self._path / "episode.json").read_bytes())
        mine = ("format", "episode_id", "bytes", "dropped", "incomplete")
        self._facts = {name: value for name, value in told.items() if name not in mine}
        self._dropped, self._incomplete = Counter(told["dropped"]), list(told["incomplete"])
        self._sizes = {name: path.stat().st_size for name, path in regular_files(self._path)}
        self._used = sum(self._sizes.values())
        self._frames = {
            int(Path(name).stem): name for name in self._sizes if re.fullmatch(r"frames/[0-9]{4,}\.[a-z]+", name)
        }
        self._made = True

    # -- writes -------------------------------------------------------------------------------------------------

    def about(self, facts: Mapping[str, Any]) -> None:
        self._facts |= facts
        self._stale = True

    def document(self, name: str, value: Any, keep: bool = False) -> None:
        data = self._json(value, indent=1)
        if keep or self._fits(len(data)):
            self._replace(name, data, lasting=keep)
        else:
            self.drop(name)

    def frame(self, number: int, picture: bytes) -> None:
        name = f"frames/{number:04d}{_suffix(picture)}"
        if self._fits(len(picture), RESERVE):
            self._replace(name, picture)
            self._frames[number] = name
        else:
            self.drop("frames")

    def step(self, result: StepResult | Mapping[str, Any], said: str, at: float) -> None:
        told = result.model_dump(mode="json", exclude={"screenshot"}) if isinstance(result, StepResult) else result
        line = {"at": at, "said": said, **told, "frame": self._frames.get(int(told["step"]))}
        self._append("steps.jsonl", self._json(line), "steps")
        last = told["actions"][-1]["action"] if told["actions"] else self._facts.get("last_action")
        ended = {"end_reason": told["end_reason"]} if told.get("end_reason") else {}
        self.about({"steps": told["step"], "last_action": last, **ended})

    def final(self, picture: bytes) -> None:
        if self._fits(len(picture)):
            self._replace(f"final{_suffix(picture)}", picture)
        else:
            self.drop("final")

    def log(self, lines: Sequence[str]) -> None:
        self._append("guest.log", _encoded(self._hide("\n".join(line.rstrip() for line in lines))), "log")

    def file(self, name: str, content: Path | bytes) -> None:
        if isinstance(content, Path):
            self._copy(content, name)
        elif self._fits(len(content), RESERVE):
            self._replace(name, content)
        else:
            self.drop("files")

    def files(self, folder: Path, under: str) -> None:
        """All regular files below `folder`, which somebody hostile may have filled."""
        for found, (name, path) in enumerate(regular_files(folder)):
            if found == FILES_KEPT:
                self.drop("files")
                break
            try:
                self._copy(path, f"{under}/{name}")
            except OSError as error:
                self._failed(f"{error.filename}: {error.strerror}")

    def drop(self, kind: str) -> None:
        self._dropped[kind] += 1
        self._stale = True

    # -- how ----------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        if not self._made:
            with _named("the folder"):
                self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._made = True

    def _write_facts(self) -> None:
        if self._stale:
            told = {
                "format": FORMAT,
                "episode_id": self._path.name,
                **self._facts,
                "bytes": self._used,
                "dropped": dict(self._dropped),
                "incomplete": self._incomplete,
            }
            self._replace("episode.json", self._json(told, indent=1))
            self._stale = False

    def _fits(self, size: int, reserve: float = 0.0) -> bool:
        return self._used + size <= self._limit * (1 - reserve)

    def _replace(self, name: str, data: bytes, lasting: bool = False) -> None:
        """`lasting` survives a power cut, too."""
        with _replacing(self._path, name) as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        self._count(name, len(data))

    def _append(self, name: str, data: bytes, kind: str) -> None:
        """Whole lines or nothing."""
        if not self._fits(len(data)):
            self.drop(kind)
            return
        with _named(name), open(self._path / name, "ab", buffering=0) as file:
            before = file.tell()
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)
                raise
        self._count(name, before + len(data))

    def _copy(self, source: Path, name: str) -> None:
        with _named(name), _opened(source) as file:
            size = os.fstat(file.fileno()).st_size
            if not self._fits(size, RESERVE):
                self.drop("files")
                return
            with _replacing(self._path, name) as target:
                for piece in _pieces(file, size):
                    target.write(piece)
        self._count(name, size)

    def _count(self, name: str, size: int) -> None:
        self._used += size - self._sizes.get(name, 0)
        self._sizes[name] = size

    def _failed(self, reason: str) -> None:
        if not self._incomplete:
            logger.warning("evidence could not be written", bundle=str(self._path), error=reason)
        if reason not in self._incomplete and len(self._incomplete) < REASONS_KEPT:
            self._incomplete.append(reason)
        self._stale = True

    def _json(self, value: Any, indent: int | None = None) -> bytes:
        """JSON that ends with a line break, whatever the guest said: NaN is kept as text, half a character as a
        question mark."""
        try:
            text = json.dumps(value, default=_plain, ensure_ascii=False, allow_nan=False, indent=indent)
            if self._password is None:
                return _encoded(text)
        except ValueError:
            text = json.dumps(value, default=_plain)
        told = self._hide(json.loads(text, parse_constant=str))
        return _encoded(json.dumps(told, ensure_ascii=False, indent=indent))

    def _hide(self, value: Any) -> Any:
        """`value` without the password in any of its texts."""
        if isinstance(value, str):
            return value.replace(self._password, "{CLIENT_PASSWORD}") if self._password else value
        if isinstance(value, list):
            return [self._hide(item) for item in value]
        return {name: self._hide(item) for name, item in value.items()} if isinstance(value, dict) else value


def _encoded(text: str) -> bytes:
    return f"{text}\n".encode(errors="replace")


def find_frame(folder: Path, number: int) -> bytes | None:
    for suffix in SUFFIXES:
        with suppress(OSError), _opened(folder / f"frames/{number:04d}{suffix}") as file:
            return file.read()
    return None


def read_steps(folder: Path, after: int, most: int) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """What episode.json tells; at most `most` steps that follow step `after`, fewer where they are long; and whether
    there are more. What is not there is empty, and a line that was cut short is passed over."""
    told: dict[str, Any] = {}
    with suppress(OSError, ValueError), _opened(folder / "episode.json") as file:
        told = json.load(file)
    found: list[dict[str, Any]] = []
    left = STEPS_BYTES
    with suppress(OSError), _opened(folder / "steps.jsonl") as file:
        for line in file:
            with suppress(ValueError):
                step = json.loads(line)
                if int(step["step"]) <= after:
                    continue
                if len(found) == most or left <= 0:
                    return told, found, True
                found.append(step)
                left -= len(line)
    return told, found, False


def list_bundles(root: Path) -> list[tuple[float, str]]:
    """(last written to, in Unix seconds; name) of each bundle, the latest first."""
    try:
        with os.scandir(root) as entries:
            found = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.name)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            ]
    except FileNotFoundError:
        return []
    return sorted(found, reverse=True)


def remove_bundle(root: Path, name: str) -> None:
    """It is there or gone for whoever looks, at every moment."""
    going = root / f"{GOING}{name}"
    shutil.rmtree(going, ignore_errors=True)
    (root / name).rename(going)
    shutil.rmtree(going)


def remove_leftovers(root: Path) -> None:
    """Of removals that a daemon did not live to finish."""
    for going in root.glob(f"{GOING}*"):
        shutil.rmtree(going, ignore_errors=True)


def tar(folder: Path) -> Iterator[bytes]:
    """`folder` as a tar file, in pieces of about `CHUNK` bytes. Each file is as long as it was when its turn came."""
    waiting = bytearray()
    for piece in _tar(folder):
        waiting += piece
        if len(waiting) >= CHUNK:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _tar(folder: Path) -> Iterator[bytes]:
    for name, path in regular_files(folder):
        try:
            file = _opened(path)
        except FileNotFoundError:
            continue
        with file:
            status = os.fstat(file.fileno())
            member = tarfile.TarInfo(f"{folder.name}/{name}")
            member.size, member.mtime, member.mode = status.st_size, int(status.st_mtime), 0o644
            yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            yield from _pieces(file, status.st_size)
            yield bytes(-status.st_size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def regular_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name below `folder`, path) of each, in order; no links, no temporary files, nothing deeper than `DEPTH`."""
    for at, folders, names in os.walk(folder):
        below = os.path.relpath(at, folder)
        folders[:] = [] if below.count("/") >= DEPTH else sorted(folders)
        for name in sorted(names):
            path = Path(at, name)
            if stat.S_ISREG(path.lstat().st_mode) and not name.endswith(TEMPORARY):
                yield os.path.normpath(os.path.join(below, name)), path


def _opened(path: Path) -> BinaryIO:
    """Raises OSError for anything but a regular file, also if it became something else since it was listed."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes: zeros for what is missing if the file has shrunk."""
    while size > 0:
        piece = file.read(min(CHUNK, size)) or bytes(min(CHUNK, size))
        size -= len(piece)
        yield piece


@contextmanager
def _replacing(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of the one of that name once the block ends well."""
    path = folder / name
    temporary = path.with_name(f".{path.name[:100]}{TEMPORARY}")
    with _named(name):
        folder.stat()  # One that was cleared away does not come back.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _named(name: str) -> Iterator[None]:
    """An OSError from the block says which of the bundle's files it is about."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = name, None
        raise


def _suffix(picture: bytes) -> str:
    if picture.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".jpg" if picture.startswith(b"\xff\xd8\xff") else ".bin"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return dict(value) if isinstance(value, Mapping) else str(value)
