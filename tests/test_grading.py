"""The evaluator process: getters and metrics of desktop-env against a guest that answers, lies, hangs or is gone."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grading_desktop as desktop
import pytest
import pytest_asyncio
from grading_desktop import FakeGuest, Handler, command, fake_guest, number, rule, vm_file

from envd.errors import AssetUnavailable, EvaluationExpired, EvaluatorError, EvaluatorsMissing, GuestMisbehaved
from envd.settings import Settings, load
from envd.tasks import grading_sandbox
from envd.tasks.grading import GradeReport, GradeRequest, Graders, find_interpreter
from envd.tasks.task import Metric

pytestmark = pytest.mark.asyncio(loop_scope="module")

ODD = Path(__file__).parent / "odd_metrics.py"
LOOP = b"while True:\n    pass\n"
SECRET = "ENVD_TEST_SECRET_" + secrets.token_hex(8)


def settings_of(state_dir: Path) -> Settings:
    settings = load({}, env_file=None, provider="sim", state_dir=state_dir, evaluations=4)
    if find_interpreter(settings) is None:
        pytest.skip("the evaluators' interpreter is not there: run `make evaluators`")
    return settings


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def graders(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Graders]:
    """One evaluator process for this file: it takes seconds to start."""
    state = tmp_path_factory.mktemp("state")
    (state / "secret.txt").write_text(SECRET)
    os.environ[SECRET] = "in the daemon's environment"
    try:
        async with Graders.open(settings_of(state), [ODD]) as graders:
            await graders.warm()
            yield graders
    finally:
        del os.environ[SECRET]


@pytest_asyncio.fixture(loop_scope="module")
async def guest() -> AsyncIterator[FakeGuest]:
    async with fake_guest() as guest:
        yield guest


async def grade(graders: Graders, request: GradeRequest, deadline_s: float = 30, **cache: bytes) -> GradeReport:
    workdir = await graders.make_workdir()
    for name, content in cache.items():
        (workdir / "cache" / name.replace("_", ".")).write_bytes(content)
    report = await graders.grade(request, workdir, deadline_s)
    shutil.rmtree(workdir)
    return report


def kind_of(report: GradeReport) -> str:
    assert report.score is None, report
    assert report.failure is not None
    return report.failure.kind


# -- what a grading says ------------------------------------------------------------------------------------------


async def test_what_the_model_did_is_judged_by_the_tasks_own_evaluator(graders: Graders, guest: FakeGuest) -> None:
    expected = {"type": "cloud_file", "path": "https://example.org/gold.txt", "dest": "gold.txt"}
    metric = Metric("compare_text_file", {"type": "vm_file", "path": "/a", "dest": "a.txt"}, expected)
    guest.files["/a"] = b"text"
    right = await grade(graders, guest.request(metric), gold_txt=b"text")
    wrong = await grade(graders, guest.request(metric), gold_txt=b"other")
    assert (right.score, wrong.score) == (1.0, 0.0)
    (record,) = right.metrics
    assert (record.result, record.expected) == ({"$file": "a.txt"}, {"$file": "gold.txt"})
    assert [(call.what, call.status) for call in right.calls] == [("POST /file", 200)]
    assert right.evaluator_version.startswith("desktop-env 1.0.2")


@pytest.mark.parametrize(
    ("conj", "values", "score"),
    [
        pytest.param("and", [1, 1.0, True], 1.0, id="all"),
        pytest.param("and", [0.8, 0.4, 0.9], 0.4, id="and takes the least"),
        pytest.param("and", [1, 0, "1 / 0"], 0.0, id="and stops at the first 0"),
        pytest.param("or", [0, 0.6, 0.2], 0.6, id="or takes the most"),
        pytest.param("or", [0, 1, "1 / 0"], 1.0, id="or stops at the first 1"),
        pytest.param("and", ["__import__('numpy').float64(0.5)"], 0.5, id="a number of numpy"),
        pytest.param("and", [3.0], 1.0, id="more than 1"),
        pytest.param("and", [-0.5], 0.0, id="less than 0"),
    ],
)
async def test_how_numbers_become_one(
    graders: Graders, guest: FakeGuest, conj: Any, values: list[Any], score: float
) -> None:
    report = await grade(graders, guest.request(*map(number, values), conj=conj))
    assert report.score == score, report.failure
    assert bool(report.warnings) == any(not isinstance(v, str) and not 0 <= v <= 1 for v in values)


@pytest.mark.parametrize(
    "value", ["None", "float('nan')", "float('inf')", "'text'", "[1.0]", "1 / 0", "__import__('sys').exit(0)"]
)
async def test_what_is_no_number_never_becomes_one(graders: Graders, guest: FakeGuest, value: str) -> None:
    report = await grade(graders, guest.request(number(1), number(value)))
    assert kind_of(report) == "evaluator"
    assert report.failure is not None
    assert (report.failure.stage, report.failure.index) == ("metric", 1)
    assert isinstance(report.failure.error(), EvaluatorError)


async def test_in_an_or_a_missing_file_counts_for_its_own_metric_alone(graders: Graders, guest: FakeGuest) -> None:
    missing = Metric("number", {"type": "missing_file", "path": "/gone"})
    report = await grade(graders, guest.request(number(0.5), missing, number(0.25), conj="or"))
    assert (report.score, [record.value for record in report.metrics]) == (0.5, [0.5, 0.0, 0.25])
    assert "/gone" in report.warnings[0]


async def test_a_gold_file_that_is_missing_is_not_the_models_doing(graders: Graders, guest: FakeGuest) -> None:
    metric = Metric("number", rule(1), {"type": "missing_file", "path": "/gold"})
    assert kind_of(await grade(graders, guest.request(metric))) == "task"


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param(Metric("no_such_metric", rule(1)), id="metric"),
        pytest.param(Metric("infeasible", rule(1)), id="infeasible"),
        pytest.param(Metric("number", {"type": "no_such_getter"}), id="getter"),
    ],
)
async def test_what_does_not_exist_is_the_tasks_fault(graders: Graders, guest: FakeGuest, metric: Metric) -> None:
    assert kind_of(await grade(graders, guest.request(metric))) == "task"


async def test_a_library_that_is_not_there_fails_its_metric_by_name(graders: Graders, guest: FakeGuest) -> None:
    if "easyocr" not in (await graders.warm()).ready["absent"]:
        pytest.skip("easyocr is installed")
    guest.files["/a"] = b"no picture"
    metric = Metric("compare_image_text", {"type": "vm_file", "path": "/a", "dest": "a.png"}, rule({"type": "text"}))
    report = await grade(graders, guest.request(metric))
    assert kind_of(report) == "missing_library"
    assert report.failure is not None
    error = report.failure.error()
    assert isinstance(error, EvaluatorsMissing)
    assert re.search(r"easyocr.*pip install 'easyocr'", str(error))


async def test_relative_dates_count_from_the_reset_in_the_guests_zone(graders: Graders, guest: FakeGuest) -> None:
    rules = {"relativeTime": {"from": "tomorrow"}, "expected": {"time": "{Year}-{Month0D}-{Day0D}"}}
    metric = Metric("number", rule(1), {"type": "rule_relativeTime", "rules": rules})
    at_23_utc = 1_700_002_800.0  # 2023-11-14 23:00
    for zone, day in (("UTC", "15"), ("Asia/Tokyo", "16")):
        report = await grade(graders, guest.request(metric, now=at_23_utc, timezone=zone))
        assert report.metrics[0].expected["expected"]["time"] == f"2023-11-{day}"
    assert rules["expected"] == {"time": "{Year}-{Month0D}-{Day0D}"}


async def test_saved_values_are_judged_again_without_a_guest(graders: Graders, guest: FakeGuest) -> None:
    guest.files["/home/user/a.txt"] = b"done"
    metrics = (vm_file(), Metric("number", {"type": "large", "size": 300_000}, rule([1])))
    workdir = await graders.make_workdir()
    first = await graders.grade(guest.request(vm_file(), Metric("number", rule(1), metrics[1].result)), workdir, 30)
    assert first.score == 1.0, first.failure
    assert first.metrics[1].expected["$saved"] == "values/1-expected.json"
    asked = len(guest.asked)
    again = guest.request(vm_file(), Metric("number", rule(0), metrics[1].result), values=first.values)
    second = await graders.grade(again, workdir, 30)
    assert (second.score, second.values, len(guest.asked)) == (1.0, first.values, asked)


async def test_without_an_interpreter_it_says_how_to_get_one(tmp_path: Path, guest: FakeGuest) -> None:
    settings = load({}, env_file=None, provider="sim", state_dir=tmp_path, evaluators=tmp_path / "none")
    async with Graders.open(settings) as graders:
        report = await graders.grade(guest.request(number(1)), await graders.make_workdir(), 30)
    assert kind_of(report) == "missing_library"
    assert report.failure is not None
    assert "make evaluators" in report.failure.hint


# -- the guest ----------------------------------------------------------------------------------------------------

EXECUTE_FAULTS = [
    pytest.param(desktop.resets, id="reset"),
    pytest.param(desktop.hangs, id="hangs"),
    pytest.param(desktop.breaks_off, id="breaks off"),
    pytest.param(desktop.is_garbage, id="garbage"),
    pytest.param(desktop.is_empty, id="empty"),
    pytest.param(desktop.fails_in_html, id="500 in HTML"),
    pytest.param(desktop.redirects, id="redirect"),
]


@pytest.mark.parametrize("fault", EXECUTE_FAULTS)
async def test_a_command_whose_answer_is_lost_is_the_desktops_failure_and_sent_once(
    graders: Graders, guest: FakeGuest, fault: Handler
) -> None:
    guest.faults["/execute"] = fault
    report = await grade(graders, guest.request(command()), 4)
    assert kind_of(report) == "infra"
    assert report.failure is not None
    assert isinstance(report.failure.error(), GuestMisbehaved)
    assert guest.asked == ["/execute"]


@pytest.mark.parametrize(
    ("path", "config"),
    [
        pytest.param("/file", {"type": "vm_file", "path": "/a", "dest": "a"}, id="file"),
        pytest.param("/accessibility", {"type": "accessibility_tree"}, id="accessibility"),
        pytest.param("/terminal", {"type": "vm_terminal_output"}, id="terminal"),
        pytest.param("/list_directory", {"type": "list_directory", "path": "/"}, id="directory"),
        pytest.param("/screen_size", {"type": "vm_screen_size"}, id="screen size"),
        pytest.param("/wallpaper", {"type": "vm_wallpaper", "dest": "w.png"}, id="wallpaper"),
        pytest.param("/execute", {"type": "enable_do_not_track"}, id="a getter that hides exceptions"),
        pytest.param("/execute", {"type": "default_video_player"}, id="a getter that runs many"),
    ],
)
@pytest.mark.parametrize("fault", [desktop.resets, desktop.fails_in_html])
async def test_a_guest_that_fails_is_never_a_number(
    graders: Graders, guest: FakeGuest, path: str, config: dict[str, Any], fault: Handler
) -> None:
    guest.faults[path] = fault
    report = await grade(graders, guest.request(Metric("number", config)), 20)
    if (path, fault) == ("/file", desktop.fails_in_html):
        assert "500" in str(report.failure)
    assert kind_of(report) == "infra"


@pytest.mark.parametrize("metric", [command(), vm_file()], ids=["command", "file"])
async def test_a_guest_that_is_gone_is_the_desktops_failure(graders: Graders, metric: Metric) -> None:
    gone = FakeGuest(port=9)
    assert kind_of(await grade(graders, gone.request(metric), 20)) == "infra"


async def test_a_file_getter_that_fails_once_is_asked_again(graders: Graders, guest: FakeGuest) -> None:
    async def fails_first(request: Any) -> Any:
        del guest.faults["/file"]
        return await desktop.resets(request)

    guest.faults["/file"] = fails_first
    guest.files["/home/user/a.txt"] = b"done"
    report = await grade(graders, guest.request(vm_file()))
    assert (report.score, guest.asked) == (1.0, ["/file", "/file"])


async def test_a_file_that_the_guest_says_is_not_there_was_not_made(graders: Graders, guest: FakeGuest) -> None:
    report = await grade(graders, guest.request(vm_file()))
    assert report.score == 0.0
    assert "/home/user/a.txt" in report.warnings[0]
    assert "TypeError" in report.metrics[0].traceback


async def test_a_404_that_is_not_the_guests_own_proves_nothing(graders: Graders, guest: FakeGuest) -> None:
    async def not_found(_: Any) -> Any:
        answer = await desktop.fails_in_html(_)
        answer.set_status(404)
        return answer

    guest.faults["/file"] = not_found
    assert kind_of(await grade(graders, guest.request(vm_file()))) == "infra"


async def test_a_metric_that_raises_for_a_file_that_is_there_has_no_number(graders: Graders, guest: FakeGuest) -> None:
    guest.files["/home/user/a.txt"] = b"\xff\xfe\xff"
    assert kind_of(await grade(graders, guest.request(vm_file()))) == "evaluator"


@pytest.mark.parametrize(
    ("message", "kind"), [("No such file or directory: 'whoami'", "missing_library"), ("Command timed out", "infra")]
)
async def test_a_command_that_the_guest_cannot_run_gives_no_number(
    graders: Graders, guest: FakeGuest, message: str, kind: str
) -> None:
    from aiohttp import web

    async def cannot(_: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "error", "message": message}, status=500)

    guest.faults["/execute"] = cannot
    report = await grade(graders, guest.request(command()))
    assert kind_of(report) == kind
    assert report.failure is not None
    assert message in report.failure.message


async def test_a_file_that_was_not_put_in_place_is_named(graders: Graders, guest: FakeGuest) -> None:
    url = "https://example.org/gold.txt"
    report = await grade(
        graders, guest.request(Metric("number", rule(1), {"type": "cloud_file", "path": url, "dest": "g"}))
    )
    assert report.failure is not None
    error = report.failure.error()
    assert isinstance(error, AssetUnavailable)
    assert error.facts["url"] == url


async def test_tabs_that_cannot_be_read_are_not_no_tabs(graders: Graders, guest: FakeGuest) -> None:
    report = await grade(graders, guest.request(Metric("number", {"type": "open_tabs_info"})))
    assert kind_of(report) == "infra"
    assert "/setup/launch" in guest.asked  # the getter's own second try


async def test_vlc_that_does_not_run_is_not_playing(graders: Graders, guest: FakeGuest) -> None:
    metric = Metric("number", {"type": "vlc_playing_info", "dest": "status.xml"})
    assert kind_of(await grade(graders, guest.request(metric))) == "infra"  # pgrep found one, the answer says
    from aiohttp import web

    async def none(_: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "success", "output": "", "error": "", "returncode": 1})

    guest.faults["/execute"] = none
    report = await grade(graders, guest.request(metric))
    assert (report.score, "VLC" in report.warnings[0]) == (0.0, True)


# -- ends ---------------------------------------------------------------------------------------------------------


async def descendants(pid: int) -> dict[int, int]:
    """Each process under `pid`, with its parent."""

    def walk() -> dict[int, int]:
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = path.read_text()
            except OSError:
                continue
            parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
        found: dict[int, int] = {}
        grew = True
        while grew:
            new = {child: parent for child, parent in parents.items() if parent in {pid, *found} and child not in found}
            found |= new
            grew = bool(new)
        return found

    return await asyncio.to_thread(walk)


async def running(words: str) -> list[str]:
    """Command lines that have `words`."""

    def look() -> list[str]:
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
        return [line for line in lines if words in line]

    return await asyncio.to_thread(look)


async def until(fact: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while True:
            if await fact():
                return
            await asyncio.sleep(0.02)


async def test_a_test_suite_that_loops_ends_at_its_deadline_and_leaves_nothing(
    graders: Graders, guest: FakeGuest
) -> None:
    guest.files["/home/user/test.py"] = LOOP
    config = {"type": "vm_file", "path": "/home/user/test.py", "dest": "test.py"}
    zygote = await graders.warm()
    before = await descendants(zygote.process.pid)
    report = await grade(graders, guest.request(Metric("check_python_file_by_test_suite", rule([]), config)), 2)
    assert kind_of(report) == "timeout"
    assert report.failure is not None
    assert report.failure.stage == "metric"
    assert isinstance(report.failure.error(), EvaluationExpired)
    assert report.metrics[0].expected == {"$file": "test.py"}
    assert await descendants(zygote.process.pid) == before


@pytest.mark.parametrize("func", ["leaves_a_process", "leaves_a_process_and_loops"])
async def test_a_process_with_a_session_of_its_own_does_not_outlive_its_grading(
    graders: Graders, guest: FakeGuest, func: str
) -> None:
    length = f"{secrets.randbelow(10**9)}.5"
    report = await grade(graders, guest.request(Metric(func, rule(length))), 3)
    assert report.status == ("failed" if func.endswith("loops") else "scored")
    assert not await running(f"sleep {length}")


async def test_a_grading_that_is_cancelled_has_ended_when_the_call_comes_back(
    graders: Graders, guest: FakeGuest
) -> None:
    length = f"{secrets.randbelow(10**9)}.5"
    metric = Metric("leaves_a_process_and_loops", rule(length))
    task = asyncio.create_task(grade(graders, guest.request(metric), 60))
    await until(lambda: running(f"sleep {length}"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await running(f"sleep {length}")


@pytest.mark.parametrize(
    "position", [pytest.param(-1, id="metric"), pytest.param(-2, id="worker"), pytest.param(-3, id="keeper")]
)
async def test_kill_9_is_told_and_the_next_grading_works(graders: Graders, guest: FakeGuest, position: int) -> None:
    length = f"{secrets.randbelow(10**9)}.5"
    metric = Metric("leaves_a_process_and_loops", rule(length))
    task = asyncio.create_task(grade(graders, guest.request(metric), 60))
    await until(lambda: running(f"sleep {length}"))
    *ancestors, _sleep = await chain_with_sleep(graders)
    os.kill(ancestors[position], signal.SIGKILL)
    report = await task
    assert kind_of(report) == "killed"
    assert report.failure is not None
    assert isinstance(report.failure.error(), EvaluatorError)
    await until(lambda: gone(f"sleep {length}"))
    assert (await grade(graders, guest.request(number(1)))).score == 1.0


async def gone(words: str) -> bool:
    return not await running(words)


async def chain_with_sleep(graders: Graders) -> list[int]:
    zygote = await graders.warm()
    tree = await descendants(zygote.process.pid)
    (last,) = [pid for pid in tree if pid not in tree.values()]
    pids = [last]
    while pids[0] in tree and tree[pids[0]] != zygote.process.pid:
        pids.insert(0, tree[pids[0]])
    return pids


async def test_kill_9_of_the_warm_process_ends_what_runs_and_a_new_one_starts(
    graders: Graders, guest: FakeGuest
) -> None:
    length = f"{secrets.randbelow(10**9)}.5"
    metric = Metric("leaves_a_process_and_loops", rule(length))
    task = asyncio.create_task(grade(graders, guest.request(metric), 60))
    await until(lambda: running(f"sleep {length}"))
    warm = await graders.warm()
    warm.process.kill()
    assert kind_of(await task) == "killed"
    await until(lambda: gone(f"sleep {length}"))
    # Until then its sandbox dies around it, and what is asked of it meanwhile is killed with it.
    async with asyncio.timeout(20):
        while not warm.ended:  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.02)
    assert (await grade(graders, guest.request(number(1)))).score == 1.0


async def test_a_getter_whose_process_dies_has_no_number(graders: Graders, guest: FakeGuest) -> None:
    report = await grade(graders, guest.request(number(1), Metric("number", {"type": "process"})))
    assert kind_of(report) == "killed"
    assert report.failure is not None
    assert (report.failure.stage, report.failure.index, len(report.metrics)) == ("result", 1, 2)


# -- walls --------------------------------------------------------------------------------------------------------


async def test_nothing_of_the_daemon_can_be_seen(graders: Graders, guest: FakeGuest) -> None:
    if not await asyncio.to_thread(grading_sandbox.works):
        pytest.skip("bubblewrap does not work here")
    state = graders.directory.parent
    paths = [str(state / "secret.txt"), __file__, "/etc/shadow", "/etc/passwd", "/root/.bashrc", "/home/user"]
    seen = await grade(graders, guest.request(Metric("sees", rule(paths))))
    known = await grade(graders, guest.request(Metric("knows", rule(SECRET))))
    other = await graders.make_workdir()
    others = await grade(graders, guest.request(Metric("sees_other_gradings", rule(1))))
    shutil.rmtree(other)
    assert (seen.score, known.score, others.score) == (0.0, 0.0, 0.0)


async def test_a_metric_reaches_no_network(graders: Graders, guest: FakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        report = await grade(graders, guest.request(Metric("reaches", rule(list(listener.getsockname())))))
    assert report.score == 0.0


async def test_gradings_at_once_do_not_disturb_each_other(graders: Graders, guest: FakeGuest) -> None:
    guest.files = {f"/{n}": b"done" if n % 2 else b"no" for n in range(6)}
    reports = await asyncio.gather(*(grade(graders, guest.request(vm_file(path=f"/{n}"))) for n in range(6)))
    assert [report.score for report in reports] == [0.0, 1.0] * 3


async def test_what_evaluators_print_is_kept_and_bounded(graders: Graders, guest: FakeGuest) -> None:
    workdir = await graders.make_workdir()
    report = await graders.grade(guest.request(Metric("prints_much", rule(3000))), workdir, 30)
    assert report.score == 1.0
    assert (workdir / "log.txt").stat().st_size == 1024 * 1024
    assert report.log.endswith("x\n")
    assert len(report.log) <= 8 * 1024
    assert sorted(path.name for path in workdir.iterdir()) == ["cache", "log.txt", "values"]


async def test_without_bubblewrap_it_still_works_and_leaves_nothing(
    graders: Graders, guest: FakeGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading_sandbox, "works", lambda: False)
    length = f"{secrets.randbelow(10**9)}.5"
    settings = await asyncio.to_thread(settings_of, tmp_path / "state")
    async with Graders.open(settings, [ODD]) as plain:
        report = await grade(plain, guest.request(Metric("leaves_a_process", rule(length))))
        known = await grade(plain, guest.request(number(f"float({SECRET!r} in __import__('os').environ)")))
    assert (report.score, known.score, report.separated) == (1.0, 0.0, False), report
    assert not await running(f"sleep {length}")


@pytest.mark.parametrize(
    ("defaults", "score"),
    [
        pytest.param({"cookies": 4}, 1.0, id="done"),
        pytest.param({"has_migrated_local_network_access": True}, 0.0, id="only what Chrome writes by itself"),
    ],
)
async def test_a_desktop_that_nobody_touched_does_not_delete_its_data(
    graders: Graders, guest: FakeGuest, defaults: dict[str, Any], score: float
) -> None:
    path = "/home/user/.config/google-chrome/Default/Preferences"
    guest.outputs.append(f"{path}\n")
    guest.files[path] = json.dumps({"profile": {"default_content_setting_values": defaults}}).encode()
    metric = Metric("exact_match", {"type": "data_delete_automacally"}, {"type": "rule", "rules": {"expected": "true"}})
    assert (await grade(graders, guest.request(metric))).score == score
