"""A task's set-up against guests that answer as the published servers do, old and new, and as broken ones do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web
from serving import serving

from envd.drivers.sim import Behaviour
from envd.errors import Fault, SetupFailed
from envd.guest import Cdp, Guest
from envd.models import SetupOutcome, SetupRecord
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import commands, runner
from envd.tasks.setup.context import Context
from envd.tasks.task import Parameters, Step

Answer = web.Response | Callable[[Any], web.Response]
HTML_500 = "<!doctype html>\n<html lang=en>\n<title>500 Internal Server Error</title>\n"


def ran(output: str = "", error: str = "", returncode: int = 0) -> web.Response:
    return web.json_response({"status": "success", "output": output, "error": error, "returncode": returncode})


def said(text: str, status: int = 200) -> web.Response:
    """As Flask labels what a handler answers as a string."""
    return web.Response(status=status, text=text, content_type="text/html")


def refused(message: str) -> web.Response:
    return web.json_response({"status": "error", "message": message}, status=500)


def broken_down() -> web.Response:
    return said(HTML_500, 500)


@dataclass
class Played:
    """A guest server under the test's control. `answers` overrides what an endpoint answers; None breaks the
    connection, a list is used up from its start. `calls` is what it was asked, in order."""

    answers: dict[str, Any] = field(default_factory=dict)
    folders: set[str] = field(default_factory=lambda: {"/home/user", "/tmp"})
    makes_folders: bool = True
    calls: list[tuple[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def bodies(self) -> list[Any]:
        return [body for _, body in self.calls]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        body = await (self._upload(request) if path == "/setup/upload" else request.json())
        self.calls.append((path, body))
        answer = self.answers.get(path, self._usual(path, body))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = ran()
        made = answer(body) if callable(answer) else answer
        return web.Response(status=made.status, body=made.body, content_type=made.content_type)

    def _usual(self, path: str, body: Any) -> Answer:
        match path, body:
            case "/execute", {"command": ["mkdir", "-p", folder]}:
                self.folders.add(folder)
                return ran()
            case "/execute", {"command": ["wmctrl", *_]}:
                return refused("[Errno 2] No such file or directory: 'wmctrl'")
            case "/execute", _:
                return ran()
            case "/setup/upload", {"path": target, "bytes": content}:
                if not self.makes_folders and target.rpartition("/")[0] not in self.folders:
                    return broken_down()
                self.files[target] = content
                return said(f"File Uploaded: {len(content)} bytes" if self.makes_folders else "File Uploaded")
            case "/setup/launch" | "/setup/open_file" | "/setup/change_wallpaper", _:
                return said("done successfully")
            case "/setup/activate_window" | "/setup/close_window", _:
                return said("Window done successfully")
        return said("<!doctype html>\n<title>404 Not Found</title>", 404)

    async def _upload(self, request: web.Request) -> dict[str, Any]:
        assert request.content_length  # older servers do not read what is sent in chunks
        form = await request.post()
        file = form["file_data"]
        assert isinstance(file, web.FileField)
        return {"path": form["file_path"], "bytes": file.file.read()}


@asynccontextmanager
async def playing(**how: Any) -> AsyncIterator[tuple[Played, Context]]:
    """A guest, and the context of a set-up on it. `settings` are the context's, and `files` is the folder in which it
    finds what is under http://files; the rest is the guest's."""
    files = how.pop("files", "/nonexistent")
    known = {"offline": True, "state_dir": Path(files, "state"), "asset_mirrors": (f"http://files={files}",)}
    settings = Settings(provider="sim", **known | how.pop("settings", {}))
    played = Played(**how)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", played.answer)
    web_runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await web_runner.setup()
    try:
        site = web.TCPSite(web_runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{web_runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            guest, cdp, assets = Guest(session, url), Cdp(session, url), Assets(settings, session)
            yield played, Context(guest, cdp, assets, settings, session)
    finally:
        await web_runner.cleanup()


def step(kind: str, **parameters: Any) -> Step:
    return Step(kind, parameters)


async def warning_of(context: Context, one: Step) -> str:
    """The warning of a step that does not fail."""
    [record] = await runner.run([one], context)
    assert record.outcome is (SetupOutcome.WARNING if record.detail else SetupOutcome.OK)
    return record.detail


async def failure_of(context: Context, *steps: Step) -> SetupFailed:
    with pytest.raises(SetupFailed) as caught:
        await runner.run(steps, context)
    return caught.value


def outcomes(records: Any) -> list[tuple[int, str, str]]:
    return [(record.index, record.type, str(record.outcome)) for record in records]


async def test_steps_run_in_order_and_each_tells_what_became_of_it_as_it_ends() -> None:
    told: list[SetupRecord] = []
    async with playing(answers={"/execute": ran(error="no such file", returncode=1)}) as (guest, context):
        context.record = lambda record: told.append(record.model_copy(update={"detail": str(len(guest.calls))}))
        steps = [step("launch", command=["vlc"]), step("sleep", seconds=0.05), step("execute", command="cat x")]
        records = await runner.run(steps, context)
    assert outcomes(records) == [(0, "launch", "ok"), (1, "sleep", "ok"), (2, "execute", "warning")]
    assert [record.detail for record in records] == ["", "", "it ended with 1: no such file"]
    assert [record.detail for record in told] == ["1", "1", "2"]
    assert 0.05 <= records[1].seconds < 1


async def test_no_steps_are_no_records() -> None:
    async with playing() as (_, context):
        assert await runner.run((), context) == ()


async def test_a_step_that_fails_ends_the_set_up_and_says_which_and_why() -> None:
    async with playing(answers={"/setup/open_file": said("File not found: /x", 404)}) as (guest, context):
        steps = [step("launch", command="vlc"), step("sleep", seconds=0), step("open", path="/x")]
        failure = await failure_of(context, *steps, step("launch", command="gimp"))
    assert [path for path, _ in guest.calls] == ["/setup/launch", "/setup/open_file"]
    assert failure.detail.startswith("Set-up step 2 (open) failed: ")
    assert "File not found: /x" in failure.detail
    assert "not the image that the task was written for" in failure.hint
    facts = failure.facts
    assert (facts["step"], facts["step_type"], facts["cause"]) == (2, "open", "guest_misbehaved")
    assert [record["outcome"] for record in facts["records"]] == ["ok", "ok", "failed"]
    assert facts["records"][2]["detail"] == "File not found: /x"
    json.dumps(failure.problem().model_dump())


@pytest.mark.parametrize(
    ("answer", "cause", "fault", "retryable"),
    [
        pytest.param(said("File not found", 404), "guest_misbehaved", Fault.TASK, False, id="refused in text"),
        pytest.param(refused("no such program"), "guest_misbehaved", Fault.TASK, False, id="refused in JSON"),
        pytest.param(broken_down(), "guest_misbehaved", Fault.INFRA, True, id="endpoint broken down"),
        pytest.param(web.Response(status=502, text="bad gateway"), "guest_misbehaved", Fault.INFRA, True, id="gateway"),
        pytest.param(said(HTML_500), "guest_misbehaved", Fault.INFRA, True, id="page of HTML"),
        pytest.param(said(""), "guest_misbehaved", Fault.INFRA, True, id="empty"),
        pytest.param(web.Response(body=b"\x8f\x00\xff" * 9), "guest_misbehaved", Fault.INFRA, True, id="garbage"),
        pytest.param(web.json_response({}), "guest_misbehaved", Fault.INFRA, True, id="empty JSON"),
        pytest.param(web.Response(status=302), "guest_misbehaved", Fault.INFRA, True, id="redirect"),
        pytest.param(None, "guest_unreachable", Fault.INFRA, True, id="breaks off"),
    ],
)
@pytest.mark.parametrize("kind", ["launch", "open", "download", "change_wallpaper"])
async def test_whose_fault_a_step_was_is_told_by_the_guests_answer_and_nothing_is_sent_twice(
    kind: str, answer: Any, cause: str, fault: Fault, retryable: bool, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    path = {"open": "/setup/open_file", "download": "/setup/upload"}.get(kind, f"/setup/{kind}")
    files = [{"url": "http://files/a", "path": "/a"}]
    async with playing(answers={path: answer}, files=tmp_path) as (guest, context):
        failure = await failure_of(context, step(kind, command="vlc", path="/a", files=files))
    assert (failure.facts["cause"], failure.fault, failure.retryable) == (cause, fault, retryable)
    assert len(guest.calls) == 1


async def test_a_guest_that_is_gone_is_nobodys_task() -> None:
    async with playing() as (_, context):
        context.guest.url = "http://127.0.0.1:9"
        failure = await failure_of(context, step("execute", command="ls"))
    assert (failure.fault, failure.facts["cause"]) == (Fault.INFRA, "guest_unreachable")


async def test_a_step_that_overruns_its_deadline_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runner.LIMITS, "execute", 0.1)
    async with playing(answers={"/execute": 60.0}) as (_, context):
        failure = await failure_of(context, step("execute", command="sleep 60"))
    assert "was not done within 0.1 s" in failure.detail
    assert (failure.fault, failure.facts["cause"]) == (Fault.INFRA, "guest_unreachable")


@pytest.mark.parametrize("kind", ["sleep", "launch"])
async def test_the_whole_set_up_has_one_limit(kind: str) -> None:
    async with playing(answers={"/setup/launch": 60.0}, settings={"setup_timeout": 0.1}) as (_, context):
        failure = await failure_of(context, step("sleep", seconds=0), step(kind, seconds=60, command="vlc"))
    assert "0.1 s of the whole set-up" in failure.detail
    assert "ENVD_SETUP_TIMEOUT" in failure.hint
    assert (failure.fault, failure.facts["cause"], failure.facts["step"]) == (Fault.INFRA, "infra_error", 1)


async def test_a_mistake_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(context: Context, parameters: Parameters) -> str:
        raise KeyError("oops")

    monkeypatch.setitem(runner.STEPS, "sleep", wrong)
    async with playing() as (_, context):
        failure = await failure_of(context, step("sleep"))
    assert (failure.fault, failure.facts["cause"]) == (Fault.INFRA, "internal_error")
    assert "KeyError: 'oops'" in failure.detail


async def test_a_type_that_does_not_exist_fails() -> None:
    async with playing() as (_, context):
        failure = await failure_of(context, step("tidy_desktop"))
    assert (failure.fault, failure.facts["cause"]) == (Fault.TASK, "task_invalid")


async def test_a_set_up_that_is_cancelled_is_no_failure() -> None:
    async with playing() as (_, context):
        with anyio.move_on_after(0.05) as scope:
            await runner.run([step("sleep", seconds=60)], context)
        assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("command", "shell", "proxied", "launched"),
    [
        pytest.param(["google-chrome", "--new window"], False, False, ["google-chrome", "--new window"], id="list"),
        pytest.param("vlc movie.mp4", False, False, ["vlc", "movie.mp4"], id="several words"),
        pytest.param("gimp", False, False, "gimp", id="one word"),
        pytest.param("gimp a && b", True, False, "gimp a && b", id="shell"),
        pytest.param(["google-chrome"], False, True, ["google-chrome", commands.PROXY_OPTION], id="list, proxy"),
        pytest.param("google-chrome", False, True, ["google-chrome", commands.PROXY_OPTION], id="one word, proxy"),
        pytest.param(["socat"], False, True, ["socat"], id="other program, proxy"),
    ],
)
async def test_launch_starts_a_program(command: Any, shell: bool, proxied: bool, launched: Any) -> None:
    async with playing() as (guest, context):
        context.proxied = proxied
        assert await warning_of(context, step("launch", command=command, shell=shell)) == ""
    assert guest.calls == [("/setup/launch", {"command": launched, "shell": shell})]


@pytest.mark.parametrize("kind", ["execute", "command"])
@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        pytest.param(ran("out"), "", id="ran"),
        pytest.param(ran("out", "err", 3), "it ended with 3: err", id="return code"),
        pytest.param(ran("out", "", 3), "it ended with 3: out", id="return code, said on stdout"),
        pytest.param(
            refused("[Errno 2] No such file or directory: 'ls'"),
            "the guest did not run it to its end: [Errno 2] No such file or directory: 'ls'",
            id="no such program",
        ),
    ],
)
async def test_a_command_that_fails_is_a_warning(kind: str, answer: Any, warning: str) -> None:
    async with playing(answers={"/execute": answer}) as (guest, context):
        assert await warning_of(context, step(kind, command="ls")) == warning
    assert guest.bodies == [{"command": "ls", "shell": False}]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        pytest.param(broken_down(), "guest_misbehaved", id="endpoint broken down"),
        pytest.param(web.json_response({"returncode": 0}), "guest_misbehaved", id="no status"),
        pytest.param(web.json_response({"status": "success"}), "guest_misbehaved", id="no return code"),
        pytest.param(said("ok"), "guest_misbehaved", id="text"),
        pytest.param(None, "guest_unreachable", id="breaks off"),
    ],
)
async def test_a_command_of_which_nothing_is_known_is_a_failure(answer: Any, cause: str) -> None:
    async with playing(answers={"/execute": answer}) as (guest, context):
        failure = await failure_of(context, step("execute", command="ls"))
    assert (failure.fault, failure.facts["cause"], len(guest.calls)) == (Fault.INFRA, cause, 1)


async def test_what_a_guest_says_is_cut() -> None:
    async with playing(answers={"/setup/launch": refused("x" * 10_000)}) as (_, context):
        failure = await failure_of(context, step("launch", command="vlc"))
    assert failure.facts["records"][0]["detail"] == "x" * 2000
    assert len(failure.detail) < 2200


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        pytest.param("click {SCREEN_WIDTH_HALF} {SCREEN_HEIGHT_HALF}", "click 400 300", id="text"),
        pytest.param(["{SCREEN_WIDTH}x{SCREEN_HEIGHT}", "a"], ["800x600", "a"], id="list"),
        pytest.param("echo {CLIENT_PASSWORD} | sudo -S id", "echo {SCREEN_WIDTH} | sudo -S id", id="filled in once"),
        pytest.param("{OTHER} ${HOME} {}", "{OTHER} ${HOME} {}", id="no others"),
    ],
)
async def test_placeholders_of_a_command_are_filled_in(command: Any, sent: Any) -> None:
    async with playing(settings={"client_password": "{SCREEN_WIDTH}"}) as (guest, context):
        context.screen = (800, 600)
        await runner.run([step("execute", command=command, shell=True)], context)
    assert guest.bodies == [{"command": sent, "shell": True}]


@pytest.mark.parametrize(
    "until",
    [
        pytest.param({"returncode": 7}, id="return code"),
        pytest.param({"stdout": "rea"}, id="stdout"),
        pytest.param({"stderr": "nearly"}, id="stderr"),
        pytest.param({"returncode": 99, "stdout": "ready"}, id="either"),
    ],
)
async def test_a_command_with_until_is_repeated_until_a_condition_holds(
    until: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "UNTIL_PAUSE", 0.01)
    answers = [ran("no"), refused("not installed yet"), ran("ready", "nearly", 7), ran("too far")]
    async with playing(answers={"/execute": answers}) as (guest, context):
        assert await warning_of(context, step("execute", command="poll", stdout="out", until=until)) == ""
    assert len(guest.calls) == 3
    assert context.outputs == {"out": b"ready"}


async def test_until_that_never_comes_true_fails_and_tells_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "UNTIL_PAUSE", 0.01)
    monkeypatch.setattr(commands, "UNTIL_SECONDS", 0.1)
    async with playing(answers={"/execute": ran(error="not yet", returncode=1)}) as (guest, context):
        failure = await failure_of(context, step("command", command="poll", until={"returncode": 0}))
    assert failure.fault is Fault.TASK
    assert "{'returncode': 0} did not come true" in failure.detail
    assert "not yet" in failure.detail
    assert len(guest.calls) > 1


async def test_outputs_are_kept_by_the_names_the_task_gives_them() -> None:
    async with playing(answers={"/execute": ran("Ünï", "err")}) as (_, context):
        steps = [step("execute", command="x", stdout="a.out", stderr="a.err"), step("execute", command="y")]
        await runner.run(steps, context)
    assert context.outputs == {"a.out": "Ünï".encode(), "a.err": b"err"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/b", "a\\b", "a\0b", "n" * 300, 5], ids=str)
async def test_outputs_with_names_that_are_paths_are_refused_before_anything_runs(name: Any) -> None:
    async with playing() as (guest, context):
        failure = await failure_of(context, step("execute", command="x", stdout=name))
    assert (failure.fault, guest.calls, context.outputs) == (Fault.TASK, [], {})


async def test_outputs_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LARGEST_OUTPUTS", 10)
    async with playing(answers={"/execute": ran("1234567")}) as (_, context):
        assert await warning_of(context, step("execute", command="x", stdout="a")) == ""
        assert await warning_of(context, step("execute", command="x", stdout="a")) == ""
        assert "b was cut" in await warning_of(context, step("execute", command="x", stdout="b"))
    assert context.outputs == {"a": b"1234567", "b": b"123"}


async def test_a_newer_guest_verifies_by_itself() -> None:
    answer = web.json_response(
        {"status": "success", "output": "", "error": "", "returncode": 0, "verification": "passed"}
    )
    asked = {"command": ["code"], "verification": {"window_exists": "Code"}, "max_wait_time": 3}
    async with playing(answers={"/execute_with_verification": answer}) as (guest, context):
        assert await warning_of(context, step("execute_with_verification", **asked)) == ""
    assert guest.bodies == [asked | {"shell": False, "check_interval": 1.0}]


async def test_a_verification_that_a_newer_guest_denies_fails() -> None:
    answer = web.json_response(
        {"status": "verification_failed", "message": "no window", "verification": "failed"}, status=500
    )
    async with playing(answers={"/execute_with_verification": answer}) as (_, context):
        failure = await failure_of(context, step("execute_with_verification", command="code", verification={}))
    assert (failure.fault, failure.facts["records"][0]["detail"]) == (Fault.TASK, "no window")


@pytest.mark.parametrize(
    ("windows", "returncode", "passes"),
    [
        pytest.param("0x1  0 host Files\n0x2  0 host main.py - Visual Studio Code", 0, True, id="both hold"),
        pytest.param("0x1  0 host Files\n0x2  0 code", 0, False, id="no window"),
        pytest.param("0x2  0 host Visual Studio Code", 1, False, id="command fails"),
    ],
)
async def test_for_an_older_guest_we_verify(windows: str, returncode: int, passes: bool) -> None:
    def answer(body: Any) -> web.Response:
        match body["command"]:
            case ["wmctrl", "-l"]:
                return ran(windows)
            case ["timeout", "5", "sh", "-c", "pgrep code"]:
                return ran(returncode=returncode)
        assert body == {"command": "code main.py", "shell": True}
        return ran()

    verification = {"window_exists": "studio CODE", "command_success": "pgrep code"}
    asked = {"verification": verification, "max_wait_time": 0.1, "check_interval": 0.05}
    async with playing(answers={"/execute": answer}) as (_, context):
        one = step("execute_with_verification", command="code main.py", shell=True, **asked)
        if passes:
            assert await warning_of(context, one) == ""
        else:
            failure = await failure_of(context, one)
            assert (failure.fault, "did not hold within 0.1 s" in failure.detail) == (Fault.TASK, True)


LISTED = "0x1  0 host  README.txt - gedit\n0x2  0 host  Terminal\n"
CLASSES = "0x1  0 gedit.Gedit  host  README.txt - gedit\n0x2  0 gnome-terminal-server.Gnome-terminal host Terminal\n"


@pytest.mark.parametrize("kind", ["activate_window", "close_window"])
@pytest.mark.parametrize(
    ("window", "strict", "by_class", "matches"),
    [
        pytest.param("readme", False, False, True, id="part of a title"),
        pytest.param("GIMP", False, False, False, id="no title"),
        pytest.param("Terminal", True, False, True, id="whole title"),
        pytest.param("README.txt", True, False, False, id="no whole title"),
        pytest.param("gnome-terminal", False, True, True, id="part of a class"),
        pytest.param("gedit.Gedit", True, True, True, id="whole class"),
        pytest.param("gedit.gedit", True, True, False, id="no whole class"),
    ],
)
async def test_a_window_that_is_not_there_is_a_warning(
    kind: str, window: str, strict: bool, by_class: bool, matches: bool
) -> None:
    """Upstream goes on then, and there are tasks that rely on it."""
    listed = ran(CLASSES if by_class else LISTED)
    async with playing(answers={"/execute": listed}) as (guest, context):
        warning = await warning_of(context, step(kind, window_name=window, strict=strict, by_class=by_class))
    assert warning == ("" if matches else f"wmctrl lists no window {window!r}")
    assert guest.calls == [
        ("/execute", {"command": ["wmctrl", "-lx" if by_class else "-l"], "shell": False}),
        (f"/setup/{kind}", {"window_name": window, "strict": strict, "by_class": by_class}),
    ]


@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        pytest.param(said("Window activated successfully"), "", id="says the same always, and there is no wmctrl"),
        pytest.param(said("No window matched 'x', so none was activated"), "No window matched 'x'", id="says so"),
        pytest.param(said("window not found", 404), "window not found", id="answers 404"),
    ],
)
async def test_a_guest_without_wmctrl_is_believed(answer: Any, warning: str) -> None:
    async with playing(answers={"/setup/activate_window": answer}) as (_, context):
        told = await warning_of(context, step("activate_window", window_name="x"))
    assert told.startswith(warning)
    assert bool(told) is bool(warning)


async def test_a_guest_that_breaks_down_over_a_window_is_not_passed_over() -> None:
    async with playing(answers={"/setup/close_window": broken_down()}) as (_, context):
        failure = await failure_of(context, step("close_window", window_name="x"))
    assert (failure.fault, failure.facts["cause"]) == (Fault.INFRA, "guest_misbehaved")


@pytest.mark.parametrize("size", [0, 5, 3_000_000])
@pytest.mark.parametrize("makes_folders", [pytest.param(True, id="new guest"), pytest.param(False, id="old guest")])
async def test_download_brings_files_to_where_the_task_wants_them(
    size: int, makes_folders: bool, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    (tmp_path / "b").write_bytes(b"b")
    wanted = {"a": "/home/user/Désktop/new/a.bin", "b": "/tmp/b"}
    files = [{"url": f"http://files/{name}", "path": path} for name, path in wanted.items()]
    async with playing(files=tmp_path, makes_folders=makes_folders) as (guest, context):
        assert await warning_of(context, step("download", files=files)) == ""
    assert guest.files == {"/home/user/Désktop/new/a.bin": b"x" * size, "/tmp/b": b"b"}
    made = [body["command"] for path, body in guest.calls if path == "/execute"]
    assert made == ([] if makes_folders else [["mkdir", "-p", "/home/user/Désktop/new"]])


@pytest.mark.parametrize(
    ("answers", "uploads", "fault", "says"),
    [
        pytest.param(
            {"/setup/upload": broken_down(), "/execute": ran(error="Permission denied", returncode=1)},
            1,
            Fault.TASK,
            "cannot make the folder /root: Permission denied",
            id="folder forbidden",
        ),
        pytest.param({"/setup/upload": broken_down()}, 2, Fault.INFRA, "answered 500", id="no better with a folder"),
        pytest.param(
            {"/setup/upload": said("File Uploaded: 1 bytes")}, 1, Fault.INFRA, "1 of 3 bytes", id="half of it"
        ),
        pytest.param(
            {"/setup/upload": web.json_response({"error": "No space left"}, status=500)},
            1,
            Fault.TASK,
            "No space left",
            id="disk full",
        ),
    ],
)
async def test_a_file_that_does_not_arrive_fails(
    answers: Any, uploads: int, fault: Fault, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    async with playing(files=tmp_path, answers=answers) as (guest, context):
        failure = await failure_of(context, step("download", files=[{"url": "http://files/a", "path": "/root/a"}]))
    assert (failure.fault, says in failure.detail) == (fault, True), failure.detail
    assert [path for path, _ in guest.calls].count("/setup/upload") == uploads


async def test_a_file_that_cannot_be_had_is_not_the_tasks_fault(tmp_path: Path) -> None:
    async with playing(files=tmp_path) as (guest, context):
        failure = await failure_of(context, step("download", files=[{"url": "http://files/none", "path": "/tmp/a"}]))
    assert (failure.fault, failure.facts["cause"], guest.calls) == (Fault.INFRA, "asset_unavailable", [])
    assert "http://files/none" in failure.detail
    assert failure.hint


@pytest.fixture
def hosts_files(tmp_path: Path) -> Path:
    """`allowed` with a file and a link out of it, beside a file that is nobody's business."""
    allowed = tmp_path / "allowed"
    (allowed / "data").mkdir(parents=True)
    (allowed / "data" / "a.txt").write_bytes(b"abc")
    (tmp_path / "secret").write_bytes(b"s3cret")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "loop").symlink_to(allowed / "loop")
    return allowed


@pytest.mark.parametrize("local_path", ["data/a.txt", "{}/data/a.txt", "./data/../data/a.txt"])
async def test_upload_file_takes_files_from_the_operators_folders(local_path: str, hosts_files: Path) -> None:
    mirrors = ("https://mirror.example/", "/nonexistent", str(hosts_files))
    files = [{"local_path": local_path.format(hosts_files), "path": "/tmp/a"}]
    async with playing(settings={"asset_mirrors": mirrors}) as (guest, context):
        assert await warning_of(context, step("upload_file", files=files)) == ""
    assert guest.files == {"/tmp/a": b"abc"}


@pytest.mark.parametrize(
    "local_path", ["../secret", "{}/../secret", "link", "loop", "data", "/etc/passwd", "none", "", "a\0b"]
)
async def test_upload_file_takes_no_other_file_of_the_host(local_path: str, hosts_files: Path) -> None:
    files = [{"local_path": local_path.format(hosts_files), "path": "/tmp/a"}]
    async with playing(settings={"asset_mirrors": (str(hosts_files),)}) as (guest, context):
        failure = await failure_of(context, step("upload_file", files=files))
    assert (failure.fault, failure.facts["cause"], guest.calls) == (Fault.TASK, "missing_requirement", [])
    assert "ENVD_ASSET_MIRRORS" in failure.hint


@pytest.mark.parametrize(
    ("kind", "path"), [("open", "/setup/open_file"), ("change_wallpaper", "/setup/change_wallpaper")]
)
async def test_a_file_is_shown_by_the_guest(kind: str, path: str) -> None:
    async with playing() as (guest, context):
        assert await warning_of(context, step(kind, path="~/a.png")) == ""
    assert guest.calls == [(path, {"path": "~/a.png"})]


async def test_a_step_that_fails_fails_the_reset_and_its_desktop_is_not_used_again() -> None:
    async with serving([Behaviour(), Behaviour()]) as served:
        asked: list[Any] = [{"type": "launch", "parameters": {"command": "vlc"}}]
        asked += [{"type": "sleep", "parameters": {"seconds": 0}}]
        asked += [{"type": "open", "parameters": {"path": "/nowhere/at.all"}}]
        job = await served.reset(task={"id": "t-1", "config": asked})
        assert (job["state"], job["episode_id"], job["error"]["code"]) == ("failed", None, "setup_failed")
        assert (job["error"]["step"], job["error"]["step_type"]) == (2, "open")
        _, env = await served.get("/v1/envs/0")
        assert (env["state"], env["desktop"], env["episode"]) == ("empty", None, None)
        again = await served.reset(task={"config": []})
        assert again["state"] == "succeeded"
        assert again["desktop_id"] != job["desktop_id"]


async def test_a_desktop_that_dies_during_set_up_fails_the_reset_as_lost() -> None:
    async with serving(setup_attempts=1) as served:
        sleep = {"type": "sleep", "parameters": {"seconds": 600}}
        _, job = await served.post("/v1/envs/0/reset", {"task": {"config": [sleep]}})
        sleeping = await served.in_state(job["id"], "setting_up")
        served.sim.kill(sleeping["desktop_id"])
        ended = await served.ended(job["id"])
        assert (ended["state"], ended["error"]["code"], ended["error"]["fault"]) == ("failed", "desktop_lost", "infra")
