"""Who holds up the event loop: while it does not answer, a thread says what it is in the middle of."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Self

import structlog

logger = structlog.get_logger(__name__)

PATIENCE = 1.0
"""Seconds without a beat that are worth a look."""
QUIET = 60.0
"""Seconds after a look until there is another one, however often the loop is held up in between."""
LOOKS = 0.2
MOST_FRAMES = 30
"""Of each stack, the innermost."""
MOST_THREADS = 10
IDLE = ("threading.py", "queue.py", "selectors.py")
"""Where threads wait for something to do."""


class Watchdog:
    """`with Watchdog() as watchdog:` on the loop that is watched, which `beat`s again and again."""

    def __init__(self, patience: float = PATIENCE, quiet: float = QUIET) -> None:
        self._patience = patience
        self._quiet = quiet
        self._over = threading.Event()
        self._beaten = 0.0

    def __enter__(self) -> Self:
        self.beat()
        watched = asyncio.get_running_loop(), threading.get_ident()
        # A daemon thread: it may be about to log when the process ends.
        threading.Thread(target=self._watch, args=watched, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        told_of, told_at, untold = 0.0, -self._quiet, 0
        while not self._over.wait(LOOKS):
            beaten, now = self._beaten, time.monotonic()
            if now - beaten < self._patience or beaten == told_of:
                continue
            told_of = beaten
            if now - told_at < self._quiet:
                untold += 1
                continue
            told_at = now
            _tell(now - beaten, loop, thread, untold)
            untold = 0


def _tell(late: float, loop: asyncio.AbstractEventLoop, thread: int, untold: int) -> None:
    frames = sys._current_frames()
    names = {one.ident: one.name for one in threading.enumerate()}
    others = {
        f"{names.get(ident, 'thread')} {ident}": _stack(frame)
        for ident, frame in frames.items()
        if ident not in (thread, threading.get_ident()) and not frame.f_code.co_filename.endswith(IDLE)
    }
    logger.warning(
        "the event loop is held up",
        seconds=round(late, 1),
        task=_task_of(loop),
        stack=_stack(frames.get(thread)),
        threads=dict(list(others.items())[:MOST_THREADS]),
        untold=untold,
    )


def _task_of(loop: asyncio.AbstractEventLoop) -> str:
    """The name of the task that runs; empty when none does, or it cannot be known."""
    try:
        task = asyncio.current_task(loop)
    except RuntimeError:
        return ""
    return task.get_name() if task is not None else ""


def _stack(frame: FrameType | None) -> list[str]:
    """From the outermost to where it is now, without what its variables hold."""
    if frame is None:
        return []
    found = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False, limit=MOST_FRAMES)
    return [f"{one.filename}:{one.lineno} in {one.name}" for one in reversed(found)]
