"""JSON messages over a stream: four bytes of length (big-endian), then the text."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from typing import Any

LARGEST = 16 * 1024 * 1024
"""Bytes of one message. Values that are larger than a few hundred kilobytes travel as files."""


class Frames:
    """Collects what came in; `feed` returns the messages that are complete. Raises ValueError for what is none."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            (size,) = struct.unpack(">I", self._buffer[:4])
            if size > LARGEST:
                raise ValueError(f"a message of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            message = json.loads(self._buffer[4 : 4 + size])
            if not isinstance(message, dict):
                raise ValueError("a message that is no object")
            messages.append(message)
            self._buffer = self._buffer[4 + size :]
        return messages


def pack(message: dict[str, Any]) -> bytes:
    """Raises ValueError when it is too large."""
    text = json.dumps(message).encode()
    if len(text) > LARGEST:
        raise ValueError(f"a message of {len(text)} bytes")
    return struct.pack(">I", len(text)) + text


def send(fd: int, message: dict[str, Any]) -> None:
    """Blocks until all of it is written."""
    data = pack(message)
    while data:
        data = data[os.write(fd, data) :]


def receive(read: Callable[[int], bytes]) -> dict[str, Any] | None:
    """The next message of `read(size)`, None at the end of the stream. Nothing may follow it."""
    frames = Frames()
    while data := read(65_536):
        if messages := frames.feed(data):
            return messages[0]
    return None
