"""How many desktops fit on this host, and what binds: counted with what one was measured to take."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from ..findings import Finding
from ..settings import Settings
from ..vm.capacity import CLONE_GUESS, OVERHEAD, RESERVE, Memory
from ..vm.disks import DESKTOP_BUDGET, in_words
from ..vm.templates import Listed

LOCAL = 390 * 10**6
"""Bytes that a local desktop was measured to take, with a blank page: its processes' share (PSS), with two of them. One
more takes 190 MB; pages take what they take."""
CONTAINER = 245 * 10**6
"""The same of a container desktop, as Docker counts it."""

Kind = Literal["local", "container", "machine", "foreign", "elsewhere"]
"""What is counted: processes, a container of ours, a virtual machine of ours, one of an image that is not ours, and
what is not on this host."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes. `first` is what the first one takes beyond `each`; `disk` is what one may write, at most as a rule."""

    each: int
    words: str
    first: int = 0
    disk: int = 0


def need_of(kind: Kind, settings: Settings, templates: list[Listed]) -> Need | None:
    """None where nothing of this host is taken, or next to nothing."""
    if kind == "elsewhere":
        return None
    if kind == "local":
        return Need(LOCAL, "measured with a blank page")
    if kind == "container":
        return Need(CONTAINER, f"measured idle; at most RAM_SIZE={in_words(settings.ram_size)}")
    whole = settings.ram_size + OVERHEAD
    if kind == "foreign" or settings.templates == "off":
        return Need(whole, "RAM_SIZE and what QEMU takes", disk=DESKTOP_BUDGET)
    usable = [one.manifest for one in templates if one.manifest is not None and not one.problem]
    if not usable:
        return Need(CLONE_GUESS, "for a clone, as others were measured", first=whole, disk=DESKTOP_BUDGET)
    measured = max((one.trial.clone_bytes or 0 for one in usable), default=0)
    each = int(measured * 1.2) or CLONE_GUESS
    return Need(each, "for a clone, as this host's template was measured", disk=DESKTOP_BUDGET)


def capacity_of(settings: Settings, need: Need | None, memory: Memory, disk_free: int | None) -> Finding:
    """How many more fit beside what runs now, and whether the host is large enough for those that are wanted.
    `disk_free` is None where the disk is not seen."""
    what = "capacity"
    if need is None:
        return Finding(what, "skipped", _elsewhere(settings))
    more = _fit(memory.available - RESERVE, need)
    binds, limits = (
        "memory",
        [f"{in_words(memory.available)} of memory free, {in_words(need.each)} each ({need.words})"],
    )
    if need.first:
        limits[0] += f", the first {in_words(need.first)}"
    if need.disk and disk_free is not None:
        by_disk = max(0, disk_free // need.disk)
        limits.append(f"{in_words(disk_free)} of disk free, up to {in_words(need.disk)} each")
        if by_disk < more:
            more, binds = by_disk, "disk"
    cores = len(os.sched_getaffinity(0))
    wanted, most = settings.envs + settings.spares, _fit(memory.limit - RESERVE, need)
    told = (
        f"room for {more} more, {binds} binds: {'; '.join(limits)}. {cores} processor{'s' * (cores != 1)} for what is "
        f"done at once. ENVD_ENVS={settings.envs}, ENVD_SPARES={settings.spares}"
    )
    if wanted > most:
        fix = f"ENVD_ENVS={max(1, most - settings.spares)}, or a host with more memory"
        return Finding(
            what, "warning" if most else "failed", f"{told}, and all of this host's memory is enough for {most}", fix
        )
    return Finding(what, "ok", told)


def _fit(free: int, need: Need) -> int:
    left = free - need.first
    return max(0, math.floor(left / need.each) + (1 if need.first else 0)) if left >= 0 else 0


def _elsewhere(settings: Settings) -> str:
    if settings.provider == "aws":
        limits = {
            "ENVD_AWS_MAX_INSTANCES": settings.aws_max_instances,
            "ENVD_AWS_MAX_HOURLY_USD": settings.aws_max_hourly_usd,
        }
        told = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        return f"desktops are instances of their own; {told or 'no limit is set (ENVD_AWS_MAX_INSTANCES)'}"
    return f"PROVIDER={settings.provider} makes desktops that take next to nothing"
