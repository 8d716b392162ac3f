"""What the steps of a set-up work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from ...guest import Cdp, Guest
from ...models import SetupRecord
from ...settings import Settings
from ..assets import Assets
from ..task import Parameters


@dataclass
class Context:
    """One desktop that is being set up (or post-configured), and what the daemon has for it.

    record   told of every step that ended, as it ended
    note     told in words of what takes long while it does
    outputs  what `execute` was told to keep under a name (its `stdout` and `stderr` parameters): name → bytes. The
             getter `cache_file` reads them at evaluation, so whoever runs a set-up hands them on.
    """

    guest: Guest
    cdp: Cdp
    assets: Assets
    settings: Settings
    session: aiohttp.ClientSession
    record: Callable[[SetupRecord], None] = lambda record: None
    note: Callable[[str], None] = lambda words: None
    screen: tuple[int, int] = (1920, 1080)
    outputs: dict[str, bytes] = field(default_factory=dict)
    proxied: bool = False
    """Whether a `proxy` step has made a proxy for Chrome on this desktop."""


Run = Callable[[Context, Parameters], Awaitable[str]]
"""Runs one step. Answers a warning, or "" when there is nothing to say; raises EnvdError when the step failed."""
