"""Getter values survive being saved: what a rescore judges is what the getter gave."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest

from envd.grader import frames, values


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([None, True, 7, 1.5, "text", {"a": ["b"]}], id="plain"),
        pytest.param({"url": ("a", b"\x00\xff"), "set": {1, 2}}, id="tuple, bytes, set"),
        pytest.param({1: "one", "$file": "no file"}, id="keys that JSON has not, or that look like ours"),
        pytest.param([datetime.datetime(2024, 2, 29, 1, 2, 3), datetime.date(2024, 2, 29)], id="dates"),
        pytest.param([math.inf, -math.inf], id="infinite"),
        pytest.param("half of a pair: \ud83d", id="surrogate"),
    ],
)
def test_what_a_getter_gave_comes_back_as_it_was(tmp_path: Path, value: Any) -> None:
    saved = values.save(value, tmp_path / "cache", tmp_path / "values" / "0-result.json")
    (message,) = frames.Frames().feed(frames.pack({"value": saved}))
    assert values.decode(message["value"], tmp_path) == value


def test_a_file_in_the_cache_is_found_where_the_cache_is_now(tmp_path: Path) -> None:
    saved = values.encode([str(tmp_path / "old" / "cache" / "a" / "b.txt")], tmp_path / "old" / "cache")
    assert values.decode(saved, tmp_path / "new") == [str(tmp_path / "new" / "cache" / "a" / "b.txt")]


def test_a_large_value_goes_to_a_file(tmp_path: Path) -> None:
    saved = values.save("x" * 300_000, tmp_path / "cache", tmp_path / "values" / "0-result.json")
    assert saved == {"$saved": "values/0-result.json", "bytes": 300_002}
    assert values.decode(saved, tmp_path) == "x" * 300_000


def test_what_cannot_be_restored_says_so(tmp_path: Path) -> None:
    with pytest.raises(values.NotRestorable, match="object object"):
        values.decode(values.encode(object(), tmp_path), tmp_path)


@pytest.mark.parametrize("saved", [{"$saved": "../secret"}, {"$file": "../../etc/passwd"}, {"$file": "/etc/passwd"}])
def test_a_saved_value_names_no_file_outside(tmp_path: Path, saved: dict[str, str]) -> None:
    with pytest.raises(values.NotRestorable):
        values.decode(saved, tmp_path)


def test_a_value_that_is_nested_without_end_is_told(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "$repr" in values.encode(endless, tmp_path)


def test_messages_arrive_whole_however_they_are_cut() -> None:
    sent: list[dict[str, Any]] = [{"a": 1}, {"b": "x" * 100}]
    data = b"".join([frames.pack(message) for message in sent])
    collected = frames.Frames()
    assert [message for byte in data for message in collected.feed(bytes([byte]))] == sent


def test_a_message_that_claims_to_be_huge_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        frames.Frames().feed(b"\xff\xff\xff\xff")
