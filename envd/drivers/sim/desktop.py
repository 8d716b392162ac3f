"""A sim desktop: its state, its two ports, and the timeline of its life."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from aiohttp import web

from ..base import Death
from .answers import answer_badly, silence
from .behaviour import Bad, Behaviour
from .cdp import Chrome
from .guest import Guest
from .gui import Gui
from .picture import Scene, flat, render
from .ports import Port

Change = Literal["ready", "died"]
BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome")


class Desktop:
    """One simulated machine. Tests may look at everything here, and replace `behaviour` while it runs.

    inputs    every Python program that was applied, in order: for counting how often each was
    requests  route → how many requests for it arrived, on either port
    launched  every command given to /setup/launch
    files     absolute path → bytes
    """

    def __init__(
        self,
        instance_id: str,
        screen: tuple[int, int],
        behaviour: Behaviour,
        number: int,
        note: Callable[[Change], None],
    ) -> None:
        self.id = instance_id
        self.number = number
        self.screen = screen
        self.behaviour = behaviour
        self.gui = Gui(screen)
        self.files: dict[str, bytes] = {"/home/user/Desktop/README.txt": b"A simulated desktop.\n"}
        self.inputs: list[str] = []
        self.launched: list[str | list[str]] = []
        self.requests: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=200)
        self.death: Death | None = None
        self.gone = asyncio.Event()
        self.ready = asyncio.Event()
        self.destroy_calls = 0
        self.chrome = Chrome(self)
        self.guest_port: Port | None = None
        self.cdp_port: Port | None = None
        self._note = note
        self._ready_at = 0.0
        self._seen: set[str] = set()
        self._bad_answers: Counter[str] = Counter()
        self._frame: tuple[Scene, bytes] | None = None
        self._life: asyncio.Task[None] | None = None

    # Its life

    async def start(self) -> None:
        """Take both ports, and open at once what is not to be waited for."""
        self.guest_port, self.cdp_port = Port(Guest(self).answer), Port(self.chrome.answer)
        behaviour = self.behaviour
        self.say(f"guest on port {self.guest_port.number}, CDP on port {self.cdp_port.number}")
        if behaviour.strikes(self.number):
            behaviour = replace(behaviour, dies_after_s=behaviour.dies_after_s or behaviour.boot_s, dies_when="booting")
        opens = not behaviour.refuse and not behaviour.dies_booting
        if opens and behaviour.boot_s == 0:
            await self._open_guest_in(0)
        if opens and behaviour.cdp_s == 0:
            await self._open_cdp_in(0)
        if behaviour.dies_after_s is not None or (opens and (behaviour.boot_s or behaviour.cdp_s)):
            self._life = asyncio.create_task(self._live(behaviour), name=f"sim {self.id}")

    async def close(self) -> None:
        """Give everything up, and return when it is gone. May be called again, also while it runs."""
        self._end(Death("destroyed"))
        if self._life is not None and self._life is not asyncio.current_task():
            await asyncio.wait([self._life])
            if not self._life.cancelled():
                self._life.result()
        for port in (self.guest_port, self.cdp_port):
            if port is not None:
                await port.close()

    def die(self, death: Death) -> None:
        """Stop as a machine does that loses power: both ports are gone at once. What it wrote can still be read."""
        if not self.gone.is_set():
            self.say(f"died: {death.reason}")
            self._end(death)
            self._note("died")

    def say(self, line: str) -> None:
        """Write to the instance's log."""
        self.log.append(line)

    def seen_good(self, what: str) -> None:
        """A good answer was given to somebody: `screenshot` or `page list`. With both, it is ready."""
        self._seen.add(what)
        if len(self._seen) == 2 and not self.ready.is_set():
            self.ready.set()
            self._ready_at = time.monotonic()
            self.say("ready")
            self._note("ready")

    def _end(self, death: Death) -> None:
        if not self.gone.is_set():
            self.death = death
            self.gone.set()
            if self._life is not None and self._life is not asyncio.current_task():
                self._life.cancel()
            for port in (self.guest_port, self.cdp_port):
                if port is not None:
                    port.drop()

    async def _live(self, behaviour: Behaviour) -> None:
        """Open the ports and die, when each is due."""
        if behaviour.dies_booting:
            await asyncio.sleep(behaviour.dies_after_s or 0)
            self.die(Death(behaviour.death))
            return
        async with asyncio.TaskGroup() as group:
            if not behaviour.refuse:
                group.create_task(self._open_guest_in(behaviour.boot_s))
                if behaviour.cdp_s is not None:
                    group.create_task(self._open_cdp_in(behaviour.cdp_s))
            if behaviour.dies_after_s is not None:
                await self.ready.wait()
                await asyncio.sleep(behaviour.dies_after_s)
                self.die(Death(behaviour.death))

    async def _open_guest_in(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.guest_port is not None and not self.gone.is_set() and not self.guest_port.is_open:
            await self.guest_port.open()
            self.say("guest server started")

    async def _open_cdp_in(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.open_cdp()

    # Chrome

    async def open_cdp(self) -> None:
        if self.cdp_port is not None and not self.gone.is_set() and not self.cdp_port.is_open:
            await self.cdp_port.open()
            self.say("Chrome started")

    def stop_chrome(self) -> None:
        """CDP refuses connections until Chrome is launched again."""
        if self.cdp_port is not None and not self.gone.is_set():
            self.cdp_port.shut()
            self.say("Chrome stopped")

    async def launch(self, command: str | list[str]) -> None:
        """Take note of a launched program; a browser brings CDP up."""
        self.launched.append(command)
        self.say(f"launched {command}")
        words = command.split() if isinstance(command, str) else command
        if any(word.rpartition("/")[2] in BROWSERS for word in words[:1]):
            await self.open_cdp()

    # What both ports share

    async def screenshot(self) -> bytes:
        scene = self.gui.scene()
        if self._frame is None or self._frame[0] != scene:
            self._frame = (scene, await asyncio.to_thread(render, scene))
        return self._frame[1]

    async def before_answering(self, route: str) -> None:
        """Count the request; keep silent for ever where told."""
        self.requests[route] += 1
        if self.behaviour.never or self._troubled(self.behaviour.hang, route):
            await silence()

    def next_bad(self, route: str, *, probed: bool) -> Bad | None:
        """How this answer is to be bad, if at all. `probed`: the route is one that readiness is judged by."""
        behaviour = self.behaviour
        spoiled = self._troubled(behaviour.spoil, route)
        if not spoiled and not (probed and self._bad_answers[route] < behaviour.flaky):
            return None
        self._bad_answers[route] += 1
        return behaviour.bad[(self._bad_answers[route] - 1) % len(behaviour.bad)]

    def loses(self, route: str) -> bool:
        return self._troubled(self.behaviour.lose, route)

    def _troubled(self, told: str, route: str) -> bool:
        begun = self.ready.is_set() and time.monotonic() >= self._ready_at + self.behaviour.trouble_s
        return begun and told in ("*", route)

    async def bad_screenshot(self, request: web.BaseRequest, bad: Bad) -> web.StreamResponse:
        half = (self.screen[0] // 2, self.screen[1] // 2)
        small = await asyncio.to_thread(render, replace(self.gui.scene(), screen=half))
        plain = await asyncio.to_thread(flat, self.screen)
        return await answer_badly(request, bad, await self.screenshot(), plain, small, "image/png")
