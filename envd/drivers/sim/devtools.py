"""A websocket of a sim desktop's Chrome: a handful of methods of the DevTools protocol, sessions with pages, and the
events of a page that loads and of a session that begins and ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import GARBAGE, HTML, reset
from .behaviour import ACTING, Way
from .calls import texts

if TYPE_CHECKING:
    from .cdp import Chrome

Params = dict[str, Any]
LARGE = 5 << 20
"""Characters of a `huge` message."""
ANSWERS: dict[str, Params] = {
    "undefined": {"type": "undefined"},
    "document.readyState": {"type": "string", "value": "complete"},
    "document.visibilityState": {"type": "string", "value": "visible"},
}
YES = {"type": "boolean", "value": True}
"""What every other expression is: whether a page is drawn, or loaded, is what is asked."""


class Refused(Exception):
    """Chrome answers with an error. Its arguments are the code and the message."""


class Conversation:
    """One websocket, with the browser or, when there is a `page`, with that page alone."""

    def __init__(self, chrome: Chrome, request: web.BaseRequest, page: str | None) -> None:
        self._chrome = chrome
        self._request = request
        self._page = page
        self._socket = web.WebSocketResponse(max_msg_size=1 << 24)
        self._sessions: dict[str, str] = {}
        self._enabled: set[str | None] = set()
        self._events: list[Params] = []
        self._of_browser: dict[str, Callable[[Params], Params]] = {
            "Browser.getVersion": lambda params: chrome.version(),
            "Browser.close": lambda params: {},
            "Target.activateTarget": self._activate,
            "Target.attachToTarget": self._attach,
            "Target.closeTarget": self._close_target,
            "Target.createTarget": lambda params: {"targetId": chrome.open_page(str(params.get("url", "")))},
            "Target.detachFromTarget": self._detach,
            "Target.getTargets": lambda params: {"targetInfos": [self._target(page) for page in chrome.listed()]},
            "Target.setDiscoverTargets": lambda params: {},
        }
        self._of_page: dict[str, Callable[[str, str | None, Params], Params]] = {
            "Page.enable": self._enable,
            "Page.navigate": self._navigate,
            "Runtime.enable": lambda page, session, params: {},
            "Runtime.evaluate": self._evaluate,
        }

    async def hold(self) -> web.WebSocketResponse:
        """Answer until the other side has had enough."""
        await self._socket.prepare(self._request)
        async for message in self._socket:
            if not isinstance(message.data, str) or not await self._hear(message.data):
                break
        return self._socket

    async def _hear(self, text: str) -> bool:
        """Whether the conversation goes on."""
        try:
            command = json.loads(text)
        except ValueError:
            return await self._say(_error(None, -32700, "Message must be a valid JSON"))
        if not isinstance(command, dict) or not isinstance(command.get("id"), int):
            return await self._say(_error(None, -32600, "Message must have integer 'id' property"))
        method = str(command.get("method"))
        way = self._chrome.desktop.asked(method, " ".join(texts(command.get("params"))))
        if way is not None:
            return await self._go_wrong(command, way)
        await self._say(self._answered(command), *self._events_now())
        if method == "Browser.close":
            self._chrome.desktop.stop_chrome()
        return method != "Browser.close"

    async def _say(self, *messages: Params) -> bool:
        for message in messages:
            await self._socket.send_str(json.dumps(message))
        return True

    async def _go_wrong(self, command: Params, way: Way) -> bool:
        right = json.dumps(self._answered(command)) if way in ACTING else ""
        if way not in ("stall", "die", "reset", "lose"):
            await self._socket.send_str(_wrong(command, way, right))
        if way == "reset":
            reset(self._request)
        elif way in ("lose", "cut") and self._request.transport is not None:
            self._request.transport.close()
        return way not in ("reset", "lose", "cut")

    def _answered(self, command: Params) -> Params:
        try:
            return _addressed(command, {"result": self._result(command)})
        except Refused as refused:
            return _error(command, *refused.args)

    def _result(self, command: Params) -> Params:
        method, session, params = str(command.get("method")), command.get("sessionId"), command.get("params") or {}
        page = self._page if session is None else self._sessions.get(session)
        if session is not None and page not in self._chrome.pages:
            raise Refused(-32001, "Session with given id not found.")
        if method in self._of_browser:
            return self._of_browser[method](params)
        if page is None or method not in self._of_page:
            raise Refused(-32601, f"'{method}' wasn't found")
        return self._of_page[method](page, session, params)

    def _events_now(self) -> list[Params]:
        events, self._events = self._events, []
        return events

    # Targets

    def _known(self, params: Params) -> str:
        page = params.get("targetId") or self._page
        if page not in self._chrome.pages:
            raise Refused(-32602, "No target with given id found")
        return str(page)

    def _target(self, page: str) -> Params:
        url = self._chrome.pages[page]
        attached = page in self._sessions.values()
        return {
            "targetId": page, "type": "page", "title": url, "url": url, "attached": attached, "canAccessOpener": False,
        }  # fmt: skip

    def _activate(self, params: Params) -> Params:
        self._known(params)
        return {}

    def _attach(self, params: Params) -> Params:
        page = self._known(params)
        session = self._chrome.identity(f"{page}/session/{len(self._sessions)}/{id(self)}")
        self._sessions[session] = page
        about = {"sessionId": session, "targetInfo": self._target(page), "waitingForDebugger": False}
        self._events.append({"method": "Target.attachedToTarget", "params": about})
        return {"sessionId": session}

    def _detach(self, params: Params) -> Params:
        if params.get("sessionId") not in self._sessions:
            raise Refused(-32602, "No session with given id")
        self._end(str(params["sessionId"]))
        return {}

    def _close_target(self, params: Params) -> Params:
        closed = self._known(params)
        del self._chrome.pages[closed]
        for session in [session for session, page in self._sessions.items() if page == closed]:
            self._end(session)
        return {"success": True}

    def _end(self, session: str) -> None:
        about = {"sessionId": session, "targetId": self._sessions.pop(session)}
        self._enabled.discard(session)
        self._events.append({"method": "Target.detachedFromTarget", "params": about})

    # A page

    def _enable(self, page: str, session: str | None, params: Params) -> Params:
        self._enabled.add(session)
        return {}

    def _navigate(self, page: str, session: str | None, params: Params) -> Params:
        """Pages load at once; every session with this one is told."""
        url = str(params.get("url", ""))
        self._chrome.pages[page] = url
        for told in [told for told in self._enabled if (self._sessions.get(told) if told else self._page) == page]:
            event = {"method": "Page.loadEventFired", "params": {"timestamp": time.monotonic()}}
            self._events.append(event | ({"sessionId": told} if told else {}))
        return {"frameId": page, "loaderId": self._chrome.identity(f"{page}/{url}")}

    def _evaluate(self, page: str, session: str | None, params: Params) -> Params:
        expression = str(params.get("expression", ""))
        if expression in ("document.title", "location.href", "document.location.href", "window.location.href"):
            return {"result": {"type": "string", "value": self._chrome.pages[page]}}
        return {"result": ANSWERS.get(expression, YES)}


def _wrong(command: Params, way: Way, right: str) -> str:
    match way:
        case "half" | "cut":
            return right[: len(right) // 2]
        case "garbage":
            return GARBAGE.decode("latin-1")
        case "html":
            return HTML
        case "empty":
            return ""
        case "huge":
            return " " * LARGE
        case "flat":
            return json.dumps(_addressed(command, {}))
        case "size":
            return json.dumps(_addressed(command, {"result": [1, 2]}))
        case _:
            return json.dumps(_error(command, -32603, "Internal error"))


def _error(command: Params | None, code: int, message: str) -> Params:
    return _addressed(command, {"error": {"code": code, "message": message}})


def _addressed(command: Params | None, answer: Params) -> Params:
    """An answer carries the command's id, and the session it came from."""
    return {key: command[key] for key in ("id", "sessionId") if command and key in command} | answer
