"""What a step did, as marks to be drawn on the picture of the screen that it was done on: where it clicked, what it
dragged whereto, which way it scrolled, what it typed. Places are pixels of that screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .gestures import Gesture, Key, Move, Press, Wheel
from .pyautogui import Special, step_for_raw
from .translate import gestures_for
from .uitars import (
    Action,
    CallUser,
    Click,
    DoubleClick,
    Drag,
    ErrorEnv,
    Finished,
    Frame,
    Hotkey,
    Hover,
    KeyDown,
    KeyUp,
    PredictionError,
    Scroll,
    Type,
    Wait,
    parse,
)
from .uitars import Press as PressKey

MOST = 50
"""Marks of one step: nobody could tell more of them apart."""
TEXT = 200
"""Characters of a mark's text."""

Kind = Literal["click", "double", "hover", "drag", "scroll", "type", "keys", "wait", "end", "program"]
Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """`at` is where it was done, None where that is not told; `to` is where a drag ended; `text` is what was typed, the
    keys, the button that is not the left one, the way that the wheel went, or the program itself."""

    kind: Kind
    at: Place | None = None
    to: Place | None = None
    text: str = ""

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"text": self.text[:TEXT]}


def marks_for(said: str, actions: Sequence[str], frame: Frame) -> list[Mark]:
    """Of a step in which the model said `said` and `actions` were carried out: pieces of that, or programs."""
    try:
        found = [_of_action(action) for action in parse(said, frame=frame).actions]
    except PredictionError:
        found = [mark for action in actions for mark in _of_raw(action, (frame.width, frame.height))]
    return found[:MOST]


def _of_action(action: Action) -> Mark:
    match action:
        case Click(at=at, button=button):
            return Mark("click", at, text="" if button == "left" else button)
        case DoubleClick(at=at):
            return Mark("double", at)
        case Hover(at=at):
            return Mark("hover", at)
        case Drag(start=start, end=end):
            return Mark("drag", start, end)
        case Scroll(direction=direction, at=place):
            return Mark("scroll", place, text=direction)
        case Type(text=text, enter=enter):
            return Mark("type", text=text + ("\n" if enter else ""))
        case Hotkey(keys=keys):
            return Mark("keys", text="+".join(keys))
        case PressKey(key=key):
            return Mark("keys", text=key)
        case KeyDown(key=key):
            return Mark("keys", text=f"{key} down")
        case KeyUp(key=key):
            return Mark("keys", text=f"{key} up")
        case Wait():
            return Mark("wait")
        case Finished(content=content):
            return Mark("end", text=f"finished {content}".strip())
        case CallUser():
            return Mark("end", text="call_user")
        case ErrorEnv():
            return Mark("end", text="error_env")


def _of_raw(code: str, screen: tuple[int, int]) -> Iterator[Mark]:
    step = step_for_raw(code)
    if isinstance(step, Special):
        yield Mark("wait") if step is Special.WAIT else Mark("end", text=str(step))
        return
    gestures = gestures_for(step.code, screen)
    pointed = [] if gestures is None else list(_pointed(gestures))
    yield from pointed
    if not pointed or any(isinstance(gesture, Key) for gesture in gestures or ()):
        yield Mark("program", text=code.strip())


def _pointed(gestures: Sequence[Gesture]) -> Iterator[Mark]:
    """What the pointer does. Clicks on one place in a row are one mark."""
    at: Place | None = None
    pressed: Place | None = None
    last: Mark | None = None
    for gesture in gestures:
        match gesture:
            case Move(x=x, y=y):
                at = (float(x), float(y))
            case Press(down=True):
                pressed = at
            case Press(button=button, down=False):
                text = "" if button == "left" else button
                mark = Mark("click", at, text=text) if pressed == at else Mark("drag", pressed, at, text)
                if last is not None and mark.kind == "click" and last.at == at and last.kind in ("click", "double"):
                    last = Mark("double", at, text=text)
                    continue
                if last is not None:
                    yield last
                last = mark
            case Wheel(up=up):
                if last is not None:
                    yield last
                last = Mark("scroll", at, text="up" if up > 0 else "down")
            case _:
                pass
    if last is not None:
        yield last
    elif at is not None:
        yield Mark("hover", at)
