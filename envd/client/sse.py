"""Server-Sent Events: bytes in, messages out. Follows the WHATWG HTML standard, section 9.2.6."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Message:
    """`id` is the last one the stream set, which may have come with an earlier message."""

    event: str
    data: str
    id: str


class SseParser:
    """Feed it what arrives, cut anywhere; it returns the messages that are complete.

    A message that the stream's end cuts off is never returned, as the standard asks. Raises ValueError when one
    message grows beyond `limit` characters.
    """

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self.started = False
        """Whether anything came yet."""
        self._limit = limit
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")  # drops one leading byte order mark
        self._line: list[str] = []
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._held = 0

    def feed(self, chunk: bytes) -> list[Message]:
        self.started = self.started or bool(chunk)
        text = self._decoder.decode(chunk)
        if not text:
            return []
        if self._after_cr:  # the CR ended a line when it came; an LF at the head of this chunk belongs to it
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        self._held += len(text)
        first, *rest = LINE_END.split(text)
        self._line.append(first)
        messages = []
        for following in rest:
            message = self._take("".join(self._line))
            if message is not None:
                messages.append(message)
            self._line = [following]
        if self._held > self._limit:
            raise ValueError(f"one event is larger than {self._limit} characters")
        return messages

    def _take(self, line: str) -> Message | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.last_event_id = value
        elif name == "retry" and value.isascii() and value.isdecimal():
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> Message | None:
        event, data = self._event or "message", self._data
        self._event, self._data, self._held = "", [], 0
        return Message(event, "\n".join(data), self.last_event_id) if data else None
