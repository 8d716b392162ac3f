"""What the preflight finds, one thing at a time, and how several looks go on at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio

from ...errors import EnvdError, NotAuthorized
from .refusals import CHECK

AT_ONCE = 8
"""Calls under way: few enough that no bucket of AWS's runs dry."""
Verdict = Literal["ok", "warning", "failed", "unknown"]
Look = Callable[[], Awaitable["list[Finding]"]]


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, as a few words; `detail` is a sentence of facts; `fix` a command or a setting, if there is
    something to do. failed: no desktop will work. warning: one will, and something should be done. unknown: it could
    not be looked at."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""


async def gather(looks: Sequence[tuple[str, Look]]) -> list[Finding]:
    """What all of them found, in their order. One that cannot look is an `unknown` of its name, and leaves the others
    theirs."""
    found: list[list[Finding]] = [[] for _ in looks]
    bounded = anyio.CapacityLimiter(AT_ONCE)

    async def one(index: int, what: str, look: Look) -> None:
        async with bounded:
            try:
                found[index] = await look()
            except EnvdError as error:
                found[index] = [not_seen(what, error)]
            except Exception as error:  # noqa: BLE001 - AWS answered in a form that is not known; the rest is still told
                found[index] = [Finding(what, "unknown", f"AWS's answer was not understood: {error!r}")]

    async with anyio.create_task_group() as tasks:
        for index, (what, look) in enumerate(looks):
            tasks.start_soon(one, index, what, look)
    return [finding for some in found for finding in some]


def not_seen(what: str, error: EnvdError) -> Finding:
    if isinstance(error, NotAuthorized):
        allow = f"Allow {error.facts.get('action', 'it')}, as deploy/aws/policy.json does."
        return Finding(what, "unknown", error.detail, allow)
    return Finding(what, "unknown", error.detail, "" if error.hint == CHECK else error.hint)
