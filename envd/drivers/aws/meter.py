"""What instances have cost in this life of the daemon: their hours, summed up between looks."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from ..base import Costs
from .budget import Budget

PAID = ("pending", "running", "stopping")
"""States of instances that cost by the hour. One that is stopped costs its disk alone."""


class Meter:
    """Told again and again which types of instances are there; what was there since the time before has cost for so
    long. `clock` is in seconds, and never goes back."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._clock = clock
        self._there: Counter[str] = Counter()
        self._looked = clock()
        self._hours: defaultdict[str, float] = defaultdict(float)

    def look(self, types: Iterable[str]) -> Costs:
        """One entry of `types` for each instance. What they cost, and have cost so far."""
        now = self._clock()
        for kind, count in self._there.items():
            self._hours[kind] += count * (now - self._looked) / 3600
        self._there, self._looked = Counter(types), now
        return Costs(dict(self._there), self._price(self._there), dict(self._hours), self._price(self._hours))

    def _price(self, amounts: dict[str, float] | Counter[str]) -> float:
        return sum(amount * (self._budget.hourly(kind) or 0.0) for kind, amount in amounts.items())
