"""`envd rescore`: the same number from the same values, or why there is none."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_bundles import settings, step, verdict

from envd.bundles import Bundles
from envd.cli.rescore import CANNOT, DIFFERENT, EQUAL, CannotRescore, rescore, unpack
from envd.models import EndReason, Provenance
from envd.settings import Settings
from envd.tasks.grading import find_interpreter

MATCH = {
    "func": "exact_match",
    "result": {"type": "vm_command_line", "command": "date"},
    "expected": {"type": "rule", "rules": {"expected": "seven"}},
}
MATCH_ANY = {
    "func": ["exact_match", "exact_match"],
    "conj": "or",
    "result": [MATCH["result"], {"type": "vm_file", "path": "/home/user/a.txt", "dest": "a.txt"}],
    "expected": [MATCH["expected"], MATCH["expected"]],
}
COMPARE = {
    "func": "compare_text_file",
    "result": {"type": "vm_file", "path": "/home/user/a.txt", "dest": "a.txt"},
    "expected": {"type": "vm_file", "path": "/home/user/b.txt", "dest": "b.txt"},
}
INFEASIBLE = {"func": "infeasible"}


@pytest.fixture
def evaluators(tmp_path: Path) -> Settings:
    """Settings of a daemon whose evaluators are installed."""
    chosen = settings(tmp_path / "other")
    if find_interpreter(chosen) is None:
        pytest.skip("the evaluators are not there; run: make evaluators")
    return chosen


def without_evaluators(tmp_path: Path) -> Settings:
    return settings(tmp_path / "other", evaluators=tmp_path / "none")


def record(index: int = 0, func: str = "exact_match", **fields: Any) -> dict[str, Any]:
    return {"index": index, "func": func, **fields}


def judged(*records: dict[str, Any], score: float | None = None, failure: str = "") -> dict[str, Any]:
    if failure:
        return {"status": "failed", "metrics": records, "failure": {"kind": "infra", "message": failure}}
    return {"status": "scored", "score": score, "metrics": records}


async def left_by(
    folder: Path,
    evaluator: Mapping[str, Any],
    score: float,
    report: Mapping[str, Any] | None = None,
    *,
    files: Mapping[str, str] | None = None,
    last: str = "DONE",
) -> Path:
    """The bundle of an episode that was judged so."""
    work = folder / "work"
    for name, content in (files or {}).items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(content)
    end = EndReason.FAIL if last == "FAIL" else EndReason.DONE
    given = verdict(score=score, raw=(score,))
    given = given.model_copy(update={"provenance": Provenance(**{**given.provenance.model_dump(), "end_reason": end})})
    async with Bundles.open(settings(folder)) as bundles:
        bundle = await bundles.begin("ep-1", task={"id": "t-1", "instruction": "x", "evaluator": evaluator}, about={})
        await bundle.step(step(1, last, end), "said")
        if report is not None:
            await bundle.grading(report, work)
        await bundle.verdict(given)
        bundle.close()
    return folder / "episodes" / "ep-1"


async def archived(folder: Path) -> Path:
    """The bundle in `folder` as it is downloaded."""
    path = folder / "ep-1.tar"
    async with Bundles.open(settings(folder)) as bundles:
        path.write_bytes(b"".join([piece async for piece in await bundles.archive("ep-1")]))
    return path


@pytest.mark.parametrize(
    ("evaluator", "last", "kept", "code"),
    [
        pytest.param(INFEASIBLE, "FAIL", 1.0, EQUAL, id="infeasible and given up"),
        pytest.param(INFEASIBLE, "DONE", 0.0, EQUAL, id="infeasible and claimed"),
        pytest.param(INFEASIBLE, "DONE", 1.0, DIFFERENT, id="infeasible and claimed, but scored"),
        pytest.param(MATCH, "FAIL", 0.0, EQUAL, id="feasible and given up"),
    ],
)
async def test_giving_up_is_judged_without_evaluators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluator: dict[str, Any], last: str, kept: float, code: int
) -> None:
    bundle = await left_by(tmp_path, evaluator, kept, last=last)
    assert await rescore(bundle, without_evaluators(tmp_path)) == code
    assert ("equal, by the rule" if code == EQUAL else "different, by the rule") in capsys.readouterr().out


@pytest.mark.parametrize("of", ["folder", "archive"])
async def test_saved_values_score_as_they_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluators: Settings, of: str
) -> None:
    report = judged(record(result="seven", expected={"expected": "seven"}, value=1.0), score=1.0)
    bundle = await left_by(tmp_path, MATCH, 1.0, report)
    given = bundle if of == "folder" else await archived(tmp_path)
    assert await rescore(given, evaluators, as_json=True) == EQUAL
    told = json.loads(capsys.readouterr().out)
    assert (told["equal"], told["kept"]["score"], told["now"]["score"]) == (True, 1.0, 1.0)
    assert "desktop-env" in told["now"]["by"]


async def test_a_number_that_the_evaluators_would_not_return_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluators: Settings
) -> None:
    report = judged(record(result="eight", expected={"expected": "seven"}, value=1.0), score=1.0)
    assert await rescore(await left_by(tmp_path, MATCH, 1.0, report), evaluators) == DIFFERENT
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["score", "1", "0"] in out
    assert ["0", "exact_match", "1.0", "0.0"] in out


async def test_files_that_getters_gave_are_judged_again(tmp_path: Path, evaluators: Settings) -> None:
    report = judged(
        record(0, "compare_text_file", result={"$file": "a.txt"}, expected={"$file": "b.txt"}, value=1.0), score=1.0
    )
    files = {"cache/a.txt": "same\n", "cache/b.txt": "same\n"}
    bundle = await left_by(tmp_path, COMPARE, 1.0, report, files=files)
    assert await rescore(await archived(tmp_path), evaluators) == EQUAL
    (bundle / "values" / "cache" / "a.txt").write_text("other\n")
    assert await rescore(bundle, evaluators) == DIFFERENT


async def test_a_file_that_the_guest_did_not_have_is_still_not_there(tmp_path: Path, evaluators: Settings) -> None:
    absent = record(1, result=None, value=0.0, traceback="TypeError")
    first = record(0, result="eight", expected={"expected": "seven"}, value=0.0)
    bundle = await left_by(tmp_path, MATCH_ANY, 0.0, judged(first, absent, score=0.0))
    assert await rescore(bundle, evaluators) == EQUAL
    alone = await left_by(tmp_path / "alone", COMPARE, 0.0, judged(record(value=0.0), score=0.0))
    assert await rescore(alone, without_evaluators(tmp_path)) == EQUAL


@pytest.mark.parametrize(
    ("report", "why"),
    [
        pytest.param(None, "no getter's value was saved", id="not graded"),
        pytest.param(judged(record(), failure="The guest hung."), "has no saved result (The guest hung.)", id="failed"),
        pytest.param(judged(failure="no getter ran"), "has no getter's value", id="nothing saved"),
        pytest.param(
            judged(record(result=[{"$repr": "<socket>"}], value=1.0), score=1.0), "cannot be saved", id="only its repr"
        ),
        pytest.param(
            judged(record(result={"$file": "gone.txt"}, value=1.0), score=1.0),
            "not in the bundle: cache/gone.txt", id="file dropped",
        ),
        pytest.param(
            judged(record(result={"$file": "../../../../etc/passwd"}, value=1.0), score=1.0), "not in the bundle",
            id="file outside",
        ),
        pytest.param(judged(record(result="seven", value=1.0), score=1.0), "make evaluators", id="no evaluators"),
        pytest.param({"metrics": 7}, "cannot be used", id="no report"),
    ],
)  # fmt: skip
async def test_what_cannot_be_judged_again_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Mapping[str, Any] | None, why: str
) -> None:
    bundle = await left_by(tmp_path, MATCH, 1.0, report)
    assert await rescore(bundle, without_evaluators(tmp_path)) == CANNOT
    assert why in capsys.readouterr().err
    assert await rescore(bundle, without_evaluators(tmp_path), as_json=True) == CANNOT
    assert why in json.loads(capsys.readouterr().out)["error"]


async def test_a_value_that_was_never_fetched_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluators: Settings
) -> None:
    """`or` stopped at the first metric, which would not be enough now."""
    report = judged(record(result="eight", expected={"expected": "seven"}, value=1.0), score=1.0)
    assert await rescore(await left_by(tmp_path, MATCH_ANY, 1.0, report), evaluators) == CANNOT
    assert "Metric 1, result:" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["nothing there", "no task", "task is no task", "torn verdict", "not an archive"])
async def test_what_is_no_bundle_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    bundle = await left_by(tmp_path, INFEASIBLE, 1.0, last="FAIL")
    if damage == "nothing there":
        bundle = tmp_path / "none"
    elif damage == "no task":
        (bundle / "task.json").unlink()
    elif damage == "task is no task":
        (bundle / "task.json").write_text('{"evaluator": 7}')
    elif damage == "torn verdict":
        (bundle / "verdict.json").write_text('{"score": 1')
    else:
        bundle = bundle / "verdict.json"
    assert await rescore(bundle, without_evaluators(tmp_path)) == CANNOT
    assert str(bundle) in capsys.readouterr().err


async def test_what_is_wrong_in_an_archive_is_told_of_the_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await left_by(tmp_path, MATCH, 1.0)
    archive = await archived(tmp_path)
    assert await rescore(archive, without_evaluators(tmp_path)) == CANNOT
    told = capsys.readouterr().err
    assert told.startswith(f"{archive} cannot be judged again: it has no evaluation.json")
    assert "envd-rescore-" not in told


async def test_a_bundle_of_a_daemon_that_was_killed_tells_by_its_last_whole_line(tmp_path: Path) -> None:
    bundle = await left_by(tmp_path, INFEASIBLE, 1.0, last="FAIL")
    (bundle / "verdict.json").unlink()
    (bundle / "episode.json").write_text('{"last_action": "DONE"}')
    with (bundle / "steps.jsonl").open("a") as file:
        file.write('{"actions": [{"action": "DO')
    assert await rescore(bundle, without_evaluators(tmp_path)) == DIFFERENT


def tar_of(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder / "made.tar"
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(member("ep-1/../../out"), id="way out"),
        pytest.param(member("/ep-1/out"), id="absolute"),
        pytest.param(member("out"), id="beside"),
        pytest.param(member("ep-1/link", tarfile.SYMTYPE, "/etc/passwd"), id="symbolic link"),
        pytest.param(member("ep-1/link", tarfile.LNKTYPE, "/etc/passwd"), id="hard link"),
        pytest.param(member("ep-1/pipe", tarfile.FIFOTYPE), id="pipe"),
        pytest.param(member("ep-1/disk", tarfile.BLKTYPE), id="device"),
    ],
)
def test_an_archive_puts_nothing_outside_of_its_folder(tmp_path: Path, odd: tarfile.TarInfo) -> None:
    archive = tar_of(tmp_path, (member("ep-1/task.json"), b"{}"), (odd, b"x"))
    with pytest.raises(CannotRescore, match="is no archive of a bundle"):
        unpack(archive, tmp_path / "in" / "bundle", 10_000)
    assert {path.name for path in tmp_path.rglob("*")} <= {"made.tar", "in", "bundle", "task.json"}


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([(member("ep-1/a"), bytes(600)), (member("ep-1/b"), bytes(600))], id="too large"),
        pytest.param([(member("ep-1/a"), b""), (member("ep-1/a"), b"")], id="twice"),
    ],
)
def test_an_archive_that_is_too_much_is_refused(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with pytest.raises(CannotRescore):
        unpack(tar_of(tmp_path, *members), tmp_path / "bundle", 1000)
