"""What bubblewrap's arguments have in common wherever something is walled in: desktops and evaluators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_HOLES_OF_PROC = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi")
"""Files that the host's root may write although he has no capability left. bubblewrap covers some of them, but takes
/proc/sys for unwritable (the directory is, its files are not); seen with 0.8.0: without this a desktop of a daemon that
runs as root can set the host's kernel.core_pattern."""


def system() -> Iterator[str]:
    """The host's programs and libraries, read-only. Blocks."""
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.exists():
            yield from ("--ro-bind", str(path), str(path))
    yield from ("--ro-bind-try", "/var/cache/fontconfig", "/var/cache/fontconfig")
    yield from ("--perms", "1777", "--tmpfs", "/var/tmp")


def proc_and_dev() -> Iterator[str]:
    """A /proc and a /dev of their own, without what would reach the host. Blocks."""
    yield from ("--proc", "/proc", "--dev", "/dev")
    for name in _HOLES_OF_PROC:
        if Path("/proc", name).exists():
            yield from ("--ro-bind", f"/proc/{name}", f"/proc/{name}")
