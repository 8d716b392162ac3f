"""What is asked of a sim desktop, as tests find it in `Desktop.calls` and match it in `Behaviour.on`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

SAID_KEPT = 2000


class Call(NamedTuple):
    """A request that arrived, or a command on a CDP websocket. `at` is of the monotonic clock, in seconds; `said` is
    what it asks for in plain words: the texts of its body, joined by blanks and cut; of an upload, the path."""

    at: float
    route: str
    said: str


def texts(value: Any) -> Iterator[str]:
    """The texts in JSON, in order, names of fields aside."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from texts(item)
        case dict():
            yield from texts(list(value.values()))
