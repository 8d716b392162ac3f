"""The conversation as trainers see it: system, prompt, screenshots, the model's turns.

A `Dialogue` is the whole history of one episode. All of it goes over the wire again at every step, so an image is
encoded once, when it is first asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from envd.actions.uitars import MAX_PIXELS, MIN_PIXELS

SYSTEM_TEXT: Final = "Your are a helpful assistant."
"""29 characters, misspelt. Models were trained with it."""

PLACEHOLDER: Final = "{instruction}"
PUBLISHED_SHA256: Final = "f1d70d9d71b6048f86c4a1786d972440b106bee129c559d3cedda0a29412e328"
"""Of the 1,212 characters of the prompt that UI-TARS models were trained with; the text is not ours to ship."""

WireMessage = dict[str, Any]
"""`{"role": str, "content": [part]}`; a part is `{"type": "text", "text": str}` or
`{"type": "image", "b64": str, "min_pixels": int, "max_pixels": int}`, without a `data:` prefix."""


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with one `{instruction}` in it. Raises ValueError when there is none, or more than one."""

    text: str

    def __post_init__(self) -> None:
        found = self.text.count(PLACEHOLDER)
        if found != 1:
            raise ValueError(f"a prompt template needs {PLACEHOLDER} exactly once, and this one has it {found} times")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a template, UTF-8, from a file. Raises ValueError that names the file when it is of no use."""
        try:
            return cls(path.read_bytes().decode())
        except (OSError, ValueError) as error:
            raise ValueError(f"prompt template {path}: {error}") from error

    @cached_property
    def sha256(self) -> str:
        """Of the template as it stands, placeholder included, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def matches_published(self) -> bool:
        """True for the very prompt that the published models were trained with."""
        return self.sha256 == PUBLISHED_SHA256

    def fill(self, instruction: str) -> str:
        """The prompt for a task. Braces mean nothing, in the template or in the instruction."""
        return self.text.replace(PLACEHOLDER, instruction)


DEFAULT_TEMPLATE: Final = PromptTemplate(
    r"""Someone wants a job done on their computer. The pictures show its screen, the latest one last, and your
earlier turns stand between them. Decide on the one step that comes next.

## Answer
Always in this form:
```
Thought: ...
Action: ...
```

## Actions
click(start_box='<|box_start|>(x1,y1)<|box_end|>')
left_double(start_box='<|box_start|>(x1,y1)<|box_end|>')
right_single(start_box='<|box_start|>(x1,y1)<|box_end|>')
drag(start_box='<|box_start|>(x1,y1)<|box_end|>', end_box='<|box_start|>(x3,y3)<|box_end|>')
hotkey(key='')  # names of keys with blanks between, such as 'ctrl shift t'
type(content='xxx')  # write \', \" and \n for quotes and new lines; a last \n presses Enter
scroll(start_box='<|box_start|>(x1,y1)<|box_end|>', direction='down or up or right or left')
wait()  # nothing is done; you get a new picture a little later
finished(content='xxx')  # the job is done; content tells the user about it

## Remember
- The Thought is short and in English: what you see that matters, what you will do, and to which thing on the screen.
- Coordinates are pixels of the latest picture.

## The job
{instruction}
"""
)
"""Our own words around the interface: the form of the answer and the nine calls."""


class Dialogue:
    """One episode's history, growing: `saw` a screenshot, `said` a prediction, `saw` the next …

    `min_pixels` and `max_pixels` are advertised with every image; give the same to `uitars.Frame`.
    """

    def __init__(
        self,
        instruction: str,
        *,
        template: PromptTemplate = DEFAULT_TEMPLATE,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.min_pixels: Final = min_pixels
        self.max_pixels: Final = max_pixels
        self._messages: list[_Text | _Image] = [
            _Text("system", SYSTEM_TEXT),
            _Text("user", template.fill(instruction)),
        ]

    def __len__(self) -> int:
        return len(self._messages)

    def saw(self, screenshot: bytes) -> None:
        """Adds a user turn with an image file (PNG, as guests make it)."""
        self._messages.append(_Image(screenshot, self.min_pixels, self.max_pixels))

    def said(self, prediction: str) -> None:
        """Adds an assistant turn, its boxes marked."""
        self._messages.append(_Text("assistant", add_box_token(prediction)))

    @property
    def screenshots(self) -> tuple[bytes, ...]:
        """The image files seen so far, first to last."""
        return tuple(message.data for message in self._messages if isinstance(message, _Image))

    def to_wire(self) -> list[WireMessage]:
        """All messages, new objects each time."""
        return [message.to_wire() for message in self._messages]

    def wire_json(self, turns: int | None = None) -> bytes:
        """`to_wire()` as a JSON array in ASCII, put together from what is already encoded; the first `turns` of it.

        Sixteen screenshots of 1 MB take 3 to 13 ms this way, and 75 ms through `json.dumps`.
        """
        return b"".join(self._json_pieces(turns))

    def _json_pieces(self, turns: int | None) -> Iterator[bytes]:
        for position, message in enumerate(self._messages[:turns]):
            yield b"," if position else b"["
            yield from message.json_pieces()
        yield b"]"


_BOX: Final = re.compile(r"(start_box|end_box)='(\(\d+,\d+\))'")


def add_box_token(prediction: str) -> str:
    """A prediction with the tokens around its boxes that models read, and that decoding had taken away.

    As upstream does it: only where `Action: ` and `start_box=` occur, only integers without a
    blank between them. The pieces between several `Action: ` are joined by blank lines, and all but the first
    `Action: ` go.
    """
    if "Action: " not in prediction or "start_box=" not in prediction:
        return prediction
    thought, *actions = prediction.split("Action: ")
    joined = "\n\n".join(_BOX.sub(r"\1='<|box_start|>\2<|box_end|>'", action.strip()) for action in actions)
    return f"{thought}Action: {joined}"


@dataclass(frozen=True, slots=True)
class _Text:
    role: Literal["system", "user", "assistant"]
    text: str

    def to_wire(self) -> WireMessage:
        return {"role": self.role, "content": [{"type": "text", "text": self.text}]}

    def json_pieces(self) -> Iterator[bytes]:
        yield json.dumps(self.to_wire()).encode()


@dataclass(frozen=True)
class _Image:
    data: bytes
    min_pixels: int
    max_pixels: int

    @cached_property
    def b64(self) -> bytes:
        return base64.b64encode(self.data)

    def to_wire(self) -> WireMessage:
        pixels = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {"role": "user", "content": [{"type": "image", "b64": self.b64.decode(), **pixels}]}

    def json_pieces(self) -> Iterator[bytes]:
        yield b'{"role": "user", "content": [{"type": "image", "b64": "'
        yield self.b64
        yield b'", "min_pixels": %d, "max_pixels": %d}]}' % (self.min_pixels, self.max_pixels)
