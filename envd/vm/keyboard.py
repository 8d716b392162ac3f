"""A US keyboard: pyautogui's key names and the keys of QEMU that they are.

What pyautogui names and no US keyboard has (`help`, `select`, `f13`, …) is not here; neither is any character that
needs another layout, nor `decimal`, which on that keyboard is Del unless Num Lock is on. The names of QEMU are
`QKeyCode` of its QMP reference.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple


class Stroke(NamedTuple):
    """A key of QEMU's, and whether shift is held while it goes down."""

    qcode: str
    shift: bool = False


_PLAIN: Final = {
    "`": "grave_accent",
    "-": "minus",
    "=": "equal",
    "[": "bracket_left",
    "]": "bracket_right",
    "\\": "backslash",
    ";": "semicolon",
    "'": "apostrophe",
    ",": "comma",
    ".": "dot",
    "/": "slash",
    " ": "spc",
    "\t": "tab",
    "\n": "ret",
    "\r": "ret",
    "\b": "backspace",
}
_SHIFTED: Final = dict(zip('~!@#$%^&*()_+{}|:"<>?', "`1234567890-=[]\\;',./", strict=True))
_NAMED: Final = {
    **{"shift": "shift", "shiftleft": "shift", "shiftright": "shift_r"},
    **{"ctrl": "ctrl", "ctrlleft": "ctrl", "ctrlright": "ctrl_r"},
    **{"alt": "alt", "altleft": "alt", "altright": "alt_r"},
    **{"win": "meta_l", "winleft": "meta_l", "winright": "meta_r", "apps": "compose"},
    **{"enter": "ret", "return": "ret", "tab": "tab", "space": "spc", "backspace": "backspace"},
    **{"esc": "esc", "escape": "esc", "del": "delete", "delete": "delete", "insert": "insert"},
    **{"left": "left", "right": "right", "up": "up", "down": "down", "home": "home", "end": "end"},
    **{"pageup": "pgup", "pgup": "pgup", "pagedown": "pgdn", "pgdn": "pgdn"},
    **{"capslock": "caps_lock", "numlock": "num_lock", "scrolllock": "scroll_lock", "pause": "pause"},
    **dict.fromkeys(("print", "printscreen", "prntscrn", "prtsc", "prtscr"), "print"),
    **{f"num{digit}": f"kp_{digit}" for digit in range(10)},
    **{"add": "kp_add", "subtract": "kp_subtract", "multiply": "kp_multiply", "divide": "kp_divide"},
    **{f"f{number}": f"f{number}" for number in range(1, 13)},
}


def _strokes() -> Iterator[tuple[str, Stroke]]:
    for letter in string.ascii_lowercase:
        yield letter, Stroke(letter)
        yield letter.upper(), Stroke(letter, shift=True)
    for digit in string.digits:
        yield digit, Stroke(digit)
    for name, qcode in (_PLAIN | _NAMED).items():
        yield name, Stroke(qcode)
    for character, unshifted in _SHIFTED.items():
        yield character, Stroke(_PLAIN.get(unshifted, unshifted), shift=True)


KEYS: Final[Mapping[str, Stroke]] = dict(_strokes())
"""Every name that a `Key` may carry."""

PRINTABLE: Final = string.ascii_letters + string.digits + string.punctuation + " "
"""What a US keyboard types, a character each."""
