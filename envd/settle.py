"""Waiting until a screen has come to rest, by what it shows and not by the clock."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio
from PIL import Image, ImageChops

from .errors import GuestMisbehaved
from .models import Settled
from .pictures import opened

CELL = 8
"""Pixels. Pictures are compared by the mean grey of cells of so many pixels each way."""
CHANGED = 8
"""Grey levels (of 255) by which a cell must differ to count as changed."""
SHARE = 0.001
"""Of all cells: 32 of a Full HD screen's 32,400. A blinking caret changes 3, a tab's spinner about 9, a clock's minute
about 8; a line of ten letters about 40."""


async def settle(
    look: Callable[[], Awaitable[bytes]],
    *,
    quiet: float,
    limit: float,
    at_least: float = 0.0,
    before: tuple[bytes, float] | None = None,
) -> tuple[bytes, Settled]:
    """Look until nothing but a caret or a clock has changed for `quiet` seconds; the last picture (as `look` gave it)
    and how that went.

    `quiet` is the time from one picture's arrival to the moment the next is asked for, so that a guest that takes
    seconds for a picture is judged as a fast one is. Gives up after `limit` seconds, `still` being False then. 0 for
    `quiet` takes the first picture. Returns no sooner than after `at_least` seconds. `before` is a picture that was
    seen earlier and when (monotonic): a screen that still shows it has been quiet since. Raises what `look` raises, and
    GuestMisbehaved for a picture that cannot be decoded.
    """
    began = time.monotonic()
    picture = reference = await look()
    since, pictures, still = time.monotonic(), 1, quiet == 0
    if before is not None and began - before[1] >= quiet:
        still = still or not await anyio.to_thread.run_sync(differs, before[0], picture)
    while True:
        waited = time.monotonic() - began
        if waited >= at_least and (still or waited >= limit):
            break
        pause = quiet / 2 if not still else at_least - waited
        await anyio.sleep(max(0.02, min(pause, max(limit, at_least) - waited)))
        asked = time.monotonic()
        picture, pictures = await look(), pictures + 1
        if await anyio.to_thread.run_sync(differs, reference, picture):
            reference, since, still = picture, time.monotonic(), quiet == 0
        elif asked - since >= quiet:
            still = True
    return picture, Settled(still=still, seconds=round(time.monotonic() - began, 3), pictures=pictures)


def differs(one: bytes, other: bytes) -> bool:
    """Whether two pictures (PNG or JPEG) show different screens. Blocks: call it in a thread."""
    if one == other:
        return False
    before, after = _cells(one), _cells(other)
    if before.size != after.size:
        return True
    changes = ImageChops.difference(before, after).histogram()[CHANGED + 1 :]
    return sum(changes) > SHARE * before.width * before.height


def _cells(picture: bytes) -> Image.Image:
    try:
        with opened(picture) as image:
            return image.convert("L").reduce(CELL)
    except ValueError as error:
        raise GuestMisbehaved(
            f"The guest answered a picture of {len(picture)} bytes that is broken: {error}"
        ) from error
