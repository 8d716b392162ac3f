"""Settling: what counts as a change, and when a screen has come to rest."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Awaitable, Callable

import anyio
import pytest
from PIL import Image, ImageDraw

from envd.errors import GuestMisbehaved, GuestUnreachable
from envd.settle import differs, settle

SCREEN = (1920, 1080)


def screen(*boxes: tuple[int, int, int, int], ground: str = "white", kind: str = "PNG") -> bytes:
    """A screen with black boxes on it."""
    image = Image.new("RGB", SCREEN, ground)
    draw = ImageDraw.Draw(image)
    for box in boxes:
        draw.rectangle(box, "black")
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


BLANK = screen()
WINDOW = screen((200, 200, 900, 700))


def shows(*pictures: bytes) -> Callable[[], Awaitable[bytes]]:
    """One picture after the other; the last one stays."""
    coming = itertools.chain(pictures, itertools.repeat(pictures[-1]))

    async def look() -> bytes:
        return next(coming)

    return look


@pytest.mark.parametrize(
    ("box", "changed"),
    [
        pytest.param((500, 500, 501, 520), False, id="caret"),
        pytest.param((300, 8, 324, 32), False, id="spinner of a tab"),
        pytest.param((500, 500, 548, 512), False, id="one word in small letters"),
        pytest.param((500, 500, 700, 516), True, id="line of text"),
        pytest.param((0, 0, 100, 100), True, id="icon"),
    ],
)
def test_a_change_counts_from_the_size_of_a_line_of_text(box: tuple[int, int, int, int], changed: bool) -> None:
    assert differs(BLANK, screen(box)) is changed


def test_a_jpeg_of_the_same_screen_is_no_change() -> None:
    assert not differs(WINDOW, screen((200, 200, 900, 700), kind="JPEG"))


async def test_a_still_screen_settles_after_its_quiet_time() -> None:
    picture, settled = await settle(shows(WINDOW), quiet=0.1, limit=5)
    assert (picture, settled.still) == (WINDOW, True)
    assert 0.1 <= settled.seconds < 5


async def test_the_picture_is_the_one_that_stayed() -> None:
    picture, settled = await settle(shows(BLANK, BLANK, WINDOW), quiet=0.1, limit=5)
    assert (picture, settled.still) == (WINDOW, True)
    assert settled.pictures >= 5


async def test_a_screen_that_creeps_is_not_still() -> None:
    """Each picture differs little from the one before, and much from the one that the quiet began with."""
    creeping = (screen((500, 500, 500 + 60 * step, 516)) for step in range(30))
    _, settled = await settle(shows(*creeping), quiet=0.1, limit=0.4)
    assert not settled.still


async def test_a_screen_that_never_rests_ends_at_the_limit() -> None:
    blinking = itertools.cycle((BLANK, WINDOW))

    async def look() -> bytes:
        return next(blinking)

    _, settled = await settle(look, quiet=0.1, limit=0.3)
    assert not settled.still
    assert settled.seconds >= 0.3


async def test_a_guest_that_takes_long_for_a_picture_needs_two_of_them() -> None:
    async def look() -> bytes:
        await anyio.sleep(0.3)
        return WINDOW

    _, settled = await settle(look, quiet=0.1, limit=5)
    assert settled.still
    assert settled.pictures <= 3


async def test_a_screen_that_still_shows_what_was_seen_before_has_settled_already() -> None:
    _, settled = await settle(shows(WINDOW), quiet=0.1, limit=5, before=(WINDOW, time.monotonic() - 1))
    assert (settled.still, settled.pictures) == (True, 1)


@pytest.mark.parametrize(
    ("seen", "ago"), [pytest.param(BLANK, 1.0, id="another screen"), pytest.param(WINDOW, 0.0, id="only just")]
)
async def test_what_was_seen_before_is_no_proof_if_it(seen: bytes, ago: float) -> None:
    _, settled = await settle(shows(WINDOW), quiet=0.1, limit=5, before=(seen, time.monotonic() - ago))
    assert settled.pictures > 1


async def test_without_a_quiet_time_the_first_picture_is_taken() -> None:
    picture, settled = await settle(shows(BLANK, WINDOW), quiet=0, limit=5)
    assert (picture, settled.still, settled.pictures) == (BLANK, True, 1)


async def test_it_waits_as_long_as_it_is_told_to_whatever_the_screen_does() -> None:
    _, settled = await settle(shows(WINDOW), quiet=0, limit=0, at_least=0.2)
    assert settled.seconds >= 0.2


async def test_a_picture_that_is_broken_is_the_guests_fault() -> None:
    with pytest.raises(GuestMisbehaved, match="broken"):
        await settle(shows(BLANK, BLANK[:500]), quiet=0.1, limit=5)


async def test_a_guest_that_goes_silent_ends_it() -> None:
    async def look() -> bytes:
        raise GuestUnreachable("gone", sent=True)

    with pytest.raises(GuestUnreachable):
        await settle(look, quiet=0.1, limit=5)
