"""Chromium's texts with Chrome's name in them: tasks look for windows whose title ends in "Google Chrome".

The texts are in one file per language, of Chromium's own format (ui/base/resource/data_pack.cc, version 5): a header,
a table of (id, offset) that ends with an entry for the end of the data, a table of aliases, and the data.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

VERSION = 5
_HEADER = struct.Struct("<IBxxxHH")
_ENTRY = struct.Struct("<HI")
_ALIAS_BYTES = 4


def renamed(pack: bytes) -> bytes:
    """The pack with every "Chromium" made a "Google Chrome". One of another format or encoding is left as it is."""
    try:
        version, encoding, count, aliases = _HEADER.unpack_from(pack)
        end = _HEADER.size + (count + 1) * _ENTRY.size
        entries = list(_ENTRY.iter_unpack(pack[_HEADER.size : end]))
    except struct.error:
        return pack
    utf_8 = 1
    if (version, encoding) != (VERSION, utf_8):
        return pack
    start = end + aliases * _ALIAS_BYTES
    table, data = bytearray(), bytearray()
    for (number, begin), (_, after) in pairwise(entries):
        table += _ENTRY.pack(number, start + len(data))
        data += pack[begin:after].replace(b"Chromium", b"Google Chrome")
    table += _ENTRY.pack(entries[-1][0], start + len(data))
    return pack[: _HEADER.size] + table + pack[end:start] + data


def rename(source: Path, target: Path) -> None:
    """Make the folder `target` with the packs of `source`, renamed. Blocks."""
    target.mkdir()
    for pack in source.glob("*.pak"):
        (target / pack.name).write_bytes(renamed(pack.read_bytes()))
