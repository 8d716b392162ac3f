"""What the next life of a daemon must know of a machine to take it over, beside what the machine itself can be asked.

A file `machine.json` in the desktop's folder, out of the machine's own reach. It is there as soon as the machine may be
taken over, until its folder goes: a clone that has no identity of its own yet has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..models import ResetPath
from .console import HostIo

FILE = "machine.json"


class Kept(BaseModel):
    """screen: (width, height) in pixels. booted: whether its server has answered. pictures, input, detail: as `HostIo`
    has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    path: ResetPath
    screen: tuple[int, int]
    booted: bool = True
    pictures: bool = False
    input: bool = False
    detail: str = ""

    @property
    def seen(self) -> HostIo:
        return HostIo(self.pictures, self.input, self.detail)

    def write(self, directory: Path) -> None:
        """Blocks. Raises OSError."""
        new = directory / f"{FILE}.new"
        new.write_text(self.model_dump_json())
        new.replace(directory / FILE)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """None where there is none, or none that this version can use. Blocks."""
        try:
            return cls.model_validate_json((directory / FILE).read_bytes())
        except (OSError, ValidationError):
            return None
