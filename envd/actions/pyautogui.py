"""Programs for the guest: typed actions and raw strings → what `python -c` runs there.

A program that we write is nothing but imports and calls of pyautogui, pyperclip and `time.sleep` with literal
arguments, in ASCII, so the guest may run it in an interpreter that is already warm. Only texts that no keyboard has
need pyperclip, and with it `xclip` or `xsel` in the guest.

The model's thought is in no program, and its text is only ever in a string literal that Python itself wrote.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, assert_never

from envd.actions.uitars import (
    CallUser,
    Click,
    DoubleClick,
    Drag,
    ErrorEnv,
    Finished,
    Hotkey,
    Hover,
    Input,
    KeyDown,
    KeyUp,
    Point,
    Prediction,
    Press,
    Scroll,
    Type,
    Wait,
)


class Special(StrEnum):
    """Words that stand where a program could and reach no guest."""

    DONE = "DONE"
    WAIT = "WAIT"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Program:
    """One program for the guest, and the piece of the model's text that it carries out."""

    code: str
    source: str = field(default="", compare=False)


Step = Program | Special
"""One thing to do, then to wait, then to look: what upstream calls an env action."""


def steps(prediction: Prediction) -> tuple[Step, ...]:
    """What to do about a prediction, in order: one program per action, or one word.

     `finished` is DONE, `wait` is WAIT, `call_user` and `error_env` are FAIL, whatever was to be clicked before
    ; the first of them counts.
    """
    programs: list[Program] = []
    for action in prediction.actions:
        match action:
            case Finished():
                return (Special.DONE,)
            case Wait():
                return (Special.WAIT,)
            case CallUser() | ErrorEnv():
                return (Special.FAIL,)
            case _:
                programs.append(Program(program_for(action), action.source))
    return tuple(programs)


def step_for_raw(text: str) -> Step:
    """The step that a raw string asks for: one of the three words, alone, or a program."""
    word = text.strip()
    return Special(word) if word in list(Special) else Program(program_for_raw(text), text)


# --- programs -----------------------------------------------------------------------------------------------------

PREFIX: Final = "import pyautogui; import time; pyautogui.FAILSAFE = False; "
"""What every program begins with. The words are upstream's, so that guests recognise them."""


def program_for_raw(code: str) -> str:
    """`code` as the guest runs it: behind PREFIX, which is not put there twice.

    A new line follows PREFIX, so that code may begin with `for` or `with`, which upstream turns into a SyntaxError.
    """
    if code.startswith(PREFIX.rstrip("; ")):
        return code
    return PREFIX + "\n" + code.lstrip(" \t")


def program_for(action: Input) -> str:
    """The program that carries out one action."""
    return PREFIX + "\n" + "\n".join(_statements(action))


def _statements(action: Input) -> list[str]:
    match action:
        case Click(at=at, button=button):
            return [f"pyautogui.click({_at(at)}, button={button!r})"]
        case DoubleClick(at=at):
            return [f"pyautogui.doubleClick({_at(at)}, button='left')"]
        case Hover(at=at):
            return [f"pyautogui.moveTo({_at(at)})"]
        case Drag(start=start, end=end):
            return [f"pyautogui.moveTo({_at(start)})", f"pyautogui.dragTo({_at(end)}, duration=1.0)"]
        case Hotkey(keys=keys):
            return [_hotkey(*keys)]
        case Press(key=key):
            return [_hotkey(key) if key == "<" else f"pyautogui.press({key!a})"]
        case KeyDown(key=key):
            return [f"pyautogui.keyDown({key!a})"]
        case KeyUp(key=key):
            return [f"pyautogui.keyUp({key!a})"]
        case Type(text=text, enter=enter):
            return [*_typing(text), *(["pyautogui.press('enter')"] if enter else [])]
        case Scroll(direction=direction, at=at):
            return [_scroll(direction, at)]
        case _:
            assert_never(action)


def _at(point: Point) -> str:
    return f"{point.x}, {point.y}"


def _hotkey(*keys: str) -> str:
    plain = [name for key in keys for name in (("shift", ",") if key == "<" else (key,))]
    return f"pyautogui.hotkey({', '.join(ascii(key) for key in plain)})"


def _scroll(direction: str, at: Point | None) -> str:
    function = "scroll" if direction in ("up", "down") else "hscroll"
    notches = 5 if direction in ("up", "right") else -5
    place = f", x={at.x}, y={at.y}" if at is not None else ""
    return f"pyautogui.{function}({notches}{place})"


# --- typing -------------------------------------------------------------------------------------------------------

TYPABLE: Final = frozenset(string.ascii_letters + string.digits + string.punctuation + " \t\n\r")
"""The characters that pyautogui presses on X11. It skips every other one and says nothing."""

KEY_INTERVAL: Final = 0.1
TYPING_SECONDS: Final = 60.0
KEY_COST: Final = 0.0015
WRITE_LIMIT: Final = 20_000
LESS_THAN_LIMIT: Final = 300
"""How long typing may take. Upstream rests 0.1 s after each key, so that 900 characters outlast the 90 s of the
controller, and 1200 the 120 s of the guest. Here a text that would take longer than
TYPING_SECONDS rests less: TYPING_SECONDS / length - KEY_COST, which is what pyautogui itself needs for a key (1.34 ms
measured on Xvfb). Beyond WRITE_LIMIT characters there is nothing left to take away, and the text is pasted; likewise
beyond LESS_THAN_LIMIT times `<`, each of which is two lines of program."""


def _typing(text: str) -> list[str]:
    if not text:
        return []
    if len(text) > WRITE_LIMIT or text.count("<") > LESS_THAN_LIMIT or not TYPABLE.issuperset(text):
        put = ["import pyperclip", f"pyperclip.copy({text!a})", "pyautogui.hotkey('ctrl', 'v')"]
    else:
        put = _writing(text, interval_for(len(text)))
    return [*put, "time.sleep(0.5)"]


def interval_for(length: int) -> float:
    """Seconds to rest after each key of a text of `length` ≥ 1 characters."""
    return min(KEY_INTERVAL, max(0.0, round(TYPING_SECONDS / length - KEY_COST, 4)))


def _writing(text: str, interval: float) -> list[str]:
    """pyautogui finds `<` on the key beside the left shift, holds shift for it, and types `>` (seen on Xvfb)."""
    if "<" not in text:
        return [_write(text, interval)]
    # pyautogui rests 0.1 s after every call; over a page of HTML that would be minutes.
    lines = ["pyautogui.PAUSE = 0"]
    for piece in re.findall("<|[^<]+", text):
        lines += [_hotkey("<"), f"time.sleep({interval})"] if piece == "<" else [_write(piece, interval)]
    return lines


def _write(text: str, interval: float) -> str:
    return f"pyautogui.write({text!a}, interval={interval})"
