"""`envd tasks check`: which task files this server can run, and what each of them needs."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import anyio.to_thread

from ..settings import Settings
from .abilities import Abilities, has_ocr
from .assets import Assets
from .check_report import print_json, print_report
from .checked import Checked
from .grading import find_interpreter
from .schema import TaskProblem, examine

HEADINGS = ("id", "instruction", "config", "evaluator")
"""A task has at least one of these."""


def task_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Files named as they are, and the *.json files below folders in order, each once. Folders that begin with a dot
    are left out. A path that is not there, or a folder that cannot be read, is yielded itself."""
    seen: set[str] = set()
    for path in paths:
        # os.path raises nothing, where methods of Path do.
        for file in _below(path) if os.path.isdir(path) else [path]:
            if (real := os.path.realpath(file)) not in seen:
                seen.add(real)
                yield file


async def check(paths: Sequence[Path], settings: Settings, *, as_json: bool = False) -> int:
    """Print the table (or JSON) to stdout. Answers the exit code: 0 all are supported, 1 some are not, 2 no file was
    found."""
    abilities = await abilities_here(settings)

    def tell() -> int:
        checked = look(paths, abilities, settings.body_limit)
        if as_json:
            print_json(checked)
        else:
            print_report(checked, evaluators=find_interpreter(settings) is not None)
        if not checked or not any(os.path.exists(path) for path in paths):
            return 2
        return 0 if all(one.supported for one in checked) else 1

    return await anyio.to_thread.run_sync(tell)


def look(paths: Sequence[Path], abilities: Abilities, limit: int) -> list[Checked]:
    """Every file, but for listings that were found in folders. `limit` is in bytes."""
    named = {os.path.realpath(path) for path in paths}
    found = (look_at(file, abilities, limit) for file in task_files(paths))
    return [one for one in found if not one.listing or os.path.realpath(one.path) in named]


def look_at(path: Path, abilities: Abilities, limit: int) -> Checked:
    """Read one file and examine it. Raises nothing."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return made

    try:
        raw = json.loads(_read(path, limit), object_pairs_hook=unique)
    except RecursionError:
        return _unusable(path, "is nested too deep to be read")
    except ValueError as error:
        return _unusable(path, f"is not JSON in UTF-8, and must be: {error}"[:300])
    except OSError as error:
        return _unusable(path, f"cannot be read: {error.strerror or error}")
    if not isinstance(raw, dict):
        return _unusable(path, "is no task; a task is a JSON object")
    if raw and all(isinstance(ids, list) and all(isinstance(name, str) for name in ids) for ids in raw.values()):
        return _unusable(path, "lists tasks and is none itself; check the folder with the task files", listing=True)
    if not raw.keys() & set(HEADINGS):
        return _unusable(path, f"is no task; it has none of {', '.join(HEADINGS)}")
    found = examine(raw, abilities)
    repeated = tuple(TaskProblem(name[:200], "is there more than once; leave one") for name in dict.fromkeys(twice))
    name = raw.get("id") or raw.get("task_id")
    task_id = str(name)[:200] if isinstance(name, str | int) else None
    return Checked(path, task_id, found.needs, repeated + found.problems)


async def abilities_here(settings: Settings) -> Abilities:
    """What a server with these settings can do, its cache as it is now. Raises SettingsError."""
    async with aiohttp.ClientSession() as session:
        assets = Assets(settings, session)
        if settings.offline:
            await assets.load()
    interpreter = await anyio.to_thread.run_sync(find_interpreter, settings)
    ocr = interpreter is not None and await anyio.to_thread.run_sync(has_ocr, interpreter)
    return Abilities.of(settings, has_asset=assets.has_now, ocr=ocr)


def _below(folder: Path) -> Iterator[Path]:
    unreadable: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".json"))
    yield from unreadable


def _read(path: Path, limit: int) -> str:
    # Opening a pipe would wait for somebody to write into it.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "it is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"it has more than the {limit:,} bytes that a request may have (ENVD_BODY_LIMIT)")
    return content.decode()


def _unusable(path: Path, message: str, *, listing: bool = False) -> Checked:
    return Checked(path, problems=(TaskProblem("", message),), listing=listing)
