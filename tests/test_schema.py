"""Task files: what is accepted, what is refused and by which words, and that any JSON is answered."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envd.errors import MissingRequirement, TaskInvalid
from envd.settings import Settings
from envd.tasks.catalog import EXTRA_GETTERS, EXTRA_METRICS, GETTERS, METRICS, NEEDS
from envd.tasks.needs import is_remote
from envd.tasks.schema import Abilities, evaluation_assets, examine, parse, postconfig_assets, setup_assets
from envd.tasks.task import Evaluator, Metric, Step, Task

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "osworld-tasks"
EVERYTHING = Abilities(google_drive=True, google_login=True, proxy=True, folders=("/srv/files",), ocr=True)
NOTHING = Abilities()

RULE = {"type": "rule", "rules": {"expected": "yes"}}
TYPED = {"type": "vm_command_line", "command": ["cat", "/tmp/a"]}
JUDGED = {"func": "exact_match", "result": TYPED, "expected": RULE}
FILE = {"type": "vm_file", "path": "/home/user/a.csv", "dest": "a.csv"}
CLOUD = {"type": "cloud_file", "path": "https://files.example/gold.csv", "dest": "gold.csv"}
DRIVE = {"operation": ["delete", "upload"], "args": [{"query": "x"}, {"url": "https://f.example/a", "path": ["a"]}]}
EACH_STEP: dict[str, dict[str, Any]] = {
    "download": {"files": [{"url": "https://files.example/a%20b.csv", "path": "/home/user/a.csv"}]},
    "upload_file": {"files": [{"local_path": "/srv/files/a", "path": "/home/user/a"}]},
    "change_wallpaper": {"path": "/home/user/a.png"},
    "open": {"path": "/home/user/a.csv"},
    "launch": {"command": ["google-chrome", "--remote-debugging-port=1337"], "shell": False},
    "execute": {"command": "echo {CLIENT_PASSWORD}", "shell": "true", "stdout": "out.txt", "until": {"returncode": 0}},
    "command": {"command": ["true"], "until": None, "stderr": ""},
    "execute_with_verification": {"command": ["true"], "verification": {"window_exists": "A"}, "max_wait_time": 5},
    "sleep": {"seconds": 0.5},
    "activate_window": {"window_name": "A", "strict": True, "by_class": False},
    "close_window": {"window_name": "A"},
    "proxy": {"client_password": "x"},
    "chrome_open_tabs": {"urls_to_open": ["https://a.example/", "chrome://settings"]},
    "chrome_close_tabs": {"urls_to_close": ["https://a.example/"]},
    "login": {"settings_file": "settings.json", "platform": "googledrive"},
    "googledrive": {"settings_file": "settings.yml", **DRIVE},
    "update_browse_history": {
        "history": [{"url": "https://a.example", "title": "A", "visit_time_from_now_in_seconds": 60}]
    },
}
FULL: dict[str, Any] = {
    "id": "a-task",
    "instruction": "Do it.",
    "proxy": True,
    "config": [{"type": name, "parameters": parameters} for name, parameters in EACH_STEP.items()],
    "evaluator": {
        "postconfig": [{"type": "sleep", "parameters": {"seconds": 1}}],
        "func": ["exact_match", "compare_table", "is_utc_0"],
        "conj": "or",
        "result": [TYPED, FILE, TYPED],
        "expected": [RULE, CLOUD, {}],
        "options": [None, {"rules": [{"type": "sheet_data", "sheet_idx0": 0}]}, {}],
    },
}


def configured(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"config": [{"type": kind, "parameters": parameters}]}


def judged(**changes: Any) -> dict[str, Any]:
    return {"evaluator": {**JUDGED, **changes}}


def problems(raw: dict[str, Any], abilities: Abilities = NOTHING) -> list[tuple[str, str]]:
    return [(problem.field, problem.kind) for problem in examine(raw, abilities).problems]


def test_a_task_is_read_whole() -> None:
    raw = {"id": 7, "instruction": "Do it.", "config": [{"type": "open", "parameters": {"path": "/a"}}], **judged()}
    step = Step("open", {"path": "/a"})
    assert parse(raw, NOTHING) == Task(
        raw, "7", "Do it.", (step,), Evaluator((Metric("exact_match", TYPED, RULE),), "and", ())
    )


def test_every_set_up_type_passes_with_every_parameter() -> None:
    task = parse(FULL, EVERYTHING)
    assert [step.type for step in task.steps] == list(EACH_STEP)
    # What is null was not given.
    assert task.steps[6].parameters == {"command": ["true"], "stderr": ""}


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param({}, id="nothing at all"),
        pytest.param({"id": None, "config": None, "evaluator": None}, id="nulls"),
        pytest.param({"instruction": "Look.", "config": [], "evaluator": {}}, id="empty evaluator"),
    ],
)
def test_a_task_without_an_evaluator_can_be_played(raw: dict[str, Any]) -> None:
    assert parse(raw, NOTHING).evaluator is None
    assert examine(raw, NOTHING).needs == ()


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        pytest.param({"id": ["a"]}, "id", id="id that is a list"),
        pytest.param({"task_id": "x" * 201}, "task_id", id="endless id"),
        pytest.param({"instruction": None}, "instruction", id="no instruction"),
        pytest.param({"config": "none"}, "config", id="config that is a word"),
        pytest.param({"config": [5]}, "config[0]", id="step that is a number"),
        pytest.param({"config": [{"type": "opne"}]}, "config[0].type", id="unknown step"),
        pytest.param({"config": [{"type": "tidy_desktop"}]}, "config[0].type", id="step that upstream never made"),
        pytest.param({"config": [{"type": "open"}]}, "config[0].parameters.path", id="no parameters"),
        pytest.param({"config": [{"type": "open", "parameters": []}]}, "config[0].parameters", id="parameters: list"),
        pytest.param(configured("open", path="/a", file="/b"), "config[0].parameters.file", id="unknown parameter"),
        pytest.param(configured("open", path="a\0b"), "config[0].parameters.path", id="path with a zero byte"),
        pytest.param(configured("sleep", seconds=601), "config[0].parameters.seconds", id="long sleep"),
        pytest.param(configured("sleep", seconds="1"), "config[0].parameters.seconds", id="sleep in words"),
        pytest.param(configured("launch", command=[]), "config[0].parameters.command", id="empty command"),
        pytest.param(configured("launch", command=["a", 1]), "config[0].parameters.command", id="number as a word"),
        pytest.param(
            configured("launch", command="a", shell="false"), "config[0].parameters.shell", id="false in quotes"
        ),
        pytest.param(
            configured("execute", command="a", until={"code": 0}), "config[0].parameters.until.code", id="unknown until"
        ),
        pytest.param(
            configured("execute", command="a", stdout="../a"), "config[0].parameters.stdout", id="output elsewhere"
        ),
        pytest.param(
            configured("download", files=[{"url": "https://a.example/x", "path": "/x"}, {"url": "file:///x"}]),
            "config[0].parameters.files[1].path",
            id="download to nowhere",
        ),
        pytest.param(
            configured("download", files=[{"url": "http://[::1/x", "path": "/x"}]),
            "config[0].parameters.files[0].url",
            id="url that is none",
        ),
        pytest.param(
            configured("googledrive", operation=["mkdirs"], args=[{}]),
            "config[0].parameters.args[0].path",
            id="Drive operation without its argument",
        ),
        pytest.param(
            {"evaluator": {**JUDGED, "postconfig": [{"type": "nap"}]}},
            "evaluator.postconfig[0].type",
            id="unknown step after",
        ),
        pytest.param({"evaluator": []}, "evaluator", id="evaluator that is a list"),
        pytest.param({"evaluator": {"result": TYPED}}, "evaluator.func", id="no func"),
        pytest.param(judged(func="exact_mtach"), "evaluator.func", id="unknown metric"),
        pytest.param(judged(func=[]), "evaluator.func", id="no metrics"),
        pytest.param(judged(conj="xor"), "evaluator.conj", id="unknown conj"),
        pytest.param(judged(result=None), "evaluator.result", id="no result"),
        pytest.param(judged(result=[TYPED]), "evaluator.result", id="list for one func"),
        pytest.param(judged(result={"type": "vm_fiel"}), "evaluator.result.type", id="unknown getter"),
        pytest.param(judged(result={"type": "vm_file", "path": "/a"}), "evaluator.result.dest", id="no dest"),
        pytest.param(judged(result={**FILE, "dest": "../a"}), "evaluator.result.dest", id="dest elsewhere"),
        pytest.param(judged(result={**FILE, "multi": True}), "evaluator.result.path", id="multi without lists"),
        pytest.param(
            judged(result={**FILE, "multi": True, "path": ["/a", "/b"], "dest": ["a"]}),
            "evaluator.result.dest",
            id="fewer names than paths",
        ),
        pytest.param(judged(result={**FILE, "gives": [1]}), "evaluator.result.gives[0]", id="gives what is not there"),
        pytest.param(judged(expected=None), "evaluator.expected", id="nothing to compare with"),
        pytest.param(
            {"evaluator": {"func": "is_utc_0", "result": TYPED, "expected": RULE}}, "evaluator.expected", id="too much"
        ),
        pytest.param(judged(options={"fuzzy": 1}), "evaluator.options.fuzzy", id="option that the metric has not"),
        pytest.param(judged(func="compare_table"), "evaluator.options.rules", id="option that the metric needs"),
        pytest.param(
            {"evaluator": {"func": ["exact_match"], "result": [TYPED, TYPED], "expected": [RULE]}},
            "evaluator.result",
            id="more results than funcs",
        ),
        pytest.param(
            {"evaluator": {"func": ["is_utc_0", "nonsense"], "result": [TYPED, TYPED]}},
            "evaluator.func[1]",
            id="unknown metric in a list",
        ),
        pytest.param(
            {"evaluator": {"func": ["is_utc_0", "infeasible"], "result": [TYPED, TYPED]}},
            "evaluator.func[1]",
            id="infeasible in company",
        ),
        pytest.param(
            judged(expected={"type": "rule_relativeTime", "rules": {"relativeTime": {"from": []}, "expected": {}}}),
            "evaluator.expected.rules.relativeTime.from",
            id="a day that nobody knows",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_field(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(TaskInvalid) as caught:
        parse(raw, EVERYTHING)
    assert field in [error["field"] for error in caught.value.facts["errors"]]
    assert caught.value.detail.startswith("The task cannot be used: ")


def test_a_question_ends_with_its_own_mark() -> None:
    result = {"type": "vm_command_line", "command": "ls"}
    with pytest.raises(TaskInvalid, match=r"did you mean exact_match\?$"):
        parse({"id": "a", "evaluator": {"func": "exact_mach", "result": result}}, NOTHING)


@pytest.mark.parametrize(
    ("raw", "field", "setting"),
    [
        pytest.param(configured("googledrive", **DRIVE), "config[0].type", "ENVD_GOOGLE_CREDENTIALS", id="Drive"),
        pytest.param(configured("login"), "config[0].type", "ENVD_GOOGLE_ACCOUNT", id="login"),
        pytest.param(configured("proxy"), "config[0].type", "ENVD_PROXY_FILE", id="proxy"),
        pytest.param(
            configured("upload_file", files=[{"local_path": "/a", "path": "/b"}]),
            "config[0].type",
            "ENVD_ASSET_MIRRORS",
            id="a file of the host",
        ),
        pytest.param(
            judged(result={"type": "googledrive_file", "path": ["a", "b"], "dest": "b"}),
            "evaluator.result.type",
            "ENVD_GOOGLE_CREDENTIALS",
            id="a file on Drive",
        ),
        pytest.param(judged(func="compare_image_text"), "evaluator.func", "easyocr", id="text in pictures"),
        pytest.param(judged(func="compare_xlsx_files"), "evaluator.func", "fork", id="metric of a fork"),
        pytest.param(
            judged(result={"type": "conference_city_in_order", "csv_path": "/a"}),
            "evaluator.result.type",
            "cannot work",
            id="getter that never worked",
        ),
    ],
)
def test_what_the_server_lacks_is_no_fault_of_the_file(raw: dict[str, Any], field: str, setting: str) -> None:
    with pytest.raises(MissingRequirement) as caught:
        parse(raw, NOTHING)
    assert [error["field"] for error in caught.value.facts["errors"]] == [field]
    assert setting in caught.value.detail


def test_a_wish_for_a_proxy_is_told_and_does_not_stop_the_task() -> None:
    assert problems({"proxy": True}) == []
    assert examine({"proxy": True}, NOTHING).needs == ("internet", "proxy")


def test_offline_a_file_that_is_not_in_the_cache_is_missing() -> None:
    raw = configured("download", files=[{"url": f"https://a.example/{name}", "path": "/x"} for name in "ab"])
    there = Abilities(offline=True, has_asset=lambda url: url.endswith("a"))
    assert problems(raw, there) == [("config[0].parameters.files[1].url", "missing")]
    assert problems(raw, Abilities(has_asset=lambda url: False)) == []


def test_needs_come_in_one_order_and_once() -> None:
    needs = examine(FULL, EVERYTHING).needs
    assert needs == (
        *("cdp", "internet", "proxy", "google_drive", "google_login"),
        *("asset:https://files.example/a%20b.csv", "asset:https://f.example/a", "asset:https://files.example/gold.csv"),
    )


@pytest.mark.parametrize(
    ("raw", "needs"),
    [
        pytest.param(judged(result={"type": "active_tab_info"}), {"cdp", "accessibility_tree"}, id="active tab"),
        pytest.param(judged(result={"type": "vlc_playing_info", "dest": "a"}), {"vlc_http"}, id="VLC"),
        pytest.param(judged(result={"type": "page_info", "url": "http://localhost/a"}), {"cdp"}, id="own page"),
        pytest.param(
            judged(result={"type": "page_info", "url": "https://a.example"}), {"cdp", "internet"}, id="public page"
        ),
        pytest.param(configured("launch", command="chrome https://a.example"), {"internet"}, id="page of a command"),
        pytest.param(judged(func="compare_image_text"), {"ocr"}, id="text in pictures"),
    ],
)
def test_each_need_is_found(raw: dict[str, Any], needs: set[str]) -> None:
    assert set(examine(raw, EVERYTHING).needs) == needs <= set(NEEDS)


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        *[
            (url, True)
            for url in ("https://a.example", "a.example", "a.example:80/x", "http://10.0.0.1", "http://[2::1]")
        ],
        *[
            (url, False)
            for url in ("about:blank", "chrome://settings", "file:///a", "localhost:80", "http://127.0.0.1")
        ],
        *[(url, False) for url in ("http://[::1]:80", "http://[", "", "data:text/html,x", "http://x.localhost/")],
    ],
)
def test_pages_of_the_desktop_itself_are_not_the_internet(url: str, remote: bool) -> None:
    assert is_remote(url) is remote


def test_files_are_told_apart_by_who_uses_them() -> None:
    download = {"type": "download", "parameters": {"files": [{"url": "https://f.example/after", "path": "/x"}]}}
    several = {**CLOUD, "multi": "true", "path": ["https://f.example/1", "https://f.example/2"], "dest": ["1", "2"]}
    raw = {
        **configured("download", files=[{"url": "https://f.example/before", "path": "/x"}] * 2),
        **judged(func="compare_csv", result=several, expected=CLOUD, postconfig=[download]),
    }
    task = parse(raw, NOTHING)
    assert setup_assets(task) == ("https://f.example/before",)
    assert postconfig_assets(task) == ("https://f.example/after",)
    assert evaluation_assets(task) == (
        ("https://f.example/1", "1"),
        ("https://f.example/2", "2"),
        ("https://files.example/gold.csv", "gold.csv"),
    )


def test_a_file_of_the_guest_is_never_compared_with_itself() -> None:
    raw = judged(func="diff_text_file", result=FILE, expected={**CLOUD, "dest": "a.csv"})
    task = parse(raw, NOTHING)
    assert task.evaluator is not None
    (metric,) = task.evaluator.metrics
    assert (metric.result, metric.expected) == (FILE, {**CLOUD, "dest": "cloud1_a.csv"})
    assert evaluation_assets(task) == ((CLOUD["path"], "cloud1_a.csv"),)
    assert task.raw["evaluator"]["expected"]["dest"] == "a.csv"


def test_two_files_of_the_cloud_do_not_share_a_name() -> None:
    other = {**CLOUD, "path": "https://files.example/other.csv"}
    raw = {"evaluator": {"func": ["compare_csv"] * 3, "result": [FILE] * 3, "expected": [CLOUD, other, CLOUD]}}
    assert [name for _, name in evaluation_assets(parse(raw, NOTHING))] == ["gold.csv", "cloud1_gold.csv"]


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        pytest.param({"x": float("nan")}, "x", id="NaN"),
        pytest.param({"x": [{"y": 10**30}]}, "x[0].y", id="huge number"),
        pytest.param({"x": "\ud800"}, "x", id="half a character"),
        pytest.param({"x": object()}, "x", id="no JSON"),
        pytest.param({"x": [0] * 300_000}, "", id="huge list"),
        pytest.param({"x": {str(n): {} for n in range(300_000)}}, "", id="huge object"),
        pytest.param({"config": [{"type": "open"}] * 501}, "config", id="many steps"),
    ],
)
def test_what_cannot_be_carried_is_refused_in_bounded_time(raw: dict[str, Any], field: str) -> None:
    start = perf_counter()
    assert problems(raw) == [(field, "invalid")]
    assert perf_counter() - start < 5


def test_any_depth_is_survived() -> None:
    deep: Any = "bottom"
    for _ in range(200_000):
        deep = [deep]
    assert "nested" in examine({"x": deep}, NOTHING).problems[0].message
    while isinstance(deep, list):  # or Python would take it apart by recursion
        deep = deep.pop()


def test_at_most_a_hundred_problems_are_told_and_five_in_words() -> None:
    with pytest.raises(TaskInvalid) as caught:
        parse({"config": [{"type": "open", "parameters": {f"x{n}": 1 for n in range(150)}}] * 100}, NOTHING)
    assert len(caught.value.facts["errors"]) == 100
    assert caught.value.detail.count(";") < 20
    assert "and 95 more" in caught.value.detail


def test_abilities_follow_the_settings(tmp_path: Path) -> None:
    settings = Settings(
        google_credentials=tmp_path,
        google_account=tmp_path,
        proxy_file=tmp_path,
        offline=True,
        asset_mirrors=("https://mirror.example", "/srv/files"),
    )
    assert Abilities.of(Settings()) == NOTHING
    assert Abilities.of(settings, ocr=True) == Abilities(True, True, True, ("/srv/files",), True, None, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
VALUES = JSON | st.sampled_from([*METRICS, *GETTERS, *EACH_STEP, "true", "https://a.example", "../a", 0, 1, [], {}])


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in list(keys) for place in ((value, key), *places(value[key]))]


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    task: dict[str, Any] = copy.deepcopy(
        draw(st.sampled_from([FULL, {"config": [], **judged()}, {**judged(result=FILE, expected=CLOUD)}]))
    )
    for _ in range(draw(st.integers(1, 4))):
        found = places(task)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.sampled_from(["replace", "delete", "repeat"])):
            case "replace":
                container[key] = draw(VALUES)
            case "delete":
                del container[key]
            case "repeat" if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case _:
                container[draw(st.text(max_size=4))] = container[key]
        if not task:
            break
    return task


@given(mutations() | st.dictionaries(st.sampled_from(["id", "config", "evaluator", "instruction", "x"]), JSON))
def test_any_file_gives_a_task_or_says_why_not(raw: dict[str, Any]) -> None:
    before = repr(raw)
    outcome = task_or_error(raw, NOTHING)
    if isinstance(outcome, Task):
        assert len(outcome.hash) == 64
        assert {url[:4] for url in (*setup_assets(outcome), *postconfig_assets(outcome))} <= {"http"}
    else:
        assert 1 <= len(outcome.facts["errors"]) <= 100
        assert json.dumps(outcome.problem().model_dump(mode="json"), allow_nan=False)
    assert repr(raw) == before


@given(mutations())
def test_what_the_lists_promise_holds_for_every_task(raw: dict[str, Any]) -> None:
    task = examine(raw, EVERYTHING).task
    if task is None:
        return
    assert json.loads(json.dumps(task.raw)) == task.raw
    again = examine(json.loads(json.dumps(dict(reversed(raw.items())))), EVERYTHING).task
    assert again is not None
    assert (again.hash, again.steps, again.evaluator) == (task.hash, task.steps, task.evaluator)
    by_name = [name for _, name in evaluation_assets(task)]
    assert len(by_name) == len(set(by_name))
    assert not any("/" in name or name in ("", ".", "..") for name in by_name)


def task_or_error(raw: dict[str, Any], abilities: Abilities) -> Task | TaskInvalid | MissingRequirement:
    try:
        return parse(raw, abilities)
    except (TaskInvalid, MissingRequirement) as error:
        return error


def test_the_tables_say_what_the_evaluators_have() -> None:
    """Names, and how many arguments a metric takes, against the package itself."""
    packages = sorted(ROOT.glob(".venv*/lib/python*/site-packages/desktop_env/evaluators"))
    if not packages:
        pytest.skip("desktop-env is in no .venv* of this folder; make evaluators puts it there")
    getters = exported(packages[0] / "getters")
    metrics = exported(packages[0] / "metrics")
    assert {name.removeprefix("get_") for name in getters} == GETTERS.keys() - EXTRA_GETTERS
    assert metrics.keys() | {"infeasible"} == METRICS.keys() - EXTRA_METRICS
    for name, function in metrics.items():
        arguments, metric = function.args, METRICS[name]
        assert len(arguments.args) - len(arguments.defaults) == (2 if metric.compares else 1), name
        assert (arguments.kwarg is None) == (metric.options is not None), name
        assert (metric.options or set()) <= {argument.arg for argument in arguments.args}, name


def exported(package: Path) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for line in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(line, ast.ImportFrom):
            module = ast.parse((package / f"{line.module}.py").read_text())
            functions = {item.name: item for item in module.body if isinstance(item, ast.FunctionDef)}
            found |= {alias.name: functions[alias.name] for alias in line.names}
    return found


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public task files are not beside the project")
def test_public_tasks_lack_nothing_but_google() -> None:
    found = [examine(json.loads(path.read_text()), NOTHING) for path in sorted(SHARED.glob("*/*.json"))]
    assert len(found) > 200
    assert [one for one in found if one.task is None] == []
    unsupported = [one for one in found if one.problems]
    assert [one for one in unsupported if "google_drive" not in one.needs] == []
    assert len(unsupported) == len([one for one in found if {"google_drive", "google_login"} & set(one.needs)])
