"""`envd templates ls|rm|verify`: the templates of this user, for a person. Their keeper is `vm/templates.py`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from anyio.to_thread import run_sync
from rich.console import Console

from ..errors import NotFound
from ..settings import Settings
from ..vm.disks import in_words
from ..vm.templates import Listed, list_templates, remove_template, verify_template
from .listing import ago, busy, console, print_json
from .watch import clean

SHORTEST = 8
"""Characters of a key that are shown, or as many as tell it from the others."""
NONE = "There are no templates. A first boot makes one, or `envd templates create`."


async def ls(settings: Settings, *, as_json: bool = False, output: Console | None = None) -> int:
    """Print all of them, the last used first. Always 0."""
    found = await run_sync(list_templates, settings)
    if as_json:
        print_json({"templates": [_facts(one) for one in found]})
        return 0
    output = output or console()
    if not found:
        output.out(NONE, highlight=False)
        return 0
    now = time.time()
    for one in found:
        output.out(f"{_short(one.key, found)}  {_state(one)}, last used {ago(now - one.used_at)} ago", highlight=False)
        for name, words in _lines(one, now):
            output.out(f"  {name:9}{clean(words)}", highlight=False)
    return 0


async def remove(
    settings: Settings, keys: Sequence[str], *, everything: bool = False, output: Console | None = None
) -> int:
    """0 if they are gone, 1 if one is in use. Raises NotFound for a key that means none or several, before any goes."""
    output = output or console()
    found = await run_sync(list_templates, settings)
    if not everything and not keys:
        raise NotFound("Nothing is named.", hint="Name keys as `envd templates ls` shows them, or --all.")
    chosen = found if everything else [_meant(key, found) for key in dict.fromkeys(keys)]
    left = 0
    for one in chosen:
        short = _short(one.key, found)
        if await run_sync(remove_template, settings, one.key):
            output.out(f"removed {short}: {in_words(one.bytes)}", highlight=False)
        else:
            left += 1
            output.out(f"kept {short}: a daemon uses it", highlight=False)
    if not chosen:
        output.out(NONE, highlight=False)
    return 1 if left else 0


async def verify(
    settings: Settings, key: str | None = None, *, as_json: bool = False, output: Console | None = None
) -> int:
    """0 if all, or the one that is meant, are what they were when they were made; else 1. Raises NotFound."""
    output = output or console()
    found = await run_sync(list_templates, settings)
    # What was put aside is known to be bad, and its memory is gone.
    chosen = [_meant(key, found)] if key is not None else [one for one in found if not one.key.endswith(".aside")]
    wrong: dict[str, list[str]] = {}
    for one in chosen:
        began = time.monotonic()
        with busy(output, f"reading {_short(one.key, found)}, {in_words(one.bytes)}", quiet=as_json):
            wrong[one.key] = await run_sync(verify_template, settings, one.key)
        if not as_json:
            seconds = time.monotonic() - began
            words = "; ".join(wrong[one.key]) or f"as it was made: {in_words(one.bytes)} read in {seconds:.1f} s"
            output.out(f"{_short(one.key, found)}: {words}", highlight=False)
    if as_json:
        print_json({"templates": [{"key": key, "problems": problems} for key, problems in wrong.items()]})
    elif not chosen:
        output.out(NONE, highlight=False)
    return 1 if any(wrong.values()) else 0


def _meant(key: str, found: Sequence[Listed]) -> Listed:
    """The one template whose key is `key` or begins with it."""
    meant = [one for one in found if one.key == key] or [one for one in found if key and one.key.startswith(key)]
    if len(meant) == 1:
        return meant[0]
    if not meant:
        raise NotFound(f"There is no template {key}.", hint="`envd templates ls` shows those there are.")
    raise NotFound(
        f"{key} could be {' or '.join(one.key for one in meant)}.", hint="Give as much of the key as tells them apart."
    )


def _short(key: str, found: Sequence[Listed]) -> str:
    """The beginning of `key` that means it and no other."""
    others = [one.key for one in found if one.key != key]
    length = SHORTEST
    while length < len(key) and any(other.startswith(key[:length]) for other in others):
        length += 1
    return key[:length]


def _lines(one: Listed, now: float) -> Iterator[tuple[str, str]]:
    manifest = one.manifest
    if manifest is None:
        yield "takes", in_words(one.bytes)
        return
    yield "disk", manifest.disk
    yield "image", manifest.image
    yield "machine", _machine(manifest.machine)
    sizes = ", ".join(f"{name} {in_words(facts.size)}" for name, facts in manifest.files.items())
    yield "takes", f"{in_words(one.bytes)} of {sizes}"
    yield "made", f"{ago(now - manifest.created)} ago, of a boot of {manifest.boot_seconds:.0f} s"
    trial = manifest.trial
    seen = [name for name, works in (("pictures", trial.pictures), ("input", trial.input)) if works]
    yield "host io", " and ".join(seen or ["no"]) + (f" ({trial.io_detail})" if trial.io_detail else "")


def _machine(words: str) -> str:
    """What a person asks for first, of a machine's whole command line: screen, processors, memory, accelerator."""
    screen, cpus, memory = (
        re.search(pattern, words) for pattern in (r"xres=(\d+),yres=(\d+)", r"cpus=(\d+)", r"size=(\d+)M")
    )
    told = [
        f"{screen[1]}x{screen[2]}" if screen else "",
        f"{cpus[1]} cpus" if cpus else "",
        in_words(int(memory[1]) * 1024**2) if memory else "",
        "kvm" if "-cpu host" in words else "emulated",
    ]
    return ", ".join(filter(None, told))


def _state(one: Listed) -> str:
    if one.problem:
        return clean(f"not used ({one.problem})")
    return "in use" if one.in_use else "ready"


def _facts(one: Listed) -> dict[str, Any]:
    return {
        "key": one.key,
        "bytes": one.bytes,
        "used_at": one.used_at,
        "in_use": one.in_use,
        "problem": one.problem,
        "manifest": one.manifest.model_dump(mode="json") if one.manifest else None,
    }
