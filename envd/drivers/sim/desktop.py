"""A sim desktop: its state, its two ports, and the timeline of its life."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from aiohttp import web

from ...actions.gestures import Gesture
from ...models import Endpoints
from ..base import Death
from .answers import answer_badly
from .behaviour import Behaviour, Way
from .calls import SAID_KEPT, Call
from .cdp import Chrome
from .files import README, TIMEZONE
from .guest import Guest
from .gui import Gui
from .picture import Scene, flat, render
from .ports import Port
from .vnc import Vnc

Change = Literal["ready", "died"]
BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome")
PROBED = ("/screenshot", "/json/version", "/json/list")
"""Routes that readiness is judged by."""
CALLS_KEPT = 10_000


class Desktop:
    """One simulated machine. Tests may look at everything here, and change it while it runs.

    calls      everything that was asked of either port, in order: the last 10,000
    requests   route → how many calls of it there were
    inputs     every Python program that was applied, in order: for counting how often each was
    gestures   what was done at its console, in order
    runs       set unless it is paused: then nothing in it answers
    cloned     it goes on from where a template stood, so that any answer of its guest shows that it is ready
    launched   every command given to /setup/launch
    files      absolute path → bytes
    downloads  URL → what /setup/download_file finds there
    wallpaper  path of the picture, or ""
    terminal   what the terminal shows, None when none is open
    """

    def __init__(
        self,
        instance_id: str,
        screen: tuple[int, int],
        behaviour: Behaviour,
        number: int,
        note: Callable[[Change], None],
        *,
        cloned: bool = False,
    ) -> None:
        self.id = instance_id
        self.number = number
        self.screen = screen
        self.gui = Gui(screen)
        self.files: dict[str, bytes] = dict((README, TIMEZONE))
        self.downloads: dict[str, bytes] = {}
        self.wallpaper = ""
        self.terminal: str | None = None
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.inputs: list[str] = []
        self.gestures: list[Gesture] = []
        self.launched: list[str | list[str]] = []
        self.requests: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=200)
        self.death: Death | None = None
        self.gone = asyncio.Event()
        self.ready = asyncio.Event()
        self.runs = asyncio.Event()
        self.runs.set()
        self.cloned = cloned
        self.destroy_calls = 0
        self.chrome = Chrome(self)
        self.guest_port: Port | None = None
        self.cdp_port: Port | None = None
        self.vnc_port: Port | None = None
        self._note = note
        self._ready_at = 0.0
        self._seen: set[str] = set()
        self._bad_answers: Counter[str] = Counter()
        self._matches: Counter[str] = Counter()
        self._behaviour = behaviour
        self._frame: tuple[Scene, bytes] | None = None
        self._life: asyncio.Task[None] | None = None

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        """From here on it behaves so; what its life began with is not done again."""
        self._behaviour = behaviour
        self._matches.clear()

    # Its life

    async def start(self, behaviour: Behaviour) -> None:
        """Take both ports, and open at once what is not to be waited for. Its life begins as `behaviour` says."""
        self.guest_port, self.cdp_port = Port(Guest(self).answer), Port(self.chrome.answer)
        if behaviour.vnc:
            self.vnc_port = Port(Vnc(self).answer)
            await self.vnc_port.open()
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

    @property
    def endpoints(self) -> Endpoints | None:
        if self.guest_port is None or self.cdp_port is None:
            return None
        guest, cdp = (f"http://127.0.0.1:{port.number}" for port in (self.guest_port, self.cdp_port))
        vnc = f"http://127.0.0.1:{self.vnc_port.number}" if self.vnc_port is not None else None
        return Endpoints(guest=guest, cdp=cdp, vnc=vnc)

    def _ports(self) -> Iterator[Port]:
        return (port for port in (self.guest_port, self.cdp_port, self.vnc_port) if port is not None)

    def shut(self) -> None:
        """Asleep: both ports refuse connections until `reopen`."""
        for port in self._ports():
            port.shut()

    async def reopen(self) -> None:
        await self._open_guest_in(0)
        await self.open_cdp()
        if self.vnc_port is not None:
            await self.vnc_port.open()

    async def close(self) -> None:
        """Give everything up, and return when it is gone. May be called again, also while it runs."""
        self._end(Death("destroyed"))
        if self._life is not None and self._life is not asyncio.current_task():
            await asyncio.wait([self._life])
            if not self._life.cancelled():
                self._life.result()
        for port in self._ports():
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
        """A good answer was given to somebody: `guest` or `page list`. With both, it is ready."""
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
            for port in self._ports():
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
        """Take note of a launched program; a browser brings CDP up, and opens the pages that it is given."""
        self.launched.append(command)
        self.say(f"launched {command}")
        words = command.split() if isinstance(command, str) else command
        if any(word.rpartition("/")[2] in BROWSERS for word in words[:1]):
            starts = self.cdp_port is not None and not self.cdp_port.is_open
            self.chrome.show([word for word in words[1:] if "://" in word], afresh=starts)
            await self.open_cdp()

    # What both ports share

    async def screenshot(self) -> bytes:
        scene = self.gui.scene()
        if self._frame is None or self._frame[0] != scene:
            self._frame = (scene, await asyncio.to_thread(render, scene))
        return self._frame[1]

    def asked(self, route: str, said: str = "") -> Way | None:
        """Take note of a call; how its answer is to go wrong, if it is. It may have died when this returns."""
        self.requests[route] += 1
        self.calls.append(Call(time.monotonic(), route, said[:SAID_KEPT]))
        way = self._way(route, said)
        if way == "die":
            self.die(Death(self.behaviour.death))
        return way

    def _way(self, route: str, said: str) -> Way | None:
        behaviour = self.behaviour
        fault = self._fault(route, said)
        if behaviour.never or self._troubled(behaviour.hang, route):
            return "stall"
        if fault is not None:
            return fault
        flaky = route in PROBED and self._bad_answers[route] < behaviour.flaky
        if flaky or self._troubled(behaviour.spoil, route):
            self._bad_answers[route] += 1
            return behaviour.bad[(self._bad_answers[route] - 1) % len(behaviour.bad)]
        return "lose" if self._troubled(behaviour.lose, route) else None

    def _fault(self, route: str, said: str) -> Way | None:
        """What `on` says of this call. Every key that it matches counts it; the first that strikes decides."""
        struck: Way | None = None
        for asked, fault in self.behaviour.on.items():
            wanted, _, words = asked.partition(" ")
            if wanted in ("*", route) and words in said:
                self._matches[asked] += 1
                struck = struck or (fault.way if fault.strikes(self._matches[asked]) else None)
        return struck

    def _troubled(self, told: str, route: str) -> bool:
        begun = self.ready.is_set() and time.monotonic() >= self._ready_at + self.behaviour.trouble_s
        return begun and told in ("*", route)

    async def bad_screenshot(self, request: web.BaseRequest, way: Way) -> web.StreamResponse:
        half = (self.screen[0] // 2, self.screen[1] // 2)
        small = await asyncio.to_thread(render, replace(self.gui.scene(), screen=half))
        plain = await asyncio.to_thread(flat, self.screen)
        return await answer_badly(request, way, await self.screenshot(), plain, small, "image/png")
