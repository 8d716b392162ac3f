"""What is found where somebody looks whether all is well, one thing at a time, with a verdict and what to do: so the
doctor and the preflight of AWS tell alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio

Verdict = Literal["ok", "warning", "failed", "unknown", "skipped"]


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, as a few words; `detail` is a sentence of facts; `fix` a command or a setting, if there is
    something to do. failed: no desktop will work. warning: one will, and something should be done. unknown: it could
    not be looked at. skipped: these settings do not need it."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""


Look = Callable[[], Awaitable[list[Finding]]]
Told = Callable[[str, Exception], Finding]
"""What is said of a look, by its name, that broke: never raises."""


async def gather(looks: Sequence[tuple[str, Look]], *, told: Told, at_once: int, within: float) -> list[Finding]:
    """What all of them found, in their order. One that breaks, or takes longer than `within` seconds, is an `unknown`
    of its name, and leaves the others theirs."""
    found: list[list[Finding]] = [[] for _ in looks]
    bounded = anyio.CapacityLimiter(at_once)

    async def one(index: int, what: str, look: Look) -> None:
        async with bounded:
            with anyio.move_on_after(within):
                try:
                    found[index] = await look()
                except Exception as error:  # noqa: BLE001 - whatever broke this one, the rest is still told
                    found[index] = [told(what, error)]
                return
            found[index] = [Finding(what, "unknown", f"there was no answer within {within:g} s")]

    async with anyio.create_task_group() as tasks:
        for index, (what, look) in enumerate(looks):
            tasks.start_soon(one, index, what, look)
    return [finding for some in found for finding in some]
