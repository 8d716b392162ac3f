"""The files of a sim desktop: paths as its user writes them, and folders, which are there when a file is in them."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

HOME = "/home/user"
README = (f"{HOME}/Desktop/README.txt", b"A simulated desktop.\n")
TIMEZONE = ("/etc/timezone", b"Etc/UTC\n")
"""Files that are there from the start."""
FOLDERS = ("/", "/tmp", HOME, f"{HOME}/Desktop")
"""Folders that are there without a file in them."""


def absolute(path: str) -> str:
    """`path` from the root. The user's home may be written ~ or $HOME, and is what relative paths begin at."""
    if path == "~" or path.startswith("~/"):
        path = HOME + path[1:]
    return posixpath.normpath(posixpath.join(HOME, path.replace("$HOME", HOME)))


def is_folder(path: str, files: Mapping[str, bytes]) -> bool:
    prefix = path.rstrip("/") + "/"
    return path in FOLDERS or any(name.startswith(prefix) for name in files)


def tree(path: str, files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """The folder `path` and everything in it, as /list_directory tells it; None when there is no such folder."""
    if not is_folder(path, files):
        return None
    prefix = path.rstrip("/") + "/"
    inside = sorted(name[len(prefix) :] for name in files if name.startswith(prefix))
    children: list[dict[str, Any]] = []
    for name in dict.fromkeys(part.split("/")[0] for part in inside):
        below = tree(prefix + name, files) if prefix + name not in files else None
        children.append(below or {"type": "file", "name": name})
    return {"type": "directory", "name": posixpath.basename(path), "children": children}
