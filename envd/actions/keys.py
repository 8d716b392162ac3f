"""The keys a model may name, and what pyautogui calls them.

`KEYS` are the names that pyautogui has an X11 key for (the rarest, such as f13 to f24 and `select`, only where the
guest's keyboard map has them). It knows about thirty more (`volumeup`, `browserback`, `fn` …) that have none, and
ignores them as silently as names it has never heard of; so here they are unknown too, and the model is told.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from typing import Final

KEYS: Final[frozenset[str]] = frozenset(
    (
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
        " ",
        *("alt", "altleft", "altright", "ctrl", "ctrlleft", "ctrlright"),
        *("shift", "shiftleft", "shiftright", "win", "winleft", "winright"),
        *("left", "right", "up", "down", "home", "end", "pageup", "pagedown", "pgup", "pgdn"),
        *("enter", "return", "tab", "space", "backspace", "del", "delete", "insert", "esc", "escape"),
        *("capslock", "numlock", "scrolllock", "pause"),
        *("print", "printscreen", "prntscrn", "prtsc", "prtscr"),
        *("apps", "select", "execute", "help"),
        *(f"num{digit}" for digit in range(10)),
        *("add", "subtract", "multiply", "divide", "decimal", "separator"),
        *(f"f{number}" for number in range(1, 25)),
    )
)
"""Names that pyautogui turns into a key press on X11. One character keeps its case (`C` is shift and c), a longer
name is lower case."""

ALIASES: Final[Mapping[str, str]] = {
    # Upstream translates these few, and only when they stand alone.
    "arrowleft": "left",
    "arrowright": "right",
    "arrowup": "up",
    "arrowdown": "down",
    "space": " ",
    # What browsers, xdotool and keyboards print on the same keys. Compared without `_` and `-`.
    "spacebar": " ",
    "leftarrow": "left",
    "rightarrow": "right",
    "uparrow": "up",
    "downarrow": "down",
    "control": "ctrl",
    "controlleft": "ctrlleft",
    "controlright": "ctrlright",
    "controll": "ctrlleft",
    "controlr": "ctrlright",
    "ctrll": "ctrlleft",
    "ctrlr": "ctrlright",
    "shiftl": "shiftleft",
    "shiftr": "shiftright",
    "altl": "altleft",
    "altr": "altright",
    "altgr": "altright",
    "option": "alt",
    "optionleft": "altleft",
    "optionright": "altright",
    "cmd": "win",
    "command": "win",
    "super": "win",
    "superl": "winleft",
    "superr": "winright",
    "meta": "win",
    "metaleft": "winleft",
    "metaright": "winright",
    "windows": "win",
    "winkey": "win",
    "ret": "enter",
    "kpenter": "enter",
    "numpadenter": "enter",
    "numenter": "enter",
    "bksp": "backspace",
    "ins": "insert",
    "caps": "capslock",
    "prior": "pageup",
    "next": "pagedown",
    "pgdown": "pagedown",
    "snapshot": "printscreen",
    "menu": "apps",
    "contextmenu": "apps",
    "plus": "+",
    "minus": "-",
    "hyphen": "-",
    "equal": "=",
    "equals": "=",
    "comma": ",",
    "period": ".",
    "dot": ".",
    "slash": "/",
    "backslash": "\\",
    "semicolon": ";",
    "colon": ":",
    "quote": "'",
    "apostrophe": "'",
    "backquote": "`",
    "backtick": "`",
    "grave": "`",
    "tilde": "~",
    "underscore": "_",
    "bracketleft": "[",
    "bracketright": "]",
}


def key_name(word: str) -> str | None:
    """pyautogui's name for the key that `word` means, or None when there is no such key."""
    if len(word) == 1:
        return word if word in KEYS else None
    plain = word.lower()
    folded = plain.replace("_", "").replace("-", "")
    for candidate in (plain, folded):
        if candidate in ALIASES:
            return ALIASES[candidate]
        if candidate in KEYS and len(candidate) > 1:
            return candidate
    return None


def nearest_key(word: str) -> str | None:
    """The valid name that looks most like `word`, for the error message."""
    names = sorted(name for name in KEYS | ALIASES.keys() if len(name) > 1)
    return next(iter(difflib.get_close_matches(word.lower()[:32], names, n=1)), None)


def split_combination(text: str) -> list[str]:
    """The keys of `ctrl c`, `ctrl+c`, `ctrl + c` or `ctrl +`, as written, in order.

    Blanks and `+` both separate. A `+` is a key itself where no key precedes it or none follows: `ctrl +`,
    `ctrl++` and `+` all press it. A letter joined with `+` is named as menus print it, so `Ctrl+C` is ctrl and c;
    after a blank its case counts, as it always did.
    """
    pieces = text.replace("+", " + ").split()
    words: list[str] = []
    joined = False
    for position, piece in enumerate(pieces):
        is_joiner = piece == "+" and words and not joined and position + 1 < len(pieces)
        if not is_joiner:
            words.append(piece.lower() if joined else piece)
        joined = bool(is_joiner)
    return words
