"""Windows: find, activate, close, measure; and open a file and wait for its window."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from aiohttp import web

from envd.agent import bodies, x11
from envd.agent.errors import AgentError, MissingTool, NotFound
from envd.agent.limits import Limits
from envd.agent.processes import Processes
from envd.agent.screen import Screen

_WMCTRL_SECONDS = 15
_POLL_SECONDS = 0.5
_XDG_OPEN_SAYS = {
    2: "the file does not exist",
    3: "no program is installed that opens it",
    4: "the program that opens it failed",
}


class Windows:
    def __init__(self, limits: Limits, processes: Processes, screen: Screen) -> None:
        self._limits = limits
        self._processes = processes
        self._screen = screen

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/window_size", self.window_size),
            web.post("/setup/activate_window", self.activate_window),
            web.post("/setup/close_window", self.close_window),
            web.post("/setup/open_file", self.open_file),
        ]

    async def window_size(self, request: web.Request) -> web.Response:
        name = await bodies.form_text(request, "app_class_name")
        found = await self._screen.ask(lambda: x11.window_size(name))
        if found is None:
            raise NotFound(f"no window has the class {name!r}; `wmctrl -lx` lists those there are")
        width, height = found
        return web.json_response({"width": width, "height": height})

    async def activate_window(self, request: web.Request) -> web.Response:
        return await self._act(request, "a", "activated")

    async def close_window(self, request: web.Request) -> web.Response:
        return await self._act(request, "c", "closed")

    async def open_file(self, request: web.Request) -> web.Response:
        """Open a file, or start a program, and answer when its window is there.

        A window with the file's name or stem in its title is it. Failing that, so is any window that has appeared
        since: a browser shows the title of the page. Waiting ends at once when opening failed.
        """
        path = bodies.path_of(bodies.text(await bodies.json_object(request), "path"))
        before = set(await window_titles(self._processes))
        if await asyncio.to_thread(path.exists):
            if shutil.which("xdg-open") is None:
                raise MissingTool("xdg-open", "xdg-utils")
            opening = await self._processes.launch(["xdg-open", str(path)])
        elif shutil.which(str(path)):
            opening = await self._processes.launch([str(path)])
        else:
            raise NotFound(f"there is no file or program {path} in the desktop")
        window, title = await self._window_of(path, before, opening)
        await wmctrl(self._processes, "-i", "-a", window)
        return web.Response(text=f"File opened and window activated successfully: {title}")

    async def _act(self, request: web.Request, action: str, done: str) -> web.Response:
        """200 whether a window matched or not, as clients expect; the text says which."""
        body = await bodies.json_object(request)
        name = bodies.text(body, "window_name")
        flags = ("x" if body.get("by_class") else "") + ("F" if body.get("strict") else "") + action
        if await wmctrl(self._processes, f"-{flags}", name) is None:
            return web.Response(text=f"No window matched {name!r}, so none was {done}")
        return web.Response(text=f"Window {done} successfully")

    async def _window_of(self, path: Path, before: set[str], opening: asyncio.Task[int]) -> tuple[str, str]:
        """The id and title of the window that shows `path`."""
        began, appeared = time.monotonic(), None
        while (waited := time.monotonic() - began) < self._limits.open_file:
            if opening.done() and (code := opening.result()) != 0:
                raise AgentError(f"cannot open {path}: {_XDG_OPEN_SAYS.get(code, f'exit code {code}')}")
            titles = await window_titles(self._processes)
            for part in (path.name, path.stem):
                for window, title in titles.items():
                    if part.lower() in title.lower():
                        return window, title
            if new := [window for window in titles if window not in before]:
                appeared = appeared or waited
                if waited - appeared >= self._limits.new_window:
                    return new[-1], titles[new[-1]]
            await asyncio.sleep(_POLL_SECONDS)
        raise AgentError(f"no window for {path.name} appeared within {self._limits.open_file:g} s")


async def window_titles(processes: Processes) -> dict[str, str]:
    """The titles of all windows by id, as the window manager lists them; none when no window manager runs."""
    listed = await wmctrl(processes, "-l")
    titles = {}
    for line in (listed or "").splitlines():
        window, _desktop, _host, *title = line.split(None, 3)
        titles[window] = title[0] if title else ""
    return titles


async def wmctrl(processes: Processes, *arguments: str) -> str | None:
    """What wmctrl printed, or None when it found no such window. Raises MissingTool, AgentError without a display."""
    if shutil.which("wmctrl") is None:
        raise MissingTool("wmctrl", "wmctrl")
    done = await processes.run(["wmctrl", *arguments], seconds=_WMCTRL_SECONDS)
    if "Cannot open display" in done.error:
        raise x11.NoDisplay(done.error.strip())
    return done.output if done.returncode == 0 else None
