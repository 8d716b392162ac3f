"""Tabs on a real desktop, and what the steps make of a Chrome that is not as it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from test_local import desktops, local, until

from envd.errors import GuestUnreachable
from envd.guest import Cdp, Guest
from envd.settings import Settings
from envd.tasks.assets import Assets
from envd.tasks.setup import chrome
from envd.tasks.setup.context import Context

PAGES = {
    "/ask": "<script>alert(1); confirm(2); document.title = 'asked'</script>",
    "/on": "<script>location = '/b'</script>",
}


@asynccontextmanager
async def desktop(tmp_path: Path, **settings: Any) -> AsyncIterator[Context]:
    """The context of a set-up on a real desktop whose Chrome has come up."""
    chosen = Settings(provider="local", state_dir=tmp_path, **settings)
    async with aiohttp.ClientSession() as http, local(tmp_path) as driver, desktops(driver, "a-1") as [made]:
        await until(made.has_chrome)
        yield Context(made.guest, made.cdp, cast(Assets, None), chosen, http, screen=(800, 600))


@asynccontextmanager
async def site(*routes: web.RouteDef) -> AsyncIterator[str]:
    """The URL of a site with a page at every path; /silent never answers, and /ask asks the visitor."""

    async def page(request: web.Request) -> web.Response:
        body = PAGES.get(request.path, f"<title>{request.path}</title>")
        return web.Response(text=body, content_type="text/html")

    async def silent(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.add_routes([*routes, web.get("/silent", silent), web.get("/{any:.*}", page)])
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def urls(context: Context) -> list[str]:
    return sorted(page["url"] for page in await context.cdp.pages())


async def in_their_row(context: Context) -> list[str]:
    """The URLs of the tabs from left to right: what is in front after Control and each digit."""
    seen = []
    for number in range(1, len(await context.cdp.pages()) + 1):
        await context.guest.execute(["xdotool", "key", f"ctrl+{number}"])
        async with context.cdp.browser() as browser:
            await asyncio.sleep(0.3)  # Chrome switches tabs without telling anyone
            for page in await browser.pages():
                session = await browser.attach(page["targetId"])
                if await chrome.evaluate(browser, session, "document.visibilityState") == "visible":
                    seen.append(page["url"])
    return seen


@pytest.mark.local
async def test_tabs_are_opened_in_their_order_in_place_of_the_empty_page(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path) as context:
        wanted = [f"{base}/{name}" for name in ("c", "a", "b")]
        assert await chrome.open_tabs(context, {"urls_to_open": wanted}) == ""
        assert (await context.cdp.pages())[0]["url"] == wanted[-1]
        assert await in_their_row(context) == wanted


@pytest.mark.local
async def test_without_an_empty_page_the_oldest_one_makes_room(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path) as context:
        await chrome.open_tabs(context, {"urls_to_open": [f"{base}/a", f"{base}/b"]})
        await chrome.open_tabs(context, {"urls_to_open": [f"{base}/c"]})
        assert await urls(context) == [f"{base}/b", f"{base}/c"]


@pytest.mark.local
async def test_a_page_that_fails_is_a_warning_and_its_tab_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(chrome, "LOAD_SECONDS", 1.5)
    nobody = f"http://127.0.0.1:{unused_tcp_port}/"
    async with site() as base, desktop(tmp_path) as context:
        wanted = [nobody, f"{base}/silent", "no url", f"{base}/a"]
        warning = await chrome.open_tabs(context, {"urls_to_open": wanted})
        assert warning.split("; ") == [
            f"{nobody} did not load: net::ERR_CONNECTION_REFUSED",
            f"{base}/silent had not loaded after 1.5 s",
            f"no url was not opened: Chrome at {context.cdp.url} refused Page.navigate: Cannot navigate to invalid URL",
        ]
        assert {nobody, f"{base}/a"} <= set(await urls(context))
        assert len(await urls(context)) == 4


@pytest.mark.local
async def test_a_page_that_asks_or_goes_on_is_waited_for_to_its_end(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path) as context:
        assert await chrome.open_tabs(context, {"urls_to_open": [f"{base}/ask", f"{base}/on"]}) == ""
        assert await urls(context) == [f"{base}/ask", f"{base}/b"]
        assert "asked" in [page["title"] for page in await context.cdp.pages()]


@pytest.mark.local
async def test_a_chrome_that_is_gone_is_started(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path, chrome_grace=0.2) as context:
        await context.guest.execute(["pkill", "-KILL", "chrome"])
        assert await chrome.open_tabs(context, {"urls_to_open": [f"{base}/a"]}) == ""
        assert await urls(context) == [f"{base}/a"]


@pytest.mark.local
async def test_tabs_are_closed_by_what_their_urls_mean_and_one_always_stays(tmp_path: Path) -> None:
    async with site() as base, desktop(tmp_path) as context:
        await chrome.open_tabs(context, {"urls_to_open": [f"{base}/a", f"{base}/b", "chrome://settings/"]})
        gone = {"urls_to_close": [f"{base}/a/", "chrome://settings"]}
        assert await chrome.close_tabs(context, gone) == ""
        assert await urls(context) == [f"{base}/b"]
        assert await chrome.close_tabs(context, {"urls_to_close": [f"{base}/b"]}) == ""
        assert await urls(context) == ["about:blank"]


@pytest.mark.local
async def test_a_url_without_a_page_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome, "SETTLE_SECONDS", 0.2)
    async with desktop(tmp_path) as context:
        warning = await chrome.close_tabs(context, {"urls_to_close": ["https://a.example/"]})
        assert warning == "no page is at https://a.example/"
        assert await urls(context) == ["about:blank"]


async def test_a_chrome_that_never_comes_up_fails_the_step_and_says_what_was_last_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    async def launch(request: web.Request) -> web.Response:
        launched.append((await request.json())["command"][0])
        return web.Response(text="launched successfully")

    monkeypatch.setattr(chrome, "START_SECONDS", 0.5)
    settings = Settings(state_dir=tmp_path, chrome_grace=0.1)
    async with site(web.post("/setup/launch", launch)) as base, aiohttp.ClientSession() as http:
        context = Context(Guest(http, base), Cdp(http, base), cast(Assets, None), settings, http, proxied=True)
        with pytest.raises(GuestUnreachable, match=r"within 0\.5 s: .*/json/list answered no JSON"):
            await chrome.open_tabs(context, {"urls_to_open": [base]})
    assert launched == ["google-chrome", "socat"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param("https://www.tripadvisor.com", "https://tripadvisor.co.uk/", True, id="www, country and slash"),
        pytest.param("https://a.example.com/x", "https://b.example.com/x", False, id="another subdomain"),
        pytest.param("https://a.example/x", "http://a.example/x", False, id="another scheme"),
        pytest.param("https://a.example/x", "https://a.example/y", False, id="another path"),
        pytest.param("https://a.example/x?q=1", "https://a.example/x?q=2", False, id="another query"),
        pytest.param("example.com", "http://www.example.org", True, id="no scheme"),
        pytest.param("http://127.0.0.1:1/", "http://127.0.0.2:1/", False, id="addresses"),
        pytest.param("http://localhost/", "http://localhost", True, id="localhost"),
        pytest.param("http://[", "http://[", True, id="no URL"),
        pytest.param("about:blank", "about:blank", True, id="about:blank"),
    ],
)
def test_two_urls_mean_the_same_page(one: str, other: str, same: bool) -> None:
    assert chrome.same_page(one, other) is same
