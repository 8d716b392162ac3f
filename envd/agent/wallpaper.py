"""The wallpaper. GNOME keeps it in its settings; under a plain window manager it is painted on the root window."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aiohttp import web

from envd.agent import bodies, x11
from envd.agent.errors import AgentError, BadRequest, MissingTool, NotFound
from envd.agent.files import attachment
from envd.agent.processes import Processes, state_directory
from envd.agent.screen import Screen

_GNOME = {"GNOME Shell", "Mutter"}
_SCHEMA = "org.gnome.desktop.background"
_GSETTINGS_SECONDS = 15


class Wallpaper:
    def __init__(self, processes: Processes, screen: Screen) -> None:
        self._processes = processes
        self._screen = screen

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/wallpaper", self.wallpaper),
            web.post("/setup/change_wallpaper", self.change_wallpaper),
        ]

    async def wallpaper(self, request: web.Request) -> web.StreamResponse:
        """The bytes of the picture file, labelled image/png whatever it is, as clients expect."""
        path = await self._from_gnome() if await self._is_gnome() else await asyncio.to_thread(_remembered)
        if path is None:
            raise NotFound("no wallpaper is set; /setup/change_wallpaper sets one")
        return await attachment(path, "image/png")

    async def change_wallpaper(self, request: web.Request) -> web.Response:
        path = bodies.path_of(bodies.text(await bodies.json_object(request), "path")).absolute()
        if not await asyncio.to_thread(path.is_file):
            raise NotFound(f"there is no file {path} in the desktop")
        if await self._is_gnome():
            await self._gsettings("set", _SCHEMA, "picture-uri", path.as_uri())
        else:
            await self._screen.ask(lambda: _paint(path))
            await asyncio.to_thread(_remember, path)
        return web.Response(text="Wallpaper changed successfully")

    async def _is_gnome(self) -> bool:
        return await self._screen.ask(x11.window_manager) in _GNOME

    async def _from_gnome(self) -> Path | None:
        uri = (await self._gsettings("get", _SCHEMA, "picture-uri")).strip().strip("'")
        return Path(unquote(urlsplit(uri).path)) if uri else None

    async def _gsettings(self, *arguments: str) -> str:
        if shutil.which("gsettings") is None:
            raise MissingTool("gsettings", "libglib2.0-bin")
        done = await self._processes.run(["gsettings", *arguments], seconds=_GSETTINGS_SECONDS)
        if done.returncode != 0:
            raise AgentError(f"gsettings {' '.join(arguments)} failed: {done.error.strip()}")
        return done.output


def _paint(path: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            x11.paint_root(picture)
    except UnidentifiedImageError:
        raise BadRequest(f"{path} is not a picture that can be shown") from None


def _remember(path: Path) -> None:
    (state_directory() / "wallpaper").write_text(str(path))


def _remembered() -> Path | None:
    try:
        return Path((state_directory() / "wallpaper").read_text())
    except FileNotFoundError:
        return None
