"""Where the way to Chrome's DevTools ends: the published port → 9222 in the guest, a bridge in OSWorld's images →
1337 → Chrome. Seen by what listens in the guest."""

from __future__ import annotations

TABLES = ["cat", "/proc/net/tcp", "/proc/net/tcp6"]
"""Prints them, where there are any; the second may be missing."""
BRIDGE, CHROME = 9222, 1337
_LISTENS = "0A"


def listening(tables: str) -> frozenset[int] | None:
    """The TCP ports that somebody listens on; None if those are not the kernel's tables."""
    if "local_address" not in tables:
        return None
    rows = [line.split() for line in tables.splitlines()]
    return frozenset(
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if len(row) > 3 and row[3] == _LISTENS and row[1].rpartition(":")[2].isalnum()
    )


def told(ports: frozenset[int]) -> str:
    """What is missing of the way, for who has to mend it."""
    match BRIDGE in ports, CHROME in ports:
        case True, True:
            return (
                f"In the guest both {BRIDGE} and {CHROME} are listened on: it is Chrome itself that does not answer, "
                f"or the way from this host to the guest's port {BRIDGE} is broken."
            )
        case True, False:
            return (
                f"In the guest {BRIDGE} is listened on and {CHROME} is not: where {BRIDGE} is the bridge (socat), "
                "there is no Chrome behind it."
            )
        case False, True:
            return (
                f"In the guest Chrome listens on {CHROME}, and nothing on {BRIDGE}: the bridge (socat) between them is "
                "missing."
            )
    return f"In the guest nothing listens on {BRIDGE} or {CHROME}: neither Chrome nor the bridge (socat) to it came up."
