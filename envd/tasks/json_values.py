"""Whether a value is JSON that everything behind it can carry: finite, whole text, neither too deep nor too much."""

from __future__ import annotations

import math
from collections.abc import Iterator

DEEPEST = 100
MOST_VALUES = 20_000
"""The largest public task file has a few hundred."""
LARGEST_NUMBER = 2**63


def strange(value: object) -> Iterator[tuple[str, str]]:
    """Yield (place, message) for what is wrong with `value`, without recursion."""
    stack: list[tuple[str, object, int]] = [("", value, 0)]
    seen = 1
    while stack:
        place, item, depth = stack.pop()
        seen += len(item) if isinstance(item, dict | list) else 0
        if seen > MOST_VALUES:
            yield "", f"must hold at most {MOST_VALUES:,} values"
            return
        if depth > DEEPEST:
            yield place[:100], f"must not be nested deeper than {DEEPEST} levels"
            return
        if isinstance(item, dict):
            for name, inner in item.items():
                if not isinstance(name, str) or not _whole(name):
                    yield place, "must have names that are text"
                    return
                stack.append((f"{place}.{name[:60]}" if place else name[:60], inner, depth + 1))
        elif isinstance(item, list):
            stack.extend((f"{place}[{index}]", inner, depth + 1) for index, inner in enumerate(item))
        elif message := _wrong(item):
            yield place, message


def _wrong(item: object) -> str:
    if isinstance(item, str):
        return "" if _whole(item) else "must be text; it holds half of a character"
    if isinstance(item, bool) or item is None:
        return ""
    if isinstance(item, int):
        return "" if abs(item) < LARGEST_NUMBER else "must be a number of at most 64 bits"
    if isinstance(item, float):
        return "" if math.isfinite(item) else "must be a number that JSON has"
    return "must be a JSON value"


def _whole(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
