"""A virtual machine's screen, keyboard and pointer, over QMP: nothing in the guest takes part.

Events go to a guest through queues: 64 buffers of each virtio device, which its kernel takes from and gives back, and
behind them as many places for each reader in the kernel. What comes to a full queue is lost and nobody is told. So the
buffers that are left are asked for, and events are paced besides, for the queue that cannot be seen. (USB
devices have 16 places and are polled every 8 ms: with a load of ten on two cores, 23 and 27 of 285 keys were lost at
one event in 10 ms.) What cannot be seen is an X server that reads nothing for longer than PACE times its places, which
on a host with a multiple of the work that it can bear takes seconds: 74 of 285 keys were lost at one event in 20 ms. So
no more is taken at once (`takes`) than its queue holds though it read nothing; longer texts go to the guest's server.
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

PACE = 0.02
"""Seconds between two events on average. The kernel keeps about 32 for the X server: 0.6 s of them."""
AHEAD = 6
"""Events that may go at once after a rest."""
SPARED = 32
"""Buffers of a device that are left alone: what a guest that stood still takes at once must fit into its kernel."""
NO_ROOM = 20.0
"""Seconds after which a guest that takes no events never will."""
KEPT = 60
"""Of the kernel's 64 places for each reader of a device (evdev.c: EVDEV_MIN_BUFFER_SIZE). An event and the one that
ends its group take one each: a letter four, a capital six, a click four, a movement three."""
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
    fresh   whether nobody has moved the machine's pointer yet. Else it is not known where its tablet is.
    """

    def __init__(
        self, monitor: Monitor, run: Path, screen: tuple[int, int], seen: HostIo = UNTRIED, *, fresh: bool = True
    ) -> None:
        self._monitor = monitor
        self._frame = run / FRAME
        self._screen = screen
        self.seen = seen
        self._pictures = Pictures()
        self._eyes = asyncio.Lock()
        self._hands = asyncio.Lock()
        self._power = asyncio.Lock()
        self._paused = False
        self._queue: Queue = "tablet"
        self._due = 0.0
        """When what was sent would have been sent by PACE, with no event AHEAD."""
        self._left: dict[Queue, int] = {}
        """Buffers of a device that are left at least, as far as was asked."""
        self._whole: dict[Queue, int] = {}
        """The most that were ever left: none is in use then."""
        self._sent = False
        """Whether the call that is under way may have reached the guest."""
        self._down: dict[tuple[Queue, str], Event] = {}
        """What it holds down → how to let go of it."""
        self._place: tuple[int, ...] | None = (0, 0) if fresh else None
        """Where the tablet was last, on AXIS; None when that is not known."""

    @property
    def pictures(self) -> bool:
        return self.seen.pictures

    @property
    def input(self) -> bool:
        return self.seen.input

    def takes(self, gestures: Sequence[Gesture]) -> bool:
        """Whether it fits into what the guest's kernel keeps for an X server that reads nothing for a while."""
        keys = sum(
            4 if KEYS[gesture.name].shift and gesture.down else 2 for gesture in gestures if isinstance(gesture, Key)
        )
        hands = sum(
            _POINTED[type(gesture)] * (abs(gesture.up) if isinstance(gesture, Wheel) else 1) for gesture in gestures
        )
        return max(keys, hands) <= KEPT

    async def picture(self) -> bytes:
        async with self._eyes:
            try:
                await self._monitor.screendump(f"{RUN}/{FRAME}", timeout=PATIENCE)
                return await anyio.to_thread.run_sync(self._pictures.read, self._frame)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.Path(self._frame).unlink(missing_ok=True)

    async def perform(self, gestures: Sequence[Gesture]) -> None:
        """Returns when the last event is with QEMU, a moment before the guest has it. A call that breaks off
        lets go of the keys and buttons that it holds down."""
        async with self._hands:
            self._sent = False
            self._down.clear()
            self._left.clear()
            try:
                await self.resume()
                for gesture in gestures:
                    await self._do(gesture)
            except BaseException as error:
                if isinstance(error, InfraError):
                    error.facts["sent"] = self._sent
                with anyio.move_on_after(LETTING_GO, shield=True), contextlib.suppress(InfraError):
                    await self._emit(*self._down.values())
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
                if self._place is None:  # it may be there already: the next goes beside it, so one of them is news
                    await self._send("tablet", *self._abs(x, y))
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
        needed = len(events) + 1  # and the one that ends the group
        if queue != self._queue:
            # A guest reads each by itself, and must see a click with its ctrl key down.
            await self._until_left(self._queue, self._whole.get(self._queue, 0))
            self._queue = queue
        await anyio.sleep_until(self._due - AHEAD * PACE)
        if self._left.get(queue, 0) < needed + SPARED:
            await self._until_left(queue, needed + SPARED)
        self._left[queue] -= needed
        self._due = max(self._due, anyio.current_time()) + PACE
        await self._emit(*events)

    async def _emit(self, *events: Event) -> None:
        try:
            await self._monitor.execute("input-send-event", {"events": events}, timeout=PATIENCE)
        except InfraError as error:
            self._sent |= error.facts.get("cause") != "refused"
            raise
        self._sent = True

    async def _until_left(self, queue: Queue, wanted: int) -> None:
        """Return when the guest has given so many buffers back."""
        pause, asked_at = 0.002, anyio.current_time()
        while (left := await self._buffers(queue)) < wanted:
            if anyio.current_time() > asked_at + NO_ROOM:
                raise InfraError(f"The guest has taken nothing from its {queue} for {NO_ROOM:g} s.", cause="no_room")
            await anyio.sleep(pause)
            pause = min(2 * pause, 0.05)
        self._left[queue] = left
        self._whole[queue] = max(left, self._whole.get(queue, 0))

    async def _buffers(self, queue: Queue) -> int:
        """Those that the guest has given to the device for its events."""
        asked = {"path": f"/machine/peripheral/{queue}/virtio-backend", "queue": 0}
        rings = await self._monitor.execute("x-query-virtio-queue-element", asked, timeout=PATIENCE)
        given, used = (int(rings[ring]["idx"]) for ring in ("avail", "used"))
        return (given - used) % 0x10000

    def _abs(self, x: int, y: int) -> tuple[Event, Event]:
        """The middle of a pixel, or beside it when that is where the tablet is already: Linux drops an axis that says
        nothing new, though a program in the guest may have put the pointer elsewhere since."""
        wanted = [_middle(place, size) for place, size in zip((x, y), self._screen, strict=True)]
        before = self._place or (None, None)
        x, y = self._place = tuple(place + (place == last) for place, last in zip(wanted, before, strict=True))
        return _axis("x", x), _axis("y", y)


_POINTED: Mapping[type[Gesture], int] = {Move: 3, Press: 2, Wheel: 4, Key: 0, Rest: 0}
"""Places that each takes in the queue of the tablet."""


def _middle(pixel: int, pixels: int) -> int:
    return (2 * pixel + 1) * AXIS // (2 * pixels)


def _axis(axis: str, place: int) -> Event:
    return {"type": "abs", "data": {"axis": axis, "value": place}}


def _button(button: str, down: bool) -> Event:
    return {"type": "btn", "data": {"button": button, "down": down}}


def _key(qcode: str, down: bool) -> Event:
    return {"type": "key", "data": {"key": {"type": "qcode", "data": qcode}, "down": down}}
