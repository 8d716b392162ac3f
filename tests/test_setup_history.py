"""Pages that nobody visited, in a real Chromium's history, and databases of guests that are no history."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from test_local import until
from test_setup_chrome import desktop, site

from envd.errors import EnvdError, GuestMisbehaved
from envd.guest import Cdp, Guest
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import chrome, history
from envd.tasks.setup.context import Context

TEXT = """(function text(node) {
    return [...node.childNodes].map(child => child.nodeType == 3 ? child.data : text(child)).join(' ')
        + (node.shadowRoot ? text(node.shadowRoot) : '');
})(document.body)"""
READ = """
import sqlite3
rows = sqlite3.connect('file:/home/user/.config/google-chrome/Default/History?immutable=1', uri=True).execute(
    'SELECT urls.url, title, visit_count, visit_time FROM urls JOIN visits ON visits.url = urls.id ORDER BY visit_time')
print(*rows, sep='\\n')
"""
SONG: dict[str, Any] = {
    "url": "https://a.example/watch?v=1",
    "title": "강남 'style' \"x\"",
    "visit_time_from_now_in_seconds": 3600,
}
NEWS: dict[str, Any] = {"url": "https://news.example/", "title": "News", "visit_time_from_now_in_seconds": 60}


async def shown(context: Context) -> str:
    """What a user reads at chrome://history."""
    await chrome.open_tabs(context, {"urls_to_open": ["chrome://history/"]})
    async with context.cdp.browser() as browser:
        [page] = [page for page in await browser.pages() if page["url"] == "chrome://history/"]
        session = await browser.attach(page["targetId"])

        async def entries() -> bool:
            return "example" in str(await chrome.evaluate(browser, session, TEXT))

        await until(entries)
        return str(await chrome.evaluate(browser, session, TEXT))


@pytest.mark.local
async def test_a_running_chrome_shows_the_entries_and_its_pages_come_back(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path) as context:
        await chrome.open_tabs(context, {"urls_to_open": [f"{base}/a", f"{base}/b"]})
        assert await history.update(context, {"history": [SONG, NEWS]}) == ""
        assert {page["url"] for page in await context.cdp.pages()} == {f"{base}/a", f"{base}/b"}
        text = await shown(context)
        assert all(word in text for word in (SONG["title"], NEWS["title"], "/b", "a.example", "news.example"))


@pytest.mark.local
async def test_a_chrome_that_was_not_running_does_not_run_after_and_a_page_may_be_visited_twice(tmp_path: Path) -> None:
    async with desktop(tmp_path) as context:
        await context.guest.execute(["pkill", "chrome"])

        async def ended() -> bool:
            return (await context.guest.execute(["pgrep", "chrome"])).returncode == 1

        await until(ended)
        before = time.time()
        later = NEWS | {"visit_time_from_now_in_seconds": 5, "title": "Newer"}
        await history.update(context, {"history": [NEWS, later]})
        read = await context.guest.execute(["python", "-c", READ])
        assert read.stderr == ""
        rows = read.stdout.splitlines()
        assert [row.rpartition(",")[0] for row in rows] == ["('https://news.example/', 'Newer', 2"] * 2
        at = [int(row.rpartition(",")[2].strip(" )")) / 1e6 - 11_644_473_600 - before for row in rows]
        assert at == pytest.approx([-60, -5], abs=5)
        assert await ended()


@pytest.mark.local
async def test_a_profile_without_a_history_gets_one_that_its_chrome_understands(tmp_path: Path) -> None:
    async with desktop(tmp_path) as context:
        await context.guest.execute(["pkill", "chrome"])
        await context.guest.execute("sleep 0.5; rm ~/.config/google-chrome/Default/History*", shell=True)
        await history.update(context, {"history": [SONG]})
        await chrome.start(context)
        assert SONG["title"] in await shown(context)


@asynccontextmanager
async def guest(tmp_path: Path, content: bytes, home: str = "/home/user") -> AsyncIterator[tuple[Context, list[str]]]:
    """A guest whose Chrome does not run and whose history is `content`; and what was uploaded to it."""
    uploaded: list[str] = []

    async def execute(request: web.Request) -> web.Response:
        return web.json_response({"status": "success", "returncode": 0, "output": f"{home}\n1700000000\n", "error": ""})

    async def file(request: web.Request) -> web.Response:
        return web.Response(body=content)

    async def upload(request: web.Request) -> web.Response:
        uploaded.append(str((await request.post())["file_path"]))
        return web.Response(text="File Uploaded")

    routes = [
        web.post("/execute", execute),
        web.post("/setup/upload", upload),
        web.post("/file", file),
        web.get("/json/{any:.*}", _none),
    ]
    async with site(*routes) as base, aiohttp.ClientSession() as http:
        settings = Settings(state_dir=tmp_path)
        yield Context(Guest(http, base), Cdp(http, base), cast(Assets, None), settings, http), uploaded


async def _none(request: web.Request) -> web.Response:
    raise web.HTTPNotFound


def database(tmp_path: Path, *statements: str) -> bytes:
    path = tmp_path / "made"
    with closing(sqlite3.connect(path)) as made, made:
        made.execute(
            "CREATE TABLE urls(id INTEGER PRIMARY KEY, url, title, visit_count, typed_count, last_visit_time, hidden)"
        )
        made.execute("CREATE TABLE visits(url, visit_time, from_visit, transition, segment_id, visit_duration)")
        for statement in statements:
            made.execute(statement)
    return path.read_bytes()


COUNT = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
HOSTILE = {
    "garbage": None,
    "empty tables": ("DROP TABLE visits",),
    "never ends": (
        f"CREATE TRIGGER t AFTER INSERT ON urls BEGIN INSERT INTO visits(url) {COUNT} SELECT n FROM c; END",
    ),
    "never yields": (
        f"CREATE TRIGGER t AFTER INSERT ON urls BEGIN SELECT count(*) FROM ({COUNT} SELECT n FROM c); END",
    ),
    "one huge value": (
        "CREATE TRIGGER t AFTER INSERT ON urls BEGIN INSERT INTO visits(url) VALUES (zeroblob(900000000)); END",
    ),
    "a function": ("CREATE TRIGGER t AFTER INSERT ON urls BEGIN SELECT load_extension('x'); END",),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_database_that_is_no_history_is_an_error_in_time_and_is_not_put_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "EDIT_SECONDS", 0.5)
    statements = HOSTILE[name]
    content = b"SQLite format 3\0" + b"x" * 5000 if statements is None else database(tmp_path, *statements)
    async with guest(tmp_path, content) as (context, uploaded):
        began = time.monotonic()
        with pytest.raises(GuestMisbehaved, match="cannot be added to"):
            await history.update(context, {"history": [SONG]})
        assert uploaded == []
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("home", ["", "relative", "/" + "x" * 2000, "/h\nnoon\n"], ids=["no", "odd", "long", "clock"])
async def test_a_guest_that_does_not_say_where_its_home_is_is_not_written_to(home: str, tmp_path: Path) -> None:
    async with guest(tmp_path, database(tmp_path), home) as (context, uploaded):
        with pytest.raises(GuestMisbehaved, match="where Chrome's profile is"):
            await history.update(context, {"history": [SONG]})
        assert uploaded == []


async def test_the_file_is_put_back_where_it_was(tmp_path: Path) -> None:
    async with guest(tmp_path, database(tmp_path), "/home/other") as (context, uploaded):
        await history.update(context, {"history": [SONG]})
        assert uploaded == ["/home/other/.config/google-chrome/Default/History"]


async def test_a_history_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LARGEST", 1000)
    async with guest(tmp_path, b"x" * 2000) as (context, _):
        with pytest.raises(EnvdError, match="more than 1000 bytes"):
            await history.update(context, {"history": [SONG]})
