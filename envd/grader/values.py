"""Getter values as JSON and back.

Plain values stay what they are. Others are objects with one key that starts with `$`: $tuple, $set, $bytes (base64),
$file (a path in the cache directory), $date, $datetime, $float (nan, inf), $dict (pairs: a mapping that is no plain
one), $saved (the value is in a file of the working directory), and $repr for what cannot be restored.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

INLINE = 256 * 1024
"""Bytes of a value in a report; a larger one goes to a file."""
LARGEST = 32 * 1024 * 1024
"""Bytes of a value that is saved."""


class NotRestorable(Exception):
    """The value was of a kind that only its repr was kept of, or was too large."""


def encode(value: Any, cache: Path) -> Any:
    """JSON of `value`. Never raises for what a getter may return."""
    try:
        return _encode(value, str(cache))
    except RecursionError:
        return {"$repr": f"<a {type(value).__name__} that is nested too deeply>"}


def save(value: Any, cache: Path, path: Path) -> Any:
    """`encode`, or a reference to `path`, which then has it, when it is large. `path` lies two levels under the
    working directory."""
    encoded = encode(value, cache)
    text = json.dumps(encoded)
    if len(text) <= INLINE:
        return encoded
    if len(text) > LARGEST:
        return {"$repr": f"<{len(text)} bytes of JSON, not kept> {text[:2000]}"}
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return {"$saved": f"{path.parent.name}/{path.name}", "bytes": len(text)}


def decode(value: Any, workdir: Path) -> Any:
    """What `encode` or `save` was given; files are in `workdir`. Raises NotRestorable."""
    if isinstance(value, list):
        return [decode(item, workdir) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, workdir) for key, item in value.items()}
    if tag == "$saved":
        return decode(json.loads(_inside(workdir, value[tag]).read_text()), workdir)
    if tag == "$file":
        return str(_inside(workdir / "cache", value[tag]))
    if tag in _DECODERS:
        return _DECODERS[tag](value[tag], workdir)
    raise NotRestorable(f"a getter's value was not kept as such: {str(value.get('$repr', value))[:300]}")


def _inside(directory: Path, name: Any) -> Path:
    path = directory / str(name)
    if not path.resolve().is_relative_to(directory.resolve()):
        raise NotRestorable(f"a saved value names a file outside of its directory: {name!r}")
    return path


def _encode(value: Any, cache: str) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return {"$file": value[len(cache) + 1 :]} if value.startswith(cache + "/") else str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list):
        return [_encode(item, cache) for item in value]
    return _encode_other(value, cache)


def _encode_other(value: Any, cache: str) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, cache) for key, item in value.items()}
        return {"$dict": [[_encode(key, cache), _encode(item, cache)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, cache) for item in value]}
    if isinstance(value, set | frozenset):
        return {"$set": [_encode(item, cache) for item in sorted(value, key=repr)]}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, datetime.datetime):
        return {"$datetime": value.isoformat()}
    if isinstance(value, datetime.date):
        return {"$date": value.isoformat()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _encode(value.item(), cache)
    return {"$repr": repr(value)[:20_000]}


_DECODERS: dict[str, Callable[[Any, Path], Any]] = {
    "$tuple": lambda items, workdir: tuple(decode(item, workdir) for item in items),
    "$set": lambda items, workdir: {decode(item, workdir) for item in items},
    "$dict": lambda pairs, workdir: {decode(key, workdir): decode(item, workdir) for key, item in pairs},
    "$bytes": lambda text, _: base64.b64decode(text),
    "$float": lambda text, _: float(text),
    "$datetime": lambda text, _: datetime.datetime.fromisoformat(text),
    "$date": lambda text, _: datetime.date.fromisoformat(text),
}
