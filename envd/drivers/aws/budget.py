"""Limits of number and price that a daemon keeps to, and what types of instances cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BudgetExhausted, SettingsError
from .prices import PRICES

_NUMBER, _USD, _TABLE = "ENVD_AWS_MAX_INSTANCES", "ENVD_AWS_MAX_HOURLY_USD", "ENVD_AWS_PRICES"
_DEAREST = 1e6
_EXAMPLE = '{"t3.xlarge": 0.1664}'


class Budget:
    """What may exist at once: `limit_instances` of them, for `limit_usd` US dollars an hour together. None is no limit.

    It counts what it is told of, and remembers nothing: two launches at the same time must be told of each other.
    """

    def __init__(self, prices: Mapping[str, float], limit_instances: int | None, limit_usd: float | None) -> None:
        self._prices = prices
        self._limit_instances = limit_instances
        self._limit_usd = limit_usd

    def hourly(self, instance_type: str) -> float | None:
        """US dollars; None when the price is not known."""
        return self._prices.get(instance_type)

    def has_room(self, types: Sequence[str], one_more: str) -> bool:
        """Whether an instance of type `one_more` may be launched beside those of `types`, one entry for each."""
        return self._refusal(types, one_more) is None

    def require(self, types: Sequence[str], one_more: str) -> None:
        """Raises BudgetExhausted where `has_room` says no: with a limit of dollars also for a price that is not known.
        Not retryable if no other instance's end would help."""
        if refusal := self._refusal(types, one_more):
            raise refusal

    def _refusal(self, types: Sequence[str], one_more: str) -> BudgetExhausted | None:
        limit = self._limit_instances
        if limit is not None and len(types) >= limit:
            return BudgetExhausted(
                f"{_instances(types)} {'exists' if len(types) == 1 else 'exist'}, and {_NUMBER} is {limit}.",
                hint=f"Wait until one has ended, or raise {_NUMBER}.",
                limit=limit,
                wanted=len(types) + 1,
                setting=_NUMBER,
            )
        return None if self._limit_usd is None else self._too_dear(types, one_more, self._limit_usd)

    def _too_dear(self, types: Sequence[str], one_more: str, limit: float) -> BudgetExhausted | None:
        if unknown := sorted({kind for kind in (*types, one_more) if kind not in self._prices}):
            return _final(
                f"What {' and '.join(unknown)} costs is not known, and {_USD} is {_usd(limit)}.",
                hint=f"Give its price in a file that {_TABLE} names, as {_EXAMPLE}, or unset {_USD}.",
                limit=limit,
                wanted=None,
                setting=_USD,
            )
        price = self._prices[one_more]
        now = sum(self._prices[kind] for kind in types)
        wanted = round(now + price, 6)  # sums of such fractions are off by less than that
        if wanted <= limit:
            return None
        digits = next(
            (count for count in range(2, 6) if round(wanted, count) > limit), 6
        )  # so many show that it is more
        facts: dict[str, Any] = {"limit": limit, "wanted": wanted, "setting": _USD}
        if price > limit:
            return _final(
                f"One instance of {one_more} costs ${price:.{digits}f} an hour, and {_USD} is {_usd(limit)}.",
                hint=f"Raise {_USD}.",
                **facts,
            )
        more = "one more" if {*types} == {one_more} else f"one of {one_more} more"
        return BudgetExhausted(
            f"{_instances(types)} cost{'s' * (len(types) == 1)} ${now:.{digits}f} an hour; {more} would make"
            f" ${wanted:.{digits}f}, and {_USD} is {_usd(limit)}.",
            hint=f"Wait until one has ended, or raise {_USD}.",
            **facts,
        )


def load_prices(path: Path | None) -> dict[str, float]:
    """US dollars an hour of each type: envd's own table (`prices.py`) with what the JSON file says put over it.

    Reads a file: call it in a thread. Raises SettingsError for one that is not {type: number above 0}.
    """
    if path is None:
        return dict(PRICES)
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{_TABLE}={path} cannot be read as JSON: {error}.") from error
    if not isinstance(given, dict):
        raise SettingsError(f"{_TABLE}={path} must hold an object, such as {_EXAMPLE}.")
    for kind, price in given.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < _DEAREST:
            raise SettingsError(
                f"{_TABLE}={path}: the price of {kind} is {json.dumps(price)[:80]}; it must be a number above 0, in US"
                " dollars an hour."
            )
    return {**PRICES, **given}


def _final(detail: str, **told: Any) -> BudgetExhausted:
    """One that no other instance's end would help."""
    refusal = BudgetExhausted(detail, **told)
    refusal.retryable = False
    return refusal


def _usd(limit: float) -> str:
    """With two digits where those are all."""
    return f"{limit:.2f}" if round(limit, 2) == limit else f"{limit:g}"


def _instances(types: Sequence[str]) -> str:
    """3 instances of t3.xlarge; 3 instances (2 of m5.large, 1 of t3.xlarge)."""
    words = f"{len(types)} instance{'s' * (len(types) != 1)}"
    kinds = sorted(Counter(types).items())
    if len(kinds) == 1:
        return f"{words} of {kinds[0][0]}"
    return f"{words} ({', '.join(f'{count} of {kind}' for kind, count in kinds)})"
