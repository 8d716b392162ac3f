"""What others say (servers, guests, strangers), as it may be printed on a terminal."""

from __future__ import annotations

import re

_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without what steers a terminal or has it show words in another order than they have. Line breaks and tabs
    stay."""
    return _STEERS.sub("", text)
