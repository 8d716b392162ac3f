"""`envd images ls`: what desktops of docker and qemu are made of, and whether it is on this host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from anyio.to_thread import run_sync
from rich.console import Console
from rich.filesize import decimal

from ..errors import DiskUnusable, EnvdError, ImageMissing
from ..settings import Settings
from ..vm.disks import check_disk
from .listing import ago, console, print_json, print_list

Kind = Literal["desktop", "qemu", "foreign", "disk"]

OURS: dict[str, Kind] = {"envd/desktop": "desktop", "envd/qemu": "qemu"}
MAKE = "make images"
NO_DISK = "ENVD_VM_DISK=/path/to/the.qcow2"


@dataclass(frozen=True, slots=True)
class Part:
    """An image, or the disk of virtual machines.

    kind      None of an image that is not here and not ours: its label would say
    needed    whether desktops of these settings are made of it
    present   None where that could not be found out
    size      bytes that it takes
    created   Unix seconds
    problem   why what is here cannot be used, as a sentence; empty if it can
    get       the command that gets it, or what to do; empty if nothing needs doing
    """

    name: str
    kind: Kind | None
    needed: bool
    present: bool | None
    size: int | None = None
    created: float | None = None
    problem: str = ""
    get: str = ""

    @property
    def usable(self) -> bool:
        return bool(self.present) and not self.problem


async def ls(settings: Settings, *, as_json: bool = False, output: Console | None = None) -> int:
    """Print all of them. 0 if what these settings need is here, else 1."""
    parts, trouble = await look(settings)
    missing = [part for part in parts if part.needed and not part.usable]
    if as_json:
        refused = {"detail": trouble.detail, "hint": trouble.hint, **trouble.facts} if trouble else None
        print_json({"complete": not missing, "parts": [asdict(part) for part in parts], "docker": refused})
        return 1 if missing else 0
    output = output or console()
    print_list(output, ("", "name", "kind", "size", "age", "state"), _rows(parts))
    for part in parts:
        if part.get:
            why = part.problem or f"{part.name or 'a disk'}, to get it:"
            output.out(f"\n{why}\n    {part.get}", highlight=False)
    if trouble is not None:
        output.out(f"\n{trouble.detail}\n{trouble.hint}", highlight=False)
    output.out(f"\n{_summary(settings, missing)}", highlight=False)
    return 1 if missing else 0


async def look(settings: Settings) -> tuple[list[Part], EnvdError | None]:
    """Every part, and why images could not be looked for, if they could not."""
    names = list(dict.fromkeys([_plain(settings.docker_image), *OURS]))
    trouble = None
    try:
        images = await _images(names, settings)
    except EnvdError as error:
        images = [Part(name, OURS.get(name), _is_needed(name, settings), None) for name in names]
        trouble = error
    return [*images, await _disk(settings, images[0].kind)], trouble


async def _images(names: Sequence[str], settings: Settings) -> list[Part]:
    """Raises DockerUnavailable, SettingsError for a DOCKER_HOST that cannot be used, MissingDependency."""
    # Only here: whoever has machines without Docker need not have its client either.
    from ..drivers.docker.engine import Engine
    from ..drivers.docker.images import find

    async with Engine(settings.docker_host) as engine:
        parts = []
        for name in names:
            needed = _is_needed(name, settings)
            try:
                found = await find(engine, name)
            except ImageMissing:
                get = MAKE if name in OURS else f"envd images pull {name}"
                parts.append(Part(name, OURS.get(name), needed, present=False, get=get))
            else:
                parts.append(Part(name, found.kind, needed, present=True, size=found.size, created=found.created))
    return parts


async def _disk(settings: Settings, image: Kind | None) -> Part:
    """`image`: the kind of the image that is configured."""
    foreign = settings.provider == "docker" and image not in OURS.values()
    needed = settings.provider == "qemu" or (settings.provider == "docker" and image != "desktop")
    if settings.vm_disk is None and foreign:
        return Part("", "disk", needed, present=False, get=NO_DISK)
    path = settings.guest_disk
    try:
        disk = await run_sync(check_disk, path)
        status = await run_sync(disk.path.stat)
    except DiskUnusable as error:
        if error.facts["cause"] == "absent":
            return Part(str(path), "disk", needed, present=False, get=MAKE if settings.vm_disk is None else error.hint)
        return Part(str(path), "disk", needed, present=True, problem=error.detail, get=error.hint)
    return Part(str(path), "disk", needed, present=True, size=status.st_blocks * 512, created=status.st_mtime)


def _is_needed(name: str, settings: Settings) -> bool:
    """The same virtual machines run without Docker when the provider is qemu; then no image is needed."""
    return settings.provider == "docker" and name == _plain(settings.docker_image)


def _plain(name: str) -> str:
    """`name` without a tag that goes without saying."""
    return name.removesuffix(":latest")


def _rows(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    now = time.time()
    return [
        (
            "*" if part.needed else "",
            part.name or "(no disk)",
            "" if part.kind is None else part.kind,
            "" if part.size is None else decimal(part.size),
            "" if part.created is None else ago(now - part.created),
            _state(part),
        )
        for part in parts
    ]


def _state(part: Part) -> str:
    if part.present is None:
        return "not known"
    return "here" if part.usable else "unusable" if part.present else "missing"


def _summary(settings: Settings, missing: Sequence[Part]) -> str:
    if settings.provider not in ("docker", "qemu"):
        return f"PROVIDER={settings.provider} needs none of them."
    if not missing:
        return f"PROVIDER={settings.provider} has all it needs (*)."
    return f"PROVIDER={settings.provider} needs what is marked (*), and cannot serve as it is."
