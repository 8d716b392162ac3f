"""What both tests of the journal use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
from pydantic import Field

from envd.models import Job, Model
from envd.settings import Settings, load


class Note(Model):
    text: str = ""
    facts: Mapping[str, Any] = Field(default_factory=dict)


def at(folder: Path, **values: Any) -> Settings:
    return load({}, None, state_dir=folder, **values)


def job(number: int, **facts: Any) -> Job:
    return Job(**({"id": f"job-{number}", "env": number, "created_at": float(number)} | facts))


async def until(fact: Callable[[], bool], seconds: float = 10) -> None:
    with anyio.fail_after(seconds):
        while not fact():  # noqa: ASYNC110 - what it waits for wakes nobody
            await anyio.sleep(0.01)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def set_aside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.broken-*"))
