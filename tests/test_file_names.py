"""Names of files that tasks and guests choose: none leads out of the folder that it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from envd.errors import EvaluationInvalid
from envd.tasks.evaluating import Preparation
from envd.tasks.schema import Abilities, examine

OUTSIDE = ["..", ".", "../x", "../../etc/x", "/etc/passwd", "a/../../b", "a/b", "a\0b", "", "n" * 300]
GETTERS: list[tuple[str, dict[str, Any]]] = [
    ("path", {"type": "cache_file"}),
    ("dest", {"type": "vm_file", "path": "/tmp/a"}),
    ("dest", {"type": "cloud_file", "path": "https://a.example/b"}),
    ("dest", {"type": "googledrive_file", "path": ["a"]}),
    ("dest", {"type": "vlc_config"}),
    ("dest", {"type": "vm_wallpaper"}),
    ("dest", {"type": "gimp_config_file", "file_name": "a"}),
    ("file_name", {"type": "gimp_config_file", "dest": "a"}),
    ("dest", {"type": "audio_in_slide", "ppt_file_path": "/a", "slide_index": 0}),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
@pytest.mark.parametrize(("field", "getter"), [pytest.param(*one, id=f"{one[1]['type']} {one[0]}") for one in GETTERS])
def test_a_getter_keeps_its_file_under_a_plain_name(field: str, getter: dict[str, Any], name: str) -> None:
    rule = {"type": "rule", "rules": {"expected": "x"}}
    evaluator = {"func": "exact_match", "result": {**getter, field: name}, "expected": rule}
    problems = examine({"id": "t-1", "config": [], "evaluator": evaluator}, Abilities(google_drive=True)).problems
    assert f"evaluator.result.{field}" in [problem.field for problem in problems]
    fine = {**evaluator, "result": {**getter, field: "a.txt"}}
    problems = examine({"id": "t-1", "config": [], "evaluator": fine}, Abilities(google_drive=True)).problems
    assert f"evaluator.result.{field}" not in [problem.field for problem in problems]


@pytest.mark.parametrize("name", ["..", "../x", "link", "folder/x", "."])
async def test_what_is_placed_for_a_grading_stays_in_its_folder_whatever_links_are_there(
    tmp_path: Path, name: str
) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "work" / "cache"
    outside.mkdir()
    cache.mkdir(parents=True)
    (cache / "link").symlink_to(outside / "x")
    (cache / "folder").symlink_to(outside)
    preparation = Preparation(cast(Any, None), cast(Any, None), tmp_path / "work")
    with pytest.raises(EvaluationInvalid, match="outside of its own folder"):
        await preparation._place(b"planted", name)
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["cache"]
    await preparation._place(b"right", "x")
    assert (cache / "x").read_bytes() == b"right"
