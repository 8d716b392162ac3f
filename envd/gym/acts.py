"""What an agent may say, as spaces: a model's text, a pyautogui program, or a gesture. A sample of any of them can be
acted on, does no more than a hand on a mouse and a keyboard would, and ends no episode."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces

from ..errors import SettingsError

Actions = Literal["prediction", "program", "gesture"]
"""prediction  what the model said, in the grammar of UI-TARS: the text goes to the server as it is
program     a pyautogui program, or DONE, WAIT, FAIL
gesture     a dictionary, see `gestures`
"""
KINDS = (
    "move", "click", "double_click", "right_click", "drag", "scroll", "type", "press", "wait", "done", "fail"
)  # fmt: skip
ENDING = ("done", "fail")
KEYS = (
    "enter", "tab", "esc", "backspace", "delete", "space", "up", "down", "left", "right", "home", "end", "pageup",
    "pagedown", "ctrl+a", "ctrl+c", "ctrl+v", "ctrl+x", "ctrl+z", "ctrl+s", "alt+tab",
)  # fmt: skip
NOTCHES = 10
"""Of the mouse's wheel, for `scroll` at 1."""
LONGEST = 30_000
"""Characters of a prediction or a program; servers take as many bytes of a prediction."""


class AnyText(spaces.Text):
    """Every text of up to `max_length` characters, of whatever alphabet."""

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.ascii_letters + string.digits + " ", seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is not None or probability is not None:
            return super().sample(mask, probability)
        length = int(self.np_random.integers(0, min(self.max_length, 16) + 1))
        return "".join(self.np_random.choice(self.character_list, size=length))


class SaidText(AnyText):
    """What an agent says; its samples move the pointer, in words of this kind."""

    def __init__(self, kind: Literal["prediction", "program"], screen: tuple[int, int]) -> None:
        super().__init__(LONGEST)
        self.kind, self.screen = kind, screen

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        x, y = (int(self.np_random.integers(0, size)) for size in self.screen)
        if self.kind == "program":
            return f"pyautogui.moveTo({x}, {y})"
        return f"Thought: I look around.\nAction: hover(start_box='({x},{y})')"


class Kinds(spaces.Discrete):
    """Numbers of `KINDS`; a sample is none of those that end the episode."""

    def __init__(self) -> None:
        super().__init__(len(KINDS))

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        if mask is not None or probability is not None:
            return super().sample(mask, probability)
        return np.int64(self.np_random.integers(0, len(KINDS) - len(ENDING)))


def gestures() -> spaces.Dict:
    """kind    one of `KINDS`, as its number; the other entries matter where the kind needs them
    at, to  places on the screen, as fractions of its width and height; a drag goes from one to the other
    turn    of the wheel, from -1 (down) to 1 (up)
    text    what is typed
    key     one of `KEYS`, as its number
    """
    return spaces.Dict(
        {
            "kind": Kinds(),
            "at": spaces.Box(0.0, 1.0, (2,), np.float32),
            "to": spaces.Box(0.0, 1.0, (2,), np.float32),
            "turn": spaces.Box(-1.0, 1.0, (1,), np.float32),
            "text": AnyText(1000),
            "key": spaces.Discrete(len(KEYS)),
        }
    )


def action_space(actions: Actions, screen: tuple[int, int]) -> spaces.Space[Any]:
    """Raises SettingsError for what is none of `Actions`."""
    if actions == "gesture":
        return gestures()
    if actions in get_args(Actions):
        return SaidText(actions, screen)
    raise SettingsError(
        f"There is no kind of actions {actions!r}.", hint=f"It is one of {', '.join(get_args(Actions))}."
    )


def program(gesture: Mapping[str, Any], screen: tuple[int, int]) -> str:
    """The program, or the word, that a gesture stands for."""
    at, to = (_place(gesture[name], screen) for name in ("at", "to"))
    match KINDS[int(gesture["kind"])]:
        case "move":
            return f"pyautogui.moveTo{at}"
        case "click":
            return f"pyautogui.click{at}"
        case "double_click":
            return f"pyautogui.doubleClick{at}"
        case "right_click":
            return f"pyautogui.rightClick{at}"
        case "drag":
            return f"pyautogui.moveTo{at}\npyautogui.dragTo({to[0]}, {to[1]}, duration=0.5)"
        case "scroll":
            return f"pyautogui.moveTo{at}\npyautogui.scroll({round(float(gesture['turn'][0]) * NOTCHES)})"
        case "type":
            return f"pyautogui.write({gesture['text']!r})"
        case "press":
            keys = KEYS[int(gesture["key"])].split("+")
            return f"pyautogui.hotkey({', '.join(map(repr, keys))})"
        case word:
            return word.upper()


def _place(fractions: Any, screen: tuple[int, int]) -> tuple[int, int]:
    x, y = (min(int(float(part) * size), size - 1) for part, size in zip(fractions, screen, strict=True))
    return x, y
