"""Short questions to the X server. Each opens a connection of its own, asks, and closes it.

Nothing is remembered from one question to the next, so a server that was started anew is found by the next question.
All of it blocks: it is called in a `Worker`. Facts about windows follow the EWMH conventions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from envd.agent.errors import AgentError

if TYPE_CHECKING:
    from PIL import Image


class NoDisplay(AgentError):
    """The X server cannot be reached or went away in the middle of an answer."""

    def __init__(self, reason: object) -> None:
        name = os.environ.get("DISPLAY")
        where = f"the X server on display {name!r}" if name else "an X server (DISPLAY is not set)"
        super().__init__(f"cannot talk to {where}: {reason}; start it again or restart the desktop")


@contextmanager
def connection() -> Iterator[Any]:
    """An Xlib Display for the length of the block. Raises NoDisplay, also for what goes wrong inside."""
    from Xlib.display import Display

    display = None
    try:
        display = Display()
        yield display
    except failures() as reason:
        raise NoDisplay(reason) from reason
    finally:
        if display is not None:
            close(display)


def failures() -> tuple[type[Exception], ...]:
    """What Xlib raises when the server is not there, refuses us, or goes away."""
    from Xlib.error import ConnectionClosedError, DisplayError, XauthError, XError

    return DisplayError, ConnectionClosedError, XauthError, XError, OSError


def close(display: Any) -> None:
    """Close an Xlib Display, also one whose server has gone, which Xlib itself would leave open."""
    from Xlib.error import ConnectionClosedError

    try:
        display.close()
    except (ConnectionClosedError, OSError):
        display.display.socket.close()


def size() -> tuple[int, int]:
    """Width and height of the screen in pixels."""
    with connection() as display:
        shape = display.screen().root.get_geometry()
        return shape.width, shape.height


def pointer() -> tuple[int, int]:
    with connection() as display:
        at = display.screen().root.query_pointer()
        return at.root_x, at.root_y


def window_size(name: str) -> tuple[int, int] | None:
    """Width and height of the first window whose WM_CLASS, instance or class, is `name` whatever its case."""
    from Xlib import X
    from Xlib.error import XError

    with connection() as display:
        listed = display.screen().root.get_full_property(display.intern_atom("_NET_CLIENT_LIST"), X.AnyPropertyType)
        for number in listed.value if listed else ():
            window = display.create_resource_object("window", number)
            try:
                if name.lower() in [part.lower() for part in window.get_wm_class() or ()]:
                    shape = window.get_geometry()
                    return shape.width, shape.height
            except XError:  # the window was closed between the list and the question
                continue
    return None


def window_manager() -> str | None:
    """What the window manager calls itself, such as "Openbox" or "GNOME Shell"."""
    from Xlib import X

    with connection() as display:
        check = display.screen().root.get_full_property(
            display.intern_atom("_NET_SUPPORTING_WM_CHECK"), X.AnyPropertyType
        )
        if not check:
            return None
        window = display.create_resource_object("window", check.value[0])
        name = window.get_full_property(display.intern_atom("_NET_WM_NAME"), X.AnyPropertyType)
        return bytes(name.value).decode(errors="replace") if name else None


def paint_root(picture: Image.Image) -> None:
    """Make `picture`, fitted to the screen, the background of the root window."""
    from PIL import ImageOps

    with connection() as display:
        screen = display.screen()
        size = (screen.width_in_pixels, screen.height_in_pixels)
        pixmap = screen.root.create_pixmap(*size, screen.root_depth)
        context = pixmap.create_gc()
        pixmap.put_pil_image(context, 0, 0, ImageOps.fit(picture.convert("RGB"), size))
        screen.root.change_attributes(background_pixmap=pixmap)
        screen.root.clear_area()
        context.free()
        pixmap.free()
        display.sync()
