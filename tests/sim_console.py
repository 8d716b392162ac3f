"""Sim desktops with a console: what was done at it, and when the machine stood still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from envd.actions.gestures import Gesture
from envd.drivers.base import Console
from envd.drivers.sim import Desktop, SimDriver
from envd.errors import InfraError


class SimConsole:
    """`broken`: gestures fail, and whether some were sent. `fails`: "pause" or "resume" does."""

    def __init__(self, desktop: Desktop, *, pictures: bool = True, input: bool = True) -> None:
        self.desktop = desktop
        self.pictures, self.input = pictures, input
        self.performed: list[tuple[Gesture, ...]] = []
        self.still_since: float | None = None
        self.pauses: list[tuple[float, float]] = []
        self.broken: bool | None = None
        self.fails = ""

    def takes(self, gestures: Sequence[Gesture]) -> bool:
        return len(gestures) <= 60

    async def picture(self) -> bytes:
        return await self.desktop.screenshot()

    async def perform(self, gestures: Sequence[Gesture]) -> None:
        if self.broken is not None:
            raise InfraError("QEMU hung up.", sent=self.broken)
        self.performed.append(tuple(gestures))

    async def pause(self) -> None:
        await self._work("pause")
        self.still_since = self.still_since or time.monotonic()

    async def resume(self) -> None:
        await self._work("resume")
        if self.still_since is not None:
            self.pauses.append((self.still_since, time.monotonic()))
            self.still_since = None

    async def _work(self, what: str) -> None:
        await asyncio.sleep(0.002)
        if self.fails == what:
            raise InfraError("QEMU hung up.")

    def disturbed(self) -> list[str]:
        """What the guest was asked while the machine stood still."""
        now = (self.still_since, time.monotonic()) if self.still_since else None
        spans = [*self.pauses, *([now] if now else [])]
        return [call.route for call in self.desktop.calls if any(a < call.at < b for a, b in spans)]


class ConsoleDriver(SimDriver):
    """Each desktop's console is made as `how` says."""

    def __init__(self, *given: object, **how: bool) -> None:
        super().__init__(*given)  # type: ignore[arg-type]  # as SimDriver is made
        self.how = how
        self.consoles: dict[str, SimConsole] = {}

    def console(self, instance_id: str) -> Console | None:
        if instance_id not in self.consoles and instance_id in self.desktops:
            self.consoles[instance_id] = SimConsole(self.desktops[instance_id], **self.how)
        return self.consoles.get(instance_id)
