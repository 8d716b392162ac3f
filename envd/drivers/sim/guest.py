"""The guest port of a sim desktop: the routes of the OSWorld guest server that set-ups, episodes and evaluations use.

Routes, statuses and shapes follow the published server. Differences: a command that a sim desktop does not know ends
with 127, as in a shell; a window is opened at once; `downloads` is all that is on the internet.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import shlex
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from aiohttp import BodyPartReader, web

from .answers import answer_badly, as_json, html
from .behaviour import ACTING, Way
from .calls import texts
from .files import HOME, absolute, tree
from .gui import Output
from .shell import run_script, run_words

if TYPE_CHECKING:
    from .desktop import Desktop

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]
ALIASES = {"/setup/execute": "/execute", "/setup/execute_with_verification": "/execute_with_verification"}
PARTS = web.RequestKey("parts", dict[str, bytes])
STATES = "https://accessibility.ubuntu.example.org/ns/state"


class Guest:
    """Answers requests for one desktop."""

    def __init__(self, desktop: Desktop) -> None:
        self.desktop = desktop
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/screenshot"): self._screenshot,
            ("GET", "/terminal"): self._terminal,
            ("GET", "/platform"): self._platform,
            ("GET", "/cursor_position"): self._cursor_position,
            ("GET", "/accessibility"): self._accessibility,
            ("POST", "/execute"): self._execute,
            ("POST", "/execute_with_verification"): self._execute_with_verification,
            ("POST", "/screen_size"): self._screen_size,
            ("POST", "/window_size"): self._window_size,
            ("POST", "/desktop_path"): self._desktop_path,
            ("POST", "/wallpaper"): self._wallpaper,
            ("POST", "/file"): self._file,
            ("POST", "/list_directory"): self._list_directory,
            ("POST", "/setup/launch"): self._launch,
            ("POST", "/setup/upload"): self._upload,
            ("POST", "/setup/download_file"): self._download_file,
            ("POST", "/setup/change_wallpaper"): self._change_wallpaper,
            ("POST", "/setup/open_file"): self._open_file,
            ("POST", "/setup/activate_window"): self._activate_window,
            ("POST", "/setup/close_window"): self._close_window,
        }
        self._paths = {path for _, path in self._routes}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        route = ALIASES.get(request.path, request.path)
        await self.desktop.runs.wait()
        way = self.desktop.asked(route, await _said(request))
        if self.desktop.behaviour.answer_s:
            await asyncio.sleep(self.desktop.behaviour.answer_s)
        if way is None:
            return await self._do(request, route)
        return await self._go_wrong(request, route, way)

    async def _do(self, request: web.BaseRequest, route: str) -> web.Response:
        handler = self._routes.get((request.method, route))
        if handler is None:
            return html(405, "Method Not Allowed") if route in self._paths else html(404, "Not Found")
        try:
            return await handler(request)
        except _Refused as refused:
            return html(refused.status, refused.title)

    async def _go_wrong(self, request: web.BaseRequest, route: str, way: Way) -> web.StreamResponse:
        if route == "/screenshot":
            return await self.desktop.bad_screenshot(request, way)
        right = await self._do(request, route) if way in ACTING else as_json({})
        body = right.body if isinstance(right.body, bytes) else b""
        return await answer_badly(request, way, body, b"{}", b"[1, 2]", right.content_type)

    # Looking

    async def _screenshot(self, request: web.BaseRequest) -> web.Response:
        picture = await self.desktop.screenshot()
        self.desktop.seen_good("guest")
        return web.Response(body=picture, content_type="image/png")

    async def _terminal(self, request: web.BaseRequest) -> web.Response:
        return as_json({"output": self.desktop.terminal, "status": "success"})

    async def _platform(self, request: web.BaseRequest) -> web.Response:
        if self.desktop.cloned:
            self.desktop.seen_good("guest")
        return web.Response(text="Linux")

    async def _cursor_position(self, request: web.BaseRequest) -> web.Response:
        return as_json(list(self.desktop.gui.cursor))

    async def _accessibility(self, request: web.BaseRequest) -> web.Response:
        """Each window is an application; the one in front is active."""
        *behind, front = [quoteattr(title) for title in self.desktop.gui.windows] or [""]
        nodes = "".join(f"<application name={title}/>" for title in behind)
        nodes += f'<application name={front} st:active="true"/>' if front else ""
        return as_json({"AT": f'<desktop-frame xmlns:st="{STATES}" name="main">{nodes}</desktop-frame>'})

    async def _screen_size(self, request: web.BaseRequest) -> web.Response:
        width, height = self.desktop.screen
        return as_json({"width": width, "height": height})

    async def _window_size(self, request: web.BaseRequest) -> web.Response:
        """Asked for by the last part of a class, in any case. Published servers break down when there is none."""
        name = (await request.post()).get("app_class_name")
        if not isinstance(name, str) or not name:
            return as_json({"error": "app_class_name is required"}, 400)
        gui, (width, height) = self.desktop.gui, self.desktop.screen
        if name.lower() not in {gui.class_of(window).rpartition(".")[2].lower() for window in gui.windows}:
            return html(500, "Internal Server Error")
        return as_json({"width": width * 5 // 8, "height": height * 5 // 8})

    async def _desktop_path(self, request: web.BaseRequest) -> web.Response:
        return as_json({"desktop_path": f"{HOME}/Desktop"})

    async def _wallpaper(self, request: web.BaseRequest) -> web.Response:
        content = self.desktop.files.get(self.desktop.wallpaper)
        return html(404, "Not Found") if content is None else web.Response(body=content, content_type="image/png")

    # Running

    async def _execute(self, request: web.BaseRequest) -> web.Response:
        return await self._ran(await _json(request))

    async def _execute_with_verification(self, request: web.BaseRequest) -> web.Response:
        """Looks as often as it is told to, until what is wanted holds."""
        body = await _json(request)
        wanted, began = body.get("verification") or {}, time.monotonic()
        response = await self._ran(body)
        if not wanted or response.status != 200:
            return response
        answer = json.loads(response.text or "")
        while not (holds := await self._holds(wanted)):
            if time.monotonic() - began > float(body.get("max_wait_time", 10)):
                break
            await asyncio.sleep(float(body.get("check_interval", 1)))
        answer |= {"verification": "passed" if holds else "failed", "wait_time": time.monotonic() - began}
        return as_json(answer if holds else answer | {"status": "verification_failed"}, 200 if holds else 500)

    async def _ran(self, body: dict[str, Any]) -> web.Response:
        try:
            done = await self._run(body.get("command", ""), shell=bool(body.get("shell")))
        except ValueError as error:
            return as_json({"status": "error", "message": str(error)}, 500)
        return as_json({"status": "success", "output": done.output, "error": done.error, "returncode": done.returncode})

    async def _run(self, command: Any, *, shell: bool) -> Output:
        if shell and command:
            return await run_script(command if isinstance(command, str) else _words(command)[0], self.desktop)
        return await run_words(_words(command), self.desktop)

    async def _holds(self, wanted: dict[str, Any]) -> bool:
        if "window_exists" in wanted and not self.desktop.gui.matching(str(wanted["window_exists"])):
            return False
        check = wanted.get("command_success")
        return check is None or (await run_script(str(check), self.desktop)).returncode == 0

    async def _launch(self, request: web.BaseRequest) -> web.Response:
        body = await _json(request)
        command = body.get("command", "")
        try:
            words = _words(command)
            if body.get("shell") and isinstance(command, list):
                words = shlex.split("".join(words[:1]))
        except ValueError as error:
            return as_json({"status": "error", "message": str(error)}, 500)
        await self.desktop.launch(words)
        return web.Response(text=f"{' '.join(words)} launched successfully")

    # Files

    async def _file(self, request: web.BaseRequest) -> web.Response:
        path = (await request.post()).get("file_path")
        if not isinstance(path, str):
            return as_json({"error": "file_path is required"}, 400)
        content = self.desktop.files.get(absolute(path))
        if content is None:
            return as_json({"error": "File not found"}, 404)
        about = {"Content-Disposition": f'attachment; filename="{posixpath.basename(path)}"'}
        return web.Response(body=content, content_type="application/octet-stream", headers=about)

    async def _upload(self, request: web.BaseRequest) -> web.Response:
        parts = request.get(PARTS, {})
        if not {"file_path", "file_data"} <= parts.keys():
            return as_json({"error": "file_path and file_data are required"}, 400)
        self.desktop.files[absolute(parts["file_path"].decode())] = parts["file_data"]
        return web.Response(text=f"File Uploaded: {len(parts['file_data'])} bytes")

    async def _download_file(self, request: web.BaseRequest) -> web.Response:
        body = await _json(request)
        url, path = body.get("url"), body.get("path")
        if not isinstance(url, str) or not isinstance(path, str):
            return web.Response(status=400, text="Path or URL not supplied")
        if url not in self.desktop.downloads:
            return web.Response(status=500, text=f"Failed to download {url}")
        self.desktop.files[absolute(path)] = self.desktop.downloads[url]
        return web.Response(text=f"File downloaded successfully: {len(self.desktop.downloads[url])} bytes")

    async def _list_directory(self, request: web.BaseRequest) -> web.Response:
        path = absolute(str((await _json(request)).get("path", "")))
        found = tree(path, self.desktop.files)
        if found is None:
            return as_json({"error": f"The provided path does not exist or is not a directory: {path}"}, 400)
        return as_json({"directory_tree": found})

    async def _change_wallpaper(self, request: web.BaseRequest) -> web.Response:
        path = (await _json(request)).get("path")
        if not isinstance(path, str) or not path:
            return web.Response(status=400, text="Path not supplied")
        if absolute(path) not in self.desktop.files:
            return web.Response(status=404, text=f"File not found: {path}")
        self.desktop.wallpaper = absolute(path)
        return web.Response(text="Wallpaper changed successfully")

    # Windows

    async def _open_file(self, request: web.BaseRequest) -> web.Response:
        path = (await _json(request)).get("path")
        if not isinstance(path, str) or not path:
            return web.Response(status=400, text="Path not supplied")
        if absolute(path) not in self.desktop.files:
            return web.Response(status=404, text=f"File not found: {path}")
        self.desktop.gui.windows.append(posixpath.basename(path))
        return web.Response(text="File opened successfully")

    async def _activate_window(self, request: web.BaseRequest) -> web.Response:
        name, how = await _window(request)
        self.desktop.gui.raise_window(name, **how)
        return web.Response(text="Window activated successfully")

    async def _close_window(self, request: web.BaseRequest) -> web.Response:
        name, how = await _window(request)
        self.desktop.gui.close_window(name, **how)
        return web.Response(text="Window closed successfully")


class _Refused(Exception):
    """The request cannot be read; answered with a page of HTML, as Flask does."""

    def __init__(self, status: int, title: str) -> None:
        super().__init__(title)
        self.status, self.title = status, title


async def _said(request: web.BaseRequest) -> str:
    """What a request asks for, in plain words; see `Call`. The parts of an upload stay in `request`, since the body
    can be read once: field → bytes."""
    if request.content_type == "multipart/form-data":
        parts: dict[str, bytes] = {}
        request[PARTS] = parts
        async for part in await request.multipart():
            if isinstance(part, BodyPartReader) and part.name:
                parts[part.name] = bytes(await part.read())
        return parts.get("file_path", b"").decode(errors="replace")
    body = await request.read()
    if request.content_type == "application/x-www-form-urlencoded":
        return " ".join(map(str, (await request.post()).values()))
    try:
        return " ".join(texts(json.loads(body)))
    except ValueError:
        return body.decode(errors="replace")


async def _json(request: web.BaseRequest) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise _Refused(415, "Unsupported Media Type")
    try:
        body = await request.json()
    except ValueError:
        raise _Refused(400, "Bad Request") from None
    if not isinstance(body, dict):
        raise _Refused(500, "Internal Server Error")
    return body


async def _window(request: web.BaseRequest) -> tuple[str, dict[str, bool]]:
    body = await _json(request)
    name = body.get("window_name")
    if not isinstance(name, str):
        raise _Refused(400, "Bad Request")
    return name, {how: bool(body.get(how)) for how in ("strict", "by_class")}


def _words(command: Any) -> list[str]:
    """A command as the guest server takes it: a list, or a string to be split."""
    if isinstance(command, list) and all(isinstance(word, str) for word in command):
        return command
    if isinstance(command, str):
        return shlex.split(command)
    raise ValueError(f"command must be a string or a list of strings, not {command!r:.80}")
