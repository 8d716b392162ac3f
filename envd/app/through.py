"""A desktop's own services through this daemon's port, its tokens and scopes: screen (noVNC), Chrome's DevTools, files.

    /v1/envs/{env}/vnc/…    the pages and the websocket of the desktop's noVNC; the folder itself opens the screen
    /v1/envs/{env}/cdp/…    Chrome's json/… and devtools/…, with the addresses in them leading through here
    /v1/envs/{env}/files    one file, named by `path`: GET reads, PUT writes

It is the desktop that the env plays on. What was opened keeps it awake, and ends with it: when it dies, when a reset
takes it away, when the daemon drains, when the link that it was opened by ends.

The guest is an adversary that answers under this daemon's address. So nothing of a caller's headers reaches it and
nothing of its headers leaves but the type and length of a body; its pages may talk to their own folder and open
nothing; its files and its JSON are no pages. What it sends is bounded, and passed on only as fast as it is taken.
"""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext
from typing import Any
from urllib.parse import quote, unquote_plus

import aiohttp
import anyio
import structlog
from aiohttp import WSCloseCode
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send

from ..errors import (
    BodyTooLarge,
    DesktopLost,
    Draining,
    EnvdError,
    Forbidden,
    GuestUnreachable,
    HttpVersionUnsupported,
    InvalidRequest,
    MalformedJson,
    MisdirectedRequest,
    NotFound,
    NoVnc,
    RequestError,
)
from ..guest import upstream
from ..guest.client import parse_json
from ..models import Desktop
from .bodies import env_of, service_of
from .gate import LINK, SAFE
from .leases import require
from .problems import refuse
from .sse import counted, refuse_another

logger = structlog.get_logger(__name__)

SEND_LIMIT = 30.0
"""Seconds that a client may leave a piece or a message unread, or a guest a message, before it is cut off."""
PAGE_LIMIT = 64 * 1024 * 1024
"""Bytes of one file of noVNC."""
JSON_LIMIT = 4 * 1024 * 1024
"""Bytes of what Chrome tells over HTTP."""
FILE_LIMIT = 4 * 1024 * 1024 * 1024
"""Bytes of a file of a desktop."""
LONGEST_PATH = 1000
_SEGMENT = re.compile(r"(?!\.\.?(/|$))[\w.~@+,=:-]+", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?")
_HOST_V6 = re.compile(r"\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_PROTOCOL = re.compile(r"[\w.-]{1,64}", re.ASCII)
_TARGET = re.compile(r"/devtools/(browser|page)/[\w.-]{1,100}", re.ASCII)
_READING = frozenset({"json", "json/list", "json/version", "json/protocol"})
"""What Chrome answers without doing anything."""

GUARDS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""With every answer of a guest. The next desktop answers at the same address, so nothing is kept of this one's."""
NO_PAGE = {**GUARDS, "Content-Security-Policy": "sandbox; default-src 'none'"}
"""With what is no page, whatever a browser makes of it."""


class _Endpoint:
    """ASGI for requests and websockets alike. A problem answers what has not been answered yet, and ends what has."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = ""

        async def send_in_time(message: Message) -> None:
            nonlocal began
            began = began or message["type"]
            try:
                with anyio.fail_after(SEND_LIMIT):
                    await send(message)
            except TimeoutError as error:
                raise RequestError(f"What was sent was not read for {SEND_LIMIT:g} s.") from error

        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                raise HttpVersionUnsupported(
                    "Desktops are served over HTTP/1.1 only.", hint="Let your proxy speak 1.1."
                )
            await self._serve(HTTPConnection(scope), receive, send_in_time)
        except EnvdError as error:
            if not began:
                await refuse(error, scope, receive, send)
                return
            logger.info("cut off", path=scope["path"][:200], code=error.code, detail=error.detail)
            if began == "websocket.accept":
                with anyio.move_on_after(1):
                    await send(_closing(_code_of(error), error.detail))

    async def _serve(self, request: HTTPConnection, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class Vnc(_Endpoint):
    """The desktop's screen, live: the pages of its noVNC, and the websocket under them. With an empty path a page that
    opens it and connects."""

    async def _serve(self, request: HTTPConnection, receive: Receive, send: Send) -> None:
        scope, path = request.scope, _safe(request.path_params["path"])
        prefix = scope["path"].removesuffix(path)
        own_path = f"{prefix.lstrip('/')}websockify"
        if path == own_path:
            # Newer noVNC takes the `path` that it is told for one beside its page.
            path = "websockify"

        async def play(desktop: Desktop) -> None:
            base = _vnc_of(desktop)
            if scope["type"] == "websocket":
                await _converse(f"{base}/{path}{_query(scope)}", {}, scope, receive, send)
                return
            policy = _page_policy(request.headers.get("host", ""), prefix)
            if not path:
                await _opener(own_path)(scope, receive, send)
                return
            async with upstream.asking(scope["method"], f"{base}/{path}{_query(scope)}") as response:
                if 400 <= response.status < 500:
                    raise NotFound(f"The desktop's noVNC has no {path} ({response.status}).")
                if response.status != 200:
                    raise upstream.misbehaved(f"The desktop's noVNC answered {response.status} to {path}.")
                headers = {**GUARDS, "Content-Security-Policy": policy, "Content-Type": upstream.content_type(response)}
                await _pass_on(response, headers, PAGE_LIMIT, send)

        await _on_desktop(request, receive, play, lasts=scope["type"] == "websocket")


class Cdp(_Endpoint):
    """The DevTools of the desktop's Chrome: `json/version`, `json/list`, `json/new`, … and the websockets that they
    name."""

    async def _serve(self, request: HTTPConnection, receive: Receive, send: Send) -> None:
        scope, path = request.scope, _safe(request.path_params["path"])
        prefix, is_socket = scope["path"].removesuffix(path), scope["type"] == "websocket"
        path = path.rstrip("/")
        if is_socket and not path.startswith("devtools/"):
            raise NotFound(f"Chrome has no websocket at {path}.", hint="json/version and json/list name those it has.")
        if not is_socket and path.partition("/")[0] != "json":
            raise NotFound(f"Of Chrome there is no {path or 'page'} here.", hint="json/version and json/list are.")
        if request.headers.get("sec-fetch-mode") == "navigate" and path not in _READING:
            raise Forbidden("A link in a browser may not command Chrome.", hint="Send the request from a program.")
        address = _websockets_at(request, prefix)

        async def play(desktop: Desktop) -> None:
            assert desktop.endpoints is not None
            url, host = f"{desktop.endpoints.cdp}/{path}{_query(scope)}", {"Host": "localhost"}
            if is_socket:
                await _converse(url, host, scope, receive, send)
                return
            async with upstream.asking(scope["method"], url, headers=host) as response:
                body = await upstream.whole(response, JSON_LIMIT)
                if response.status >= 500:
                    raise upstream.misbehaved(f"Chrome answered {response.status} to {path}.")
                await _told(body, response.status, address)(scope, receive, send)

        await _on_desktop(request, receive, play, lasts=is_socket)


class Files(_Endpoint):
    """A file of the desktop, `path` (absolute, or from ~). GET streams it; PUT stores the body, of which Content-Length
    must tell the size, in a folder that is there."""

    async def _serve(self, request: HTTPConnection, receive: Receive, send: Send) -> None:
        path = _file_path(request)
        if request.scope["method"] == "PUT":
            require(request, env_of(request))
            await self._write(Request(request.scope, receive), path, send)
        else:
            await self._read(request, path, receive, send)

    async def _read(self, request: HTTPConnection, path: str, receive: Receive, send: Send) -> None:
        name = quote(path.rstrip("/").rpartition("/")[2] or "file", safe="")
        headers = {
            **NO_PAGE,
            "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
            "Content-Type": "application/octet-stream",
        }

        async def read(desktop: Desktop) -> None:
            assert desktop.endpoints is not None
            url, form = f"{desktop.endpoints.guest}/file", {"file_path": path}
            async with upstream.asking("POST", url, form=form) as response:
                if response.status == 404:
                    raise NotFound(f"There is no file {path} on the desktop.")
                if response.status != 200:
                    said = (await upstream.whole(response, JSON_LIMIT))[:300].decode(errors="replace")
                    raise upstream.misbehaved(f"The guest answered {response.status} to {path}: {said!r}")
                await _pass_on(response, headers, FILE_LIMIT, send, body=request.scope["method"] != "HEAD")

        await _on_desktop(request, receive, read, lasts=True)

    async def _write(self, request: Request, path: str, send: Send) -> None:
        given = request.headers.get("content-length", "")
        if not (given.isascii() and given.isdecimal() and len(given) < 20):
            raise InvalidRequest("The size of the file is not told.", hint="Send Content-Length.", errors=[])
        size = int(given)
        if size > FILE_LIMIT:
            raise BodyTooLarge(f"The file is larger than {FILE_LIMIT} bytes.", limit=FILE_LIMIT)
        broken: list[EnvdError] = []

        async def parts() -> AsyncIterator[bytes]:
            try:
                body = request.stream()
                while True:
                    with anyio.fail_after(upstream.IDLE_SECONDS):
                        part = await anext(body, None)
                    if part is None:
                        return
                    yield part
            except (ClientDisconnect, TimeoutError) as error:
                broken.append(MalformedJson("The client went away, or paused, before its file was complete."))
                raise broken[0] from error

        async def write(desktop: Desktop) -> None:
            try:
                await service_of(request).fleet.guest(desktop).store(path, parts(), size)
            except GuestUnreachable as error:
                raise broken[0] if broken else error from error
            await JSONResponse({"path": path, "bytes": size})(request.scope, request.receive, send)

        await _on_desktop(request, None, write, lasts=True)


# -- which desktop, and for how long --------------------------------------------------------------------------------


async def _on_desktop(
    request: HTTPConnection, receive: Receive | None, work: Callable[[Desktop], Awaitable[None]], *, lasts: bool
) -> None:
    """Run `work` on the env's desktop until it is done, the daemon drains or, of a request without a body, the client
    hangs up. What `lasts` is counted.

    Raises as `Envs.on_desktop`, and Draining, TooManyWatchers.
    """
    service, env = service_of(request), env_of(request)
    service.refuse_when_draining()
    if lasts:
        refuse_another(service)
    service.about(env)
    watched = receive if request.scope["type"] == "http" else None
    failure: EnvdError | None = None
    done = left = False
    with counted(service) if lasts else nullcontext():
        async with anyio.create_task_group() as race:

            async def end_with_the_daemon() -> None:
                await service.draining.wait()
                race.cancel_scope.cancel()

            async def end_with_the_client(receive: Receive) -> None:
                nonlocal left
                while (await receive())["type"] != "http.disconnect":
                    pass
                left = True
                race.cancel_scope.cancel()

            race.start_soon(end_with_the_daemon)
            if watched is not None:
                race.start_soon(end_with_the_client, watched)
            try:
                await service.envs.on_desktop(env, work)
                done = True
            except EnvdError as error:
                failure = error
            race.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not done and not left:
        raise Draining("The daemon is shutting down.", retry_after=5)


# -- passing on -----------------------------------------------------------------------------------------------------


async def _pass_on(
    response: aiohttp.ClientResponse, headers: dict[str, str], limit: int, send: Send, *, body: bool = True
) -> None:
    """Answer with the body that the guest sends. What fails on the way leaves the answer short of its end."""
    size = upstream.length(response)
    if size is not None and size > limit:
        raise upstream.misbehaved(f"{response.url.path} announced {size} bytes, more than {limit}.")
    if size is not None:
        headers = {**headers, "Content-Length": str(size)}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    if body:
        async with aclosing(upstream.pieces(response, limit)) as pieces:
            # The first is waited for: a guest that sends nothing can still be answered for with a problem.
            first = await anext(pieces, b"")
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


async def _converse(url: str, headers: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
    """Join the caller's websocket with the guest's until either ends; the other is told with the same code."""
    assert (await receive())["type"] == "websocket.connect"
    offered = [name for name in scope["subprotocols"] if _PROTOCOL.fullmatch(name)][:8]
    async with upstream.websocket(url, offered, headers) as socket:
        chosen = socket.protocol if socket.protocol in offered else None
        await send({"type": "websocket.accept", "subprotocol": chosen})
        failure: EnvdError | None = None
        async with anyio.create_task_group() as ways:

            async def to_guest() -> None:
                nonlocal failure
                try:
                    code = await _forward(receive, socket)
                except TimeoutError:
                    failure = upstream.misbehaved(f"The guest read nothing for {SEND_LIMIT:g} s.")
                    code = WSCloseCode.GOING_AWAY
                except (aiohttp.ClientError, OSError):
                    return  # it has closed, and `_bring` comes upon why
                ways.cancel_scope.cancel()
                with anyio.move_on_after(upstream.CLOSE_SECONDS, shield=True):
                    await socket.close(code=code)

            ways.start_soon(to_guest)
            try:
                await send(await _bring(socket, send))
            except EnvdError as error:
                failure = error
            ways.cancel_scope.cancel()
        if failure is not None:
            raise failure


async def _forward(receive: Receive, socket: aiohttp.ClientWebSocketResponse) -> int:
    """What the caller sends, to the guest, until the caller has had enough: its code. Raises TimeoutError when the
    guest does not read, ClientError and OSError when it is gone."""
    while (message := await receive())["type"] == "websocket.receive":
        with anyio.fail_after(SEND_LIMIT):
            if message.get("text") is not None:
                await socket.send_str(message["text"])
            else:
                await socket.send_bytes(message.get("bytes") or b"")
    code = int(message.get("code") or 0)
    return code if _may_be_sent(code) else WSCloseCode.GOING_AWAY


async def _bring(socket: aiohttp.ClientWebSocketResponse, send: Send) -> Message:
    """What the guest sends, to the caller, until it ends; how the caller is told."""
    while True:
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
        elif message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
        elif message.type is aiohttp.WSMsgType.CLOSE:
            code = message.data if isinstance(message.data, int) else 0
            if code in (0, WSCloseCode.OK):
                return _closing(WSCloseCode.OK, message.extra or "")
            return _closing(code if _may_be_sent(code) else WSCloseCode.INTERNAL_ERROR, message.extra or "")
        elif message.type is aiohttp.WSMsgType.ERROR:
            return _closing(WSCloseCode.INTERNAL_ERROR, f"The guest broke the protocol: {message.data}")
        else:
            return _closing(WSCloseCode.INTERNAL_ERROR, "The guest broke off.")


def _may_be_sent(code: int) -> bool:
    """Whether RFC 6455 lets a close frame carry it."""
    return code in range(1000, 1004) or code in range(1007, 1015) or code in range(3000, 5000)


def _closing(code: int, reason: str) -> Message:
    said = reason.encode(errors="replace")[:120].decode(errors="ignore")
    return {"type": "websocket.close", "code": int(code), "reason": said}


def _code_of(error: EnvdError) -> int:
    return WSCloseCode.GOING_AWAY if isinstance(error, Draining | DesktopLost) else WSCloseCode.INTERNAL_ERROR


# -- what is asked for ----------------------------------------------------------------------------------------------


def _safe(path: str) -> str:
    """A path that leads down, as every server would read it. Raises NotFound."""
    segments = path.removesuffix("/").split("/") if path else []
    if len(path) > LONGEST_PATH or not all(map(_SEGMENT.fullmatch, segments)):
        raise NotFound(f"{path[:100]!r} is no path that a desktop is asked for.")
    return path


def _query(scope: Scope) -> str:
    """As it came, without the signature of a link: the guest is not to know that."""
    left = scope["query_string"].decode("ascii", "replace")
    if scope.get("method", "GET") in SAFE:  # where there may be one
        left = "&".join(part for part in left.split("&") if unquote_plus(part.partition("=")[0]) != LINK)
    return f"?{left}" if left else ""


def _file_path(request: HTTPConnection) -> str:
    path = request.query_params.get("path", "")
    if not path.startswith(("/", "~")) or len(path) > 4096 or not path.isprintable():
        message = "must be the absolute path of a file, or begin with ~"
        raise InvalidRequest(f"path: {message}.", errors=[{"field": "path", "message": message}])
    return path


def _vnc_of(desktop: Desktop) -> str:
    assert desktop.endpoints is not None
    if desktop.endpoints.vnc is None:
        raise NoVnc(
            f"The desktop {desktop.id} has no VNC.",
            hint=f"Desktops of the providers docker and aws have it, those of {desktop.provider} do not. "
            "/v1/envs/{env}/screenshot shows any screen.",
        )
    return desktop.endpoints.vnc


# -- what is answered -----------------------------------------------------------------------------------------------


def _opener(path: str) -> Response:
    """A page of ours on the way to the guest's, which so never sees the address that this one was opened by. Not a
    redirect: the cookie that a link leaves would not be sent on one that begins on another site."""
    there = f"vnc.html?path={quote(path)}&autoconnect=1&resize=scale"
    text = (
        '<!doctype html><meta charset="utf-8"><title>A desktop</title>'
        f'<meta http-equiv="refresh" content="0;url={html.escape(there)}">'
        f'<p><a href="{html.escape(there)}">The desktop</a></p>'
    )
    headers = {**GUARDS, "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
    return HTMLResponse(text, headers=headers)


def _page_policy(host: str, prefix: str) -> str:
    """What noVNC's pages may do: load from and talk to their own folder. They are of this daemon's origin, since its
    cookies, storage and modules would not work otherwise; so they must not reach its API, nor any other page of it,
    where an open daemon would take them for whoever looks. Raises MisdirectedRequest."""
    if not _HOST.fullmatch(host):
        raise MisdirectedRequest(
            f"noVNC cannot be shown at {host[:100]!r}: its pages are held to an address, in a form that has no IPv6.",
            hint="Call the daemon by a name or an IPv4 address.",
        )
    pages = f"http://{host}{prefix}"  # https too, and of ws wss
    return (
        "sandbox allow-scripts allow-same-origin allow-pointer-lock; default-src 'none'; "
        f"script-src {pages} 'unsafe-inline'; style-src {pages} 'unsafe-inline'; img-src {pages} data: blob:; "
        f"media-src {pages} data: blob:; font-src {pages} data:; connect-src {pages} ws://{host}{prefix} data: blob:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _websockets_at(request: HTTPConnection, prefix: str) -> str:
    """Where the caller finds Chrome's websockets, called as it called us. Raises MisdirectedRequest."""
    host, scope = request.headers.get("host", ""), request.scope
    if not (_HOST.fullmatch(host) or _HOST_V6.fullmatch(host)):
        raise MisdirectedRequest(f"{host[:100]!r} is no address that could be named in an answer.")
    peer = str((scope.get("client") or ("127.0.0.1", 0))[0])
    told = request.headers.get("x-forwarded-proto", "") if service_of(request).access.believes(peer) else ""
    secure = told == "https" or (not told and scope["scheme"] in ("https", "wss"))
    return f"{'wss' if secure else 'ws'}://{host}{prefix.rstrip('/')}"


def _told(body: bytes, status: int, address: str) -> Response:
    """Chrome's answer, in which every address of a websocket leads through here, at `address`."""
    try:
        answer = parse_json(body)
        if isinstance(answer, dict | list):
            targets = answer if isinstance(answer, list) else [answer]
            for target in targets:
                if isinstance(target, dict):
                    _lead_through(target, address)
            return JSONResponse(answer, status, NO_PAGE)
    except (ValueError, RecursionError):
        pass  # no JSON, or none that can be said again
    return Response(body[:4096].decode(errors="replace"), status, NO_PAGE, media_type="text/plain")


def _lead_through(target: dict[str, Any], address: str) -> None:
    frontend = target.pop("devtoolsFrontendUrl", None)
    given = target.pop("webSocketDebuggerUrl", None)
    path = re.sub(r"^wss?://[^/]*", "", given) if isinstance(given, str) else ""
    if not _TARGET.fullmatch(path):
        return
    target["webSocketDebuggerUrl"] = address + path
    if frontend is not None:
        # Every Chrome has the frontend in itself; the guest's own would be a program of the guest's.
        scheme, _, where = address.partition("://")
        target["devtoolsFrontendUrl"] = f"devtools://devtools/bundled/inspector.html?{scheme}={where}{path}"


routes: list[BaseRoute] = [
    Route("/v1/envs/{env}/vnc/{path:path}", Vnc(), methods=["GET"]),
    WebSocketRoute("/v1/envs/{env}/vnc/{path:path}", Vnc()),
    Route("/v1/envs/{env}/cdp/{path:path}", Cdp(), methods=["GET", "PUT"]),
    WebSocketRoute("/v1/envs/{env}/cdp/{path:path}", Cdp()),
    Route("/v1/envs/{env}/files", Files(), methods=["GET", "PUT"]),
]
