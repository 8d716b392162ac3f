"""The log as the daemon serves it: its last lines, those that follow, and who may see which; `envd logs`; and what a
line says that it is about."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from daemon_process import DaemonProcess, daemon, ended_job, environment, reset
from rich.console import Console
from serving import eventually, serving

from envd import Client, log
from envd.app import logs
from envd.app.sse import PIECE
from envd.cli.logs import logs as show
from envd.cli.logs import moment, rendered
from envd.drivers.sim import Behaviour
from envd.errors import EnvdError, RequestError
from envd.telemetry.about import gathered, note
from envd.telemetry.lines import LONGEST, Keeper, Line, Lines, Wanted

ADMIN, READ = "a" * 32, "r" * 32
QUICK = {"ENVD_SCREEN": "320x240", "ENVD_SETTLE_QUIET": "0", "ENVD_LOG_FORMAT": "json"}
EVERYTHING = Wanted(private=True)


# -- the ring ---------------------------------------------------------------------------------------------------------


def kept(*facts: dict[str, Any], most: int = 100) -> Lines:
    lines = Lines(most)
    for one in facts:
        lines.keep(one, "envd.test", logging.INFO)
    return lines


def events(lines: list[Line]) -> list[str]:
    return [json.loads(line.text)["event"] for line in lines]


def test_the_newest_lines_are_kept_and_numbered_for_ever() -> None:
    lines = kept(*({"event": str(number)} for number in range(10)), most=3)
    found, reached = lines.after(0, EVERYTHING)
    assert events(found) == ["7", "8", "9"]
    assert [json.loads(line.text)["id"] for line in found] == [f"{lines.life}-{number}" for number in (8, 9, 10)]
    assert reached == 10
    assert events(lines.after(lines.number_of(f"{lines.life}-9"), EVERYTHING)[0]) == ["9"]


def test_long_lines_are_kept_within_a_bound_of_their_own() -> None:
    lines = Lines(1000, characters=3 * LONGEST)
    for number in range(100):
        lines.keep({"event": str(number), "data": "x" * 10 * LONGEST}, "envd.test", logging.INFO)
        held, reached = lines.after(0, EVERYTHING)
        assert sum(len(line.text) for line in held) <= 3 * LONGEST
    assert events(held)[-1] == "99"
    assert reached == 100
    lines.keep({"event": "short"}, "envd.test", logging.INFO)
    assert events(lines.after(reached, EVERYTHING)[0]) == ["short"]
    assert lines.after(5000, EVERYTHING) == ([], 5000)


def test_who_follows_looks_at_what_is_new_alone() -> None:
    class Counting(Wanted):
        def has(self, line: Line) -> bool:
            looked.append(line.number)
            return super().has(line)

    looked: list[int] = []
    lines = kept(*({"event": "old"} for _ in range(100)), {"event": "new"})
    lines.after(100, Counting())
    assert looked == [101]


@pytest.mark.parametrize("line_id", ["", "other-3", "x", "-5", f"{'9' * 30}", "a-²"])
def test_a_line_of_another_life_is_before_all_of_this_one(line_id: str) -> None:
    assert kept({"event": "one"}).number_of(line_id) == 0


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        pytest.param(Wanted(env=1), ["one"], id="env"),
        pytest.param(Wanted(job="job-2"), ["two"], id="job"),
        pytest.param(Wanted(episode="ep-3"), ["three"], id="episode"),
        pytest.param(Wanted(since=float("inf")), [], id="since"),
        pytest.param(Wanted(level=logging.WARNING), [], id="level"),
        pytest.param(Wanted(), ["one", "two", "three"], id="all that everybody may see"),
        pytest.param(Wanted(private=True), ["one", "two", "three", "where", "who", "whose"], id="all"),
    ],
)
def test_lines_are_found_by_what_they_are_about(wanted: Wanted, found: list[str]) -> None:
    lines = kept(
        {"event": "one", "env": 1},
        {"event": "two", "job_id": "job-2", "env": 2},
        {"event": "three", "episode_id": "ep-3"},
        {"event": "where", "address": "10.0.0.1"},
        {"event": "who", "caller": "10.0.0.1", "env": 1},
        {"event": "whose", "caller": "2001:db8::1", "env": 1},
    )
    assert events(lines.after(0, wanted)[0]) == found


def test_a_line_that_is_too_long_is_cut_and_says_what_it_was_about() -> None:
    (line,), _ = kept({"event": "long", "env": 4, "job_id": "job-4", "data": "x" * 3 * LONGEST}).after(0, EVERYTHING)
    told = json.loads(line.text)
    assert (told["event"], told["env"], told["job_id"]) == ("long", 4, "job-4")
    assert len(line.text) < 2 * LONGEST
    assert line.env == 4


def test_a_line_is_json_whatever_was_logged() -> None:
    (line,), _ = kept({"event": "odd\nline", "nan": float("nan"), "text": "\ud800", "thing": object}).after(
        0, EVERYTHING
    )
    assert "\n" not in line.text
    assert json.loads(line.text, parse_constant=pytest.fail)["nan"] == "NaN"
    line.text.encode()


async def test_who_follows_is_told_of_lines_that_other_threads_log() -> None:
    lines = kept({"event": "before"})
    following = lines.follow(0, EVERYTHING, idle=20)
    async with asyncio.timeout(10):
        assert events(await anext(following)) == ["before"]
        thread = threading.Thread(target=lines.keep, args=({"event": "after"}, "envd.test", logging.INFO))
        waiting = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        thread.start()
        assert events(await waiting) == ["after"]
    await following.aclose()
    lines.keep({"event": "nobody listens"}, "envd.test", logging.INFO)


async def test_silence_is_told_too() -> None:
    following = kept().follow(0, EVERYTHING, idle=0.01)
    async with asyncio.timeout(10):
        assert await anext(following) == []
    await following.aclose()


# -- what a request is about ------------------------------------------------------------------------------------------


def test_facts_are_gathered_for_the_request_that_is_served_alone() -> None:
    note(env=9)
    with gathered() as facts:
        note(env=1, job_id=None)
        note(job_id="j" * 1000)
    note(env=2)
    assert facts == {"env": 1, "job_id": "j" * 200}


def of(caplog: pytest.LogCaptureFixture, event: str, **facts: Any) -> list[dict[str, Any]]:
    """The lines with that text and these facts, at least."""
    found = [record.__dict__ for record in caplog.records if record.getMessage() == event]
    return [one for one in found if facts.items() <= one.items()]


async def test_a_request_s_line_and_headers_say_what_it_was_about(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(envs=2) as served:
        _, job, headers = await served.ask("POST", "/v1/envs/1/reset", {}, headers={"X-Request-Id": "reset-1"})
        assert (headers["Envd-Job"], headers["Envd-Env"], headers["X-Request-Id"]) == (job["id"], "1", "reset-1")
        job = await served.ended(job["id"])
        _, _, headers = await served.ask("GET", f"/v1/jobs/{job['id']}")
        about = [headers[name] for name in ("Envd-Job", "Envd-Episode", "Envd-Desktop")]
        assert about == [job["id"], job["episode_id"], job["desktop_id"]]
        how = {"headers": {"X-Request-Id": "step-1"}}
        _, _, headers = await served.ask("POST", "/v1/envs/1/step", {"actions": ["DONE"]}, **how)
        assert headers["Envd-Episode"] == job["episode_id"]
        await served.ask("POST", "/v1/envs/1/step", {"actions": ["DONE"]}, headers={"X-Request-Id": "step-2"})
    (line,) = of(caplog, "request", request_id="reset-1")
    assert (line["env"], line["job_id"], line["caller"], line["status"]) == (1, job["id"], "127.0.0.1", 202)
    (line,) = of(caplog, "request", request_id="step-1")
    assert (line["env"], line["episode_id"], line["desktop_id"]) == (1, job["episode_id"], job["desktop_id"])
    (line,) = of(caplog, "request", request_id="step-2")
    assert (line["status"], line["code"], line["fault"]) == (409, "episode_over", "client")
    assert "ended" in line["detail"]
    (line,) = of(caplog, "step")
    assert (line["request_id"], line["episode_id"]) == ("step-1", job["episode_id"])
    assert of(caplog, "reset queued", request_id="reset-1", job_id=job["id"])
    assert of(caplog, "reset succeeded", job_id=job["id"], episode_id=job["episode_id"], env=1)


async def test_an_event_says_which_request_caused_it() -> None:
    async with serving() as served:
        await served.ask("POST", "/v1/envs/0/reset", {}, headers={"X-Request-Id": "cause-1"})
        await eventually(lambda: served.service.env(0).state == "playing")
        found = {event.data.get("state") or event.kind: event.request_id for event in served.service.events.recent()}
        queued = next(event for event in served.service.events.recent() if event.kind == "state")
    assert queued.request_id == "cause-1"
    assert found["ready"] is None


async def test_a_header_never_has_what_a_stranger_sent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as served:
        _, _, headers = await served.ask("GET", "/v1/jobs/made%0d%0aup:%20x")
    assert "Envd-Job" not in headers
    (line,) = of(caplog, "request")
    assert line["path"] == "/v1/jobs/made%0D%0Aup:%20x"
    assert "job_id" not in line
    assert line["detail"].isprintable()


async def test_a_lease_is_told_of_by_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as served:
        _, lease = await served.post("/v1/leases", {})
        await served.post("/v1/envs/0/reset", {}, headers={"X-Lease": lease["id"]})
        await served.get(f"/v1/leases/{lease['id']}")
    lines = [line for line in of(caplog, "request") if "lease" in line]
    assert len(lines) == 2
    assert {line["lease"] for line in lines} == {lease["id"][:10]}


async def test_whoever_reads_the_log_cannot_use_a_lease_that_it_tells_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as served:
        _, lease = await served.post("/v1/leases", {})
        for path in (lease["id"], lease["id"].replace("e", "%65"), f"{lease['id']}/renew", f"{lease['id']}//odd"):
            await served.ask("POST", f"/v1/leases/{path}", {})
        await served.ask("DELETE", f"/v1/leases/{lease['id']}")
    lines = [record.__dict__ for record in caplog.records if record.name.startswith("envd")]
    assert f"/v1/leases/{lease['id'][:10]}…/renew" in {line.get("path") for line in lines}
    assert {line["msg"] for line in lines} >= {"request", "audit"}
    assert [line for line in lines if lease["id"] in repr({**line, "detail": ""})] == []


async def test_a_websocket_is_a_request_that_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(Behaviour(vnc=True)) as served:
        await served.play()
        path = "/v1/envs/0/vnc/websockify"
        async with served.http.ws_connect(served.url + path, headers={"X-Request-Id": "look-1"}) as viewer:
            assert viewer._response.headers["X-Request-Id"] == "look-1"
            await viewer.receive()
        await eventually(lambda: bool(of(caplog, "request", request_id="look-1")))
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await served.http.ws_connect(f"{served.url}/v1/envs/7/vnc/websockify")
        _, body = await served.get("/metrics")
    (line,) = of(caplog, "request", request_id="look-1")
    assert (line["method"], line["path"], line["status"], line["env"]) == ("WEBSOCKET", path, 101, 0)
    (refused,) = of(caplog, "request", method="WEBSOCKET", status=404)
    assert refused["code"] == "unknown_env"
    assert b'envd_http_requests_total{method="WEBSOCKET",route="/v1/envs/{env}/vnc/{path}",status="101"} 1.0' in body


# -- over HTTP --------------------------------------------------------------------------------------------------------


async def fetch(session: aiohttp.ClientSession, url: str, token: str = "", **query: str) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with session.get(f"{url}/v1/logs", params=query, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "application/x-ndjson"
        return [json.loads(line) for line in (await answer.text()).splitlines()]


async def test_the_last_lines_are_served_by_what_they_are_about(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env={**QUICK, "ENVD_ENVS": "2"}) as (process, session):
        url = process.url
        job = await ended_job(session, url, (await reset(session, url, 1))["id"])
        await ended_job(session, url, (await reset(session, url, 0))["id"])
        every = await fetch(session, url, limit="5000")
        by_job = await fetch(session, url, job=job["id"])
        by_env = await fetch(session, url, env="1")
        by_episode = await fetch(session, url, episode=job["episode_id"])
        warned = await fetch(session, url, level="warning")
        newest = await fetch(session, url, limit="2")
        later = await fetch(session, url, after=every[-1]["id"])
        none = await fetch(session, url, since=f"{time.time() + 100:.3f}")
        async with session.get(f"{url}/v1/logs", params={"level": "loud"}) as refused:
            assert (refused.status, (await refused.json())["code"]) == (422, "invalid_request")
    assert {line["job_id"] for line in by_job} == {job["id"]}
    assert "reset succeeded" in [line["event"] for line in by_job]
    assert {line["env"] for line in by_env} == {1}
    assert "episode began" in [line["event"] for line in by_episode]
    assert {line["level"] for line in warned} <= {"warning", "error"}
    assert len(newest) == 2
    assert [line["event"] for line in later] == ["request"] * len(later)
    assert none == []
    # What stderr has is what is kept, but for what came since, and the ids.
    texts = [json.loads(line)["event"] for line in process.log]
    assert [line["event"] for line in every] == texts[: len(every)]


async def test_where_somebody_is_and_what_they_changed_is_told_to_admins_alone(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"watcher read {READ}\n")
    tokens.chmod(0o600)
    given = {**QUICK, "ENVD_TOKEN": ADMIN, "ENVD_TOKEN_FILE": str(tokens)}
    async with daemon(tmp_path / "state", env=given) as (process, session):
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with session.post(f"{process.url}/v1/prewarm", headers=headers) as answer:
            assert answer.status == 202
        async with session.get(f"{process.url}/v1/logs") as answer:
            assert answer.status == 401
        seen = await fetch(session, process.url, READ)
        all_of_it = await fetch(session, process.url, ADMIN)
    assert {"audit", "refused"} <= {line["event"] for line in all_of_it}
    assert not {"audit", "refused"} & {line["event"] for line in seen}
    assert not any("address" in line for line in seen)
    assert any(line["event"] == "request" and line.get("caller") == "ENVD_TOKEN" for line in seen)


@asynccontextmanager
async def kept_in_process() -> AsyncIterator[None]:
    """As `log.setup` has it, for a daemon in this process."""
    keeper = Keeper(log.LINES)
    keeper.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[keeper.take]))
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(keeper)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(keeper)
        root.setLevel(before)


async def lines_of(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in answer.content:
        if line.strip():
            yield json.loads(line)["event"]


async def test_lines_are_followed_until_the_daemon_ends_and_counted_among_the_streams() -> None:
    async with kept_in_process(), serving(max_streams=1, heartbeat=0.1) as served:
        async with asyncio.timeout(20), served.http.get(f"{served.url}/v1/logs?follow=1") as answer:
            assert answer.status == 200
            following = lines_of(answer)
            assert served.service.streams == 1
            assert (await served.get("/v1/logs?follow=1"))[1]["code"] == "too_many_watchers"
            async with served.http.get(f"{served.url}/v1/logs") as once:
                assert once.status == 200
            logging.getLogger("envd.test").warning("come and see")
            while await anext(following) != "come and see":
                pass
            await served.service.drain()
            rest = [line async for line in following]
        assert "come and see" not in rest
        await eventually(lambda: served.service.streams == 0)
        assert (await served.get("/v1/logs?follow=1"))[1]["code"] == "draining"


async def test_to_a_reader_that_does_not_read_only_a_little_is_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("envd.app.logs.SEND_LIMIT", 0.5)
    sent = 0

    def counting(lines: list[Line]) -> Iterator[bytes]:
        nonlocal sent
        for piece in packed(lines):
            assert len(piece) < 2 * LONGEST + PIECE
            sent += len(piece)
            yield piece

    def ended(name: str) -> bool:
        return bool(of(caplog, "request", request_id=name))

    packed = logs._packed
    async with kept_in_process(), serving() as served:
        for _ in range(400):
            logging.getLogger("envd.test").info("x" * (LONGEST - 1000))
        async with served.http.get(f"{served.url}/v1/logs?limit=5000") as answer:
            told = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert sum(line["event"].startswith("xxx") for line in told) == 400
        monkeypatch.setattr(logs, "_packed", counting)
        for query in ("limit=5000&follow=1", "limit=5000"):
            sent = 0
            small = socket.socket()
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.setblocking(False)
            async with asyncio.timeout(30):
                await asyncio.get_running_loop().sock_connect(small, served.address)
                reader, writer = await asyncio.open_connection(sock=small, limit=1)
                name = query.replace("=", ".").replace("&", ".")
                request = f"GET /v1/logs?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: {name}\r\n\r\n"
                writer.write(request.encode())
                await reader.read(1)
                # The other end has room for some, and is cut off when it takes no more.
                await eventually(partial(ended, name))
            assert sent < 4_900_000
            writer.transport.abort()


async def test_an_answer_that_was_not_read_does_not_end_as_if_it_were_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.app.logs.SEND_LIMIT", 0.05)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.Event().wait()

    lines, _ = kept({"event": "one"}).after(0, EVERYTHING)
    async with asyncio.timeout(10):
        await logs._tell(lines, send)
    assert [message["more_body"] for message in sent] == [True]


async def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    async with kept_in_process(), serving() as served:
        async with served.http.get(f"{served.url}/v1/logs?follow=1") as answer:
            await answer.content.readany()
        await eventually(lambda: served.service.streams == 0)
        assert log.LINES._waiting == set()


# -- the command ------------------------------------------------------------------------------------------------------


async def envd(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "envd",
        *arguments,
        env=environment(folder / "state", settings),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_prints_lines_that_people_and_programs_can_read(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, session):
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
        url = {"ENVD_URL": process.url}
        code, out, err = await envd(tmp_path, "logs", "--job", job["id"], **url)
        assert (code, err) == (0, "")
        assert "reset succeeded" in out
        assert all(f"job_id={job['id']}" in line for line in out.splitlines())
        code, out, _ = await envd(tmp_path, "logs", "--json", "--limit", "3", "--since", "10m", "--env", "0", **url)
        assert code == 0
        assert len([json.loads(line) for line in out.splitlines()]) == 3
        code, _, err = await envd(tmp_path, "logs", "--since", "yesterday", **url)
        assert code == 2
        assert "10m" in err
        code, _, err = await envd(tmp_path, "logs", "--level", "loud", **url)
        assert code == 2
        assert "warning" in err


class Screen:
    """What a command has printed so far."""

    def __init__(self) -> None:
        self.file = StringIO()
        self.console = Console(file=self.file, width=200)

    async def shows(self, wanted: Callable[[str], bool]) -> None:
        async with asyncio.timeout(40):
            while not wanted(self.file.getvalue()):  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.02)


async def play(process: DaemonProcess, session: aiohttp.ClientSession) -> dict[str, Any]:
    return await ended_job(session, process.url, (await reset(session, process.url))["id"])


async def test_who_follows_goes_on_after_a_restart_of_the_daemon(tmp_path: Path) -> None:
    screen = Screen()
    async with daemon(tmp_path / "state", env=QUICK) as (process, session):
        url = process.url
        client = Client(url)
        following = asyncio.create_task(show(client, {"level": "info"}, follow=True, console=screen.console))
        job = await play(process, session)
        await screen.shows(lambda text: job["id"] in text and "reset succeeded" in text)
    await screen.shows(lambda text: "reconnecting" in text)
    port = url.rpartition(":")[2]
    async with daemon(tmp_path / "state", "--port", port, env=QUICK) as (process, session):
        assert process.url == url
        again = await play(process, session)
        await screen.shows(lambda text: again["id"] in text and text.count("envd is listening") == 2)
    following.cancel()
    await asyncio.wait({following})
    await client.aclose()


async def test_a_server_that_is_not_there_is_no_reason_to_wait(tmp_path: Path) -> None:
    code, out, err = await envd(tmp_path, "logs", "--follow", "--url", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert "reconnecting" in err
    assert "127.0.0.1:1" in err


async def test_the_client_has_the_same_lines() -> None:
    async with kept_in_process(), serving() as served, Client(served.url) as client:
        logging.getLogger("envd.test").warning("for the client")
        assert (await client.logs(level="warning", limit=1))[0]["event"] == "for the client"
        with pytest.raises(EnvdError, match="level"):
            await client.logs(level="loud")


def test_a_line_is_shown_without_what_would_steer_the_terminal() -> None:
    line = {
        "timestamp": "2026-01-02T03:04:05Z",
        "level": "warning",
        "event": "a\x1b[2Jb",
        "path": "x\ny",
        "nothing": None,
        "env": 0,
        "exception": [
            {"exc_type": "ValueError", "exc_value": "no", "frames": [{"filename": "f", "lineno": 3, "name": "g"}]}
        ],
    }
    shown = rendered(line).plain
    assert "\x1b" not in shown
    assert "a[2Jb  env=0  path=x y" in shown
    assert shown.splitlines()[1:] == ["    f:3 in g", "    ValueError: no"]


@pytest.mark.parametrize("line", [{}, {"timestamp": 5, "level": None, "event": ["x"], "exception": {"odd": 1}}])
def test_a_line_of_another_kind_is_shown_all_the_same(line: dict[str, Any]) -> None:
    assert rendered(line).plain


def test_a_span_of_time_is_a_number_with_its_unit() -> None:
    now = time.time()
    assert moment(None) is None
    for text, seconds in (("30s", 30), ("1.5m", 90), ("2h", 7200), ("1d", 86_400)):
        assert now - (moment(text) or 0) == pytest.approx(seconds, abs=5)
    for text in ("", "10", "m", "-1m", "1 week"):
        with pytest.raises(RequestError):
            moment(text)
