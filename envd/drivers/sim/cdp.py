"""The CDP port of a sim desktop: Chrome's HTTP endpoints, and a websocket that knows a handful of methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from .answers import answer_badly, as_json

if TYPE_CHECKING:
    from .desktop import Desktop

PRODUCT = "Chrome/140.0.0.0"
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
LISTS = ("/json", "/json/list")
PROBED = ("/json/version", *LISTS)
Params = dict[str, Any]


class Chrome:
    """A browser with pages, in memory. `pages` is target id → URL, oldest first."""

    def __init__(self, desktop: Desktop) -> None:
        self.desktop = desktop
        self.browser_id = _identity(f"{desktop.id}/browser").lower()
        self.pages: dict[str, str] = {}
        self._made = 0
        self.open_page("about:blank")
        self._methods: dict[str, Callable[[Params], Params]] = {
            "Browser.getVersion": self._version,
            "Page.enable": _nothing,
            "Page.navigate": self._navigate,
            "Runtime.enable": _nothing,
            # What is asked of a page is whether it is drawn, and these always are.
            "Runtime.evaluate": lambda params: {"result": {"type": "boolean", "value": True}},
            "Target.activateTarget": _nothing,
            "Target.attachToTarget": self._attach,
            "Target.closeTarget": self._close_target,
            "Target.createTarget": lambda params: {"targetId": self.open_page(str(params.get("url", "")))},
            "Target.getTargets": lambda params: {"targetInfos": [self._target(page) for page in self.pages]},
            "Target.setDiscoverTargets": _nothing,
        }

    def open_page(self, url: str) -> str:
        """Open a page and return its target id."""
        self._made += 1
        page = _identity(f"{self.desktop.id}/page/{self._made}")
        self.pages[page] = url or "about:blank"
        return page

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        route = request.path.rstrip("/") or "/"
        await self.desktop.before_answering(route)
        if route.startswith("/devtools/"):
            return await self._talk(request, route)
        found = self._found(request, route)
        bad = self.desktop.next_bad("/json/list" if route in LISTS else route, probed=route in PROBED)
        if bad is not None:
            right = found.body if isinstance(found.body, bytes) else b""
            return await answer_badly(request, bad, right, b"{}", b'[{"id": 1}, 2]', "application/json")
        if route in LISTS and self._listed():
            self.desktop.seen_good("page list")
        return found

    def _found(self, request: web.BaseRequest, route: str) -> web.Response:
        verb, _, argument = route.removeprefix("/json/").partition("/")
        if route == "/json/version":
            return as_json(self._about(request.host))
        if route in LISTS:
            return as_json([self._described(page, request.host) for page in self._listed()])
        if verb == "new" and request.method in ("PUT", "GET"):
            return as_json(self._described(self.open_page(request.query_string), request.host))
        if verb in ("activate", "close") and argument in self.pages:
            if verb == "close":
                del self.pages[argument]
            return web.Response(text="Target activated" if verb == "activate" else "Target is closing")
        known = verb in ("activate", "close")
        return web.Response(status=404, text=f"No such target id: {argument}" if known else f"Unknown command: {route}")

    def _listed(self) -> list[str]:
        return [] if self.desktop.behaviour.cdp_no_page else list(self.pages)

    def _about(self, host: str) -> dict[str, str]:
        return {
            "Browser": PRODUCT,
            "Protocol-Version": "1.3",
            "User-Agent": USER_AGENT,
            "webSocketDebuggerUrl": f"ws://{host}/devtools/browser/{self.browser_id}",
        }

    def _described(self, page: str, host: str) -> dict[str, str]:
        url = self.pages[page]
        return {
            "description": "",
            "id": page,
            "title": url,
            "type": "page",
            "url": url,
            "webSocketDebuggerUrl": f"ws://{host}/devtools/page/{page}",
        }

    # The websocket

    async def _talk(self, request: web.BaseRequest, route: str) -> web.StreamResponse:
        kind, _, name = route.removeprefix("/devtools/").partition("/")
        if not (kind == "browser" and name == self.browser_id) and not (kind == "page" and name in self.pages):
            return web.Response(status=404, text="No such target id")
        socket = web.WebSocketResponse(max_msg_size=1 << 24)
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(json.dumps(self._reply(message.data, name)))
        return socket

    def _reply(self, text: str, page: str) -> Params:
        try:
            command = json.loads(text)
        except ValueError:
            return _error(None, -32700, "Message must be a valid JSON")
        if not isinstance(command, dict) or not isinstance(command.get("id"), int):
            return _error(None, -32600, "Message must have integer 'id' property")
        method, params = command.get("method"), command.get("params") or {}
        if method not in self._methods:
            return _error(command, -32601, f"'{method}' wasn't found")
        try:
            result = self._methods[method]({"targetId": page, **params})
        except KeyError:
            return _error(command, -32602, "No target with given id found")
        return _addressed(command, {"result": result})

    def _version(self, params: Params) -> Params:
        return {
            "protocolVersion": "1.3",
            "product": PRODUCT,
            "revision": "@0",
            "userAgent": USER_AGENT,
            "jsVersion": "14.0",
        }

    def _target(self, page: str) -> Params:
        url = self.pages[page]
        return {"targetId": page, "type": "page", "title": url, "url": url, "attached": False, "canAccessOpener": False}

    def _navigate(self, params: Params) -> Params:
        page = params["targetId"] if params["targetId"] in self.pages else next(iter(self.pages))
        self.pages[page] = str(params["url"])
        return {"frameId": page, "loaderId": _identity(f"{page}/{params['url']}")}

    def _attach(self, params: Params) -> Params:
        self.pages[params["targetId"]]
        return {"sessionId": _identity(f"{params['targetId']}/session")}

    def _close_target(self, params: Params) -> Params:
        del self.pages[params["targetId"]]
        return {"success": True}


def _nothing(params: Params) -> Params:
    return {}


def _error(command: Params | None, code: int, message: str) -> Params:
    return _addressed(command, {"error": {"code": code, "message": message}})


def _addressed(command: Params | None, answer: Params) -> Params:
    """An answer carries the command's id, and the session it came from."""
    return {key: command[key] for key in ("id", "sessionId") if command and key in command} | answer


def _identity(seed: str) -> str:
    return hashlib.md5(seed.encode(), usedforsecurity=False).hexdigest().upper()
