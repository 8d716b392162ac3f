"""The guest port of a sim desktop: the routes of the OSWorld guest server that a trainer's episode uses.

Routes, statuses and shapes follow the published server. Two differences: a command that a sim desktop does not know
ends with 127, as in a shell, and a window is opened at once.
"""

from __future__ import annotations

import asyncio
import io
import json
import posixpath
import shlex
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import BodyPartReader, web

from .answers import answer_badly, as_json, break_off, html
from .gui import Output, run_python

if TYPE_CHECKING:
    from .desktop import Desktop

HOME = "/home/user"
ALIASES = {"/setup/execute": "/execute"}
PYTHONS = ("python", "python3")
SHELLS = ("sh", "bash")


class Guest:
    """Answers requests for one desktop."""

    def __init__(self, desktop: Desktop) -> None:
        self.desktop = desktop
        self._routes: dict[tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            ("GET", "/screenshot"): self._screenshot,
            ("GET", "/terminal"): self._terminal,
            ("GET", "/platform"): self._platform,
            ("GET", "/cursor_position"): self._cursor_position,
            ("POST", "/execute"): self._execute,
            ("POST", "/screen_size"): self._screen_size,
            ("POST", "/desktop_path"): self._desktop_path,
            ("POST", "/file"): self._file,
            ("POST", "/list_directory"): self._list_directory,
            ("POST", "/setup/launch"): self._launch,
            ("POST", "/setup/upload"): self._upload,
            ("POST", "/setup/open_file"): self._open_file,
            ("POST", "/setup/activate_window"): self._activate_window,
            ("POST", "/setup/close_window"): self._close_window,
        }
        self._paths = {path for _, path in self._routes}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        desktop = self.desktop
        route = ALIASES.get(request.path, request.path)
        await desktop.before_answering(route)
        if desktop.behaviour.answer_s:
            await asyncio.sleep(desktop.behaviour.answer_s)
        handler = self._routes.get((request.method, route))
        if handler is None:
            return html(405, "Method Not Allowed") if route in self._paths else html(404, "Not Found")
        bad = desktop.next_bad(route, probed=route == "/screenshot")
        if bad is not None:
            return await self._answer_badly(request, route, bad)
        try:
            response = await handler(request)
        except _Refused as refused:
            return html(refused.status, refused.title)
        if desktop.loses(route):
            await break_off(request)
        return response

    async def _answer_badly(self, request: web.BaseRequest, route: str, bad: Any) -> web.StreamResponse:
        if route == "/screenshot":
            return await self.desktop.bad_screenshot(request, bad)
        right = json.dumps({"status": "success", "output": "", "error": "", "returncode": 0}).encode()
        return await answer_badly(request, bad, right, b"{}", b"[1, 2]", "application/json")

    # Looking

    async def _screenshot(self, request: web.BaseRequest) -> web.Response:
        picture = await self.desktop.screenshot()
        self.desktop.seen_good("screenshot")
        return web.Response(body=picture, content_type="image/png")

    async def _terminal(self, request: web.BaseRequest) -> web.Response:
        return as_json({"output": None, "status": "success"})

    async def _platform(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text="Linux")

    async def _cursor_position(self, request: web.BaseRequest) -> web.Response:
        return as_json(list(self.desktop.gui.cursor))

    async def _screen_size(self, request: web.BaseRequest) -> web.Response:
        width, height = self.desktop.screen
        return as_json({"width": width, "height": height})

    async def _desktop_path(self, request: web.BaseRequest) -> web.Response:
        return as_json({"desktop_path": f"{HOME}/Desktop"})

    # Running

    async def _execute(self, request: web.BaseRequest) -> web.Response:
        body = await _json(request)
        try:
            words = _words(body.get("command", ""), shell=bool(body.get("shell")))
        except ValueError as error:
            return as_json({"status": "error", "message": str(error)}, 500)
        done = await self._run(words)
        return as_json({"status": "success", "output": done.output, "error": done.error, "returncode": done.returncode})

    async def _run(self, words: list[str]) -> Output:
        desktop = self.desktop
        match words:
            case [python, "-c", program, *_] if python in PYTHONS:
                desktop.inputs.append(program)
                return await run_python(program, desktop.gui, desktop.behaviour.pace)
            case [shell, "-c", script, *_] if shell in SHELLS:
                return await self._run(shlex.split(script))
            case ["echo", *rest]:
                return Output(" ".join(rest) + "\n")
            case ["true"]:
                return Output()
            case ["false"]:
                return Output(returncode=1)
            case ["sleep", seconds] if seconds.replace(".", "", 1).isdigit():
                await asyncio.sleep(float(seconds))
                return Output()
            case ["cat", path]:
                content = desktop.files.get(_absolute(path))
                if content is None:
                    return Output(error=f"cat: {path}: No such file or directory\n", returncode=1)
                return Output(content.decode(errors="replace"))
            case _:
                return Output(error=f"{words[0] if words else ''}: command not found\n", returncode=127)

    async def _launch(self, request: web.BaseRequest) -> web.Response:
        body = await _json(request)
        command = body.get("command", "")
        try:
            words = _words(command, shell=bool(body.get("shell")))
        except ValueError as error:
            return as_json({"status": "error", "message": str(error)}, 500)
        await self.desktop.launch(words)
        return web.Response(text=f"{' '.join(words)} launched successfully")

    # Files

    async def _file(self, request: web.BaseRequest) -> web.Response:
        form = await request.post()
        path = form.get("file_path")
        if not isinstance(path, str):
            return as_json({"error": "file_path is required"}, 400)
        content = self.desktop.files.get(_absolute(path))
        if content is None:
            return as_json({"error": "File not found"}, 404)
        name = posixpath.basename(path)
        return web.Response(
            body=io.BytesIO(content),
            content_type="application/octet-stream",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    async def _upload(self, request: web.BaseRequest) -> web.Response:
        if request.content_type != "multipart/form-data":
            return as_json({"error": "file_path and file_data are required"}, 400)
        parts: dict[str, bytes] = {}
        async for part in await request.multipart():
            if isinstance(part, BodyPartReader) and part.name:
                parts[part.name] = bytes(await part.read())
        if not {"file_path", "file_data"} <= parts.keys():
            return as_json({"error": "file_path and file_data are required"}, 400)
        self.desktop.files[_absolute(parts["file_path"].decode())] = parts["file_data"]
        return web.Response(text=f"File Uploaded: {len(parts['file_data'])} bytes")

    async def _list_directory(self, request: web.BaseRequest) -> web.Response:
        path = _absolute(str((await _json(request)).get("path", "")))
        tree = _tree(path, self.desktop.files)
        if tree is None:
            return as_json({"error": f"The provided path does not exist or is not a directory: {path}"}, 400)
        return as_json({"directory_tree": tree})

    # Windows

    async def _open_file(self, request: web.BaseRequest) -> web.Response:
        path = (await _json(request)).get("path")
        if not isinstance(path, str) or not path:
            return web.Response(status=400, text="Path not supplied")
        if _absolute(path) not in self.desktop.files:
            return web.Response(status=404, text=f"File not found: {path}")
        self.desktop.gui.windows.append(posixpath.basename(path))
        return web.Response(text="File opened successfully")

    async def _activate_window(self, request: web.BaseRequest) -> web.Response:
        self.desktop.gui.raise_window(await _window_name(request))
        return web.Response(text="Window activated successfully")

    async def _close_window(self, request: web.BaseRequest) -> web.Response:
        self.desktop.gui.close_window(await _window_name(request))
        return web.Response(text="Window closed successfully")


class _Refused(Exception):
    """The request cannot be read; answered with a page of HTML, as Flask does."""

    def __init__(self, status: int, title: str) -> None:
        super().__init__(title)
        self.status, self.title = status, title


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


async def _window_name(request: web.BaseRequest) -> str:
    name = (await _json(request)).get("window_name")
    if not isinstance(name, str):
        raise _Refused(400, "Bad Request")
    return name


def _words(command: Any, *, shell: bool) -> list[str]:
    """A command as the guest server takes it: a list, or a string to be split. With `shell`, only a list's first."""
    if isinstance(command, list) and all(isinstance(word, str) for word in command):
        return shlex.split(command[0]) if shell and command else command
    if isinstance(command, str):
        return shlex.split(command)
    raise ValueError(f"command must be a string or a list of strings, not {command!r:.80}")


def _absolute(path: str) -> str:
    if path == "~" or path.startswith("~/"):
        path = HOME + path[1:]
    return posixpath.normpath(posixpath.join(HOME, path.replace("$HOME", HOME)))


def _tree(path: str, files: dict[str, bytes]) -> dict[str, Any] | None:
    prefix = path.rstrip("/") + "/"
    inside = sorted(name[len(prefix) :] for name in files if name.startswith(prefix))
    if not inside and path not in (HOME, f"{HOME}/Desktop", "/"):
        return None
    children: list[dict[str, Any]] = []
    for name in dict.fromkeys(part.split("/")[0] for part in inside):
        below = _tree(prefix + name, files) if prefix + name not in files else None
        children.append(below or {"type": "file", "name": name})
    return {"type": "directory", "name": posixpath.basename(path), "children": children}
