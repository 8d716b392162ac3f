"""A desktop's screen, Chrome and files through the daemon's own port: for whom, for how long, and whatever the guest
does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import WSMsgType, WSServerHandshakeError
from daemon_process import daemon, ended_job, reset
from serving import Served, eventually, raw_connection, serving

from envd.app import through
from envd.drivers.base import Death
from envd.drivers.sim import Behaviour, Fault
from envd.guest import upstream
from envd.models import Endpoints
from envd.settings import load
from envd.tasks.grading import find_interpreter

TOKEN, READER, PLAYER = "a-token-of-the-owner", "a-token-of-somebody", "a-token-of-a-player"
GOOD = {"Authorization": f"Bearer {TOKEN}"}
VNC, CDP, FILES = "/v1/envs/0/vnc/", "/v1/envs/0/cdp/", "/v1/envs/0/files"
SHOWS = Behaviour(vnc=True)
GREETING = b"RFB 003.008\n"


@asynccontextmanager
async def playing(behaviour: Behaviour = SHOWS, **settings: Any) -> AsyncIterator[Served]:
    """A daemon whose env 0 plays."""
    async with serving(behaviour, **settings) as served:
        if "token" in settings or "token_file" in settings:
            await served.service.queue.ended((await served.service.reset(0, {"id": "t-1"})).id)
        else:
            await served.play()
        yield served


@asynccontextmanager
async def socket(served: Served, path: str, **how: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with asyncio.timeout(20), served.http.ws_connect(served.url + path, **how) as opened:
        yield opened


async def code(served: Served, method: str, path: str, **how: Any) -> tuple[int, str]:
    status, body, _ = await served.ask(method, path, **how)
    return status, body.get("code", "") if isinstance(body, dict) else ""


async def refused(served: Served, path: str, **how: Any) -> int:
    """The status with which a websocket is not opened."""
    with pytest.raises(WSServerHandshakeError) as caught:
        async with socket(served, path, **how):
            pass
    return caught.value.status


# -- the screen ---------------------------------------------------------------------------------------------------


async def test_a_page_opens_the_screen_and_what_it_loads_comes_from_the_desktop() -> None:
    async with playing() as served:
        status, page, headers = await served.ask("GET", VNC)
        assert status == 200
        target = re.search(rb"url=(vnc.html\?[^\"]*)", page)
        assert target is not None
        assert target[1] == b"vnc.html?path=v1/envs/0/vnc/websockify&amp;autoconnect=1&amp;resize=scale"
        assert headers["Referrer-Policy"] == "no-referrer"
        status, page, headers = await served.ask("GET", VNC + target[1].decode().replace("&amp;", "&"))
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"core/rfb.js" in page
        status, _, headers = await served.ask("GET", VNC + "core/rfb.js")
        assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
        assert await code(served, "GET", VNC + "core/nothing.js") == (404, "not_found")


async def test_head_tells_of_a_page_without_it() -> None:
    async with playing() as served:
        status, body, headers = await served.ask("HEAD", VNC + "vnc.html")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 10


@pytest.mark.parametrize("path", ["websockify", "v1/envs/0/vnc/websockify"])
async def test_frames_go_both_ways_and_two_may_look_at_once(path: str) -> None:
    async with playing() as served:
        async with (
            socket(served, VNC + path, protocols=("binary",)) as one,
            socket(served, VNC + path) as other,
        ):
            assert (one.protocol, other.protocol) == ("binary", None)
            for number, viewer in enumerate((one, other)):
                assert await viewer.receive_bytes() == GREETING
                await viewer.send_bytes(bytes([number]) * 1_000_000)
                await viewer.send_str(f"words {number}")
            for number, viewer in enumerate((one, other)):
                assert await viewer.receive_bytes() == bytes([number]) * 1_000_000
                assert await viewer.receive_str() == f"words {number}"
        await eventually(lambda: served.service.streams == 0)


async def test_where_there_is_no_vnc_the_caller_is_told_who_has_it() -> None:
    async with playing(Behaviour()) as served:
        status, problem = await served.get(VNC)
        assert (status, problem["code"]) == (404, "no_vnc")
        assert "docker" in problem["hint"]
        assert await refused(served, VNC + "websockify") == 404


async def test_without_a_desktop_there_is_nothing_to_see() -> None:
    async with serving(SHOWS) as served:
        for path in (VNC, CDP + "json/version", FILES + "?path=/etc/timezone"):
            assert await code(served, "GET", path) == (409, "no_episode")
        assert await code(served, "GET", VNC.replace("0", "7")) == (404, "unknown_env")
        assert await refused(served, VNC + "websockify") == 409
    async with playing() as served:
        served.desktop().die(Death("power"))
        await eventually(lambda: served.service.env(0).state == "lost")
        assert await code(served, "GET", VNC) == (503, "desktop_lost")


@pytest.mark.parametrize(
    "path",
    [
        "../../1/vnc/",
        "%2e%2e/x",
        "core/%2e%2e/%2e%2e/x",
        "core//rfb.js",
        "core%5crfb.js",
        "%00",
        "a%0d%0ab",
        "%25",
        ".",
    ],
)
@pytest.mark.parametrize("below", [VNC, CDP])
async def test_a_path_leads_down_or_nowhere(below: str, path: str) -> None:
    async with playing() as served, raw_connection(served.address) as (reader, writer):
        asked = len(served.desktop().calls)
        writer.write(f"GET {below}{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 404 ")
        routes = [call.route for call in list(served.desktop().calls)[asked:]]
        assert not [route for route in routes if "rfb" in route or "x" in route or "envs" in route]


# -- for how long -------------------------------------------------------------------------------------------------


async def ends_going_away(viewer: aiohttp.ClientWebSocketResponse) -> None:
    while (message := await viewer.receive()).type is not WSMsgType.CLOSE:
        assert message.type is WSMsgType.BINARY
    assert message.data == 1001


async def test_a_drain_ends_open_websockets_within_a_second() -> None:
    async with playing() as served, socket(served, VNC + "websockify") as viewer:
        assert await viewer.receive_bytes() == GREETING
        began = time.monotonic()
        draining = asyncio.create_task(served.service.drain())
        await ends_going_away(viewer)
        assert time.monotonic() - began < 1
        await draining
        await eventually(lambda: served.service.streams == 0)
        assert await code(served, "GET", VNC) == (503, "draining")


@pytest.mark.parametrize("keeps", [False, True])
async def test_a_reset_ends_what_was_open_on_the_old_desktop(keeps: bool) -> None:
    async with playing(Behaviour(vnc=True, renews=keeps)) as served, socket(served, VNC + "websockify") as viewer:
        assert await viewer.receive_bytes() == GREETING
        _, job = await served.post("/v1/envs/0/reset", {"task": {"id": "t-2"}})
        await ends_going_away(viewer)
        await served.ended(job["id"])
        async with socket(served, VNC + "websockify") as again:
            assert await again.receive_bytes() == GREETING


async def test_a_desktop_that_is_kept_until_there_is_another_is_not_looked_at_meanwhile() -> None:
    async with playing(Behaviour(vnc=True, create_s=1.0)) as served, socket(served, VNC + "websockify") as viewer:
        served.sim.traits = replace(served.sim.traits, keeps_old=True)
        assert await viewer.receive_bytes() == GREETING
        old = served.desktop()
        _, job = await served.post("/v1/envs/0/reset", {"task": {"id": "t-2"}})
        await ends_going_away(viewer)
        assert not old.gone.is_set()
        assert await code(served, "GET", VNC) == (409, "env_busy")
        await served.ended(job["id"])


async def test_a_desktop_that_dies_ends_what_was_open() -> None:
    async with playing() as served, socket(served, VNC + "websockify") as viewer:
        assert await viewer.receive_bytes() == GREETING
        served.desktop().die(Death("power"))
        message = await viewer.receive()
        assert message.type is WSMsgType.CLOSE
        assert message.data in (1001, 1011)  # whichever of the port and the driver is noticed first


async def test_what_is_open_keeps_a_desktop_awake_that_is_paused_when_idle() -> None:
    async with playing(Behaviour(vnc=True, console=True), pause_idle=True) as served:
        await eventually(lambda: not served.desktop().runs.is_set())
        async with socket(served, VNC + "websockify") as viewer:
            assert await viewer.receive_bytes() == GREETING
            assert served.desktop().runs.is_set()
        await eventually(lambda: not served.desktop().runs.is_set())


async def test_streams_are_counted_and_bounded() -> None:
    async with playing(max_streams=1) as served, socket(served, VNC + "websockify") as viewer:
        assert await viewer.receive_bytes() == GREETING
        assert await refused(served, VNC + "websockify") == 503
        assert (await served.ask("GET", VNC + "vnc.html"))[0] == 200


# -- for whom -----------------------------------------------------------------------------------------------------


async def test_a_daemon_that_is_told_to_end_does_so_with_screens_open(tmp_path: Path, python: Path) -> None:
    async with daemon(tmp_path / "state", python=python, env={"ENVD_SIM": "vnc=1"}) as (process, http):
        await ended_job(http, process.url, (await reset(http, process.url))["id"])
        async with (
            asyncio.timeout(20),
            http.ws_connect(f"{process.url}{VNC}websockify") as viewer,
            http.ws_connect(f"{process.url}{VNC}websockify", autoclose=False) as deaf,
        ):
            assert (await viewer.receive_bytes(), await deaf.receive_bytes()) == (GREETING, GREETING)
            process.signal()
            await ends_going_away(viewer)
            assert await process.ended() == 0


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"owner admin {TOKEN}\nreader read {READER}\nplayer play {PLAYER}\n")
    file.chmod(0o600)
    return file


async def test_screen_and_chrome_need_to_play_and_a_file_only_to_read(tokens: Path) -> None:
    async with playing(token_file=tokens) as served:
        for token, played, read in ((READER, 403, 200), (PLAYER, 200, 200), ("", 401, 401)):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            for path in (VNC, VNC + "vnc.html", CDP + "json/version"):
                assert (await served.ask("GET", path, headers=headers))[0] == played, (token, path)
            assert (await served.ask("GET", FILES + "?path=/etc/timezone", headers=headers))[0] == read
            assert (await served.ask("PUT", FILES + "?path=/tmp/x", data=b"1", headers=headers))[0] == played
            if played == 200:
                async with socket(served, VNC + "websockify", headers=headers) as viewer:
                    assert await viewer.receive_bytes() == GREETING
            else:
                assert await refused(served, VNC + "websockify", headers=headers) == played


async def test_who_took_to_a_screen_is_written(caplog: pytest.LogCaptureFixture, tokens: Path) -> None:
    caplog.set_level("INFO")
    async with playing(token_file=tokens) as served:
        headers = {"Authorization": f"Bearer {PLAYER}"}
        async with socket(served, VNC + "websockify", headers=headers) as viewer:
            await viewer.receive_bytes()
            written = [vars(record) for record in caplog.records if record.name == "envd.audit"]
            assert [(one["caller"], one["method"], one["status"]) for one in written] == [("player", "WEBSOCKET", 101)]
        await refused(served, VNC + "websockify")
        await served.ask("GET", CDP + "json/version", headers=headers)
    written = [vars(record) for record in caplog.records if record.name == "envd.audit"]
    assert [(one["how"], one["method"], one["status"]) for one in written[1:]] == [
        ("refused", "WEBSOCKET", 401),
        ("token", "GET", 200),
    ]


async def link(served: Served, path: str, token: str = TOKEN, **asked: Any) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    status, body, _ = await served.ask("POST", "/v1/links", {"path": path, **asked}, headers=headers)
    return status, body.get("path", body)


async def test_one_link_is_a_live_desktop_for_a_browser(tokens: Path) -> None:
    async with playing(token_file=tokens) as served:
        status, opened = await link(served, VNC, PLAYER)
        assert status == 201
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
            async with browser.get(served.url + opened) as answer:
                assert answer.status == 200
                cookie = answer.headers["Set-Cookie"]
            assert re.search(rf"; Path={VNC}; Max-Age=\d+; HttpOnly; SameSite=Strict$", cookie)
            assert 0 < int(cookie.partition("Max-Age=")[2].partition(";")[0]) <= 300
            async with browser.get(f"{served.url}{VNC}core/rfb.js") as answer:
                assert answer.status == 200
                assert "Set-Cookie" not in answer.headers
            async with browser.ws_connect(f"{served.url}{VNC}websockify") as viewer:
                assert await viewer.receive_bytes() == GREETING
            for path in ("/v1/envs", "/v1/envs/1/vnc/vnc.html", CDP + "json/version", FILES + "?path=/etc/timezone"):
                async with browser.get(served.url + path) as answer:
                    assert answer.status == 401
            seen = str(list(served.desktop().calls))
            assert "signature" not in seen
            assert opened.rpartition("=")[2] not in seen


async def test_a_kept_link_opens_its_path_alone_and_only_to_pages_of_this_site(tokens: Path) -> None:
    async with playing(token_file=tokens) as served:
        _, opened = await link(served, VNC, PLAYER)
        kept = {"Cookie": f"other=1; envd-link=planted; envd-link={opened.rpartition('=')[2]}"}
        there = VNC + "vnc.html"
        assert (await served.ask("GET", there, headers=kept))[0] == 200
        assert (await served.ask("GET", CDP + "json/version", headers=kept))[0] == 401
        assert (await served.ask("POST", "/v1/envs/0/reset", {}, headers=kept))[0] == 401
        assert (await served.ask("PUT", FILES + "?path=/tmp/x", data=b"", headers=kept))[0] == 401
        for foreign in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            assert (await served.ask("GET", there, headers={**kept, **foreign}))[0] == 403
            assert await refused(served, VNC + "websockify", headers={**kept, **foreign}) == 403
        many = {"Cookie": "; ".join(["envd-link=planted"] * 8 + [kept["Cookie"]])}
        assert (await served.ask("GET", there, headers=many))[0] == 401


async def test_a_link_is_made_only_by_who_may_go_there(tokens: Path) -> None:
    async with playing(token_file=tokens) as served:
        for path in (VNC, CDP, VNC + "websockify", "/v1/envs/0/vnc"):
            status, problem = await link(served, path, READER)
            assert (status, problem["code"], problem["needed"]) == (403, "forbidden", "play")
        # One to a folder above gives no more than its maker had.
        for above in ("/v1/envs/0/", "/v1/"):
            status, opened = await link(served, above, READER)
            assert status == 201
            signature = "?signature=" + opened.rpartition("=")[2]
            assert (await served.ask("GET", "/v1/envs/0/screenshot" + signature))[0] == 200
            assert await code(served, "GET", VNC + signature) == (403, "forbidden")
            assert await refused(served, VNC + "websockify" + signature) == 403
        # Nor does one to the root open everything.
        _, opened = await link(served, "/", READER)
        assert (await served.ask("GET", "/v1/envs?signature=" + opened.rpartition("=")[2]))[0] == 401


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda parts: [parts[0], "2", parts[2], parts[3]], id="scope"),
        pytest.param(lambda parts: [parts[0], parts[1], "4", parts[3]], id="a folder above"),
        pytest.param(lambda parts: [parts[0], parts[1], "999", parts[3]], id="longer"),
        pytest.param(lambda parts: ["9" + parts[0], *parts[1:]], id="end"),
    ],
)
async def test_a_link_to_a_folder_that_was_changed_is_refused(tokens: Path, change: Callable[[Any], Any]) -> None:
    async with playing(token_file=tokens) as served:
        _, opened = await link(served, "/v1/envs/0/", READER)
        changed = ".".join(change(opened.rpartition("=")[2].split(".")))
        assert await code(served, "GET", "/v1/envs/0/screenshot?signature=" + changed) == (401, "unauthorized")
        assert await code(served, "GET", VNC + "?signature=" + changed) == (401, "unauthorized")


async def test_a_websocket_ends_with_the_link_that_it_came_by(tokens: Path) -> None:
    async with playing(token_file=tokens) as served:
        _, opened = await link(served, VNC, PLAYER, seconds=0.5)
        async with socket(served, VNC + "websockify?" + opened.partition("?")[2]) as viewer:
            assert await viewer.receive_bytes() == GREETING
            message = await viewer.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1008, "The link has ended.")


async def test_no_page_of_another_site_has_an_open_daemon_show_a_screen() -> None:
    async with playing() as served:
        for foreign in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            assert await refused(served, VNC + "websockify", headers=foreign) in (403, 421)
            assert await refused(served, CDP + "devtools/browser/x", headers=foreign) in (403, 421)


# -- Chrome -------------------------------------------------------------------------------------------------------


async def test_chrome_is_driven_through_the_daemon_by_the_addresses_that_it_answers() -> None:
    async with playing() as served:
        host = served.url.removeprefix("http://")
        status, version = await served.get(CDP + "json/version/")  # as Playwright asks
        assert status == 200
        assert version["webSocketDebuggerUrl"].startswith(f"ws://{host}{CDP}devtools/browser/")
        status, page, _ = await served.ask("PUT", CDP + "json/new?https://example.org/?a=1&signature=b")
        assert (status, page["url"]) == (200, "https://example.org/?a=1&signature=b")
        _, pages = await served.get(CDP + "json/list")
        assert page["id"] in [one["id"] for one in pages]
        async with served.http.ws_connect(version["webSocketDebuggerUrl"]) as chrome:
            await chrome.send_json({"id": 1, "method": "Target.getTargets"})
            answer = await chrome.receive_json()
        assert {one["targetId"] for one in answer["result"]["targetInfos"]} == {one["id"] for one in pages}
        assert (await served.get(CDP + f"json/close/{page['id']}")) == (200, b"Target is closing")
        assert (await served.get(CDP + "json/close/none"))[0] == 404
        assert await refused(served, CDP + "devtools/browser/other") == 502


async def test_a_host_is_named_as_the_caller_called_it_and_behind_tls_as_the_proxy_says() -> None:
    async with playing(hosts="desk.example", proxies="127.0.0.1", insecure=True) as served:
        headers = {"Host": "desk.example", "X-Forwarded-Proto": "https"}
        _, version, _ = await served.ask("GET", CDP + "json/version", headers=headers)
        assert version["webSocketDebuggerUrl"].startswith(f"wss://desk.example{CDP}devtools/browser/")
        assert await code(served, "GET", CDP + "json/version", headers={"Host": "desk.example/x"}) == (
            421,
            "misdirected_request",
        )


async def test_a_link_in_a_browser_does_not_command_chrome() -> None:
    async with playing() as served:
        going = {"Sec-Fetch-Mode": "navigate"}
        assert (await served.ask("GET", CDP + "json/list", headers=going))[0] == 200
        assert await code(served, "GET", CDP + "json/new?about:blank", headers=going) == (403, "forbidden")


@pytest.mark.parametrize("path", ["", "devtools/inspector.html", "index.html", "jsonx"])
async def test_of_chrome_no_page_is_served(path: str) -> None:
    async with playing() as served:
        assert await code(served, "GET", CDP + path) == (404, "not_found")


# -- files --------------------------------------------------------------------------------------------------------


async def test_a_file_is_written_and_read_as_it_is() -> None:
    async with playing() as served:
        content = bytes(range(256)) * 4096
        status, stored, _ = await served.ask("PUT", FILES + "?path=/home/user/a%20b%22%C3%A9.bin", data=content)
        assert (status, stored) == (200, {"path": '/home/user/a b"é.bin', "bytes": len(content)})
        assert served.desktop().files['/home/user/a b"é.bin'] == content
        status, read, headers = await served.ask("GET", FILES + "?path=~/a%20b%22%C3%A9.bin")
        assert (status, read) == (200, content)
        assert headers["Content-Disposition"] == "attachment; filename*=UTF-8''a%20b%22%C3%A9.bin"
        assert headers["Content-Type"] == "application/octet-stream"
        assert headers["Content-Length"] == str(len(content))
        assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        status, read, headers = await served.ask("HEAD", FILES + "?path=~/a%20b%22%C3%A9.bin")
        assert (status, read, headers["Content-Length"]) == (200, b"", str(len(content)))


async def test_a_file_that_is_not_there_is_not_found_and_what_is_no_path_is_refused() -> None:
    async with playing() as served:
        assert await code(served, "GET", FILES + "?path=/nothing") == (404, "not_found")
        for bad in ("", "?path=", "?path=relative", "?path=/a%0d%0aX:1", "?path=/%00", "?path=/" + "a" * 5000):
            assert await code(served, "GET", FILES + bad) == (422, "invalid_request")
            assert await code(served, "PUT", FILES + bad, data=b"x") == (422, "invalid_request")


async def test_an_upload_is_bounded_and_its_size_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through, "FILE_LIMIT", 1000)
    async with playing() as served:
        assert await code(served, "PUT", FILES + "?path=/tmp/x", data=bytes(1001)) == (413, "body_too_large")

        async def parts() -> AsyncIterator[bytes]:
            yield b"of unknown length"

        assert await code(served, "PUT", FILES + "?path=/tmp/x", data=parts()) == (422, "invalid_request")
        assert (await served.ask("PUT", FILES + "?path=/tmp/x", data=b""))[0] == 200
        served.desktop().files["/tmp/large"] = bytes(1001)
        assert await code(served, "GET", FILES + "?path=/tmp/large") == (502, "guest_misbehaved")
        assert served.desktop().files["/tmp/x"] == b""


async def test_an_upload_that_breaks_off_is_not_stored() -> None:
    async with playing() as served:
        async with raw_connection(served.address) as (_, writer):
            head = f"PUT {FILES}?path=/tmp/half HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
            writer.write(head.encode() + bytes(500_000))
            await writer.drain()
            await eventually(lambda: served.service.streams == 1)
        await eventually(lambda: served.service.streams == 0)
        assert "/tmp/half" not in served.desktop().files


async def test_an_upload_that_pauses_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr("envd.app.problems.REST_SECONDS", 0.1)
    async with playing() as served, raw_connection(served.address) as (reader, writer):
        head = f"PUT {FILES}?path=/tmp/half HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
        writer.write(head.encode() + bytes(500))
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        assert "/tmp/half" not in served.desktop().files


# -- a guest that means harm --------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def evil(served: Served, answer: Answer, *ports: str) -> AsyncIterator[list[bytes]]:
    """In the place of those ports of the desktop a server that answers each request so; the heads that it was sent."""
    heads: list[bytes] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        task.add_done_callback(serving.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    desktop = served.service.env(0).desktop
    assert desktop is not None
    entry = served.service.fleet._entries[desktop.id]
    at = entry.desktop.endpoints
    assert at is not None
    there = {"guest": at.guest, "cdp": at.cdp, "vnc": at.vnc, **dict.fromkeys(ports or ("vnc",), url)}
    entry.desktop = entry.desktop.model_copy(update={"endpoints": Endpoints(**there)})
    try:
        yield heads
    finally:
        entry.desktop = entry.desktop.model_copy(update={"endpoints": at})
        server.close()
        for task in tuple(serving):
            task.cancel()
        await asyncio.gather(*serving)


def says(*parts: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answer


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", id="redirect"
        ),
        pytest.param(b"HTTP/1.1 299 Odd\r\nContent-Length: 0\r\n\r\n", id="odd status"),
        pytest.param(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", id="absurd status"),
        pytest.param(b"HTTP/1.1 204 None\r\n\r\n", id="nothing"),
        pytest.param(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n", id="broken"),
        pytest.param(OK + b"".join(b"X-%d: y\r\n" % n for n in range(500)) + b"\r\n", id="many headers"),
        pytest.param(OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", id="a long header"),
        pytest.param(OK + b"".join(b"X-%d: " % n + b"y" * 8000 + b"\r\n" for n in range(9)) + b"\r\n", id="long head"),
        pytest.param(OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx", id="packed"),
        pytest.param(OK + b"Content-Length: 99999999999\r\n\r\nx", id="announced too large"),
        pytest.param(OK + b"Content-Length: -1\r\n\r\nx", id="negative length"),
        pytest.param(OK + b"Content-Length: 10\r\n\r\nx", id="cut before anything was passed on"),
        pytest.param(b"\x00\xff garbage\r\n\r\n", id="no HTTP"),
        pytest.param(b"", id="nothing at all"),
    ],
)
async def test_what_a_guest_may_not_answer_is_a_problem_of_its_gateway(answer: bytes) -> None:
    async with playing() as served, evil(served, says(answer), "vnc", "guest"):
        for path in (VNC + "vnc.html", FILES + "?path=/etc/timezone"):
            status, said = await code(served, "GET", path)
            assert (status, said) in ((502, "guest_misbehaved"), (503, "guest_unreachable")), path


async def test_headers_of_a_guest_stay_with_it_and_those_of_a_caller_with_us() -> None:
    bad = (
        b"Set-Cookie: envd-link=x; Path=/\r\nAccess-Control-Allow-Origin: *\r\n"
        b"Content-Security-Policy: default-src *\r\n"
        b"X-Frame-Options: ALLOWALL\r\nService-Worker-Allowed: /\r\nLink: </x>; rel=preload\r\nRefresh: 0;url=/docs\r\n"
        b"Clear-Site-Data: *\r\nStrict-Transport-Security: max-age=1\r\nConnection: X-Secret\r\nX-Secret: y\r\n"
        b"Cache-Control: max-age=99999, immutable\r\nAlt-Svc: h3\r\nContent-Length: 2\r\n\r\nok"
    )
    async with playing(token=TOKEN) as served, evil(served, says(OK + bad)) as heads:
        given = {**GOOD, "Cookie": "secret=1", "Referer": "http://x/?secret", "Origin": served.url, "X-Mine": "secret"}
        status, body, headers = await served.ask("GET", VNC + "vnc.html?a=1", headers=given)
        async with aiohttp.ClientSession() as http, http.get(served.url + VNC + "vnc.html", headers=GOOD) as answer:
            assert answer.headers.getall("Cache-Control") == ["no-store"]
    assert (status, body) == (200, b"ok")
    ours = {"date", "envd-version", "x-request-id", "content-length", "content-type", "content-security-policy"}
    ours |= {
        "envd-env",
        "envd-episode",
        "envd-desktop",
        "x-content-type-options",
        "cache-control",
        "referrer-policy",
        "cross-origin-opener-policy",
    }
    assert {name.lower() for name in headers} == ours
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    here = f"{served.url}{VNC}"
    assert policy["connect-src"] == f"{here} ws{here.removeprefix('http')} data: blob:"
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert "allow-popups" not in policy["sandbox"]
    assert TOKEN.encode() not in heads[0]
    assert b"secret" not in heads[0].lower()
    assert heads[0].startswith(b"GET /vnc.html?a=1 HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_slow_drip_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IDLE_SECONDS", 0.3)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with playing() as served, evil(served, drip, "vnc", "guest"):
        for path in (VNC + "vnc.html", FILES + "?path=/etc/timezone"):
            assert await code(served, "GET", path) == (502, "guest_misbehaved")


async def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "HEAD_SECONDS", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with playing() as served, evil(served, silent):
        assert await code(served, "GET", VNC + "vnc.html") == (503, "guest_unreachable")


async def test_an_endless_body_is_cut_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through, "PAGE_LIMIT", 1_000_000)
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            await writer.drain()
            sent += 65536

    async with playing() as served, evil(served, endless):
        async with served.http.get(served.url + VNC + "vnc.html") as answer:
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert sent < 20_000_000


async def test_a_guest_sends_no_faster_than_its_reader_reads() -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            await writer.drain()
            sent += 65536

    async with playing() as served, evil(served, endless, "guest"):
        async with raw_connection(served.address, receive_buffer=65536) as (reader, writer):
            writer.write(f"GET {FILES}?path=/etc/timezone HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            # The reader's own buffer takes two megabytes and then stops reading: now it stands still.
            seen = -1
            async with asyncio.timeout(20):
                while seen != sent:
                    seen = sent
                    await asyncio.sleep(0.3)
            assert sent < 64_000_000
        await eventually(lambda: served.service.streams == 0)


async def test_what_chrome_answers_is_no_page_and_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = (
        b'[{"id": "1", "webSocketDebuggerUrl": "ws://evil.example/devtools/page/1", "devtoolsFrontendUrl": "http://e/"},'
        b'{"id": "2", "webSocketDebuggerUrl": "ws://127.0.0.1/../../v1/drain"},'
        b'{"id": "3", "webSocketDebuggerUrl": 3, "devtoolsFrontendUrl": {}}, 4, "\\ud800"]'
    )
    async with playing() as served:
        async with evil(served, says(OK + b"Content-Length: %d\r\n\r\n" % len(targets) + targets), "cdp") as heads:
            status, told, headers = await served.ask("GET", CDP + "json/list")
        host = served.url.removeprefix("http://")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        assert [*told[1:4], told[4]] == [{"id": "2"}, {"id": "3"}, 4, "?"]
        assert told[0] == {
            "id": "1",
            "webSocketDebuggerUrl": f"ws://{host}{CDP}devtools/page/1",
            "devtoolsFrontendUrl": f"devtools://devtools/bundled/inspector.html?ws={host}{CDP}devtools/page/1",
        }
        assert b"\r\nHost: localhost\r\n" in heads[0]
        for odd in (b"<script>1</script>", b'[{"a": NaN}]', b"[" * 900 + b"]" * 900, b"[" * 100_000):
            async with evil(served, says(OK + b"Content-Length: %d\r\n\r\n" % len(odd) + odd), "cdp"):
                status, told, headers = await served.ask("GET", CDP + "json/list")
            assert status == 200
            assert headers["Content-Type"] in ("text/plain; charset=utf-8", "application/json")
            assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        monkeypatch.setattr(through, "JSON_LIMIT", 1000)
        async with evil(served, says(OK + b"Content-Length: 2000\r\n\r\n" + bytes(2000)), "cdp"):
            assert await code(served, "GET", CDP + "json/list") == (502, "guest_misbehaved")


UPGRADE = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "


def talks(*frames: bytes, more: bytes = b"") -> Answer:
    """Opens a websocket as it should be, and sends these bytes on it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", heads_of[0][-1], re.I)
        assert key is not None
        accept = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(UPGRADE + accept + b"\r\n" + more + b"\r\n")
        for frame in frames:
            writer.write(frame)
            await writer.drain()
        await reader.read()

    return answer


heads_of: list[list[bytes]] = []


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        pytest.param([b"\x88\x05" + (4321).to_bytes(2, "big") + b"bye"], 4321, id="a code of its own"),
        pytest.param([b"\x88\x02" + (1000).to_bytes(2, "big")], 1000, id="well"),
        pytest.param([b"\x88\x00"], 1000, id="without a code"),
        pytest.param([b"\x88\x02" + (1005).to_bytes(2, "big")], 1011, id="a code that may not be sent"),
        pytest.param([b"\x81\x02\xff\xfe"], 1011, id="no text"),
        pytest.param([b"\xf3\x00"], 1011, id="no frame"),
        pytest.param([b"\x82\x7f" + (17 << 20).to_bytes(8, "big"), bytes(17 << 20)], 1011, id="too large"),
        pytest.param([b"\x02\x7f" + (9 << 20).to_bytes(8, "big") + bytes(9 << 20)] * 1
                     + [b"\x80\x7f" + (9 << 20).to_bytes(8, "big") + bytes(9 << 20)], 1011, id="too large in all"),
    ],
)  # fmt: skip
async def test_a_guest_that_ends_a_websocket_well_or_badly_ends_the_caller_s(frames: list[bytes], code: int) -> None:
    async with playing() as served, evil(served, talks(*frames)) as heads:
        heads_of[:] = [heads]
        async with socket(served, VNC + "websockify") as viewer:
            message = await viewer.receive()
            assert (message.type, message.data) == (WSMsgType.CLOSE, code)
        assert b"Origin" not in heads[0]
    await eventually(lambda: served.service.streams == 0)


async def test_a_caller_s_message_is_bounded_too_and_its_going_reaches_the_guest() -> None:
    async with playing() as served:
        async with socket(served, VNC + "websockify") as viewer:
            assert await viewer.receive_bytes() == GREETING
            await viewer.send_bytes(bytes(17 << 20))
            while (message := await viewer.receive()).type is WSMsgType.BINARY:
                pass
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1009)
        gone = asyncio.Event()

        async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await talks()(reader, writer)
            gone.set()

        async with evil(served, waits) as heads:
            heads_of[:] = [heads]
            async with socket(served, VNC + "websockify"):
                pass
            async with asyncio.timeout(10):
                await gone.wait()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", id="redirect"
        ),
        pytest.param(OK + b"Content-Length: 2\r\n\r\nok", id="a page"),
        pytest.param(UPGRADE + b"wrong\r\n\r\n", id="another key"),
        pytest.param(
            UPGRADE + b"x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(500)) + b"\r\n", id="many headers"
        ),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_what_is_no_websocket_is_a_problem_of_its_gateway(answer: bytes) -> None:
    async with playing() as served, evil(served, says(answer)):
        assert await refused(served, VNC + "websockify") in (502, 503)


async def test_a_protocol_that_nobody_offered_is_not_chosen() -> None:
    async with playing() as served, evil(served, talks(more=b"Sec-WebSocket-Protocol: other\r\n")) as heads:
        heads_of[:] = [heads]
        async with socket(served, VNC + "websockify", protocols=("binary", "b")) as viewer:
            assert viewer.protocol is None


async def test_a_guest_that_faults_in_its_pages_leaves_the_desktop_playing() -> None:
    async with playing(Behaviour(vnc=True, on={"/vnc.html": Fault("reset", times=2)})) as served:
        assert (await code(served, "GET", VNC + "vnc.html"))[0] in (502, 503)
        assert (await served.ask("GET", VNC + "vnc.html"))[0] == 200
        assert served.service.env(0).state == "playing"


# -- the real ones ------------------------------------------------------------------------------------------------


LOCAL = {"PROVIDER": "local"}
DOCKER = {"PROVIDER": "docker", "ENVD_DOCKER_IMAGE": "envd/desktop"}


@asynccontextmanager
async def really_playing(state_dir: Path, env: dict[str, str]) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    """The address of a daemon process whose env 0 plays, and a client of it that has its token."""
    env = {"ENVD_TOKEN": TOKEN, **env}
    async with daemon(state_dir, env=env) as (served, _), aiohttp.ClientSession(headers=GOOD) as http:
        try:
            async with http.post(f"{served.url}/v1/envs/0/reset", json={}) as answer:
                job = f"{served.url}/v1/jobs/{(await answer.json())['id']}?wait=20&after="
            after = 0
            async with asyncio.timeout(240):
                while (found := await _json(http, f"{job}{after}"))["ended_at"] is None:
                    after = found["version"]
            assert found["state"] == "succeeded", str(found["error"])
            yield served.url, http
        finally:
            served.signal()  # killed, it would leave its containers to its next start
            assert await served.ended() == 0


async def _json(http: aiohttp.ClientSession, url: str, method: str = "GET") -> Any:
    async with http.request(method, url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


@asynccontextmanager
async def page_of(http: aiohttp.ClientSession, url: str) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """A new page of a real desktop's Chromium, reached through the daemon at `url`: how it is commanded."""
    page = await _json(http, f"{url}{CDP}json/new?about:blank", "PUT")
    async with asyncio.timeout(120), http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as chrome:
        last = 0

        async def command(method: str, **params: Any) -> Any:
            nonlocal last
            last += 1
            await chrome.send_json({"id": last, "method": method, "params": params})
            while (answer := await chrome.receive_json()).get("id") != last:
                pass
            assert "error" not in answer, answer
            return answer["result"]

        yield command


async def evaluated(command: Callable[..., Awaitable[Any]], expression: str) -> Any:
    given = {"expression": expression, "returnByValue": True, "awaitPromise": True, "userGesture": True}
    return (await command("Runtime.evaluate", **given))["result"].get("value")


async def until_true(command: Callable[..., Awaitable[Any]], expression: str) -> None:
    """Return once it is so on the page; fails with what the page shows."""
    end = time.monotonic() + 60
    while not await evaluated(command, expression):
        assert time.monotonic() < end, await evaluated(command, SHOWN)
        await asyncio.sleep(0.1)


SHOWN = """[location.href, document.documentElement.className, document.body.innerText.slice(0, 500),
    ...performance.getEntriesByType('resource').map(one => `${one.name} ${one.responseStatus}`)].join('\\n')"""


@pytest.mark.local
async def test_a_real_chromium_opens_a_page_through_the_daemon(tmp_path: Path) -> None:
    async with really_playing(tmp_path / "state", LOCAL) as (url, http):
        version = await _json(http, f"{url}{CDP}json/version/")
        assert version["webSocketDebuggerUrl"].startswith(f"ws{url.removeprefix('http')}{CDP}devtools/browser/")
        async with page_of(http, url) as command:
            await command("Page.navigate", url="data:text/html,<title>through</title><p>here</p>")
            await until_true(command, "document.title === 'through'")
            picture = await command("Page.captureScreenshot")
            assert base64.b64decode(picture["data"]).startswith(b"\x89PNG")
            assert "through" in [one["title"] for one in await _json(http, f"{url}{CDP}json/list")]
        content = bytes(range(256)) * 8192
        there = f"{url}{FILES}?path=/home/user/through.bin"
        async with http.put(there, data=io.BytesIO(content)) as answer:
            assert (answer.status, (await answer.json())["bytes"]) == (200, len(content))
        async with http.get(there) as answer:
            assert (answer.status, await answer.read()) == (200, content)
        async with http.get(f"{url}{FILES}?path=/home/user/nothing") as answer:
            assert answer.status == 404


PLAYWRIGHT = """
import sys
from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.connect_over_cdp(sys.argv[1], headers={"Authorization": sys.argv[2]})
    page = browser.contexts[0].new_page()
    page.goto("data:text/html,<title>played</title>")
    print(page.title())
    page.close()
    browser.close()
"""


@pytest.mark.local
async def test_playwright_connects_through_the_daemon(tmp_path: Path) -> None:
    python = await anyio.to_thread.run_sync(find_interpreter, load({}, env_file=None))
    if python is None:
        pytest.skip("Playwright comes with the evaluators; run: make evaluators")
    async with really_playing(tmp_path / "state", LOCAL) as (url, _):
        given = [str(python), "-c", PLAYWRIGHT, url + CDP.rstrip("/"), GOOD["Authorization"]]
        async with asyncio.timeout(60):
            ran = await anyio.run_process(given, check=False)
    assert (ran.returncode, ran.stdout) == (0, b"played\n"), ran.stderr.decode()[-2000:]


@pytest.mark.docker
async def test_a_container_s_own_novnc_shows_its_screen_through_the_daemon(tmp_path: Path) -> None:
    async with really_playing(tmp_path / "state", DOCKER) as (url, http):
        async with http.get(f"{url}{VNC}vnc.html") as answer:
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
            assert b"noVNC" in await answer.read()
        for _ in range(2):
            async with asyncio.timeout(60), http.ws_connect(f"{url}{VNC}websockify", protocols=("binary",)) as viewer:
                assert await viewer.receive_bytes() == GREETING
                await viewer.send_bytes(GREETING)
                kinds = await viewer.receive_bytes()
                assert kinds[0] == len(kinds) - 1 > 0  # how many ways to sign in there are, and which
        content = bytes(range(256)) * 8192
        there = f"{url}{FILES}?path=/home/user/through.bin"
        async with http.put(there, data=io.BytesIO(content)) as answer:
            assert answer.status == 200
        async with http.get(there) as answer:
            assert (answer.status, await answer.read()) == (200, content)


@pytest.mark.docker
@pytest.mark.local
@pytest.mark.parametrize("known", [True, False], ids=["by a link", "where no token is needed"])
async def test_a_browser_shows_a_container_s_screen_and_its_pages_reach_nothing_else(
    tmp_path: Path, known: bool
) -> None:
    """The browser is a local desktop's, on this host's network."""
    async with (
        really_playing(tmp_path / "seen", DOCKER if known else {**DOCKER, "ENVD_TOKEN": ""}) as (url, http),
        really_playing(tmp_path / "sees", LOCAL) as (other, others),
        page_of(others, other) as command,
    ):
        opened = VNC
        if known:
            async with http.post(f"{url}/v1/links", json={"path": VNC}) as answer:
                opened = (await answer.json())["path"]
        await command("Page.navigate", url=url + opened)
        await until_true(command, "document.documentElement.classList.contains('noVNC_connected')")
        await until_true(command, "!!document.querySelector('canvas') && document.querySelector('canvas').width > 300")
        assert "signature" not in await evaluated(command, "location.href + document.referrer + document.cookie")
        entries = await evaluated(command, "navigation.entries().map(one => one.url).join(' ')")
        assert "signature" not in entries
        refused = "async () => false"
        reached = f"fetch('/v1/envs').then(async () => true, {refused})"
        assert await evaluated(command, reached) is False
        assert await evaluated(command, f"fetch('{VNC}vnc.html').then(async () => true, {refused})") is True
        assert await evaluated(command, "window.open('/docs') === null") is True
        frame = "(() => { const f = document.createElement('iframe'); f.src = '/docs'; document.body.append(f);"
        frame += " return new Promise(r => { f.onload = () => { let n = 0; try { n = f.contentDocument.links.length }"
        frame += " catch {} r(n) } }) })()"
        assert await evaluated(command, frame) == 0
        worker = "navigator.serviceWorker ? navigator.serviceWorker.register('core/rfb.js')"
        assert await evaluated(command, f"{worker}.then(() => true, () => false) : false") is False
