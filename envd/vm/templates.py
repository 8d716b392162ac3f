"""Templates: frozen machines on memory-backed storage, and what they are keyed by.

    <root>/<key>/ram            the guest's memory, which clones map privately
                 state          the devices' state
                 disk.qcow2     what the guest had written to its disk, the clones' backing file
                 manifest.json  written last: a folder without it is no template
           <key>.new/           one that is being made
           <key>.aside/         one that failed, without its memory
           <key>.make, .use     locks (flock): of who makes or puts aside, and, shared, of who clones it

Two daemons of one user share templates; only one of them makes each. Files of a template are never written again.
A machine that maps a file which is removed keeps it, so removing takes nothing from clones that run.
Everything here blocks and belongs into a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import NoSpace, StartError
from ..settings import Settings
from .disks import Disk, in_words, require_space
from .frozen import Changed, FileFacts, facts_of, require_unchanged
from .identity import How
from .machine import Machine, fingerprint

FORMAT = 2
"""Of what is written here. Templates of another format are not found, and go when room is needed."""
RAM, STATE, OVERLAY, MANIFEST = "ram", "state", "disk.qcow2", "manifest.json"
OVERLAY_BUDGET = 512 * 1024**2
"""Bytes that a guest is expected to write to its disk while it boots."""
FAILURES = 2
"""Clones that may fail one after another until a template is put aside."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that shapes a machine. `size` is the disk's, in bytes, as the guest sees it; `image` names the QEMU that
    runs it."""

    machine: Machine
    disk: Disk
    size: int
    image: str

    @property
    def key(self) -> str:
        facts = [FORMAT, fingerprint(self.machine), self.disk.identity, self.size, self.image]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Record):
    """What was found out with the clones that a new template is tried with. `clone_bytes`: memory that one of them
    had for itself once both its ports answered."""

    frame: str
    identity: How
    pictures: bool = False
    input: bool = False
    io_detail: str = ""
    clone_bytes: int | None = None


class Manifest(_Record):
    """`created` in Unix seconds; `boot_seconds` is what the cold boot took that it is made of."""

    format: int
    key: str
    created: float
    boot_seconds: float
    disk: str
    image: str
    machine: str
    trial: Trial
    files: dict[str, FileFacts]
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Template:
    """One that can be cloned, as far as a look at its files tells."""

    directory: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def state(self) -> Path:
        return self.directory / STATE


@dataclass(frozen=True, slots=True)
class Listed:
    """A template as `envd templates ls` shows it. `bytes` is what it takes; `problem` says why it is not used."""

    key: str
    bytes: int
    used_at: float
    in_use: bool
    manifest: Manifest | None
    problem: str = ""


class Templates:
    """Those of one folder."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._limit = limit

    @classmethod
    def of(cls, settings: Settings) -> Templates:
        root = settings.template_dir or Path(f"/dev/shm/envd-templates-{os.geteuid()}")
        return cls(root.absolute(), settings.template_limit)

    def open(self) -> None:
        """Make the folder, and remove what somebody who was killed left half made. Raises StartError."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.lstat()
        except OSError as error:
            raise StartError(
                f"{self.root}, for templates, cannot be made: {error.strerror}.", hint=_ELSEWHERE
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise StartError(
                f"{self.root}, for templates, belongs to others or others may write there.", hint=_ELSEWHERE
            )
        for half_made in self.root.glob("*.new"):
            with self.locked(half_made.stem, "make") as mine:
                if mine:
                    shutil.rmtree(half_made, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, key: str, what: str, *, shared: bool = False) -> Iterator[bool]:
        """Whether the lock was free; held until the block is left."""
        fd = self.lock(key, what, shared=shared)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def lock(self, key: str, what: str, *, shared: bool = False) -> int | None:
        """A descriptor that holds the lock until it is closed; None if somebody else has it."""
        fd = os.open(self.root / f"{key}.{what}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def find(self, key: str) -> Template | None:
        """The template, if there is one. Raises Changed when its files are not what they were when it was made."""
        directory = self.root / key
        manifest = _read_manifest(directory)
        if manifest is None:
            return None
        if manifest.key != key or manifest.format != FORMAT:
            raise Changed(f"the template {key} is not what its folder is named for")
        for name, facts in manifest.files.items():
            require_unchanged(directory / name, facts)
        return Template(directory, manifest)

    def cloned(self, template: Template) -> None:
        """It just was, and well: what failed before was not its fault. Others go first when room is needed."""
        with contextlib.suppress(OSError), self.locked(template.key, "make") as mine:
            manifest = _read_manifest(template.directory)
            if mine and manifest is not None and manifest.failures:
                _write_manifest(template.directory, manifest.model_copy(update={"failures": 0}))
            os.utime(template.directory)

    def begin(self, plan: Plan) -> Path:
        """A folder to make a template in. The caller holds its lock `make`. Raises NoSpace."""
        needed = plan.machine.memory + OVERLAY_BUDGET
        directory = self.root / f"{plan.key}.new"
        shutil.rmtree(directory, ignore_errors=True)
        self._make_room(needed, spare=plan.key)
        require_space(self.root, needed, "A template")
        directory.mkdir(mode=0o700)
        with (directory / RAM).open("xb") as ram:
            os.fchmod(ram.fileno(), 0o600)
            ram.truncate(plan.machine.memory)
        return directory

    def admit(self, plan: Plan, trial: Trial, boot_seconds: float) -> Template:
        """What was made in `begin`'s folder is a template from here on."""
        made, directory = self.root / f"{plan.key}.new", self.root / plan.key
        manifest = Manifest(
            format=FORMAT,
            key=plan.key,
            created=time.time(),
            boot_seconds=round(boot_seconds, 1),
            disk=str(plan.disk.path),
            image=plan.image,
            machine=fingerprint(plan.machine),
            trial=trial,
            files={name: facts_of(made / name) for name in (RAM, STATE, OVERLAY)},
        )
        _write_manifest(made, manifest)
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
        return Template(directory, manifest)

    def failed(self, template: Template) -> int:
        """A clone of it failed: how many did since one was made."""
        with self.locked(template.key, "make"):
            manifest = _read_manifest(template.directory)
            if manifest is None:
                return FAILURES
            manifest = manifest.model_copy(update={"failures": manifest.failures + 1})
            _write_manifest(template.directory, manifest)
            return manifest.failures

    def set_aside(self, key: str) -> Path:
        """Keep it for who wants to know why it failed, without its memory; one of each key."""
        directory, aside = self.root / key, self.root / f"{key}.aside"
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            (aside / RAM).unlink(missing_ok=True)
        return aside

    def listed(self) -> list[Listed]:
        """Every template, and what was put aside, the last used first."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        found = [self._listed(one) for one in folders if one.suffix != ".new" and one.is_dir()]
        return sorted(found, key=lambda one: -one.used_at)

    def remove(self, key: str, *, even_if_used: bool = False) -> bool:
        """Whether it is gone; not while a daemon uses it, unless `even_if_used`."""
        with self.locked(key.removesuffix(".aside"), "use") as unused:
            if not unused and not even_if_used:
                return False
            shutil.rmtree(self.root / key, ignore_errors=True)
            return True

    def verify(self, key: str) -> list[str]:
        """What is wrong with it, by the digests of all its bytes; empty if nothing is."""
        try:
            template = self.find(key)
        except Changed as error:
            return [str(error)]
        if template is None:
            return [f"there is no template {key}"]
        return [
            f"{name} is not what it was when the template was made"
            for name, facts in template.manifest.files.items()
            if facts_of(template.directory / name).sha256 != facts.sha256
        ]

    def _listed(self, directory: Path) -> Listed:
        problem, manifest = "", _read_manifest(directory)
        if directory.suffix == ".aside":
            problem = "put aside after it failed"
        elif manifest is None or manifest.format != FORMAT:
            problem = "made by another version, or not whole"
        else:
            try:
                self.find(directory.name)
            except Changed as error:
                problem = str(error)
        with self.locked(directory.stem, "use") as unused:
            return Listed(directory.name, _taken(directory), directory.stat().st_mtime, not unused, manifest, problem)

    def _make_room(self, needed: int, spare: str) -> None:
        """Remove what nobody uses, the least recently used first, until `needed` bytes fit the limit and the file
        system. Raises NoSpace."""
        others = [one for one in self.listed() if one.key != spare]
        while others:
            taken = sum(one.bytes for one in others)
            if taken + needed <= self._limit and shutil.disk_usage(self.root).free >= needed:
                return
            oldest = next((one for one in reversed(others) if not one.in_use), None)
            if oldest is None:
                break
            self.remove(oldest.key)
            others.remove(oldest)
        taken = sum(one.bytes for one in others)
        if taken + needed > self._limit:
            raise NoSpace(
                f"A template needs up to {in_words(needed)}; templates may take {in_words(self._limit)} "
                f"(ENVD_TEMPLATE_LIMIT), and {in_words(taken)} are in use.",
                hint="Raise the limit, lower RAM_SIZE, or see `envd templates ls`.",
                needed_bytes=needed,
                free_bytes=self._limit - taken,
                where=str(self.root),
            )


_ELSEWHERE = "Set ENVD_TEMPLATE_DIR to a folder of yours on memory-backed storage, or ENVD_TEMPLATES=off."


def list_templates(settings: Settings) -> list[Listed]:
    """For the command line."""
    return Templates.of(settings).listed()


def remove_template(settings: Settings, key: str) -> bool:
    """Whether it is gone; a template that a running daemon uses is not removed."""
    templates = Templates.of(settings)
    return any(one.key == key for one in templates.listed()) and templates.remove(key)


def verify_template(settings: Settings, key: str) -> list[str]:
    """What is wrong with it; reads all of it."""
    return Templates.of(settings).verify(key)


def _read_manifest(directory: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    new = directory / f"{MANIFEST}.new"
    new.write_text(manifest.model_dump_json(indent=1))
    new.replace(directory / MANIFEST)


def _taken(directory: Path) -> int:
    """What its files take; less than their sizes, since memory that the guest never touched takes nothing."""
    taken = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            taken += path.lstat().st_blocks * 512
    return taken
