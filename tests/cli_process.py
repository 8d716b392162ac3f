"""`envd` as a person runs it: a process of its own in a folder of its own, in a pipe or on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from daemon_process import environment

TO_END = 60.0
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def envd(folder: Path, *arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end. Its state directory is `folder`'s; a setting that is empty is not set."""
    return subprocess.run(
        [sys.executable, "-m", "envd", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=TO_END,
        env=environment(folder / "state", settings),
        cwd=folder,
    )


def on_terminal(
    folder: Path, *arguments: str, answers: Sequence[tuple[str, str]] = (), **settings: str
) -> tuple[int, str]:
    """Run it on a terminal, and type each answer once what it is to was printed. Returns the exit code and all that was
    shown, without colours."""
    env = environment(folder / "state", settings) | {"TERM": "xterm-256color", "COLUMNS": "200"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-m", "envd", *arguments], env)
    shown, answered, waiting = "", 0, list(answers)
    give_up = time.monotonic() + TO_END
    while time.monotonic() < give_up:
        try:
            piece = os.read(terminal, 65_536)
        except OSError:  # how a terminal says that nobody has it open any more
            break
        if not piece:
            break
        shown += COLOURS.sub("", piece.decode(errors="replace"))
        if waiting and waiting[0][0] in shown[answered:]:
            answered = len(shown)
            os.write(terminal, f"{waiting.pop(0)[1]}\n".encode())
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert not waiting, f"nothing asked for {waiting}:\n{shown}"
    return os.waitstatus_to_exitcode(status), shown
