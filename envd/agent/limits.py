"""How long and how large anything in the agent may get. The defaults are OSWorld's wherever it has any."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """All durations in seconds, all sizes in bytes."""

    command: float = 120
    """`/execute` and what it is built from; also a program in the warm interpreter."""
    python: float = 30
    """`/run_python`."""
    script: float = 100
    """`/run_bash_script` when the request names no timeout."""
    open_file: float = 1800
    """How long `/setup/open_file` waits for a window."""
    new_window: float = 30
    """How long after a window without the file's name has appeared `/setup/open_file` is content with it."""
    x_server: float = 15
    """One question to the X server, a screenshot included."""
    accessibility: float = 30
    """Walking the accessibility tree; then it is cut and says so."""
    terminal: float = 4
    """Looking for a focused terminal."""
    download: float = 300
    """One try of `/setup/download_file`."""
    output: int = 8 * MIB
    """What is kept of each of a command's two output streams."""
    body: int = 64 * MIB
    """A JSON or form body. Uploads are streamed and have no limit but the disk."""
    launch_log: int = MIB
    """What launched programs print, all together; then the log starts again."""
    tree_entries: int = 50_000
    """Files and directories in one answer of `/list_directory`."""
