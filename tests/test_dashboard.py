"""What the dashboard is made from: its files and what guards them, who the caller is, recorded episodes, small
pictures, and the stream that tells all of it."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import CLICK, DONE, Served, serving

from envd.app.dashboard import FILES
from envd.app.recorded import SHRUNK_AT_ONCE
from envd.drivers.base import Death
from envd.drivers.sim import Behaviour
from envd.pictures import smaller

TOKEN, READER = "t" * 20, "r" * 20
GOOD = {"Authorization": f"Bearer {TOKEN}"}
JUDGED = {"id": "t-1", "instruction": "Do it.", "config": [], "evaluator": {"func": "infeasible"}}


# -- the files ----------------------------------------------------------------------------------------------------


async def test_the_page_loads_and_runs_nothing_but_its_own_files() -> None:
    async with serving() as served:
        status, page, headers = await served.ask("GET", "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' blob: data:",
            "connect-src": "'self'",
            "frame-ancestors": "'none'",
            "base-uri": "'none'",
            "form-action": "'none'",
        }
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        named = set(re.findall(r'(?:src|href)="(/dashboard/[^"]*)"', page.decode()))
        assert {"/dashboard/main.js", "/dashboard/style.css", "/dashboard/theme.js"} <= named
        for path in named:
            assert (await served.ask("GET", path))[0] == 200, path


def test_no_file_has_an_inline_handler_or_names_another_host() -> None:
    for name, content in FILES.items():
        text = content.decode()
        assert not re.search(r"\son[a-z]+\s*=\s*[\"']", text), name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text), name
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, name
    page = FILES["index.html"].decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|<style", page)


def test_every_module_that_is_imported_is_there() -> None:
    for name, content in FILES.items():
        for module in re.findall(r'from "\./([\w.]+)"', content.decode()):
            assert module in FILES, (name, module)


async def test_a_file_is_sent_again_only_when_it_is_another() -> None:
    async with serving() as served:
        _, _, headers = await served.ask("GET", "/dashboard/main.js")
        assert headers["Content-Type"].startswith("text/javascript")
        status, body, _ = await served.ask("GET", "/dashboard/main.js", headers={"If-None-Match": headers["ETag"]})
        assert (status, body) == (304, b"")


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2F__init__.py", "__init__.py"])
async def test_nothing_else_is_below_it(name: str) -> None:
    async with serving() as served:
        status, problem, _ = await served.ask("GET", f"/dashboard/{name}")
        assert (status, problem["code"]) == (404, "not_found")


async def test_the_page_needs_no_token_and_what_it_shows_does() -> None:
    async with serving(token=TOKEN) as served:
        for path in ("/", "/dashboard/main.js", "/dashboard/style.css"):
            assert (await served.ask("GET", path))[0] == 200
            assert (await served.ask("HEAD", path))[0] == 200
            assert (await served.ask("POST", path))[0] == 401
        for path in ("/v1/events?stats=1", "/v1/whoami", "/v1/episodes/x/steps", "/v1/episodes/x/frames/0"):
            assert (await served.ask("GET", path))[0] == 401
        for path in ("//", "/dashboard", "/dashboard/"):
            assert (await served.ask("GET", path))[0] in (401, 404), path


# -- who asks -----------------------------------------------------------------------------------------------------


async def test_a_caller_is_told_who_it_is_taken_for(tmp_path: Path) -> None:
    async with serving() as served:
        assert await served.get("/v1/whoami") == (
            200,
            {"name": "127.0.0.1", "scope": "admin", "how": "open", "until": None},
        )
    file = tmp_path / "tokens"
    file.write_text(f"wall read {READER}\n")
    file.chmod(0o600)
    async with serving(token_file=file) as served:
        _, said = await served.get("/v1/whoami", headers={"Authorization": f"Bearer {READER}"})
        assert said == {"name": "wall", "scope": "read", "how": "token", "until": None}


# -- what was recorded --------------------------------------------------------------------------------------------


async def played(served: Served) -> str:
    """The id of an episode of three steps that was judged."""
    job = await served.reset(task=JUDGED)
    for prediction in (CLICK, "Thought: no action"):
        await served.post("/v1/envs/0/step", {"prediction": prediction})
    return str(job["episode_id"])


async def test_an_episode_s_steps_tell_what_was_said_and_done_and_where() -> None:
    async with serving(screen=(1920, 1080)) as served:
        episode = (await served.reset(task=JUDGED))["episode_id"]
        await served.post("/v1/envs/0/step", {"prediction": "Thought: So.\nAction: click(start_box='(966,546)')"})
        await served.post("/v1/envs/0/step", {"actions": ["pyautogui.click(3, 4)", "pyautogui.write('hi')"]})
        await served.post("/v1/envs/0/step", {"prediction": DONE})
        await served.evaluate()
        status, told = await served.get(f"/v1/episodes/{episode}/steps")
        assert status == 200
        assert told["episode"]["episode_id"] == episode
        assert told["episode"]["screen"] == [1920, 1080]
        assert (told["verdict"]["score"], told["verdict"]["status"]) == (0.0, "scored")
        first, second, third = told["steps"]
        assert first["said"].startswith("Thought: So.")
        assert first["marks"] == [{"kind": "click", "at": [960.0, 540.0], "to": None, "text": ""}]
        assert (first["actions"][0]["outcome"], first["has_frame"]) == ("ok", True)
        assert [mark["kind"] for mark in second["marks"]] == ["click", "program"]
        assert (third["done"], third["end_reason"]) == (True, "done")
        _, later = await served.get(f"/v1/episodes/{episode}/steps?after=2")
        assert [step["step"] for step in later["steps"]] == [3]


async def test_steps_that_are_long_come_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.bundle_files.STEPS_BYTES", 1000)
    async with serving() as served:
        episode = (await served.reset(task=JUDGED))["episode_id"]
        for said in ("x" * 5000, "y" * 5000, "z"):
            await served.post("/v1/envs/0/step", {"prediction": f"Thought: {said}\nAction: wait()"})
        seen: list[int] = []
        for expected in ([1], [2], [3]):
            _, told = await served.get(f"/v1/episodes/{episode}/steps?after={seen[-1] if seen else 0}")
            assert [step["step"] for step in told["steps"]] == expected
            seen += expected
            assert told["more"] is (expected != [3])


async def test_many_who_look_unpack_few_pictures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, counting = 0, 0, threading.Lock()

    def counted(picture: bytes, width: int) -> bytes:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        try:
            return smaller(picture, width)
        finally:
            with counting:
                at_once -= 1

    monkeypatch.setattr("envd.app.recorded.smaller", counted)
    async with serving(screen=(1920, 1080)) as served:
        await served.play()
        answers = await asyncio.gather(*(served.get("/v1/envs/0/screenshot?width=480") for _ in range(12)))
    assert {status for status, _ in answers} == {200}
    assert 1 <= most <= SHRUNK_AT_ONCE


async def test_a_step_that_does_not_parse_is_told_with_its_problem() -> None:
    async with serving() as served:
        episode = await played(served)
        _, told = await served.get(f"/v1/episodes/{episode}/steps")
        assert told["verdict"] is None
        assert told["steps"][1]["problem"]
        assert told["steps"][1]["marks"] == []


async def test_an_episode_s_pictures_are_had_one_by_one_large_or_small() -> None:
    async with serving(screen=(1920, 1080)) as served:
        episode = await played(served)
        status, first, headers = await served.ask("GET", f"/v1/episodes/{episode}/frames/0")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(first)).size == (1920, 1080)
        assert headers["Cache-Control"].startswith("private")
        status, small, headers = await served.ask("GET", f"/v1/episodes/{episode}/frames/1?width=240")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(small)).size == (240, 135)
        for number in ("7", "-1", "x", "0.png", "..", "²"):
            status, problem, _ = await served.ask("GET", f"/v1/episodes/{episode}/frames/{number}")
            assert (status, problem["code"]) == (404, "not_found"), number
        for path in ("steps", "frames/0"):
            assert (await served.ask("GET", f"/v1/episodes/ep-none/{path}"))[0] == 404
            assert (await served.ask("GET", f"/v1/episodes/..%2f..%2fx/{path}"))[0] == 404


async def test_a_screen_is_had_small() -> None:
    async with serving(screen=(1920, 1080)) as served:
        await served.reset()
        status, small, headers = await served.ask("GET", "/v1/envs/0/screenshot?width=480")
        assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/jpeg", "no-store")
        assert Image.open(io.BytesIO(small)).size == (480, 270)
        assert (await served.ask("GET", "/v1/envs/0/screenshot?width=x"))[0] == 422
        _, large, headers = await served.ask("GET", "/v1/envs/0/screenshot")
        assert headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(large)).size == (1920, 1080)


async def test_who_looks_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with serving() as served:
        await served.reset()
        for path in ("/dashboard/main.js", "/v1/envs/0/screenshot?width=480", "/v1/envs/7/screenshot?width=480"):
            await served.ask("GET", path)
        await served.ask("GET", "/v1/envs/0/screenshot")
    asked = [
        (record.levelname, record.__dict__["path"])
        for record in caplog.records
        if record.getMessage() == "request" and record.__dict__.get("method") == "GET"
    ]
    assert asked[-4:] == [
        ("DEBUG", "/dashboard/main.js"),
        ("DEBUG", "/v1/envs/0/screenshot"),
        ("INFO", "/v1/envs/7/screenshot"),
        ("INFO", "/v1/envs/0/screenshot"),
    ]


def test_no_picture_is_made_larger_and_what_is_none_is_refused() -> None:
    written = io.BytesIO()
    Image.new("RGB", (100, 40), "red").save(written, "JPEG")
    assert Image.open(io.BytesIO(smaller(written.getvalue(), 4000))).size == (100, 40)
    assert Image.open(io.BytesIO(smaller(written.getvalue(), 50))).size == (50, 20)
    with pytest.raises(ValueError, match="identify"):
        smaller(b"<html>", 100)


# -- the stream ---------------------------------------------------------------------------------------------------


async def test_the_stream_s_snapshot_tells_what_a_page_needs() -> None:
    async with serving(Behaviour(vnc=True), envs=2) as served:
        await played(served)
        await served.evaluate()
        async with served.stream("/v1/events?stats=1") as reader:
            first = json.loads((await reader.next()).data)
        assert {"queue", "envs", "jobs", "daemon", "stats", "host", "ended", "verdicts", "news", "lines"} == set(first)
        assert first["daemon"]["provider"] == "sim"
        assert first["stats"]["readiness"] == served.service.readiness()
        assert first["stats"]["readiness"]["ready"] is True
        assert [(job["state"], job["reset_path"]) for job in first["ended"] if job["kind"] == "reset"] == [
            ("succeeded", "cold")
        ]
        assert [(one["env"], one["status"]) for one in first["verdicts"]] == [(0, "scored")]
        assert first["envs"][0]["desktop"]["endpoints"]["vnc"]
        assert not {one["kind"] for one in first["news"]} & {"position", "probe", "phase", "progress"}


async def test_the_stream_tells_of_each_env_as_it_changes_and_of_the_host() -> None:
    async with serving(envs=2) as served, served.stream("/v1/events?stats=1") as reader:
        await reader.next()
        job = await served.reset(task=JUDGED)
        told = await reader.until(
            lambda message: message.event == "env" and json.loads(message.data)["env"]["state"] == "playing"
        )
        env = json.loads(told[-1].data)["env"]
        assert (env["id"], env["episode"]["id"], env["episode"]["instruction"]) == (0, job["episode_id"], "Do it.")
        await served.post("/v1/leases", {"owner": "alice"})
        told = await reader.until(
            lambda message: message.event == "env" and json.loads(message.data)["env"]["lease"] is not None
        )
        assert json.loads(told[-1].data)["env"]["lease"]["owner"] == "alice"
        served.desktop().die(Death("power"))
        await reader.until(lambda message: message.event == "env" and b'"lost"' in message.data.encode())
        stats = (await reader.until(lambda message: message.event == "stats" and '"host": {' in message.data))[-1]
        assert 0 <= json.loads(stats.data)["host"]["cpu"] <= 1


async def test_what_the_stream_tells_beside_the_events_is_not_in_their_log() -> None:
    async with serving() as served, served.stream("/v1/events?stats=1") as reader:
        first = await reader.next()
        stats = await reader.until(lambda message: message.event == "stats")
        assert stats[-1].id in ("", None, first.id)  # an id would be where a reader goes on
        assert {event.kind for event in served.service.events.recent()} <= {"state", "desktop", "note"}


async def test_events_of_an_env_that_is_no_more_are_told_of_and_no_env_is() -> None:
    async with serving(envs=1) as served:
        served.service.events.publish("note", env=7, message="an earlier life had eight")
        async with served.stream(f"/v1/events?stats=1&last_event_id={served.service.events.epoch}-0") as reader:
            told = await reader.until(lambda message: message.event == "stats")
        assert [json.loads(message.data)["env"] for message in told if message.event == "note"] == [7]
        assert [message for message in told if message.event == "env"] == []


async def test_other_streams_are_as_they_were() -> None:
    async with serving() as served:
        for path in ("/v1/events", "/v1/events?stats=0"):
            async with served.stream(path) as reader:
                assert set(json.loads((await reader.next()).data)) == {"queue", "envs", "jobs"}
        job = await served.reset()
        async with served.stream(f"/v1/jobs/{job['id']}/events?stats=1") as reader:
            kinds: list[Any] = [message.event for message in await reader.rest()]
        assert kinds == ["snapshot", "state"]


async def test_what_was_said_of_a_boot_is_in_the_snapshot_without_what_only_counts_on() -> None:
    async with serving(Behaviour(boot_s=60)) as served:
        _, job = await served.post("/v1/envs/0/reset", {})
        await served.in_state(job["id"], "booting")
        async with served.stream("/v1/events?stats=1") as reader:
            await reader.until(lambda message: message.event == "progress" and " 6s / " in message.data)
        async with served.stream("/v1/events?stats=1") as reader:
            lines = [line["message"] for line in json.loads((await reader.next()).data)["lines"][job["id"]]]
        assert lines[0] == "starting a simulated desktop"
        assert sum("Waiting for VM" in line for line in lines) == 1
