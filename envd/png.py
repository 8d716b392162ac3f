"""A PNG encoder for screens: lossless, quick, and quicker still for what did not change.

The picture is cut into strips of rows. Each strip is filtered with Sub, which looks only along the row, and deflated
on its own, ended by a full flush; so a strip's bytes depend on its pixels alone, and a strip that did not change since
the last picture is sent again as it was. Any decoder reads the result: to it they are the IDAT chunks of one stream.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image

deflate: ModuleType
try:
    from isal import isal_zlib as deflate  # three times as fast as zlib at about the same size
except ImportError:
    deflate = zlib

ROWS = 40
"""Rows per strip: 27 strips at 1080p, each small enough that a changed line of text costs little."""

Layout = Literal["BGRX", "RGB"]

_ADLER = 65521
_END = b"\x03\x00"  # an empty last block, after which only the checksum follows


class ScreenEncoder:
    """Encodes one picture after another, remembering the last. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._size = (0, 0)
        self._strips: list[_Strip] = []

    def encode(self, pixels: bytes | bytearray | memoryview, width: int, height: int, layout: Layout = "BGRX") -> bytes:
        """A PNG (RGB, 8 bits) of `pixels`: `height` rows of `width` pixels of as many bytes as `layout` has letters,
        X being one unused. The same layout every time."""
        depth = len(layout)
        if len(pixels) != width * height * depth:
            raise ValueError(f"{len(pixels)} bytes are not {width}×{height} pixels of {depth} bytes")
        known = self._strips if self._size == (width, height) else []
        view = memoryview(pixels)
        stride = ROWS * width * depth
        strips = []
        for index, start in enumerate(range(0, len(pixels), stride)):
            raw = bytes(view[start : start + stride])
            old = known[index] if known else None
            strips.append(old if old is not None and old.pixels == raw else _strip(raw, width, layout))
        self._size, self._strips = (width, height), strips
        return _png(width, height, strips)


@dataclass(frozen=True)
class _Strip:
    pixels: bytes
    chunk: bytes
    """The IDAT chunk, checksum included."""
    adler: int
    """Adler-32 of the filtered rows, `length` bytes of them."""
    length: int


def _strip(pixels: bytes, width: int, layout: Layout) -> _Strip:
    height = len(pixels) // (width * len(layout))
    rgb = pixels
    if layout == "BGRX":
        rgb = Image.frombuffer("RGB", (width, height), pixels, "raw", layout, 0, 1).tobytes()
    rows = np.frombuffer(rgb, np.uint8).reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), np.uint8)
    filtered[:, 0] = 1  # Sub: each byte less the one a pixel to its left
    filtered[:, 1:4] = rows[:, :3]
    np.subtract(rows[:, 3:], rows[:, :-3], out=filtered[:, 4:])
    deflater: Any = deflate.compressobj(level=1, wbits=-15)
    body = deflater.compress(filtered) + deflater.flush(zlib.Z_FULL_FLUSH)
    return _Strip(pixels, _chunk(b"IDAT", body), deflate.adler32(filtered), filtered.size)


def _png(width: int, height: int, strips: list[_Strip]) -> bytes:
    adler = 1
    for strip in strips:
        adler = _joined(adler, strip.adler, strip.length)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            _chunk(b"IDAT", b"\x78\x01"),
            *(strip.chunk for strip in strips),
            _chunk(b"IDAT", _END + adler.to_bytes(4, "big")),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join((len(body).to_bytes(4, "big"), kind, body, deflate.crc32(kind + body).to_bytes(4, "big")))


def _joined(first: int, second: int, length: int) -> int:
    """Adler-32 of two texts one after the other, from theirs and the second's length (RFC 1950)."""
    low = ((first & 0xFFFF) + (second & 0xFFFF) - 1) % _ADLER
    high = ((first >> 16) + (second >> 16) + length * ((first & 0xFFFF) - 1)) % _ADLER
    return high << 16 | low
