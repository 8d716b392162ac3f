"""The CDP port of a sim desktop: Chrome's pages, and the HTTP endpoints that list them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import answer_badly, as_json
from .behaviour import ACTING, Way
from .devtools import Conversation

if TYPE_CHECKING:
    from .desktop import Desktop

PRODUCT = "Chrome/140.0.0.0"
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
LIST = "/json/list"


class Chrome:
    """A browser with pages, in memory. `pages` is target id → URL, oldest first."""

    def __init__(self, desktop: Desktop) -> None:
        self.desktop = desktop
        self.browser_id = self.identity(f"{desktop.id}/browser").lower()
        self.pages: dict[str, str] = {}
        self._made = 0
        self.show([], afresh=True)

    def open_page(self, url: str) -> str:
        """Open a page and return its target id."""
        self._made += 1
        page = self.identity(f"{self.desktop.id}/page/{self._made}")
        self.pages[page] = url or "about:blank"
        return page

    def show(self, urls: Iterable[str], *, afresh: bool) -> None:
        """Open pages as a Chrome does that is launched with `urls`: a running one adds them to those that it has."""
        if afresh:
            self.pages.clear()
        for url in urls:
            self.open_page(url)
        if not self.pages:
            self.open_page("about:blank")

    def listed(self) -> list[str]:
        """The target ids that it tells of."""
        return [] if self.desktop.behaviour.cdp_no_page else list(self.pages)

    def version(self) -> dict[str, str]:
        return {
            "protocolVersion": "1.3",
            "product": PRODUCT,
            "revision": "@0",
            "userAgent": USER_AGENT,
            "jsVersion": "14.0",
        }

    @staticmethod
    def identity(seed: str) -> str:
        """An id as Chrome's look."""
        return hashlib.md5(seed.encode(), usedforsecurity=False).hexdigest().upper()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.desktop.runs.wait()
        path = request.path.rstrip("/") or "/"
        route = LIST if path == "/json" else path
        kind, _, name = path.removeprefix("/devtools/").partition("/")
        if path.startswith("/devtools/"):
            route = f"/devtools/{kind}"
        way = self.desktop.asked(route, name if route != path else request.query_string)
        if way is not None:
            return await self._go_wrong(request, route, way)
        if path.startswith("/devtools/"):
            return await self._talk(request, kind, name)
        if route == LIST and self.listed():
            self.desktop.seen_good("page list")
        return self._found(request, route)

    async def _go_wrong(self, request: web.BaseRequest, route: str, way: Way) -> web.StreamResponse:
        right = self._found(request, route).body if way in ACTING else b""
        body = right if isinstance(right, bytes) else b""
        return await answer_badly(request, way, body, b"{}", b'[{"id": 1}, 2]', "application/json")

    async def _talk(self, request: web.BaseRequest, kind: str, name: str) -> web.StreamResponse:
        if not (kind == "browser" and name == self.browser_id) and not (kind == "page" and name in self.pages):
            return web.Response(status=404, text="No such target id")
        return await Conversation(self, request, name if kind == "page" else None).hold()

    def _found(self, request: web.BaseRequest, route: str) -> web.Response:
        verb, _, argument = route.removeprefix("/json/").partition("/")
        if route == "/json/version":
            return as_json(self._about(request.host))
        if route == LIST:
            return as_json([self._described(page, request.host) for page in self.listed()])
        if verb == "new" and request.method in ("PUT", "GET"):
            return as_json(self._described(self.open_page(request.query_string), request.host))
        if verb in ("activate", "close") and argument in self.pages:
            if verb == "close":
                del self.pages[argument]
            return web.Response(text="Target activated" if verb == "activate" else "Target is closing")
        known = verb in ("activate", "close")
        return web.Response(status=404, text=f"No such target id: {argument}" if known else f"Unknown command: {route}")

    def _about(self, host: str) -> dict[str, str]:
        return {
            "Browser": PRODUCT,
            "Protocol-Version": "1.3",
            "User-Agent": USER_AGENT,
            "webSocketDebuggerUrl": f"ws://{host}/devtools/browser/{self.browser_id}",
        }

    def _described(self, page: str, host: str) -> dict[str, Any]:
        url = self.pages[page]
        return {
            "description": "",
            "id": page,
            "title": url,
            "type": "page",
            "url": url,
            "webSocketDebuggerUrl": f"ws://{host}/devtools/page/{page}",
        }
