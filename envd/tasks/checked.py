"""What was found out about one task file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .schema import TaskProblem


@dataclass(frozen=True)
class Checked:
    """`task_id` is None when there is none in the file, `listing` when it lists tasks instead of being one."""

    path: Path
    task_id: str | None = None
    needs: tuple[str, ...] = ()
    problems: tuple[TaskProblem, ...] = ()
    listing: bool = False

    @property
    def supported(self) -> bool:
        return not self.problems
