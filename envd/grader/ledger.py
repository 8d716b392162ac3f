"""What became of each call that a getter made, and so whether its value can be trusted.

Getters of desktop-env hide failures: an exception becomes an empty list, "Google" or a PDF without pages. So every
call is entered here where it is made, and a getter whose last try of a call failed has no value, whatever it returned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MOST_CALLS = 200
"""Calls that are listed in a report; more are only counted."""


class Stop(BaseException):
    """A grading that ends without a number. No Exception, so that no `except Exception` of a getter swallows it.

    `kind` is one of infra, evaluator, task, missing_library; `facts` are JSON.
    """

    kind = "evaluator"

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts


class GuestFailure(Stop):
    """The guest or Chrome in it did not answer, or not as it would when healthy."""

    kind = "infra"


class InternetFailure(Stop):
    """Something outside of the desktop could not be reached."""

    kind = "infra"


class AssetMissing(Stop):
    """A file that the task names by URL was not there. Facts: url."""

    kind = "infra"


class TaskFault(Stop):
    """The task's evaluator cannot work as it is written."""

    kind = "task"


class Missing(Stop):
    """A library or program that only some metrics need. Facts: missing."""

    kind = "missing_library"


@dataclass
class Call:
    """One call. `seconds` is None while it lasts; `error` is empty when it went well."""

    what: str
    status: int | None = None
    seconds: float | None = None
    error: str = ""


@dataclass
class Ledger:
    """`outstanding` has, for each kind of call, the failure of its last try; a success takes it away."""

    calls: list[Call] = field(default_factory=list)
    count: int = 0
    warnings: list[str] = field(default_factory=list)
    outstanding: dict[str, Stop] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    """Files that the guest says are not there (its own 404), asked for by the current getter."""
    getter: str = ""

    def begin(self, getter: str) -> None:
        """A getter starts: it answers for its own calls only."""
        self.getter = getter
        self.outstanding.clear()
        self.absent.clear()

    def judge(self) -> None:
        """Raises the first failure that was not made good. To be called when a getter or a metric has ended."""
        for stop in (*self.missing, *self.outstanding.values()):
            raise stop

    def warn(self, text: str) -> None:
        if text not in self.warnings and len(self.warnings) < 100:
            self.warnings.append(text[:1000])

    @contextmanager
    def call(self, what: str) -> Iterator[Call]:
        """Enter a call. An exception in the block is noted in it and goes on."""
        entry = Call(what[:300])
        self.count += 1
        if len(self.calls) < MOST_CALLS:
            self.calls.append(entry)
        start = time.monotonic()
        try:
            yield entry
        except BaseException as error:
            entry.error = entry.error or f"{type(error).__name__}: {error}"[:500]
            raise
        finally:
            entry.seconds = round(time.monotonic() - start, 4)

    def failed(self, key: str, stop: Stop) -> None:
        self.outstanding[key] = stop

    def succeeded(self, key: str) -> None:
        self.outstanding.pop(key, None)
