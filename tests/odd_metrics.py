"""Metrics and getters that misbehave, given to the evaluator process by tests. It has no envd, so nor has this."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any


def number(result: Any, expected: Any = None) -> Any:
    """What the rule says, so that a test chooses; text is evaluated, so `float('nan')` works."""
    return eval(result) if isinstance(result, str) else result


def needs_a_file(result: str, expected: Any = None) -> float:
    return float(Path(result).read_text().strip() == "done")


def leaves_a_process(result: str, expected: Any = None) -> float:
    subprocess.Popen(["sleep", result], start_new_session=True)
    return 1.0


def leaves_a_process_and_loops(result: str, expected: Any = None) -> float:
    leaves_a_process(result)
    while True:
        time.sleep(0.01)


def kills_itself(result: Any, expected: Any = None) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def sees(result: list[str], expected: Any = None) -> float:
    """1 when any of the paths can be read."""
    return float(any(os.path.exists(path) for path in result))


def knows(result: str, expected: Any = None) -> float:
    """1 when the text is anywhere in the environment of this process or of one that it can look into."""
    told = [repr(os.environ).encode()]
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            told.append(path.read_bytes())
    return float(any(result.encode() in text for text in told))


def reaches(result: list[Any], expected: Any = None) -> float:
    """1 when host and port can be connected to."""
    try:
        socket.create_connection((result[0], result[1]), timeout=2).close()
    except OSError:
        return 0.0
    return 1.0


def sees_other_gradings(result: Any, expected: Any = None) -> float:
    return float(bool(os.listdir("/gradings")) or "other.txt" in os.listdir(os.environ["HOME"]))


def prints_much(result: int, expected: Any = None) -> float:
    for _ in range(result):
        print("x" * 1023)  # noqa: T201 - it is what this is for
    return 1.0


def get_missing_file(env: Any, config: dict[str, Any]) -> Any:
    raise FileNotFoundError(config["path"])


def get_large(env: Any, config: dict[str, Any]) -> Any:
    return ("x" * config["size"], {1: b"\0"}, None)


def get_process(env: Any, config: dict[str, Any]) -> Any:
    """Its process ends in the middle."""
    os._exit(7)
