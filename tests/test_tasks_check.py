"""`envd tasks check`: which files it finds, what it says of each, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from daemon_process import environment
from rich.console import Console

from envd.settings import Settings
from envd.tasks import check_report
from envd.tasks.abilities import Abilities
from envd.tasks.check import abilities_here, check, look, look_at, task_files

SHARED = Path(__file__).parents[2] / "shared" / "osworld-tasks"
NOTHING = Abilities()
LIMIT = 10_000
GOOD = {"id": "good", "instruction": "Look.", "config": [{"type": "sleep", "parameters": {"seconds": 1}}]}
BAD = {"id": "bad", "config": [{"type": "dance"}]}
FILES = [{"url": "https://files.example/a", "path": "/a"}]
RICH = {"id": "rich", "proxy": True, "config": [{"type": "download", "parameters": {"files": FILES}}]}


def write(folder: Path, **tasks: Any) -> Path:
    for name, task in tasks.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(task if isinstance(task, bytes) else json.dumps(task).encode())
    return folder


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(state_dir=folder / "state", body_limit=LIMIT, **changes)


def command(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "envd", "tasks", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(folder / "state", changes),
        cwd=folder,
    )


def test_folders_are_searched_in_order_and_no_file_is_taken_twice(tmp_path: Path) -> None:
    write(tmp_path, b=GOOD, os__z=GOOD, os__a=GOOD, **{".git__x": GOOD})
    (tmp_path / "README.md").write_text("# Tasks")
    (tmp_path / "gone.json").symlink_to("nowhere")
    found = [file.relative_to(tmp_path) for file in task_files([tmp_path / "os", tmp_path, tmp_path / "b.json"])]
    assert [str(file) for file in found] == ["os/a.json", "os/z.json", "b.json", "gone.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"{", "is not JSON", id="broken JSON"),
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param('{"id": "ä"}'.encode("latin-1"), "UTF-8", id="not UTF-8"),
        pytest.param(b"\xef\xbb\xbf{}", "BOM", id="byte order mark"),
        pytest.param(b"[]", "JSON object", id="list"),
        pytest.param(b"{}", "none of id", id="nothing in it"),
        pytest.param(b'{"email": "a", "password": "b"}', "none of id", id="settings"),
        pytest.param(b'{"chrome": ["a", "b"], "os": []}', "lists tasks", id="listing"),
        pytest.param(b"[" * 9000, "nested", id="deep"),
        pytest.param(b'{"id": ' + b"9" * 5000 + b"}", "JSON", id="huge number"),
        pytest.param(b'{"id": "a", "x": NaN}', "number that JSON has", id="NaN"),
        pytest.param(b'{"id": "a", "config": [], "config": [{}]}', "more than once", id="key twice"),
        pytest.param(b'{"id": "' + b"x" * LIMIT + b'"}', "ENVD_BODY_LIMIT", id="too large"),
    ],
)
def test_a_file_that_is_no_task_is_unsupported_and_says_why(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "task.json"
    path.write_bytes(content)
    checked = look_at(path, NOTHING, LIMIT)
    assert not checked.supported
    assert told in "; ".join(f"{problem.field}: {problem.message}" for problem in checked.problems)


def test_what_cannot_be_opened_is_a_problem_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path, told in ((tmp_path / "pipe.json", "no regular file"), (tmp_path / "none.json", "No such file")):
        (problem,) = look_at(path, NOTHING, LIMIT).problems
        assert told in problem.message


def test_listings_in_a_folder_are_passed_over_and_told_when_named(tmp_path: Path) -> None:
    write(tmp_path, good=GOOD, test_all={"os": ["good"]})
    assert [one.path.name for one in look([tmp_path], NOTHING, LIMIT)] == ["good.json"]
    assert [one.supported for one in look([tmp_path / "test_all.json"], NOTHING, LIMIT)] == [False]


@pytest.mark.parametrize(
    ("tasks", "code"),
    [
        pytest.param({"a": GOOD, "b": RICH}, 0, id="all supported"),
        pytest.param({"a": GOOD, "b": BAD}, 1, id="one is not"),
        pytest.param({}, 2, id="no files"),
        pytest.param({"list": {"os": ["a"]}}, 2, id="listings only"),
    ],
)
async def test_the_exit_code_sums_it_up(tmp_path: Path, tasks: dict[str, Any], code: int) -> None:
    assert await check([write(tmp_path, **tasks)], settings(tmp_path)) == code


async def test_a_path_that_is_not_there_is_not_a_file_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await check([tmp_path / "none"], settings(tmp_path)) == 2
    assert "No such file" in capsys.readouterr().out


async def test_json_tells_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, a=RICH, b=BAD)
    assert await check([tmp_path], settings(tmp_path), as_json=True) == 1
    rich, bad = json.loads(capsys.readouterr().out)["tasks"]
    assert rich == {
        "id": "rich",
        "path": str(tmp_path / "a.json"),
        "supported": True,
        "needs": ["internet", "proxy", "asset:https://files.example/a"],
        "problems": [],
    }
    assert (bad["id"], bad["supported"], [problem["field"] for problem in bad["problems"]]) == (
        *("bad", False),
        ["config[0].type"],
    )


def test_piped_it_is_plain_lines(tmp_path: Path) -> None:
    write(tmp_path, os__a=RICH, os__b=BAD, **{"c": {**GOOD, "id": "rich"}})
    ran = command(tmp_path, "c.json", "os", ENVD_EVALUATORS=sys.executable)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.splitlines()[:3] == ["yes  c.json", "yes  os/a.json  internet, proxy, 1 file", "no   os/b.json"]
    assert ran.stdout.splitlines()[3].startswith("     config[0].type: there is no set-up step 'dance'")
    assert ran.stdout.splitlines()[4:] == [
        "2 of 3 supported: what this server can do; programs in its desktops are not looked at."
        " Needs: internet 1, proxy 1. 1 different file. 1 id in more than one file, the first is rich."
    ]


async def test_that_there_are_no_evaluators_is_told_and_makes_no_task_unsupported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, good=GOOD)
    assert await check([tmp_path], settings(tmp_path, evaluators=tmp_path / "none")) == 0
    assert "make evaluators" in capsys.readouterr().out.splitlines()[-1]
    assert await check([tmp_path], settings(tmp_path, evaluators=Path(sys.executable))) == 0
    assert "make evaluators" not in capsys.readouterr().out


def test_paths_are_told_so_that_they_can_be_pasted(tmp_path: Path) -> None:
    write(tmp_path, **{"os__a b": GOOD, "c": GOOD})
    ran = command(tmp_path / "os", ".", "../c.json")
    assert ran.stdout.splitlines()[:2] == ["yes  'a b.json'", "yes  ../c.json"]
    ran = command(tmp_path, str(tmp_path))
    assert ran.stdout.splitlines()[0] == f"yes  {tmp_path}/c.json"


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, **{"a\x1b[31m[bold]": {"id": "x", "config": [{"type": "\x1b[0mx"}]}})
    check_report.print_report(look([tmp_path], NOTHING, LIMIT))
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "a?[31m[bold].json" in told


@pytest.mark.parametrize("table", [pytest.param(True, id="table"), pytest.param(False, id="lines for lack of room")])
def test_on_a_terminal_it_is_a_table_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: bool) -> None:
    screen = io.StringIO()
    name = "libreoffice_impress__0a0faba3-5580-44df-965d-f562a99b291c"
    path = str(tmp_path / f"{name.replace('__', '/')}.json")
    width = len(path) + (30 if table else 29)
    terminal = Console(file=screen, width=width, force_terminal=True, color_system=None, markup=False, highlight=False)
    monkeypatch.setattr(check_report, "Console", lambda **_: terminal)
    check_report.print_report(look([write(tmp_path, **{name: RICH, "b": BAD})], NOTHING, LIMIT))
    lines = screen.getvalue().splitlines()
    assert any(line.startswith("task ") for line in lines) == table
    assert not table or max(map(len, lines[:-1])) <= width
    assert any(path in line and ("internet" in line) for line in lines)


async def test_offline_only_what_is_in_the_cache_counts(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror" / "files.example"
    mirror.mkdir(parents=True)
    write(tmp_path / "tasks", rich=RICH)
    offline = settings(tmp_path, offline=True, asset_mirrors=(str(tmp_path / "mirror"),))
    assert await check([tmp_path / "tasks"], offline) == 1
    (mirror / "a").write_text("here")
    assert await check([tmp_path / "tasks"], offline) == 0


async def test_abilities_are_those_of_a_server_with_these_settings(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "easyocr"
    for folder in (python.parent, package):
        folder.mkdir(parents=True)
    python.touch(mode=0o755)
    assert not (await abilities_here(settings(tmp_path, evaluators=python))).ocr
    (package / "__init__.py").touch()
    assert (await abilities_here(settings(tmp_path, evaluators=python, proxy_file=python))).ocr


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public task files are not beside the project")
def test_public_tasks_are_all_listed(tmp_path: Path) -> None:
    ran = command(tmp_path, "--json", str(SHARED))
    tasks = json.loads(ran.stdout)["tasks"]
    assert len(tasks) == len([*SHARED.glob("*/*.json")]) > 200
    assert [task["path"] for task in tasks if task["supported"] == bool(task["problems"])] == []
    assert ran.returncode == 1
