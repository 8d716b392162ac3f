"""The screen: pictures of it, its size, and where the pointer is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from envd.agent import x11
from envd.agent.errors import AgentError
from envd.agent.limits import Limits
from envd.agent.worker import Worker, result_of

if TYPE_CHECKING:
    from mss import MSS

    from envd.png import ScreenEncoder

T = TypeVar("T")


class Screen:
    """Answers for the screen. Pictures are taken in one thread, other questions are asked in another."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._camera = _Camera()
        self._questions = Worker("x11-questions")

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/screenshot", self.screenshot),
            web.post("/screen_size", self.screen_size),
            web.get("/cursor_position", self.cursor_position),
        ]

    async def screenshot(self, request: web.Request) -> web.Response:
        try:
            picture = await result_of(self._camera.next(), self._limits.x_server)
        except TimeoutError:
            raise self._silent() from None
        return web.Response(body=picture, content_type="image/png", headers={"Cache-Control": "no-store"})

    async def screen_size(self, request: web.Request) -> web.Response:
        width, height = await self.ask(x11.size)
        return web.json_response({"width": width, "height": height})

    async def cursor_position(self, request: web.Request) -> web.Response:
        return web.json_response(list(await self.ask(x11.pointer)))

    async def ask(self, question: Callable[[], T]) -> T:
        """Run a question of `x11` in its thread. Raises NoDisplay, or AgentError when the server is silent."""
        try:
            return await self._questions.call(question, self._limits.x_server)
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> AgentError:
        return AgentError(f"the X server gave no answer in {self._limits.x_server:g} s; it hangs or is overloaded")

    def prepare(self) -> None:
        """Load what the first picture needs, in its thread, so that nobody has to wait for it."""
        self._camera.prepare()

    def close(self) -> None:
        self._camera.close()
        self._questions.close()


class _Camera:
    """Takes pictures one after another. Whoever asks before one has begun shares it; nobody gets an older one."""

    def __init__(self) -> None:
        self._worker = Worker("camera")
        self._lock = threading.Lock()
        self._waiting: Future[bytes] | None = None
        self._grabber: _Grabber | None = None
        self._encoder: ScreenEncoder | None = None

    def next(self) -> Future[bytes]:
        """The PNG of a picture that begins after this call."""
        with self._lock:
            if self._waiting is None:
                self._waiting = self._worker.submit(self._shoot)
            return self._waiting

    def prepare(self) -> None:
        self._worker.submit(_load)

    def close(self) -> None:
        self._worker.submit(self._drop)
        self._worker.close()

    def _shoot(self) -> bytes:
        with self._lock:
            self._waiting = None  # from here on the picture is begun, and the next to ask gets the next one
        pixels, (width, height) = self._grab()
        if self._encoder is None:
            from envd.png import ScreenEncoder

            self._encoder = ScreenEncoder()
        return self._encoder.encode(pixels, width, height)

    def _grab(self) -> tuple[bytearray, tuple[int, int]]:
        """A frame, over a new connection when the one we have fails: the server may have been started anew."""
        if self._grabber is not None:
            try:
                return self._grabber.grab()
            except (x11.NoDisplay, _Resized):
                self._drop()
        self._grabber = _Grabber()
        return self._grabber.grab()

    def _drop(self) -> None:
        grabber, self._grabber = self._grabber, None
        if grabber is not None:
            grabber.close()


class _Grabber:
    """A connection through which frames are copied out of shared memory, the pointer drawn in.

    mss asks for the size of the screen once only, so a second connection watches it: a desktop may be resized.
    """

    def __init__(self) -> None:
        from mss import MSS, ScreenShotError
        from Xlib.display import Display

        self._failures: tuple[type[Exception], ...] = (ScreenShotError, *x11.failures())
        self._display: Any = None
        self._mss: MSS | None = None
        try:
            self._display = Display()
            self._root = self._display.screen().root
            self._mss = MSS(backend="xshmgetimage", with_cursor=True)
            self._size = self._screen_size()
        except self._failures as error:
            self.close()
            raise x11.NoDisplay(error) from error

    def grab(self) -> tuple[bytearray, tuple[int, int]]:
        """The frame, four bytes B, G, R, X a pixel, and its width and height. Raises NoDisplay or _Resized."""
        if self._mss is None:
            raise RuntimeError("the grabber is closed")
        try:
            width, height = self._screen_size()
            if (width, height) != self._size:
                raise _Resized
            return self._mss.grab({"left": 0, "top": 0, "width": width, "height": height}).raw, self._size
        except self._failures as error:
            raise x11.NoDisplay(error) from error

    def close(self) -> None:
        if self._mss is not None:
            self._mss.close()
            self._mss = None
        if self._display is not None:
            x11.close(self._display)
            self._display = None

    def _screen_size(self) -> tuple[int, int]:
        shape = self._root.get_geometry()
        return shape.width, shape.height


class _Resized(Exception):
    """The shared memory of this grabber no longer fits the screen."""


def _load() -> Any:
    import mss
    import Xlib.display

    import envd.png

    return mss, Xlib.display, envd.png
