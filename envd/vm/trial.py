"""Whether a machine's console shows and does what it seems to: tried on a clone that is thrown away afterwards.

Input is read back inside the guest by a small program of ours, which needs nothing but the Python and the X library
that pyautogui itself needs there: it puts a window over the screen, takes keyboard and pointer, and writes down what
comes. Pictures are compared with the guest's own, with the pointer at two places.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
from PIL import Image, ImageChops

from ..actions.gestures import Button, Gesture, Key, Move, Press, Wheel
from ..drivers.base import Console
from ..errors import EnvdError, GuestMisbehaved
from ..guest import Guest
from ..guest.client import parse_json
from ..pictures import opened
from ..settle import differs
from .console import HostIo
from .keyboard import PRINTABLE

SECONDS: Final = 60.0
"""Of all that is tried; on a guest that is emulated by two busy cores it takes about a third of that."""
READER_SECONDS: Final = 40
"""After which the program in the guest ends by itself."""
ANSWER: Final = 65_536
"""Bytes of what it writes."""
TRIES: Final = 3
"""Of comparing pictures: between the guest's and ours, something may move."""
NEAR: Final = 24
"""Pixels around the pointer's tip in which it is looked for."""
SHADE: Final = 32
"""Levels (of 255) by which a pixel must differ to count."""
POINTER: Final = 20
"""Pixels that a pointer has at least."""

READER: Final = """
import json, select, sys, time
from Xlib import X, display
path, seconds = sys.argv[1], float(sys.argv[2])
server = display.Display()
screen = server.screen()
buttons = X.ButtonPressMask | X.ButtonReleaseMask
window = screen.root.create_window(
    0, 0, screen.width_in_pixels, screen.height_in_pixels, 0, screen.root_depth, override_redirect=1,
    background_pixel=screen.white_pixel, event_mask=X.KeyPressMask | buttons)
window.map()
end = time.monotonic() + seconds
def grabbed():
    keyboard = window.grab_keyboard(False, X.GrabModeAsync, X.GrabModeAsync, X.CurrentTime)
    pointer = window.grab_pointer(False, buttons, X.GrabModeAsync, X.GrabModeAsync, X.NONE, X.NONE, X.CurrentTime)
    return keyboard == pointer == X.GrabSuccess
while not grabbed() and time.monotonic() < end:
    time.sleep(0.1)
with open(path, "w") as file:
    file.write("ready\\n")
text, pointer = "", []
while time.monotonic() < end:
    if not server.pending_events() and not select.select([server], [], [], 0.2)[0]:
        continue
    event = server.next_event()
    if event.type in (X.ButtonPress, X.ButtonRelease):
        pointer.append([event.type == X.ButtonPress, event.detail, event.root_x, event.root_y])
    elif event.type == X.KeyPress:
        level = bool(event.state & X.ShiftMask) + 2 * (event.state >> 13 & 3)
        symbol = server.keycode_to_keysym(event.detail, level)
        if symbol == 0xFF0D:
            break
        letter = chr(symbol) if symbol < 0x100 else ""
        text += letter.swapcase() if event.state & X.LockMask else letter
with open(path, "a") as file:
    json.dump({"text": text, "pointer": pointer}, file)
    file.write("\\n")
"""

BUTTONS: Final[dict[int, Button]] = {1: "left", 3: "right"}


async def host_io_works(console: Console, guest: Guest, seconds: float = SECONDS) -> HostIo:
    """Try `console` against the guest that it belongs to, which must be running and ready; never raises EnvdError.

    Leaves the guest's pointer elsewhere.
    """
    hands = eyes = f"not done within {seconds:g} s"
    with anyio.move_on_after(seconds):
        hands = await _fault(lambda: _try_input(console, guest))
        eyes = await _fault(lambda: _try_pictures(console, guest, None if hands else console))
    detail = (
        f"input: {hands or f'{len(PRINTABLE)} characters, clicks, a drag and the wheel arrived'}; "
        f"pictures: {eyes or 'the same as the guest shows, pointer included'}"
    )
    return HostIo(pictures=not eyes, input=not hands, detail=detail)


class _Differs(Exception):
    """What was tried has not worked."""


async def _fault(attempt: Callable[[], Awaitable[None]]) -> str:
    try:
        await attempt()
    except _Differs as error:
        return str(error)
    except EnvdError as error:
        return error.detail
    return ""


# --- input --------------------------------------------------------------------------------------------------------


async def _try_input(console: Console, guest: Guest) -> None:
    width, height = (await _image(await console.picture())).size
    first, second, third = (
        (round(width * x), round(height * y)) for x, y in ((0.25, 0.33), (0.601, 0.714), (0.999, 0.01))
    )
    path = f"/tmp/envd-trial-{secrets.token_hex(4)}"
    await guest.launch(["python", "-c", READER, path, str(READER_SECONDS)])
    await _lines(guest, path, 1)
    gestures: list[Gesture] = [Move(*first), *_press(1), Move(*second), *_press(3), Wheel(1), Wheel(-2)]
    gestures += [Press("left", down=True), Move(*first), Move(*third), Press("left", down=False)]
    for name in (*PRINTABLE, "enter"):
        gestures += [Key(name, down=True), Key(name, down=False)]
    await console.perform(gestures)
    seen = parse_json((await _lines(guest, path, 2))[1])
    wanted = [*_seen(1, first), *_seen(3, second), *_seen(4, second), *_seen(5, second), *_seen(5, second)]
    wanted += [[True, 1, *second], [False, 1, *third]]
    if not isinstance(seen, dict) or seen.get("text") != PRINTABLE:
        typed = seen.get("text") if isinstance(seen, dict) else seen
        raise _Differs(f"of the keys of a US keyboard arrived: {str(typed)[:200]!r}")
    if seen.get("pointer") != wanted:
        raise _Differs(f"clicks, a drag and the wheel arrived as {str(seen.get('pointer'))[:300]}, not as {wanted}")


def _press(button: int) -> list[Gesture]:
    return [Press(BUTTONS[button], down=True), Press(BUTTONS[button], down=False)]


def _seen(button: int, at: tuple[int, int]) -> list[list[Any]]:
    return [[True, button, *at], [False, button, *at]]


async def _lines(guest: Guest, path: str, count: int) -> list[bytes]:
    """The file's lines, once it has `count` whole ones."""
    with anyio.move_on_after(READER_SECONDS):
        while True:
            try:
                lines = (await guest.file(path, limit=ANSWER, timeout=10)).split(b"\n")
            except GuestMisbehaved:  # it is not there yet
                lines = []
            if len(lines) > count:
                return lines
            await anyio.sleep(0.2)
    raise _Differs("the program that reads input in the guest did not say what it read")


# --- pictures -----------------------------------------------------------------------------------------------------


async def _try_pictures(console: Console, guest: Guest, mover: Console | None) -> None:
    """`mover`: by whose hands the pointer is moved; the guest's own if None."""
    fault = ""
    for _ in range(TRIES):
        try:
            return await _compare(console, guest, mover)
        except _Differs as error:
            fault = str(error)
    raise _Differs(fault)


async def _compare(console: Console, guest: Guest, mover: Console | None) -> None:
    width, height = (await _image(await console.picture())).size
    pairs = []
    places = [(round(width * x), round(height * y)) for x, y in ((0.31, 0.37), (0.62, 0.71))]
    for x, y in places:
        if mover is not None:
            await mover.perform([Move(x, y)])
        else:
            await _move_inside(guest, x, y)
        theirs = await guest.screenshot()
        ours = await console.picture()
        if await anyio.to_thread.run_sync(differs, theirs, ours):
            raise _Differs("they differ from the guest's own")
        pairs.append((await _image(theirs), await _image(ours)))
    for index, (x, y) in enumerate(places):
        box = (x - NEAR, y - NEAR, x + NEAR, y + NEAR)
        guests, hosts = (picture.crop(box) for picture in pairs[index])
        pointer = _changed(hosts, pairs[1 - index][1].crop(box))
        if pointer < POINTER:
            raise _Differs("the pointer is not in them")
        if _changed(hosts, guests) > pointer // 4:
            raise _Differs("the pointer is not where, or not as, the guest shows it")


async def _move_inside(guest: Guest, x: int, y: int) -> None:
    moved = await guest.execute(["python", "-c", f"import pyautogui; pyautogui.moveTo({x}, {y})"], timeout=30)
    if moved.returncode:
        raise _Differs(f"the guest cannot move its pointer: {moved.stderr.strip()[-200:]}")


async def _image(picture: bytes) -> Image.Image:
    def decode() -> Image.Image:
        with opened(picture) as image:
            return image.convert("L")

    try:
        return await anyio.to_thread.run_sync(decode)
    except ValueError as error:
        raise _Differs(f"a picture of {len(picture)} bytes is broken: {error}") from error


def _changed(one: Image.Image, other: Image.Image) -> int:
    """Pixels that differ."""
    return sum(ImageChops.difference(one, other).histogram()[SHADE + 1 :])
