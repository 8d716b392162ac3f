"""What a value in a task file must look like: small checks that are put together. Each tells where below the value
something is wrong, and what it must be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

Shape = Callable[[object], Iterator[tuple[str, str]]]
"""Yields (place, message): place is "" for the value itself, `.url` or `[3].path` for what is inside it."""

LONGEST_NAME = 200
"""Bytes. File systems take 255, and names are lengthened at times."""


def one(wanted: str, fits: Callable[[Any], bool]) -> Shape:
    def shape(value: object) -> Iterator[tuple[str, str]]:
        if not fits(value):
            yield "", f"must be {wanted}"

    return shape


def choice(*values: str) -> Shape:
    return one(" or ".join(values), lambda value: value in values)


def each(shape: Shape, wanted: str = "a list", least: int = 0) -> Shape:
    """A list of at least `least` values that all have `shape`."""

    def check(value: object) -> Iterator[tuple[str, str]]:
        if not isinstance(value, list) or len(value) < least:
            yield "", f"must be {wanted}"
            return
        for index, item in enumerate(value):
            for place, message in shape(item):
                yield f"[{index}]{place}", message

    return check


def fields(
    required: Mapping[str, Shape] | None = None,
    optional: Mapping[str, Shape] | None = None,
    *,
    closed: bool = False,
    wanted: str = "an object",
) -> Shape:
    """An object. What is null counts as not given. `closed`: no other names, but for notes such as `_note`."""
    must, may = required or {}, optional or {}
    known = [*must, *may]

    def check(value: object) -> Iterator[tuple[str, str]]:
        if not isinstance(value, dict):
            yield "", f"must be {wanted}"
            return
        for name in must:
            if value.get(name) is None:
                yield f".{name}", "is missing"
        for name, given in value.items():
            shape = must.get(name) or may.get(name)
            if shape is not None and given is not None:
                for place, message in shape(given):
                    yield f".{name}{place}", message
            elif shape is None and closed and not name.startswith("_"):
                yield f".{name[:60]}", f"is not known here{near(name, known) or _list(known)}"

    return check


def near(name: str, names: list[str]) -> str:
    """ ", did you mean …?" for a name that is almost one of `names`, else ""."""
    found = difflib.get_close_matches(name[:80], names, n=1)
    return f", did you mean {found[0]}?" if found else ""


def is_true(value: object) -> bool:
    """How the words `true` and `"true"` of task files are read."""
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in ("", "false", "no", "0"))


def is_web(url: object) -> bool:
    if not isinstance(url, str) or "\0" in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _list(known: list[str]) -> str:
    return f"; there is {', '.join(known)}" if known else ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_command(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and "\0" not in word for word in words) and bool(words[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    return isinstance(value, int) or value.strip().lstrip("+-").isdecimal()


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or value in (0, 1) or (isinstance(value, str) and value.lower() in ("true", "yes"))


def _is_file_name(value: object) -> bool:
    return (
        _is_text(value)
        and value not in (".", "..")
        and "/" not in str(value)
        and len(str(value).encode()) <= LONGEST_NAME
    )


def between(low: float, high: float, wanted: str) -> Shape:
    return one(wanted, lambda value: _is_number(value) and low <= value <= high)


ANYTHING: Shape = one("anything", lambda value: True)
OBJECT = fields()
STRING = one("a string", lambda value: isinstance(value, str) and "\0" not in value)
TEXT = one("a string that is not empty", _is_text)
TEXTS = each(TEXT, "a list of strings")
PATH = one("a path", _is_text)
WEB = one("an http or https URL", is_web)
COMMAND = one("a command line or a list of words", _is_command)
INTEGER = one("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
INDEX = one("a whole number", _is_index)
FLAG = one("true or false", _is_flag)
FILE_NAME = one("a plain file name", _is_file_name)
FILE_NAME_OR_NOTHING = one("a plain file name", lambda value: value == "" or _is_file_name(value))
