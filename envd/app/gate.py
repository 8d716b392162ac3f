"""The gate that every request passes: meant for us, from somebody known, who may do this, and not too often."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from urllib.parse import parse_qs

import anyio
import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from ..access import Access, Caller, Scope
from ..errors import EnvdError, Forbidden, MisdirectedRequest, TooManyRequests
from ..telemetry.about import note, path_of
from .problems import refuse

logger = structlog.get_logger(__name__)
audit = structlog.get_logger("envd.audit")

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/docs", "/errors", "/openapi.json"})
"""For load balancers and for readers, who have no tokens. They tell nothing that anybody
could use: the documentation is of this version, not of this daemon."""
OPEN_PAGE = re.compile(r"/|/dashboard/[^/]*|/docs/[^/]*")
"""The dashboard and its parts: they hold nothing of this daemon, and ask for what they show as any caller does."""
ADMIN_PATHS = frozenset({"/v1/drain"})
READING_PATHS = frozenset({"/v1/links", "/env/history_messages"})
"""Whose POST changes nothing."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
LINK = "signature"
"""Of a link, in its query."""
COOKIE = "envd-link"
COOKIES = 8
"""Of that name that are looked at."""
CALLER = "envd.caller"
"""In the scope of a request that was let in."""
_PLAYED = re.compile(r"/v1/envs/[^/]*/(vnc|cdp)(/|$)")
CLIENTS = 10_000
"""Clients whose rate is remembered."""


class Gate:
    """Inside of `Boundary`."""

    def __init__(self, app: ASGIApp, access: Access, rate: float) -> None:
        self._app = app
        self._access = access
        self._rates = Rates(rate)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._admit(scope)
        except EnvdError as error:
            await self._refuse(error, scope, receive, send)
            return
        scope[CALLER] = caller
        if caller is not None:
            note(caller=caller.name)
        if caller is not None and caller.how == "link" and caller.below:
            send = _keeps_link(scope, caller, send)
        left = None if caller is None or caller.until is None else caller.until - time.time()
        with anyio.move_on_after(left) as patience:  # a stream ends with the link that it came by
            if _changes(scope):
                await self._audited(caller, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        if patience.cancelled_caught and scope["type"] == "websocket":
            with anyio.move_on_after(1):
                await send({"type": "websocket.close", "code": 1008, "reason": "The link has ended."})

    async def _refuse(self, error: EnvdError, scope: AsgiScope, receive: Receive, send: Send) -> None:
        logger.info("refused", address=_peer_of(scope), code=error.code, detail=error.detail)
        if _changes(scope):
            _write(None, scope, error.status)
        headers = {"WWW-Authenticate": 'Bearer realm="envd"'} if error.status == 401 else {}
        await refuse(error, scope, receive, send, headers)

    def _admit(self, scope: AsgiScope) -> Caller | None:
        """Raises MisdirectedRequest, Unauthorized, Forbidden, TooManyRequests."""
        path, method, headers = _path_of(scope), scope.get("method", "GET"), Headers(scope=scope)
        peer = _peer_of(scope)
        if method in SAFE and (path in OPEN_PATHS or OPEN_PAGE.fullmatch(path)):
            self._rates.require("a stranger", peer)
            return None
        query = parse_qs(scope["query_string"].decode("ascii", "replace"))
        link = query.get(LINK, [""])[-1] if method in SAFE else ""
        cookies = _kept_links(headers) if method in SAFE else []
        forwarded = headers.getlist("x-forwarded-for")
        caller = self._access.caller(peer, headers.get("authorization", ""), forwarded, link, path, cookies)
        host = headers.get("host", "")
        if caller.how in ("open", "network", "cookie"):
            # With a token no page can come by, whatever it has its name point to; a cookie goes to its own name alone.
            if caller.how != "cookie":
                self._refuse_other_names(host)
            if headers.get("sec-fetch-mode") != "navigate":
                _refuse_other_sites(headers, host)
        elif method not in SAFE or scope["type"] == "websocket":
            _refuse_other_sites(headers, host)
        self._rates.require(caller.name, f"{caller.how} {caller.address}")
        caller.require(needed_scope(method, path), f"{method} {path[:100]}")
        return caller

    def _refuse_other_names(self, host: str) -> None:
        if not self._access.knows_host(host):
            raise MisdirectedRequest(
                f"The request is for {host[:100]!r}, and this daemon is not known by that name.",
                hint="Use its address, send a token, or have the daemon's ENVD_HOSTS name it.",
            )

    async def _audited(self, caller: Caller | None, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Who changed what, and whether they could."""
        status = 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
                _write(caller, scope, status)  # it may stay open for hours
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        finally:
            if status != 101:
                _write(caller, scope, status)


class Rates:
    """So many requests a second of each client, and twice as many at once (a token bucket)."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Client → requests that it may make now, and when that was."""

    def require(self, name: str, whence: str) -> None:
        """One more of `name`, from there: those who share a token do not share a rate. Raises TooManyRequests."""
        if not self._rate:
            return
        now, client = time.monotonic(), f"{whence} {name}"
        most = max(1.0, 2 * self._rate)
        left, then = self._left.pop(client, (most, now))
        left = min(most, left + (now - then) * self._rate)
        self._left[client] = max(left - 1, 0.0) if left >= 1 else left, now
        while len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        if left < 1:
            raise TooManyRequests(
                f"{name} made more than {self._rate:g} requests a second.",
                hint="Wait for a job on its stream of events instead of asking again and again.",
                retry_after=max(1.0, (1 - left) / self._rate),
                limit=self._rate,
                setting="ENVD_REQUEST_RATE",
            )


def _write(caller: Caller | None, scope: AsgiScope, status: int) -> None:
    """One line of the audit. Of somebody who was refused there is the address alone."""
    audit.info(
        "audit",
        caller=caller.name if caller else "",
        how=caller.how if caller else "refused",
        address=caller.address if caller else _peer_of(scope),
        method=scope.get("method", "WEBSOCKET"),
        path=path_of(scope),
        status=status,
    )


def _changes(scope: AsgiScope) -> bool:
    """Whether the request may change something. Chrome also takes GET for commands."""
    if scope["type"] == "websocket":
        return True
    played = _PLAYED.match(_path_of(scope))
    return scope["method"] not in SAFE or (played is not None and played[1] == "cdp")


def _path_of(scope: AsgiScope) -> str:
    """As the routes know it, wherever the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _peer_of(scope: AsgiScope) -> str:
    """Of a unix socket nobody is told: who may connect there is of this host."""
    return str((scope.get("client") or ("127.0.0.1", 0))[0])


def needed_scope(method: str, path: str) -> Scope:
    """What a request needs. A websocket counts as GET. Through VNC and CDP a desktop is played, whatever the method."""
    if _PLAYED.match(path):
        return Scope.PLAY
    if method in SAFE or path in READING_PATHS:
        return Scope.READ
    return Scope.ADMIN if path in ADMIN_PATHS else Scope.PLAY


def caller_of(scope: AsgiScope) -> Caller:
    """Who made the request that was let in; for paths that are not open to all."""
    caller: Caller = scope[CALLER]
    return caller


def _kept_links(headers: Headers) -> list[str]:
    """Links that a browser keeps as cookies: of each path, and what pages of this origin may have planted."""
    pairs = [pair.strip() for line in headers.getlist("cookie") for pair in line.split(";")]
    return [pair.removeprefix(f"{COOKIE}=") for pair in pairs if pair.startswith(f"{COOKIE}=")][:COOKIES]


def _keeps_link(scope: AsgiScope, caller: Caller, send: Send) -> Send:
    """Has the browser keep a link that is good for more than the page which it opened: what that page loads, and the
    websocket that it opens, come without the query. No script can read it, no page of another site have it sent."""
    query = parse_qs(scope["query_string"].decode("ascii", "replace"))
    seconds = int((caller.until or 0) - time.time())
    path = scope.get("root_path", "") + caller.below
    safe = "; Secure" if scope["scheme"] == "https" else ""
    value = f"{COOKIE}={query[LINK][-1]}; Path={path}; Max-Age={seconds}; HttpOnly; SameSite=Strict{safe}"

    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message["headers"] = [*message.get("headers", ()), (b"set-cookie", value.encode())]
        await send(message)

    return send_with_cookie


def _refuse_other_sites(headers: Headers, host: str) -> None:
    """A page of another site can make a browser send what needs no permission to be sent; its answer it cannot read,
    and the harm is done by then. Raises Forbidden."""
    origin = headers.get("origin", "")
    foreign = origin and origin.partition("://")[2].lower() != host.lower()
    if foreign or headers.get("sec-fetch-site", "") in ("cross-site", "same-site"):
        raise Forbidden(
            f"The request comes from a page of {origin[:100] or 'another site'}.",
            hint="Send it from a program instead.",
        )
