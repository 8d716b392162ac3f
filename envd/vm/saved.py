"""Full states: a machine's memory in a file of its own on this host's disk, for when a template cannot be cloned.

    <root>/<key>/state       memory and devices, as one stream
                 disk.qcow2  the template's disk
                 machine     what the folder is named for; written last

Restoring one costs seconds and all of the machine's memory, where a clone costs neither; it needs neither the memory
file of the template nor a boot. One is kept: that of the template that was made last.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import anyio

from ..drivers.base import Report
from ..errors import InfraError, NoSpace
from .disks import require_space
from .monitor import Monitor
from .templates import OVERLAY, RAM, STATE, Plan

_MACHINE = "machine"
_SAVE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Saved:
    root: Path

    async def save(self, plan: Plan, monitor: Monitor, overlay: Path, report: Report) -> None:
        """Of the paused machine behind `monitor`, which cannot go on after that. A failure is noted and no more: who
        needs this has lost the template already, and there is the cold boot yet."""
        directory = self.root / plan.key
        try:
            await anyio.to_thread.run_sync(self._begin, directory, overlay, plan.machine.memory)
            await monitor.save_state(directory / STATE, memory=True, timeout=_SAVE_SECONDS)
            await anyio.Path(directory / _MACHINE).write_text(plan.key)
        except (OSError, NoSpace, InfraError) as error:
            report.note(f"The full state was not saved; without the template there is the cold boot only: {error}")
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(directory, ignore_errors=True))

    def has(self, key: str) -> bool:
        """Blocks."""
        return (self.root / key / _MACHINE).is_file()

    def state(self, key: str) -> Path:
        return self.root / key / STATE

    def stand_in(self, key: str, directory: Path) -> None:
        """Lay out a folder that takes the template's place for one machine, which has memory of its own. Blocks.
        Raises OSError."""
        directory.mkdir(mode=0o700, parents=True)
        (directory / RAM).touch(mode=0o600)
        os.link(self.root / key / OVERLAY, directory / OVERLAY)

    def forget(self, key: str) -> None:
        """Blocks."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    def _begin(self, directory: Path, overlay: Path, memory: int) -> None:
        self.root.mkdir(mode=0o700, exist_ok=True)
        for old in self.root.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        require_space(self.root, memory + overlay.stat().st_size, "A full state")
        directory.mkdir(mode=0o700)
        shutil.copyfile(overlay, directory / OVERLAY)
