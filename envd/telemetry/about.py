"""What a request is about: its env, job, episode, desktop, lease and caller, noted by whoever comes to know them while
it is served. Its line in the log has them all, and its answer's headers those that lead further.

The path of a request is told as it was sent, but for the id of a lease: whoever knows all of that may use the lease.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

Fact = str | int

HEADERS = {"job_id": "Envd-Job", "env": "Envd-Env", "episode_id": "Envd-Episode", "desktop_id": "Envd-Desktop"}
"""Of an answer, by the fact that each tells."""
LONGEST = 200
"""Characters of a fact."""
SHORT_LEASE = 10
"""Characters of a lease's id that are told."""
_LEASE = re.compile(rf"(/leases/[^/]{{{SHORT_LEASE}}})[^/]+")

_about: ContextVar[dict[str, Fact] | None] = ContextVar("about", default=None)


@contextmanager
def gathered() -> Iterator[dict[str, Fact]]:
    """What is noted in the block, by it and by the tasks that it starts; it grows as it is noted."""
    facts: dict[str, Fact] = {}
    token = _about.set(facts)
    try:
        yield facts
    finally:
        _about.reset(token)


def note(**facts: Fact | None) -> None:
    """The request that is being served is about this. None is nothing new; without a request nothing happens."""
    about = _about.get()
    if about is not None:
        about |= {
            name: fact[:LONGEST] if isinstance(fact, str) else fact for name, fact in facts.items() if fact is not None
        }


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request as it may be told: still percent-encoded, so that what a stranger sends does not move the
    cursor of whoever reads it."""
    if "/leases/" in scope["path"]:
        return _LEASE.sub(r"\1…", quote(scope["path"], errors="replace"))
    raw: bytes = scope["raw_path"]
    return raw.decode("ascii", "replace")
