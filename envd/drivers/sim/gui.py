"""The state of a sim desktop's screen, and the pyautogui programs that change it.

A program is read with `ast` and walked; nothing of it is ever executed. What is understood: imports, plain
assignments, and calls of pyautogui, time, pyperclip, platform, os and print with literal arguments. Everything else
ends the program with the traceback that Python would have given, or one that says so.
"""

from __future__ import annotations

import ast
import asyncio
import posixpath
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .files import HOME, absolute
from .picture import COLUMNS, LINES, Scene

MODULES = ("pyautogui", "time", "pyperclip", "platform", "os", "sys")
MOST = 1000
"""Clicks or presses that one call may ask for; the loop is not held up by more."""
_TEXT_OF_KEY = {"enter": "\n", "return": "\n", "\n": "\n", "tab": "\t", "\t": "\t", "space": " "}
_MODIFIERS = frozenset({"ctrl", "ctrlleft", "ctrlright", "alt", "altleft", "altright", "win", "command", "option"})
_SHIFTS = frozenset({"shift", "shiftleft", "shiftright"})
_SHIFTED_SIGNS = dict(zip("`1234567890-=[]\\;',./", '~!@#$%^&*()_+{}|:"<>?', strict=True))
"""The signs above the others on a US keyboard."""
_BUTTONS = {"primary": "left", "left": "left", "middle": "middle", "right": "right", "secondary": "right"}
Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Click:
    """One press and release. `to` differs from `at` for a drag."""

    button: str
    at: Point
    to: Point


@dataclass(frozen=True, slots=True)
class Output:
    """What a process leaves, named as the guest server names it."""

    output: str = ""
    error: str = ""
    returncode: int = 0


@dataclass(slots=True)
class Gui:
    """Cursor, keyboard, clipboard and windows. Methods that take input are named and called as in pyautogui, ignore
    what pyautogui ignores (unknown keys, text that is not ASCII), and add their duration to `waited`."""

    screen: Point
    cursor: Point = field(init=False)
    typed: str = ""
    clicks: list[Click] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    scrolled: Point = (0, 0)
    clipboard: str = ""
    windows: list[str] = field(default_factory=lambda: ["Google Chrome"])
    waited: float = 0.0
    _held: set[str] = field(default_factory=set)
    _pressed_at: dict[str, Point] = field(default_factory=dict)
    _all_selected: bool = False

    def __post_init__(self) -> None:
        self.cursor = (self.screen[0] // 2, self.screen[1] // 2)

    def scene(self) -> Scene:
        lines = [
            part
            for line in self.typed[-COLUMNS * LINES :].split("\n")
            for part in textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
        ]
        status = f"{len(self.clicks)} clicks   {len(self.keys)} keys   scrolled {self.scrolled[0]}, {self.scrolled[1]}"
        return Scene(
            self.screen,
            self.cursor,
            tuple(_printable(title)[:80] for title in self.windows[-8:]),
            tuple(_printable(line) for line in lines[-LINES:]),
            status,
        )

    # The mouse

    def moveTo(self, x: Any = None, y: Any = None, duration: float = 0.0, tween: Any = None) -> None:
        x, y = x if isinstance(x, Sequence) and not isinstance(x, str) else (x, y)
        width, height = self.screen
        across, down = (old if new is None else int(new) for new, old in zip((x, y), self.cursor, strict=True))
        self.cursor = (min(max(across, 0), width - 1), min(max(down, 0), height - 1))
        self.waited += duration

    def move(self, xOffset: Any = 0, yOffset: Any = 0, duration: float = 0.0, tween: Any = None) -> None:
        self.moveTo(self.cursor[0] + int(xOffset or 0), self.cursor[1] + int(yOffset or 0), duration)

    def click(
        self,
        x: Any = None,
        y: Any = None,
        clicks: int = 1,
        interval: float = 0.0,
        button: str = "primary",
        duration: float = 0.0,
    ) -> None:
        self.moveTo(x, y, duration)
        self.clicks += [Click(_button(button), self.cursor, self.cursor)] * min(clicks, MOST)
        self._all_selected = False
        self.waited += interval * clicks

    def doubleClick(
        self, x: Any = None, y: Any = None, interval: float = 0.0, button: str = "left", duration: float = 0.0
    ) -> None:
        self.click(x, y, 2, interval, button, duration)

    def tripleClick(
        self, x: Any = None, y: Any = None, interval: float = 0.0, button: str = "left", duration: float = 0.0
    ) -> None:
        self.click(x, y, 3, interval, button, duration)

    def rightClick(self, x: Any = None, y: Any = None, duration: float = 0.0) -> None:
        self.click(x, y, button="right", duration=duration)

    def middleClick(self, x: Any = None, y: Any = None, duration: float = 0.0) -> None:
        self.click(x, y, button="middle", duration=duration)

    def mouseDown(self, x: Any = None, y: Any = None, button: str = "primary", duration: float = 0.0) -> None:
        self.moveTo(x, y, duration)
        self._pressed_at[_button(button)] = self.cursor

    def mouseUp(self, x: Any = None, y: Any = None, button: str = "primary", duration: float = 0.0) -> None:
        self.moveTo(x, y, duration)
        start = self._pressed_at.pop(_button(button), None)
        if start is not None:
            self.clicks.append(Click(_button(button), start, self.cursor))

    def dragTo(
        self,
        x: Any = None,
        y: Any = None,
        duration: float = 0.0,
        tween: Any = None,
        button: str = "primary",
        mouseDownUp: bool = True,
    ) -> None:
        start = self.cursor
        self.moveTo(x, y, duration)
        if mouseDownUp:
            self.clicks.append(Click(_button(button), start, self.cursor))

    def drag(
        self,
        xOffset: Any = 0,
        yOffset: Any = 0,
        duration: float = 0.0,
        tween: Any = None,
        button: str = "primary",
    ) -> None:
        self.dragTo(self.cursor[0] + int(xOffset or 0), self.cursor[1] + int(yOffset or 0), duration, tween, button)

    def scroll(self, clicks: float, x: Any = None, y: Any = None) -> None:
        self.moveTo(x, y)
        self.scrolled = (self.scrolled[0], self.scrolled[1] + int(clicks))

    def hscroll(self, clicks: float, x: Any = None, y: Any = None) -> None:
        self.moveTo(x, y)
        self.scrolled = (self.scrolled[0] + int(clicks), self.scrolled[1])

    # The keyboard

    def write(self, message: str | list[str], interval: float = 0.0) -> None:
        for key in message:
            self.press(key)
            self.waited += interval

    def press(self, keys: str | list[str], presses: int = 1, interval: float = 0.0) -> None:
        for _ in range(min(presses, MOST)):
            for key in [keys] if isinstance(keys, str) else keys:
                self.keyDown(key)
                self.keyUp(key)
            self.waited += interval

    def hotkey(self, *keys: str | list[str], interval: float = 0.0) -> None:
        names = [name for key in keys for name in ([key] if isinstance(key, str) else key)]
        for name in names:
            self.keyDown(name)
            self.waited += interval
        for name in reversed(names):
            self.keyUp(name)

    def keyDown(self, key: str) -> None:
        name = key if len(key) == 1 else key.lower()
        if not name.isascii():
            return
        self.keys.append(name)
        if name in _MODIFIERS or name in _SHIFTS:
            self._held.add(name)
        elif self._held & _MODIFIERS:
            self._shortcut(name.lower())
        elif name == "backspace":
            self._replace_selection("") if self._all_selected else self._set_typed(self.typed[:-1])
        elif name in _TEXT_OF_KEY or (len(name) == 1 and name.isprintable()):
            character = _TEXT_OF_KEY.get(name, name)
            self._replace_selection(_shifted(character) if self._held & _SHIFTS else character)

    def keyUp(self, key: str) -> None:
        self._held.discard(key if len(key) == 1 else key.lower())

    def _shortcut(self, name: str) -> None:
        if not self._held & {"ctrl", "ctrlleft", "ctrlright"}:
            return
        if name == "a":
            self._all_selected = True
        elif name == "v":
            self._replace_selection(self.clipboard)
        elif name in ("c", "x") and self._all_selected:
            self.clipboard = self.typed
            if name == "x":
                self._replace_selection("")

    def _replace_selection(self, text: str) -> None:
        self._set_typed(text if self._all_selected else self.typed + text)

    def _set_typed(self, text: str) -> None:
        self.typed, self._all_selected = text, False

    # Windows, matched as wmctrl does: a part of the title or the class, whatever the case, unless `strict`

    def raise_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        for window in self.matching(name, strict=strict, by_class=by_class)[:1]:
            self.windows.remove(window)
            self.windows.append(window)

    def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        for window in self.matching(name, strict=strict, by_class=by_class)[:1]:
            self.windows.remove(window)

    def matching(self, name: str, *, strict: bool = False, by_class: bool = False) -> list[str]:
        """The titles of the windows that are meant, from back to front."""
        named = {window: self.class_of(window) if by_class else window for window in self.windows}
        if strict:
            return [window for window, known in named.items() if known == name]
        return [window for window, known in named.items() if name.lower() in known.lower()]

    @staticmethod
    def class_of(window: str) -> str:
        """A window's instance and class, as `wmctrl -lx` prints them: Google Chrome has google-chrome.Google-chrome."""
        name = "-".join(window.lower().split())
        return f"{name}.{name.capitalize()}"

    # What a program may call, by its full name

    def functions(self) -> dict[str, Callable[..., Any]]:
        gui: dict[str, Callable[..., Any]] = {
            function.__name__: function
            for function in (
                self.moveTo, self.move, self.click, self.doubleClick, self.tripleClick, self.rightClick,
                self.middleClick, self.mouseDown, self.mouseUp, self.dragTo, self.drag, self.scroll, self.hscroll,
                self.write, self.press, self.hotkey, self.keyDown, self.keyUp,
            )
        }  # fmt: skip
        gui |= {"moveRel": self.move, "dragRel": self.drag, "leftClick": self.click, "vscroll": self.scroll}
        gui |= {"typewrite": self.write, "size": lambda: self.screen, "position": lambda: self.cursor}
        gui |= {"sleep": self._sleep}
        return {f"pyautogui.{name}": function for name, function in gui.items()} | {
            "time.sleep": self._sleep,
            "time.time": time.time,
            "pyperclip.copy": self._copy,
            "pyperclip.paste": lambda: self.clipboard,
            "platform.system": lambda: "Linux",
            "platform.machine": lambda: "x86_64",
            "os.getenv": {"HOME": HOME, "USER": "user", "DISPLAY": ":0"}.get,
            "os.path.join": posixpath.join,
            "os.path.expanduser": absolute,
        }

    def _sleep(self, secs: float) -> None:
        self.waited += secs

    def _copy(self, text: Any) -> None:
        self.clipboard = str(text)


def _button(name: str) -> str:
    if name not in _BUTTONS:
        raise ValueError(f"button argument must be one of {', '.join(_BUTTONS)}")
    return _BUTTONS[name]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


class Program:
    """A Python program that drives a `Gui`. Raises SyntaxError, or another error of Python's parser, when made."""

    def __init__(self, source: str, gui: Gui) -> None:
        with warnings.catch_warnings():  # an invalid escape in the source is the program's affair
            warnings.simplefilter("ignore")
            self._statements = ast.parse(source, filename="<string>").body
        self._gui = gui
        self._printed: list[str] = []
        self._functions = gui.functions() | {"print": self._print}
        self._names: dict[str, Any] = {}
        self._full_names = {"print": "print"}

    async def run(self, pace: float = 0.0) -> Output:
        """Walk through it, statement by statement as Python would: what stands before an error has its effect."""
        for statement in self._statements:
            before = self._gui.waited
            try:
                self._do(statement)
            except Exception as error:  # noqa: BLE001 - whatever a program does wrong is its own output
                return Output("".join(self._printed), _traceback(error, statement.lineno), 1)
            pause = (self._gui.waited - before) * pace
            if pause > 0:
                await asyncio.sleep(pause)
        return Output("".join(self._printed))

    def _do(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import(names=names):
                for name in names:
                    self._import(name.name, name.asname or name.name)
            case ast.ImportFrom(module=str(module), names=names):
                self._import(module, "")
                self._full_names |= {name.asname or name.name: f"{module}.{name.name}" for name in names}
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._names[name] = self._value(value)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                for target, part in zip(targets, self._value(value), strict=True):
                    self._names[ast.unparse(target)] = part
            case ast.Assign(targets=[ast.Attribute() as target], value=value):
                self._full_name(target)
                self._value(value)
            case ast.Expr(value=value):
                self._value(value)
            case ast.Pass():
                pass
            case _:
                raise _not_understood(statement)

    def _import(self, module: str, name: str) -> None:
        if module not in MODULES:
            raise ModuleNotFoundError(f"No module named '{module}'")
        self._full_names[name] = module

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Tuple(elts=parts):
                return tuple(map(self._value, parts))
            case ast.List(elts=parts):
                return list(map(self._value, parts))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.Call(func=function, args=arguments, keywords=keywords):
                return self._call(function, arguments, keywords)
            case ast.Name(id=name) if name not in self._full_names:
                raise NameError(f"name '{name}' is not defined")
            case _:
                raise _not_understood(node)

    def _call(self, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        full_name = self._full_name(function)
        if full_name not in self._functions:
            module, _, attribute = full_name.rpartition(".")
            raise AttributeError(f"module '{module}' has no attribute '{attribute}'")
        named = {keyword.arg: self._value(keyword.value) for keyword in keywords if keyword.arg}
        return self._functions[full_name](*map(self._value, arguments), **named)

    def _full_name(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                if name not in self._full_names:
                    raise NameError(f"name '{name}' is not defined")
                return self._full_names[name]
            case ast.Attribute(value=value, attr=attribute):
                return f"{self._full_name(value)}.{attribute}"
            case _:
                raise _not_understood(node)

    def _print(self, *values: Any, sep: str = " ", end: str = "\n") -> None:
        self._printed.append(sep.join(map(str, values)) + end)


async def run_python(source: str, gui: Gui, pace: float) -> Output:
    """What `python -c source` would leave."""
    try:
        program = Program(source, gui)
    except SyntaxError as error:
        return Output(error="".join(traceback.format_exception_only(error)), returncode=1)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, lone surrogates, endless nesting
        return Output(error=_traceback(error, 1), returncode=1)
    return await program.run(pace)


def _not_understood(node: ast.AST) -> NotImplementedError:
    return NotImplementedError(f"a sim desktop does not understand {ast.unparse(node)[:200]}")


def _traceback(error: BaseException, line: int) -> str:
    last = "".join(traceback.format_exception_only(error))
    return f'Traceback (most recent call last):\n  File "<string>", line {line}, in <module>\n{last}'


def _shifted(character: str) -> str:
    return _SHIFTED_SIGNS.get(character, character.upper())
