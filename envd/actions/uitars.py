r"""What a UI-TARS model said, as typed actions: `parse(prediction, frame=...)`.

The grammar is upstream's. A prediction that does something sensible upstream does the
same here; these are the places where upstream fails, or pretends to have acted, and what happens instead:

| model says                                  | upstream                     | here                                   |
|---------------------------------------------|------------------------------|----------------------------------------|
| calls on consecutive lines (2.1)            | does not parse               | each is an action                      |
| `Action:` inside a quoted text (2.1)        | does not parse               | text                                   |
| `wait`, `finished` … without `()` (2.3)     | does not parse               | the call                               |
| `Click(...)` (2.3)                          | no-op, counted as success    | names ignore case                      |
| an unknown action (2.3)                     | no-op, counted as success    | `unknown_action`                       |
| `<|box_start|>`, `[x,y]`, `x y` (2.2)       | does not parse               | a box                                  |
| a point outside the image (2.2)             | passed on, X stops at edge   | clamped to the edge: the same          |
| any image but 1932×1092 (2.2, 10 row 15)    | scaled as 1932×1092          | scaled by the pixels we advertised     |
| `drag` without both boxes (2.3, row 16)     | no-op, counted as success    | `missing_box`                          |
| `press(key='enter')` (2.3, row 16)          | always raises                | presses                                |
| `ctrl+c`, `ctrl arrowleft`, `Page_Up` (2.3) | no-op, counted as success    | the keys (see `keys.py`)               |
| `ctrl + c` (2.3)                            | presses `+` as a third key   | ctrl and c; `ctrl +` still presses `+` |
| an unknown or missing key (2.3)             | no-op, counted as success    | `unknown_key`, `missing_key`           |
| `scroll(direction='left')` (2.3, row 16)    | no-op, counted as success    | scrolls                                |
| `type(content="x")`, `type(content = 'x')`  | types its own source         | types `x`                              |
| real newlines, blank lines in content (2.4) | guest SyntaxError, no parse  | newlines                               |
| `type(content='\n')`, `' '` (2.1)           | no-op                        | enter, a space                         |
| `C:\\new`, content ending in `\\` (2.4)     | escapes read twice           | read once, see `unescape`              |
| `fun\\n` at the end (2.4)                   | types `fu`, enter            | types `fun`, enter                     |

Kept although it may surprise: arguments lose their leading blanks (2.1.6), any run of newlines that ends a text is
one enter, `\\n` at the end counts as one (2.4), positional arguments are dropped (2.1.5), `type(content='')` types
nothing. What follows the first `finished`, `wait`, `call_user` or `error_env` must be calls, and is not run (1.6).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from envd.actions.keys import key_name, nearest_key, split_combination

MAX_PREDICTION_BYTES: Final = 30_000
"""The program is one argument of a command, for which Linux has 128 KiB, and an escaped character takes up to four
times its bytes. Ten thousand tokens fit."""

MAX_KEYS: Final = 10

MIN_PIXELS: Final = 3136
MAX_PIXELS: Final = 2_116_800
"""The image bounds that clients of this protocol expect: 1920×1080 is never made smaller."""


# --- what a prediction becomes ------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A place on the guest's screen, px from the top left, rounded to 3 decimals as upstream does."""

    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What every action carries: the text it was read from. Two actions that do the same are equal."""

    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Click(Said):
    """`click`, `left_single`, `right_single`."""

    at: Point
    button: Literal["left", "right"] = "left"


@dataclass(frozen=True, slots=True)
class DoubleClick(Said):
    """`left_double`."""

    at: Point


@dataclass(frozen=True, slots=True)
class Hover(Said):
    """`hover`: the cursor moves."""

    at: Point


@dataclass(frozen=True, slots=True)
class Drag(Said):
    """`drag`, `select`: with the left button."""

    start: Point
    end: Point


@dataclass(frozen=True, slots=True)
class Hotkey(Said):
    """`hotkey`: keys go down in order and up in reverse. Each is in `keys.KEYS`."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Press(Said):
    """`press`: one key down and up."""

    key: str


@dataclass(frozen=True, slots=True)
class KeyDown(Said):
    """`keydown`: the key stays down."""

    key: str


@dataclass(frozen=True, slots=True)
class KeyUp(Said):
    """`keyup`."""

    key: str


@dataclass(frozen=True, slots=True)
class Type(Said):
    """`type`: the text goes in as it is, newlines included; then Enter when `enter`."""

    text: str
    enter: bool = False


@dataclass(frozen=True, slots=True)
class Scroll(Said):
    """`scroll`: five notches, at a place or where the cursor is."""

    direction: Literal["up", "down", "left", "right"]
    at: Point | None = None


@dataclass(frozen=True, slots=True)
class Wait(Said):
    """`wait`: look again later."""


@dataclass(frozen=True, slots=True)
class Finished(Said):
    """`finished`: the model holds the task for done. `content` is what it said about it."""

    content: str = ""


@dataclass(frozen=True, slots=True)
class CallUser(Said):
    """`call_user`: the model gives up and asks for a person."""


@dataclass(frozen=True, slots=True)
class ErrorEnv(Said):
    """`error_env`: the model holds the desktop for broken."""


Input = Click | DoubleClick | Hover | Drag | Hotkey | Press | KeyDown | KeyUp | Type | Scroll
"""What reaches the guest."""

Ending = Wait | Finished | CallUser | ErrorEnv
"""What does not, and makes everything else in its prediction void."""

Action = Input | Ending


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction that parses: at least one action; an `Ending` is the last one.

    `thought` is what the model said before acting, or None. It goes into no program.
    """

    thought: str | None
    actions: tuple[Action, ...]


Code = Literal[
    "too_long",
    "not_text",
    "no_action",
    "not_a_call",
    "trailing_text",
    "unterminated",
    "unknown_action",
    "bad_argument",
    "missing_box",
    "bad_box",
    "missing_key",
    "unknown_key",
    "too_many_keys",
    "missing_content",
    "missing_direction",
    "bad_direction",
]


class PredictionError(ValueError):
    """A prediction that means nothing we can do.

    `code` is stable and crosses the wire; `fragment` is the piece of the prediction at fault; the message says
    what is wrong with it and what is accepted.
    """

    def __init__(self, code: Code, problem: str, fragment: str, accepted: str) -> None:
        self.code: Final = code
        text = fragment.encode(errors="backslashreplace").decode()
        self.fragment: Final = text if len(text) <= 120 else f"{text[:119]}…"
        super().__init__(f"{problem}: {self.fragment!r}. {accepted}")


@dataclass(frozen=True, slots=True)
class Frame:
    """What the model looked at: a screen of `width` × `height` px, sent with `min_pixels` and `max_pixels`.

    The model resizes the image into those bounds first and names places in the resized image, so the advertised
    bounds decide what its numbers mean. Raises ValueError for bounds or a shape that no model could be shown.
    """

    width: int
    height: int
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1:
            raise ValueError(f"a screen of {self.width}×{self.height} px has no area")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 1 ≤ min_pixels ≤ max_pixels, not {self.min_pixels} and {self.max_pixels}")
        if max(self.width, self.height) > 200 * min(self.width, self.height):
            raise ValueError(f"a screen of {self.width}×{self.height} px is too long: at most 200 to 1")

    def seen(self) -> tuple[int, int]:
        """(width, height) of the image as the model sees it (the resize of `qwen25vl`)."""
        height, width = smart_resize(self.height, self.width, self.min_pixels, self.max_pixels)
        return width, height

    def to_screen(self, x1: float, y1: float, x2: float, y2: float) -> Point:
        """The middle of a box in the image the model saw, on the screen; points outside land at the edge."""
        width, height = self.seen()
        x = round((x1 / width + x2 / width) / 2 * self.width, 3)
        y = round((y1 / height + y2 / height) / 2 * self.height, 3)
        return Point(min(max(x, 0.0), self.width - 1.0), min(max(y, 0.0), self.height - 1.0))


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """(height, width) that Qwen2.5-VL gives an image: multiples of `factor`, area within the bounds."""
    high = max(factor, round(height / factor) * factor)
    wide = max(factor, round(width / factor) * factor)
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide


# --- parsing ------------------------------------------------------------------------------------------------------

_MARK: Final = "Action:"
_MARKS_TRIED: Final = 8


def parse(prediction: str, *, frame: Frame) -> Prediction:
    """Reads a prediction. Raises PredictionError, and nothing else, when it cannot be carried out whole.

    What counts is the text after the last `Action:`, as upstream has it. Only when that does not parse, an earlier
    one is tried, since the last may be part of a text to type.
    """
    text = _checked(prediction)
    head, *bodies = text.split(_MARK)
    if not bodies:
        raise PredictionError("no_action", "no action in the prediction", text, f"Write {_MARK} and a call.")
    complaint: PredictionError | None = None
    for taken in range(1, min(len(bodies), _MARKS_TRIED) + 1):
        body = _MARK.join(bodies[-taken:])
        try:
            return Prediction(_thought(head), _actions(body, frame, lenient=taken == 1))
        except PredictionError as error:
            complaint = complaint or error
    assert complaint is not None
    raise complaint


def _checked(prediction: str) -> str:
    try:
        size = len(prediction.encode())
    except UnicodeEncodeError as error:
        bad = prediction[error.start : error.end]
        accepted = "Half of a surrogate pair is no character; write the character itself."
        raise PredictionError("not_text", "the prediction is not Unicode text", bad, accepted) from None
    if size > MAX_PREDICTION_BYTES:
        accepted = f"At most {MAX_PREDICTION_BYTES} bytes of UTF-8 are read."
        raise PredictionError("too_long", f"the prediction has {size} bytes", prediction[:40], accepted)
    return prediction.replace("\r\n", "\n").replace("\r", "\n").strip()


def _thought(head: str) -> str | None:
    for opening, marker in (
        ("Thought:", "Thought:"),
        ("Reflection:", "Action_Summary:"),
        ("Action_Summary:", "Action_Summary:"),
    ):
        if head.startswith(opening) and marker in head:
            return head.split(marker, 1)[1].strip()
    return None


def _actions(body: str, frame: Frame, *, lenient: bool) -> tuple[Action, ...]:
    calls = [_read_call(piece, lenient=lenient) for piece in _pieces(body)]
    actions: list[Action] = []
    for call in calls:
        actions.append(_action(call, frame))
        if isinstance(actions[-1], Ending):
            break
    return tuple(actions)


# Pieces: where one call ends and the next begins.

_NO_ARGUMENTS: Final = ("wait", "finished", "call_user", "error_env")
_ARGUMENTS: Final = (
    *("click", "left_single", "left_double", "right_single", "hover", "drag", "select"),
    *("hotkey", "press", "keydown", "keyup", "type", "scroll"),
)
_NAMES: Final = (*_ARGUMENTS, *_NO_ARGUMENTS)
# In Debian 12's Python 3.11.2 a possessive group around possessive parts never matches, so the groups here are plain.
_HEAD: Final = re.compile(r"\s*+(?:[^\W\d]\w*+\s*+\.\s*+)*([^\W\d]\w*+)\s*+\(")
_BARE: Final = re.compile(rf"\s*+({'|'.join(_NO_ARGUMENTS)})\s*+\Z", re.IGNORECASE)
_TEXT_HEAD: Final = re.compile(
    r"\s*+(?:[^\W\d]\w*+\s*+\.\s*+)*(type|finished)\s*+\(\s*+content\s*+=\s*+(['\"])", re.IGNORECASE
)


def _pieces(body: str) -> list[str]:
    """One piece per call. A call may span lines; a text may hold blank lines and lines that look like calls."""
    pieces: list[_Piece] = []
    after_blank = False
    for line in body.split("\n"):
        blank = not line.strip()
        if not pieces or (not blank and pieces[-1].ends_before(line, after_blank=after_blank)):
            if not blank:
                pieces.append(_Piece(line))
        else:
            pieces[-1].add(line)
        after_blank = blank
    if not pieces:
        raise PredictionError("no_action", f"nothing follows {_MARK}", body, "Write one call, such as wait().")
    return [piece.text for piece in pieces]


class _Piece:
    """The lines of one call, while they are gathered."""

    def __init__(self, line: str) -> None:
        opening = _TEXT_HEAD.match(line)
        self._quote = opening[2] if opening else None
        self._lines = [line]
        self._tail = line[opening.end() :] if opening else line

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def add(self, line: str) -> None:
        self._lines.append(line)
        if line.strip():
            # The quote and the parenthesis that close a text may stand on two lines.
            last = self._tail.rpartition("\n")[2]
            self._tail = f"{last}\n{line}"

    def ends_before(self, line: str, *, after_blank: bool) -> bool:
        """True when `line`, which is not blank, begins the next call."""
        if self._quote is None:
            return after_blank or bool(_HEAD.match(line) or _BARE.match(line))
        if _closing(self._tail, self._quote) is None:
            return False
        return _begins_known(line) or (after_blank and _is_call(line))


def _begins_known(line: str) -> bool:
    head = _HEAD.match(line)
    return bool(_BARE.match(line)) or (head is not None and head[1].lower() in _NAMES)


def _is_call(line: str) -> bool:
    try:
        _read_call(line, lenient=False)
    except PredictionError:
        return False
    return True


_COMMENT: Final = re.compile(r"\s*+(?:#[^\n]*+\s*+)*\Z")


def _closing(text: str, quote: str) -> int | None:
    """Where the quote stands that, with the parenthesis after it, ends `text`; None when it does not end so.

    A comment may follow, as Python allows; then the first quote that fits is meant.
    """
    bare = text.rstrip()
    if bare.endswith(")"):
        inside = bare[:-1].rstrip()
        if inside.endswith(quote) and not _escaped(inside, len(inside) - 1):
            return len(inside) - 1
    last_line = bare.rpartition("\n")[2]
    offset = len(bare) - len(last_line)
    for match in re.finditer(rf"{quote}[ \t]*+\)[ \t]*+#", last_line):
        if not _escaped(bare, offset + match.start()):
            return offset + match.start()
    return None


def _escaped(text: str, position: int) -> bool:
    first = position
    while first > 0 and text[first - 1] == "\\":
        first -= 1
    return (position - first) % 2 == 1


# One call.


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: dict[str, str]
    source: str


_ARGUMENT: Final = re.compile(
    r"""\s*+(?:([^\W\d]\w*+)\s*+=(?!=)\s*+)?
        (?:'((?:[^'\\]|\\.)*+)'|"((?:[^"\\]|\\.)*+)"|([^\s,()\[\]{}'"=\#]++))\s*+""",
    re.VERBOSE | re.DOTALL,
)
_CLOSE: Final = re.compile(r"\s*+\)")
_CALL_SHAPE: Final = "Write a call such as click(start_box='(100,200)')."
_TEXT_SHAPE: Final = r"Write type(content='...') and escape \' \" \n \\ inside."


def _read_call(source: str, *, lenient: bool) -> _Call:
    if opening := _TEXT_HEAD.match(source):
        name, quote = opening[1].lower(), opening[2]
        content = _read_text(source[opening.end() :], quote, source, lenient=lenient or name == "finished")
        if content is None and name == "type":
            raise _unclosed(source, quote, opening.end())
        return _Call(name, {"content": unescape(content or "")}, source.strip())
    if bare := _BARE.match(source):
        return _Call(bare[1].lower(), {}, source.strip())
    head = _HEAD.match(source)
    if head is None:
        raise PredictionError("not_a_call", "this is not a call", source.strip(), _CALL_SHAPE)
    return _Call(head[1].lower(), _read_arguments(source, head.end()), source.strip())


def _read_text(rest: str, quote: str, source: str, *, lenient: bool) -> str | None:
    """The content between the quotes, escapes and all; None when it does not end.

    Models forget to escape quotes, so the last one closes (`it's` is text). But where quotes are loose and a line
    inside looks like another action, the text was more likely never closed.
    """
    end = _closing(rest, quote)
    if end is None:
        return None
    content = rest[:end]
    loose = any(not _escaped(content, match.start()) for match in re.finditer(quote, content))
    if loose and (not lenient or any(_begins_known(line) for line in content.split("\n")[1:])):
        return None
    return content


def _unclosed(source: str, quote: str, start: int) -> PredictionError:
    end = re.search(rf"(?<!\\){quote}\s*+\)", source[start:])
    after = source[start + end.end() :].strip() if end else ""
    if after:
        return PredictionError("trailing_text", "something follows the call", after, _TEXT_SHAPE)
    return PredictionError("unterminated", "the text to type does not end", source.strip(), _TEXT_SHAPE)


def _read_arguments(source: str, position: int) -> dict[str, str]:
    arguments: dict[str, str] = {}
    while not (end := _CLOSE.match(source, position)):
        found = _ARGUMENT.match(source, position)
        if found is None:
            raise PredictionError("not_a_call", "this call is not complete", source.strip(), _CALL_SHAPE)
        name, single, double, bare = found.groups()
        if name is not None:
            if bare is not None or name in arguments:
                problem = "an argument must be a quoted string, and given once"
                raise PredictionError("bad_argument", problem, found[0].strip(), _CALL_SHAPE)
            arguments[name] = unescape(single if single is not None else double).lstrip()
        position = found.end()
        if source.startswith(",", position):
            position += 1
        elif not source.startswith(")", position):
            raise PredictionError("not_a_call", "this call is not complete", source.strip(), _CALL_SHAPE)
    if not _COMMENT.match(source, end.end()):
        after = source[end.end() :].strip()
        raise PredictionError("trailing_text", "something follows the call", after, "Write one call per line.")
    return arguments


_ESCAPE: Final = re.compile(r"\\([nt'\"\\])")


def unescape(text: str) -> str:
    r"""`\n`, `\t`, `\'`, `\"` and `\\` are escapes, read once; any other backslash is a backslash (`C:\dir`)."""
    return _ESCAPE.sub(lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


# From a call to an action.


def _action(call: _Call, frame: Frame) -> Action:
    source = call.source
    match call.name:
        case "click" | "left_single":
            return Click(_box(call, "start_box", frame), source=source)
        case "right_single":
            return Click(_box(call, "start_box", frame), "right", source=source)
        case "left_double":
            return DoubleClick(_box(call, "start_box", frame), source=source)
        case "hover":
            return Hover(_box(call, "start_box", frame), source=source)
        case "drag" | "select":
            return Drag(_box(call, "start_box", frame), _box(call, "end_box", frame), source=source)
        case "hotkey":
            return Hotkey(_keys(call, "hotkey"), source=source)
        case "press":
            return Press(_key(call, "press"), source=source)
        case "keydown":
            return KeyDown(_key(call), source=source)
        case "keyup":
            return KeyUp(_key(call), source=source)
        case "type":
            return _typed(call)
        case "scroll":
            at = _box(call, "start_box", frame) if call.arguments.get("start_box") else None
            return Scroll(_direction(call), at, source=source)
        case "wait":
            return Wait(source=source)
        case "finished":
            return Finished(call.arguments.get("content", ""), source=source)
        case "call_user":
            return CallUser(source=source)
        case "error_env":
            return ErrorEnv(source=source)
    accepted = f"Known are {', '.join(_NAMES)}."
    raise PredictionError("unknown_action", f"there is no action {call.name!a}", source, accepted)


_BOX_TOKENS: Final = re.compile(r"<\|box_(?:start|end)\|>")
_BOX_SHAPE: Final = "A box is '(x,y)' or '(x1,y1,x2,y2)'."


def _box(call: _Call, name: str, frame: Frame) -> Point:
    value = call.arguments.get(name)
    if not value:
        raise PredictionError("missing_box", f"{call.name} needs {name}", call.source, _BOX_SHAPE)
    plain = _BOX_TOKENS.sub("", value).translate(str.maketrans("", "", "()[]")).strip()
    try:
        numbers = [float(number) for number in re.split(r"\s*+,\s*+|\s++", plain)]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 4) or not all(math.isfinite(number) for number in numbers):
        raise PredictionError("bad_box", f"{name} is not a box", value, _BOX_SHAPE)
    x1, y1, x2, y2 = numbers * 2 if len(numbers) == 2 else numbers
    return frame.to_screen(x1, y1, x2, y2)


_KEYS_SHAPE: Final = "Write keys apart with blanks or +, such as 'ctrl c' or 'enter'."


def _keys(call: _Call, other_name: str | None = None) -> tuple[str, ...]:
    value = call.arguments.get("key") or (call.arguments.get(other_name) if other_name else None)
    words = split_combination(value or "")
    if not words:
        raise PredictionError("missing_key", f"{call.name} names no key", call.source, _KEYS_SHAPE)
    if len(words) > MAX_KEYS:
        accepted = f"At most {MAX_KEYS} keys are held together."
        raise PredictionError("too_many_keys", f"{call.name} names {len(words)} keys", call.source, accepted)
    keys: list[str] = []
    for word in words:
        key = key_name(word)
        if key is None:
            nearest = nearest_key(word)
            hint = f"Did you mean {nearest!a}? " if nearest else ""
            raise PredictionError("unknown_key", "there is no such key", word, hint + _KEYS_SHAPE)
        keys.append(key)
    return tuple(keys)


def _key(call: _Call, other_name: str | None = None) -> str:
    keys = _keys(call, other_name)
    if len(keys) > 1:
        accepted = f"Use hotkey(key='{' '.join(keys)}') for keys held together."
        raise PredictionError("too_many_keys", f"{call.name} takes one key", call.source, accepted)
    return keys[0]


def _typed(call: _Call) -> Type:
    content = call.arguments.get("content")
    if content is None:
        raise PredictionError("missing_content", "type has nothing to type", call.source, _TEXT_SHAPE)
    # Upstream strips the left of every argument, so a text of blanks alone does nothing there; here it is typed.
    text = content.lstrip() or content
    end = _without_newlines(text)
    return Type(text[:end], enter=end < len(text), source=call.source)


def _without_newlines(text: str) -> int:
    r"""Where the text ends without its last newlines, real ones or a literal `\n` that has no backslash before."""
    end = len(text)
    while True:
        if text.endswith("\n", 0, end):
            end -= 1
        elif text.endswith("\\n", 0, end) and not text.endswith("\\\\n", 0, end):
            end -= 2
        else:
            return end


def _direction(call: _Call) -> Literal["up", "down", "left", "right"]:
    value = call.arguments.get("direction")
    accepted = "It is one of up, down, left, right."
    if not value:
        raise PredictionError("missing_direction", "scroll needs a direction", call.source, accepted)
    for direction in ("up", "down", "left", "right"):
        if direction in value.lower():
            return direction
    raise PredictionError("bad_direction", "this is no direction", value, accepted)
