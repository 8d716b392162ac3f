"""What a user sees who is not root, though root may run the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def as_nobody(call: Callable[[], object], directory: Path) -> str:
    """The repr of what a call returns to a user who is not root and may look into `directory`."""
    for path in (directory, *directory.parents[:2]):
        path.chmod(path.stat().st_mode | 0o011)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            os.write(write, repr(call()).encode())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is to read it, and no test runs on here
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told
