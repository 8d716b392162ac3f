"""What the client of a guest server makes of its answers. How set-up steps use it: test_setup.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from envd.errors import GuestMisbehaved, GuestUnreachable
from envd.guest import Guest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[Guest]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as session:
            yield Guest(session, f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def always(**answer: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(**answer)

    return handler


async def test_a_file_is_asked_for_by_a_form_and_its_bytes_come_back() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.path == "/file"
        path = (await request.post())["file_path"]
        return web.Response(body=b"\x00" + str(path).encode(), content_type="application/octet-stream")

    async with answering(handler) as guest:
        assert await guest.file("~/Désktop/a b") == "\x00~/Désktop/a b".encode()


async def test_a_file_that_is_not_there_is_a_refusal() -> None:
    async with answering(always(status=404, text='{"error": "File not found"}')) as guest:
        with pytest.raises(GuestMisbehaved) as caught:
            await guest.file("/none")
    assert caught.value.facts == {"http_status": 404, "refused": "File not found"}


async def test_a_file_that_is_too_long_is_not_read_to_its_end() -> None:
    async with answering(always(body=b"x" * 1_000_001)) as guest:
        with pytest.raises(GuestMisbehaved, match="more than 1000000 bytes"):
            await guest.file("/a", limit=1_000_000)


async def test_a_form_is_posted_and_answered_by_an_object() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert dict(await request.post()) == {"app_class_name": "Code"}
        return web.json_response({"width": 800, "height": 600})

    async with answering(handler) as guest:
        assert await guest.form("/window_size", {"app_class_name": "Code"}) == {"width": 800, "height": 600}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        pytest.param(400, b'{"error": "Path not supplied"}', "Path not supplied", id="error"),
        pytest.param(500, b'{"status": "error", "message": "no"}', "no", id="message"),
        pytest.param(404, b"File not found: /x", "File not found: /x", id="text"),
        pytest.param(500, "€".encode() * 9000, "€" * 2000, id="long text"),
        pytest.param(500, b'{"message": {"a": 1}}', None, id="no text"),
        pytest.param(500, b'{"message": "ha', None, id="half"),
        pytest.param(500, b"<!DOCTYPE html><p>Internal Server Error", None, id="HTML"),
        pytest.param(404, b"<html>", None, id="HTML without doctype"),
        pytest.param(500, b"\x8f\x00\xff", None, id="garbage"),
        pytest.param(500, b"", None, id="nothing"),
        pytest.param(503, b"try later", None, id="unavailable"),
        pytest.param(302, b"elsewhere", None, id="redirect"),
    ],
)
async def test_a_refusal_is_told_from_an_answer_that_is_broken(status: int, body: bytes, words: str | None) -> None:
    async with answering(always(status=status, body=body)) as guest:
        with pytest.raises(GuestMisbehaved) as caught:
            await guest.post("/any", {}, 10)
    assert caught.value.facts.get("refused") == words
    assert caught.value.facts["http_status"] == status


async def test_words_that_begin_like_markup_are_words() -> None:
    """The published server answers a launch with the command that was launched."""
    async with answering(always(text="[ -f x ] && <in launched successfully", content_type="text/html")) as guest:
        await guest.launch("[ -f x ] && <in", shell=True)


async def test_an_upload_is_one_form_with_its_length(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.path == "/setup/upload"
        assert request.content_length
        form = await request.post()
        file = form["file_data"]
        assert isinstance(file, web.FileField)
        assert (list(form), form["file_path"], file.file.read()) == (["file_path", "file_data"], '/t/"ü\r\n', b"abc")
        return web.Response(text="File Uploaded: 3 bytes")

    (tmp_path / "a").write_bytes(b"abc")
    async with answering(handler) as guest:
        await guest.upload('/t/"ü\r\n', tmp_path / "a")


async def test_an_upload_that_breaks_off_is_not_sent_again(tmp_path: Path) -> None:
    uploads = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal uploads
        uploads += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    (tmp_path / "a").write_bytes(b"abc")
    async with answering(handler) as guest:
        with pytest.raises(GuestUnreachable) as caught:
            await guest.upload("/tmp/new/a", tmp_path / "a")
    assert (uploads, caught.value.facts["sent"]) == (1, True)


async def test_a_call_without_a_limit_ends_with_its_callers_deadline() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with answering(handler) as guest:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await guest.execute("sleep 60", timeout=None)
