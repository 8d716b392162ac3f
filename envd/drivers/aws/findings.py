"""How several looks of the preflight go on at once, and what is said where AWS did not let one look."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ... import findings
from ...errors import EnvdError, NotAuthorized
from ...findings import Finding, Look
from .refusals import CHECK

AT_ONCE = 8
"""Calls under way: few enough that no bucket of AWS's runs dry."""


async def gather(looks: Sequence[tuple[str, Look]]) -> list[Finding]:
    """What all of them found, in their order. One that cannot look is an `unknown` of its name, and leaves the others
    theirs. Each call has a deadline of its own (`cloud.py`)."""
    return await findings.gather(looks, told=_told, at_once=AT_ONCE, within=math.inf)


def not_seen(what: str, error: EnvdError) -> Finding:
    if isinstance(error, NotAuthorized):
        allow = f"Allow {error.facts.get('action', 'it')}, as deploy/aws/policy.json does."
        return Finding(what, "unknown", error.detail, allow)
    return Finding(what, "unknown", error.detail, "" if error.hint == CHECK else error.hint)


def _told(what: str, error: Exception) -> Finding:
    """AWS may answer in a form that is not known."""
    if isinstance(error, EnvdError):
        return not_seen(what, error)
    return Finding(what, "unknown", f"AWS's answer was not understood: {error!r}")
