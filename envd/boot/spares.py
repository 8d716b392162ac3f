"""Warm spares: clean desktops that stand by, beyond those in use (ENVD_SPARES)."""

from __future__ import annotations

import random
import time
from typing import Protocol

import anyio
import structlog

from ..events import EventLog
from ..models import Desktop, Job, JobState
from .fleet import Fleet

logger = structlog.get_logger(__name__)

LONGEST_PAUSE = 60.0
"""Seconds, between two tries to make a spare where they keep failing: 1, 2, 4, … up to this, jittered by half."""
FORGOTTEN = 120.0
"""Seconds after which a spare that failed no longer counts."""


class Maker(Protocol):
    """The queue, as far as spares need it."""

    @property
    def spares_coming(self) -> int:
        """Jobs that have not ended and will leave a clean desktop behind."""

    @property
    def spare_width(self) -> int:
        """How many such jobs have a use at once; 0 once no new work is taken."""

    def submit_spare(self) -> Job: ...

    async def stirred(self) -> None:
        """Return when something about jobs or spares has changed."""


class Spares:
    """Asks for spares one after the other while there are too few. They wait in line behind whatever callers want."""

    def __init__(self, wanted: int, fleet: Fleet, maker: Maker, events: EventLog) -> None:
        self._wanted = wanted
        self._fleet = fleet
        self._maker = maker
        self._events = events
        self._failures = 0
        self._failed_at = 0.0
        self._pause_until = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while self._wanted:
            missing = self._wanted - self._fleet.spares - self._maker.spares_coming
            pause = self._pause_until - time.monotonic()
            if missing > 0 and pause <= 0 and self._maker.spares_coming < self._width():
                self._maker.submit_spare()
                continue
            with anyio.move_on_after(pause if missing > 0 and pause > 0 else None):
                await self._maker.stirred()

    def _width(self) -> int:
        """Where they keep failing there is no use in failing in numbers."""
        width = self._maker.spare_width
        return min(width, 1) if self._recent_failures() else width

    def _recent_failures(self) -> int:
        return self._failures if time.monotonic() - self._failed_at < FORGOTTEN else 0

    def ended(self, job: Job) -> None:
        """A job that was asked for here has ended."""
        if job.state in (JobState.SUCCEEDED, JobState.SUPERSEDED):
            return
        pause = self._set_back(first=1.0)
        if job.error is not None:
            message = f"No spare came of {job.id}; the next try is in {pause:.0f} s: {job.error.detail}"
            self._events.publish("note", message=message)

    def lost(self, desktop: Desktop, why: str) -> None:
        """A spare was lost while it waited. The first one is replaced at once."""
        pause = self._set_back(first=0.0)
        when = f"in {pause:.0f} s" if pause else "now"
        message = f"A spare was lost ({why}); another one is made {when}."
        self._events.publish("note", desktop_id=desktop.id, message=message)

    def _set_back(self, first: float) -> float:
        """The pause until the next try, in seconds, for one failure more."""
        self._failures = self._recent_failures() + 1
        self._failed_at = time.monotonic()
        pause = first if self._failures == 1 else min(LONGEST_PAUSE, 2.0 ** min(self._failures - 1, 10))
        pause *= random.uniform(0.5, 1.5)
        self._pause_until = self._failed_at + pause
        return pause
