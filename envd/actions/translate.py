"""Programs for the guest that are nothing but input, as gestures: what pyautogui would do, without pyautogui.

`gestures_for` reads a program and never runs it. It knows calls of pyautogui and `time.sleep` with literal arguments,
and pyautogui's own meaning of them (version 0.9.54 on X11): what the arguments are called, where the pointer goes and
when it rests. Everything that it does not know for certain it leaves to the guest. Two things differ on purpose: `<`
is typed as `<` (pyautogui presses another key and types `>`), and the rest that pyautogui takes after every call is
only taken before the next one.
"""

from __future__ import annotations

import ast
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..vm.keyboard import KEYS
from .gestures import Button, Gesture, Key, Move, Press, Rest, Wheel

LONGEST: Final = 65_536
"""Characters of a program that is read."""
MOST: Final = 100_000
"""Gestures of a program."""
SECONDS: Final = 110.0
"""Of rest in a program. What takes 120 s is ended by the guest's own server."""
PAUSE: Final = 0.1
"""Seconds that pyautogui rests after each call unless the program says otherwise."""
INSTANT, STEP = 0.1, 0.05
"""A movement that takes no longer than INSTANT seconds is one jump; others move every STEP seconds."""


def gestures_for(code: str, screen: tuple[int, int]) -> tuple[Gesture, ...] | None:
    """What `code` does on a screen of (width, height) px, or None when that is not certain or cannot be done from
    outside the guest. Then the guest runs it, or says what is wrong with it."""
    try:
        if len(code) > LONGEST:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            statements = ast.parse(code).body
        hands = _Hands(screen)
        for statement in statements:
            _follow(hands, statement)
        return hands.done()
    except (_Inexpressible, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, Warning):
        return None


class _Inexpressible(Exception):
    """No gestures for this."""


def _follow(hands: _Hands, statement: ast.stmt) -> None:
    match statement:
        case ast.Import(names=names) if all(name.name in ("pyautogui", "time") and not name.asname for name in names):
            pass
        case ast.Expr(ast.Constant()) | ast.Pass():
            pass
        case ast.Assign(targets=[ast.Attribute(ast.Name("pyautogui"), "FAILSAFE")], value=ast.Constant(bool(value))):
            hands.failsafe = value
        case ast.Assign(targets=[ast.Attribute(ast.Name("pyautogui"), "PAUSE")], value=ast.Constant(value)):
            hands.pause = _seconds(value)
        case ast.Expr(ast.Call(ast.Attribute(ast.Name(module), name), arguments, keywords)):
            named = {keyword.arg: _literal(keyword.value) for keyword in keywords}
            hands.call(f"{module}.{name}", [_literal(argument) for argument in arguments], named)
        case _:
            raise _Inexpressible


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except TypeError as error:  # such as a list in a set
        raise _Inexpressible from error


class _Hands:
    """Collects gestures. The methods are called as pyautogui's functions are, and raise _Inexpressible."""

    def __init__(self, screen: tuple[int, int]) -> None:
        self.gestures: list[Gesture] = []
        self.pause = PAUSE
        self.failsafe = True
        self._screen = screen
        self._at: tuple[int, int] | None = None
        """Where the pointer is, once the program has put it somewhere."""
        self._due = 0.0
        """Seconds to rest before the next gesture."""
        self._pause_due = 0.0
        """Seconds to rest before the next call, if there is one."""
        self._rested = 0.0

    def call(self, function: str, positional: list[Any], named: dict[str | None, Any]) -> None:
        # While pyautogui watches for the pointer in a corner, any call may raise.
        method = _FUNCTIONS.get(function)
        if method is None or self.failsafe or None in named:
            raise _Inexpressible
        try:
            bound = _SIGNATURES[function].bind(self, *positional, **{str(name): it for name, it in named.items()})
        except TypeError as error:
            raise _Inexpressible from error
        self._rest(self._pause_due)
        self._pause_due = 0.0
        method(*bound.args, **bound.kwargs)
        if method is not _Hands.sleep:
            self._pause_due = self.pause

    def done(self) -> tuple[Gesture, ...]:
        if self._due:
            self.gestures.append(Rest(self._due))
        return tuple(self.gestures)

    def sleep(self, seconds: Any) -> None:
        self._rest(_seconds(seconds))

    # -- pointer

    def move_to(self, x: Any = None, y: Any = None, duration: Any = 0.0) -> None:
        self._move(self._point(x, y), _number(duration))

    def move_by(self, xOffset: Any, yOffset: Any, duration: Any = 0.0) -> None:
        self._move(self._away(xOffset, yOffset), _number(duration))

    def drag_to(self, x: Any = None, y: Any = None, duration: Any = 0.0, *, button: Any = "primary") -> None:
        self._drag(self._point(x, y), duration, button)

    def drag_by(
        self,
        xOffset: Any,
        yOffset: Any,
        duration: Any = 0.0,
        *,
        button: Any = "primary",
    ) -> None:
        if int(_number(xOffset)) or int(_number(yOffset)):
            self._drag(self._away(xOffset, yOffset), duration, button)

    def mouse_down(self, x: Any = None, y: Any = None, button: Any = "primary") -> None:
        self._move(self._point(x, y))
        self._add(Press(_button(button), down=True))

    def mouse_up(self, x: Any = None, y: Any = None, button: Any = "primary") -> None:
        self._move(self._point(x, y))
        self._add(Press(_button(button), down=False))

    def click(
        self,
        x: Any = None,
        y: Any = None,
        clicks: Any = 1,
        interval: Any = 0.0,
        button: Any = "primary",
        duration: Any = 0.0,
    ) -> None:
        self._move(self._point(x, y), _number(duration))
        for _ in range(_count(clicks)):
            self._add(Press(_button(button), down=True))
            self._add(Press(_button(button), down=False))
            self._rest(_seconds(interval))

    def left_click(self, x: Any = None, y: Any = None, interval: Any = 0.0, duration: Any = 0.0) -> None:
        self.click(x, y, 1, interval, "left", duration)

    def middle_click(self, x: Any = None, y: Any = None, interval: Any = 0.0, duration: Any = 0.0) -> None:
        self.click(x, y, 1, interval, "middle", duration)

    def right_click(self, x: Any = None, y: Any = None, interval: Any = 0.0, duration: Any = 0.0) -> None:
        self.click(x, y, 1, interval, "right", duration)

    def double_click(
        self, x: Any = None, y: Any = None, interval: Any = 0.0, button: Any = "left", duration: Any = 0.0
    ) -> None:
        self.click(x, y, 2, interval, button, duration)

    def triple_click(
        self, x: Any = None, y: Any = None, interval: Any = 0.0, button: Any = "left", duration: Any = 0.0
    ) -> None:
        self.click(x, y, 3, interval, button, duration)

    def scroll(self, clicks: Any, x: Any = None, y: Any = None) -> None:
        if notches := int(_number(clicks)):
            self._move(self._point(x, y))
            self._add(Wheel(notches))

    # -- keyboard

    def key_down(self, key: Any) -> None:
        self._add(Key(_key(key), down=True))

    def key_up(self, key: Any) -> None:
        self._add(Key(_key(key), down=False))

    def press(self, keys: Any, presses: Any = 1, interval: Any = 0.0) -> None:
        names = [_key(key) for key in ([keys] if isinstance(keys, str) else _texts(keys))]
        for _ in range(_count(presses)):
            for name in names:
                self._add(Key(name, down=True))
                self._add(Key(name, down=False))
            self._rest(_seconds(interval))

    def write(self, message: Any, interval: Any = 0.0) -> None:
        for character in message if isinstance(message, str) else _texts(message):
            self.press(character)
            self._rest(_seconds(interval))

    def hotkey(self, *keys: Any, interval: Any = 0.0) -> None:
        names = [_key(key) for key in (_texts(keys[0]) if keys and isinstance(keys[0], list | tuple) else keys)]
        for name, down in [*((name, True) for name in names), *((name, False) for name in reversed(names))]:
            self._add(Key(name, down))
            self._rest(_seconds(interval))

    # -- what they are made of

    def _drag(self, to: tuple[int, int] | None, duration: Any, button: Any) -> None:
        self._add(Press(_button(button), down=True))
        self._move(to, _number(duration))
        self._add(Press(_button(button), down=False))

    def _point(self, x: Any, y: Any) -> tuple[int, int] | None:
        """The place that two arguments name; None when they name none, which is where the pointer is."""
        if isinstance(x, list | tuple):
            if len(x) != 2 or y is not None:
                raise _Inexpressible
            x, y = x
            return int(_number(x)), int(_number(y))
        if x is None and y is None:
            return None
        if (x is None or y is None) and self._at is None:
            raise _Inexpressible
        here = self._at or (0, 0)
        return here[0] if x is None else int(_number(x)), here[1] if y is None else int(_number(y))

    def _away(self, x: Any, y: Any) -> tuple[int, int]:
        if self._at is None:
            raise _Inexpressible
        return self._at[0] + int(_number(x)), self._at[1] + int(_number(y))

    def _move(self, to: tuple[int, int] | None, seconds: float = 0.0) -> None:
        if seconds > INSTANT:
            self._glide(to, seconds)
        elif to is not None:
            self._put(*to)

    def _glide(self, to: tuple[int, int] | None, seconds: float) -> None:
        start, end = self._at, to or self._at
        if start is None or end is None:
            raise _Inexpressible
        count = min(max(self._screen), int(seconds / STEP))
        for done in range(count + 1):
            part = done / count
            self._rest(seconds / count)
            self._put(round(start[0] + (end[0] - start[0]) * part), round(start[1] + (end[1] - start[1]) * part))

    def _put(self, x: int, y: int) -> None:
        """The X server keeps the pointer on the screen."""
        width, height = self._screen
        self._at = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
        self._add(Move(*self._at))

    def _rest(self, seconds: float) -> None:
        self._rested += seconds
        self._due += seconds
        if self._rested > SECONDS:
            raise _Inexpressible

    def _add(self, gesture: Gesture) -> None:
        if self._due:
            self.gestures.append(Rest(self._due))
            self._due = 0.0
        self.gestures.append(gesture)
        if len(self.gestures) > MOST:
            raise _Inexpressible


_FUNCTIONS: Final[dict[str, Callable[..., None]]] = {
    "time.sleep": _Hands.sleep,
    "pyautogui.sleep": _Hands.sleep,
    "pyautogui.moveTo": _Hands.move_to,
    "pyautogui.move": _Hands.move_by,
    "pyautogui.moveRel": _Hands.move_by,
    "pyautogui.dragTo": _Hands.drag_to,
    "pyautogui.drag": _Hands.drag_by,
    "pyautogui.dragRel": _Hands.drag_by,
    "pyautogui.mouseDown": _Hands.mouse_down,
    "pyautogui.mouseUp": _Hands.mouse_up,
    "pyautogui.click": _Hands.click,
    "pyautogui.leftClick": _Hands.left_click,
    "pyautogui.middleClick": _Hands.middle_click,
    "pyautogui.rightClick": _Hands.right_click,
    "pyautogui.doubleClick": _Hands.double_click,
    "pyautogui.tripleClick": _Hands.triple_click,
    "pyautogui.scroll": _Hands.scroll,
    "pyautogui.vscroll": _Hands.scroll,
    "pyautogui.keyDown": _Hands.key_down,
    "pyautogui.keyUp": _Hands.key_up,
    "pyautogui.press": _Hands.press,
    "pyautogui.write": _Hands.write,
    "pyautogui.typewrite": _Hands.write,
    "pyautogui.hotkey": _Hands.hotkey,
}
"""hscroll is not here: see `Wheel`."""
_SIGNATURES: Final = {name: inspect.signature(method) for name, method in _FUNCTIONS.items()}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Inexpressible
    return value


def _seconds(value: Any) -> float:
    if _number(value) < 0:
        raise _Inexpressible
    return float(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value > MOST:
        raise _Inexpressible
    return value


def _texts(value: Any) -> Sequence[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise _Inexpressible
    return value


def _key(value: Any) -> str:
    name = value.lower() if isinstance(value, str) and len(value) > 1 else value
    if not isinstance(name, str) or name not in KEYS:
        raise _Inexpressible
    return name


def _button(value: Any) -> Button:
    # primary and secondary: unless somebody in the guest is left-handed, for whom the guest turns our left around too.
    names: dict[Any, Button] = {
        "left": "left",
        "middle": "middle",
        "right": "right",
        "primary": "left",
        "secondary": "right",
    }
    button = names.get(value.lower()) if isinstance(value, str) else None
    if button is None:
        raise _Inexpressible
    return button
