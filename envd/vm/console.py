"""A virtual machine's screen, keyboard and pointer, over QMP: nothing in the guest takes part.

The machine has a tablet and a keyboard on USB, each with a queue of 16 events from which the guest takes one when it
polls; what comes to a full queue is lost, and nobody is told. So events are paced.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio

from ..actions.gestures import Gesture, Key, Move, Press, Rest, Wheel
from ..errors import InfraError
from .cell import RUN
from .keyboard import KEYS
from .monitor import Monitor
from .pictures import Pictures

POLL = 0.01
"""Seconds in which a guest takes an event from a queue. The keyboard asks to be polled every 8 ms."""
AHEAD = 6
"""Events that may wait in a queue. The other ten places are for a guest that is kept from its processors: 100 ms."""
PATIENCE = 10.0
"""Seconds for QEMU to answer one command."""
LETTING_GO = 2.0
"""Seconds for releasing what is down when a call broke off."""
AXIS = 0x8000
"""Places along each axis of the tablet."""
FRAME = "frame.ppm"
"""Written anew for each picture, and deleted: one name, so that a picture that was given up leaves no second file."""

Event = Mapping[str, Any]
Queue = Literal["keyboard", "tablet"]


@dataclass(frozen=True, slots=True)
class HostIo:
    """What was seen to work from outside the guest (`trial.py`), and how that was seen or why not."""

    pictures: bool
    input: bool
    detail: str = ""


UNTRIED = HostIo(pictures=False, input=False, detail="not tried")


class VmConsole:
    """The `Console` of one machine (`drivers/base.py`).

    run     this host's side of /run/vm
    screen  (width, height) in pixels, in which gestures count
    seen    what may be relied on. Calls work whatever it says.
    """

    def __init__(self, monitor: Monitor, run: Path, screen: tuple[int, int], seen: HostIo = UNTRIED) -> None:
        self._monitor = monitor
        self._frame = run / FRAME
        self._screen = screen
        self._seen = seen
        self._pictures = Pictures()
        self._eyes = asyncio.Lock()
        self._hands = asyncio.Lock()
        self._power = asyncio.Lock()
        self._paused = False
        self._queue: Queue = "tablet"
        self._taken_at = 0.0
        """When the guest will have taken all that was sent, by POLL."""
        self._sent = False
        """Whether the call that is under way may have reached the guest."""
        self._down: dict[tuple[Queue, str], Event] = {}
        """What it holds down → how to let go of it."""
        self._place: tuple[int, ...] = (0, 0)
        """Where the tablet was last, on AXIS."""

    @property
    def pictures(self) -> bool:
        return self._seen.pictures

    @property
    def input(self) -> bool:
        return self._seen.input

    async def picture(self) -> bytes:
        async with self._eyes:
            try:
                await self._monitor.screendump(f"{RUN}/{FRAME}", timeout=PATIENCE)
                return await anyio.to_thread.run_sync(self._pictures.read, self._frame)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.Path(self._frame).unlink(missing_ok=True)

    async def perform(self, gestures: Sequence[Gesture]) -> None:
        """Returns when the last event is with QEMU, up to AHEAD * POLL before the guest has it. A call that breaks off
        lets go of the keys and buttons that it holds down."""
        async with self._hands:
            self._sent = False
            self._down.clear()
            try:
                await self.resume()
                for gesture in gestures:
                    await self._do(gesture)
            except BaseException as error:
                if isinstance(error, InfraError):
                    error.facts["sent"] = self._sent
                with anyio.move_on_after(LETTING_GO, shield=True), contextlib.suppress(InfraError):
                    for (queue, _), event in tuple(self._down.items()):
                        await self._send(queue, event)
                raise

    async def pause(self) -> None:
        async with self._hands, self._power:
            if not self._paused:
                await self._monitor.pause()
                self._paused = True

    async def resume(self) -> None:
        async with self._power:
            if self._paused:
                await self._monitor.resume()
                self._paused = False

    async def _do(self, gesture: Gesture) -> None:
        match gesture:
            case Rest(seconds):
                await anyio.sleep(seconds)
            case Move(x, y):
                await self._send("tablet", *self._abs(x, y))
            case Press(button, down):
                self._hold("tablet", button, down, _button(button, down=False))
                await self._send("tablet", _button(button, down))
            case Wheel(up):
                way = "wheel-up" if up > 0 else "wheel-down"
                for _ in range(abs(up)):
                    await self._send("tablet", _button(way, down=True), _button(way, down=False))
            case Key(name, down):
                qcode, shift = KEYS[name]
                self._hold("keyboard", qcode, down, _key(qcode, down=False))
                if down and shift:
                    self._hold("keyboard", "shift", True, _key("shift", down=False))
                    await self._send("keyboard", _key("shift", down=True), _key(qcode, down), _key("shift", down=False))
                    self._hold("keyboard", "shift", False, _key("shift", down=False))
                else:
                    await self._send("keyboard", _key(qcode, down))

    def _hold(self, queue: Queue, what: str, down: bool, release: Event) -> None:
        """Remember what is about to go down, or forget what is about to go up."""
        self._down.pop((queue, what), None)
        if down:
            self._down[queue, what] = release

    async def _send(self, queue: Queue, *events: Event) -> None:
        await self._room(queue)
        self._taken_at = max(self._taken_at, anyio.current_time()) + len(events) * POLL
        self._queue = queue
        try:
            await self._monitor.execute("input-send-event", {"events": list(events)}, timeout=PATIENCE)
        except InfraError as error:
            self._sent |= error.facts.get("cause") != "refused"
            raise
        self._sent = True

    async def _room(self, queue: Queue) -> None:
        """Return when what was sent is taken, as far as that matters: all of it before the other queue's turn, since a
        guest polls each by itself and must see a click with its ctrl key down."""
        ahead = AHEAD * POLL if queue == self._queue else 0.0
        await anyio.sleep(max(0.0, self._taken_at - anyio.current_time() - ahead))

    def _abs(self, x: int, y: int) -> tuple[Event, Event]:
        """The middle of a pixel, or beside it when that is where the tablet is already: Linux drops an axis that says
        nothing new, though a program in the guest may have put the pointer elsewhere since."""
        wanted = [_middle(place, size) for place, size in zip((x, y), self._screen, strict=True)]
        self._place = tuple(place + (place == last) for place, last in zip(wanted, self._place, strict=True))
        return _axis("x", self._place[0]), _axis("y", self._place[1])


def _middle(pixel: int, pixels: int) -> int:
    return (2 * pixel + 1) * AXIS // (2 * pixels)


def _axis(axis: str, place: int) -> Event:
    return {"type": "abs", "data": {"axis": axis, "value": place}}


def _button(button: str, down: bool) -> Event:
    return {"type": "btn", "data": {"button": button, "down": down}}


def _key(qcode: str, down: bool) -> Event:
    return {"type": "key", "data": {"key": {"type": "qcode", "data": qcode}, "down": down}}
