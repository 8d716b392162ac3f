"""A sim desktop's screen and input from outside its guest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...actions.gestures import Gesture, Key, Move, Press, Rest, Wheel
from ...errors import InfraError
from .gui import Gui

if TYPE_CHECKING:
    from .desktop import Desktop


class SimConsole:
    """As `drivers.base.Console` promises. Works whatever the ports of the desktop do."""

    pictures = True
    input = True

    def __init__(self, desktop: Desktop) -> None:
        self._desktop = desktop
        self._turn = asyncio.Lock()

    def takes(self, gestures: Sequence[Gesture]) -> bool:
        return len(gestures) <= 60

    async def picture(self) -> bytes:
        self._must_live()
        return await self._desktop.screenshot()

    async def perform(self, gestures: Sequence[Gesture]) -> None:
        async with self._turn:
            for done, gesture in enumerate(gestures):
                self._must_live(sent=done > 0)
                _do(gesture, self._desktop.gui)
                if isinstance(gesture, Rest):
                    await asyncio.sleep(gesture.seconds * self._desktop.behaviour.pace)
                self._desktop.gestures.append(gesture)

    async def pause(self) -> None:
        self._must_live()
        self._desktop.runs.clear()

    async def resume(self) -> None:
        self._must_live()
        self._desktop.runs.set()

    def _must_live(self, *, sent: bool = False) -> None:
        if self._desktop.gone.is_set():
            raise InfraError(f"The simulated desktop {self._desktop.id} is gone.", sent=sent)


def _do(gesture: Gesture, gui: Gui) -> None:
    match gesture:
        case Move(x, y):
            gui.moveTo(x, y)
        case Press(button, down):
            (gui.mouseDown if down else gui.mouseUp)(button=button)
        case Wheel(up):
            gui.scroll(up)
        case Key(name, down):
            (gui.keyDown if down else gui.keyUp)(name)
        case Rest():
            pass
