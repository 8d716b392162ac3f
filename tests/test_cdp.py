"""Chrome's protocol: what a real Chromium answers, and that nothing a hostile one does hangs, floods or misleads us."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web
from test_local import desktops, local, until

from envd.errors import EnvdError, GuestMisbehaved, GuestUnreachable
from envd.guest import Browser, Cdp

Talk = Callable[[web.WebSocketResponse, dict[str, Any]], Awaitable[Any]]


async def honest(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
    """Answers each command with what it was asked."""
    await socket.send_json({"id": command["id"], "result": {"method": command["method"], **command["params"]}})


@asynccontextmanager
async def chrome(talk: Talk = honest, **version: Any) -> AsyncIterator[tuple[Cdp, list[web.Request]]]:
    """A server in Chrome's place that answers each command by `talk`; and the requests it saw."""
    seen: list[web.Request] = []

    async def about(request: web.Request) -> web.Response:
        address = "ws://evil.invalid:1/devtools/browser/b-1"
        return web.json_response({"Browser": "X/1", "webSocketDebuggerUrl": address} | version)

    async def websocket(request: web.Request) -> web.WebSocketResponse:
        seen.append(request)
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        async for message in socket:
            await talk(socket, json.loads(message.data))
        return socket

    app = web.Application()
    app.router.add_get("/json/version", about)
    app.router.add_get("/devtools/browser/b-1", websocket)
    app.router.add_get("/devtools/browser/elsewhere", _elsewhere)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as http, asyncio.timeout(20):
            yield Cdp(http, f"http://127.0.0.1:{runner.addresses[0][1]}"), seen
    finally:
        await runner.cleanup()


async def _elsewhere(request: web.Request) -> web.Response:
    raise web.HTTPFound("/devtools/browser/b-1")


async def test_only_the_path_of_the_guests_address_is_used_and_chrome_is_called_localhost_without_an_origin() -> None:
    async with chrome() as (cdp, seen), cdp.browser() as browser:
        assert await browser.send("A.b", {"c": 1}) == {"method": "A.b", "c": 1}
        assert (seen[0].headers["Host"], seen[0].headers.get("Origin")) == ("localhost", None)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("ws://h/devtools/browser/../../x", id="climbs"),
        pytest.param("ws://h/json/new?http://x", id="is another command"),
        pytest.param("ws://h/devtools/browser/" + "b" * 100_000, id="is endless"),
        pytest.param(7, id="is a number"),
        pytest.param("ws://h/devtools/browser/elsewhere", id="redirects"),
        pytest.param("ws://h/devtools/browser/nobody", id="is not there"),
    ],
)
async def test_an_address_that_is_no_browsers_websocket_is_not_followed(address: Any) -> None:
    async with chrome(webSocketDebuggerUrl=address) as (cdp, seen):
        with pytest.raises(GuestMisbehaved):
            async with cdp.browser():
                pass
        assert seen == []


async def test_answers_find_the_command_they_belong_to_in_any_order() -> None:
    held: list[dict[str, Any]] = []

    async def backwards(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        held.append(command)
        if len(held) == 3:
            for one in reversed(held):
                await honest(socket, one)

    async with chrome(backwards) as (cdp, _), cdp.browser() as browser:
        answers = await asyncio.gather(*(browser.send(f"A.{n}") for n in range(3)))
        assert [answer["method"] for answer in answers] == ["A.0", "A.1", "A.2"]


async def test_events_reach_those_that_listen_to_their_session() -> None:
    async def two(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        for session in ("other", "mine", None):
            await socket.send_json({"method": "E.e", "params": {"of": session}, "sessionId": session})
        await honest(socket, command)

    async with chrome(two) as (cdp, _), cdp.browser() as browser:
        with browser.events("E.e", "mine") as mine, browser.events("E.e") as root:
            await browser.send("A.b")
            assert (mine.receive_nowait(), root.receive_nowait()) == ({"of": "mine"}, {"of": None})
            with pytest.raises(anyio.WouldBlock):
                mine.receive_nowait()


async def raw(socket: web.WebSocketResponse, text: str) -> None:
    await socket.send_str(text)


HOSTILE: dict[str, tuple[Talk, type[EnvdError], str]] = {
    "no JSON": (lambda socket, command: raw(socket, "{nope"), GuestMisbehaved, "no JSON"),
    "a list": (lambda socket, command: raw(socket, "[1]"), GuestMisbehaved, "list where an object belongs"),
    "nested deeply": (lambda socket, command: raw(socket, "[" * 200_000), GuestMisbehaved, "no JSON"),
    "bytes": (lambda socket, command: socket.send_bytes(b"x" * 1000), GuestMisbehaved, "BINARY"),
    "5 MiB": (lambda socket, command: raw(socket, '"' + "x" * 5 * 1024**2 + '"'), GuestMisbehaved, "ERROR"),
    "a refusal": (
        lambda socket, command: socket.send_json({"id": command["id"], "error": {"code": -32601, "message": "no A.b"}}),
        GuestMisbehaved,
        "refused A.b: no A.b",
    ),
    "no result": (lambda socket, command: socket.send_json({"id": command["id"]}), GuestMisbehaved, "no result"),
    "wrong ids": (
        lambda socket, command: socket.send_json({"id": command["id"] + 7, "result": {}}),
        GuestUnreachable,
        "within 0.3 s",
    ),
    "a true id": (lambda socket, command: socket.send_json({"id": [], "result": {}}), GuestUnreachable, "within 0.3"),
    "silence": (lambda socket, command: asyncio.sleep(0), GuestUnreachable, "within 0.3 s"),
    "a close": (lambda socket, command: socket.close(), GuestUnreachable, "closed the connection"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_answer_is_an_error_in_time(name: str) -> None:
    talk, error, words = HOSTILE[name]
    async with chrome(talk) as (cdp, _):
        began = time.monotonic()
        with pytest.raises(error, match=words):
            async with cdp.browser() as browser:
                await browser.send("A.b", timeout=0.3)
        assert time.monotonic() - began < 2.5


async def test_all_that_wait_learn_that_the_connection_broke_and_so_does_who_comes_later() -> None:
    async def leave(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        if command["method"] == "A.last":
            await socket.close()

    async with chrome(leave) as (cdp, _), cdp.browser() as browser:
        with browser.events("E.e") as events:
            outcomes = await asyncio.gather(
                *(browser.send(f"A.{name}") for name in ("first", "last")), return_exceptions=True
            )
            with pytest.raises(anyio.EndOfStream):
                await events.receive()
        with pytest.raises(GuestUnreachable):
            await browser.send("A.b")
        assert [type(outcome) for outcome in outcomes] == [GuestUnreachable, GuestUnreachable]


async def test_a_flood_of_events_is_neither_kept_nor_does_it_hold_up_the_end() -> None:
    async def flood(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        while True:
            await socket.send_json({"method": "E.e", "params": {"x": "x" * 1000}})

    async with chrome(flood) as (cdp, _):
        async with cdp.browser() as browser:
            with browser.events("E.e") as events:
                with pytest.raises(GuestUnreachable):
                    await browser.send("A.b", timeout=0.3)
                assert events.statistics().current_buffer_used == 64
            began = time.monotonic()
        assert time.monotonic() - began < 2


async def test_a_cancelled_command_leaves_the_connection_usable() -> None:
    async def only_b(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        if command["method"] == "A.b":
            await honest(socket, command)

    async with chrome(only_b) as (cdp, _), cdp.browser() as browser:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await browser.send("A.never")
        assert (await browser.send("A.b"))["method"] == "A.b"


@pytest.mark.parametrize("error", [ValueError, GuestMisbehaved], ids=str)
async def test_what_goes_wrong_in_the_block_comes_out_as_it_is(error: type[Exception]) -> None:
    async with chrome() as (cdp, _):
        with pytest.raises(error):
            async with cdp.browser():
                raise error("mine")


async def test_nobody_listening_is_unreachable(unused_tcp_port: int) -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(GuestUnreachable):
            await Cdp(http, f"http://127.0.0.1:{unused_tcp_port}").painted(1)


@pytest.mark.parametrize("value", [False, "true", None, {}])
async def test_a_page_that_does_not_say_that_it_was_drawn_was_not(value: Any) -> None:
    async def claim(socket: web.WebSocketResponse, command: dict[str, Any]) -> None:
        result: dict[str, Any] = {"sessionId": "s", "result": {"type": type(value).__name__, "value": value}}
        result["targetInfos"] = [{"type": "page", "targetId": "t", "url": ""}, {"type": "page"}, 7]
        await socket.send_json({"id": command["id"], "result": result})

    async with chrome(claim) as (cdp, _):
        assert await cdp.painted(1) is False


async def attached(browser: Browser, url: str = "about:blank") -> str:
    return await browser.attach((await browser.send("Target.createTarget", {"url": url}))["targetId"])


@pytest.mark.local
async def test_a_real_page_is_painted_unless_it_is_out_of_sight_hangs_or_crashed(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await until(desktop.has_chrome)
        assert await desktop.cdp.painted(5)
        async with desktop.cdp.browser() as browser:
            window = await browser.send(
                "Browser.getWindowForTarget", {"targetId": (await browser.pages())[0]["targetId"]}
            )
            for state, seen in (("minimized", False), ("normal", True)):
                bounds = {"windowId": window["windowId"], "bounds": {"windowState": state}}
                await browser.send("Browser.setWindowBounds", bounds)
                assert await desktop.cdp.painted(1 if not seen else 5) is seen, state
            session = await browser.attach((await browser.pages())[0]["targetId"])
            with pytest.raises(GuestUnreachable, match="Runtime"):
                await browser.send("Runtime.evaluate", {"expression": "for (;;);"}, session_id=session, timeout=0.2)
            assert await desktop.cdp.painted(0.5) is False
            with pytest.raises(EnvdError):
                await browser.send("Page.crash", session_id=session, timeout=0.5)
            began = time.monotonic()
            assert await desktop.cdp.painted(0.5) is False
            assert time.monotonic() - began < 2


@pytest.mark.local
async def test_a_real_page_speaks_in_its_session(tmp_path: Path) -> None:
    async with local(tmp_path) as driver, desktops(driver, "a-1") as [desktop]:
        await until(desktop.has_chrome)
        async with desktop.cdp.browser() as browser:
            session = await attached(browser)
            await browser.send("Page.enable", session_id=session)
            with browser.events("Page.javascriptDialogOpening", session) as dialogs:
                asked = {"expression": "setTimeout(() => alert('there'))"}
                await browser.send("Runtime.evaluate", asked, session_id=session)
                assert (await dialogs.receive())["message"] == "there"
            with pytest.raises(GuestMisbehaved, match="Cannot navigate to invalid URL"):
                await browser.send("Page.navigate", {"url": "no url"}, session_id=session)
