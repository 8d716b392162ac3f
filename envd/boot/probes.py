"""Readiness: is a desktop usable? Two probes, tried concurrently from the moment its instance exists.

Of a desktop that was booted:

screenshot  the guest port gives a picture that decodes, has the expected size and shows more than one flat colour,
            a pointer and an empty frame
chrome_cdp  Chrome answers `/json/version` and lists a page

A page is listed before its window has content, so in the end Chrome is given a moment to draw one. A probe passes after
`NEEDED` successes in a row, since a guest that comes up answers 200, then 500, then 200 for a while.

A clone goes on from where a machine stood that had passed all this, so each is needed once, and the screenshot, which
inside an emulated guest costs seconds, is the frame that its driver took from outside, judged in the same way, together
with one answer from the guest port.

A try is judged ok, fail (answered, and the answer was not good) or unknown (nothing to judge).
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from PIL import Image

from ..errors import EnvdError, GuestMisbehaved, GuestUnreachable
from ..guest import Cdp, Guest
from ..models import Probe, ProbeResult
from ..pictures import opened
from . import hops

NEEDED = 2
SLOWEST_INTERVAL = 2.0
TRY_TIMEOUT = 15.0
"""Seconds. One screenshot inside an emulated guest was measured at 2–4 s."""

LEAST_SHOWN = 30
"""Rows. A screen on which less than so many rows' worth of pixels differ from its most frequent colour is empty: a bare
root window with a pointer has less than one, a maximised browser whose window is not drawn yet has its frame's title
bar (18 measured), with an empty page drawn 53. A share of the screen would depend on its height."""

CLONE_PAUSE = 0.075
"""Seconds between two tries of a clone, at first. Each connection is accepted on this side before the guest can answer
it, and is work for the guest; more of them make it later."""
CLONE_TRY = 1.0
"""Seconds that the first try of a clone may take: one that was sent before the guest ran again may have been lost. A
guest that is merely slow gets half as long again with every try, up to `TRY_TIMEOUT`."""

PAINT_LIMIT = 5.0
"""Seconds that Chrome gets to draw a page once both probes have passed. Measured on 2 cores without load: 0.1–0.2. No
failure after that: a page may be hidden for a reason of its own."""

CHROME = ["google-chrome", "--remote-debugging-port=1337"]
BRIDGE = ["socat", "tcp-listen:9222,fork", "tcp:localhost:1337"]
"""What OSWorld's own tasks launch: Chrome on the loopback of the guest, and a bridge to the port that is published."""

Judge = Callable[[], Awaitable[tuple[ProbeResult, str]]]


class Watcher(Protocol):
    """Told of what the probes find."""

    def probed(self, probe: Probe) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass
class Readiness:
    """Both probes of one desktop. `wait` returns when both have passed; deadline and death are the caller's to race.

    `frame` is a clone's screen as PNG, taken from outside the guest; None for a desktop that was booted.
    """

    guest: Guest
    cdp: Cdp
    screen: tuple[int, int]
    interval: float
    chrome_grace: float
    watcher: Watcher
    frame: bytes | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _answered: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self.probes = {
            name: Probe(name=name, detail="the first try was not answered yet") for name in ("screenshot", "chrome_cdp")
        }

    async def wait(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._start_chrome_if_absent)
            async with anyio.create_task_group() as probes:
                probes.start_soon(self._probe_screen)
                probes.start_soon(self._probe, "chrome_cdp", self._judge_cdp)
            tasks.cancel_scope.cancel()
        if self.frame is None:
            await self._see_a_page_drawn()

    async def _probe_screen(self) -> None:
        if self.frame is not None:
            result, detail = await anyio.to_thread.run_sync(judge_picture, self.frame, self.screen)
            if result is not ProbeResult.OK:
                self.watcher.note(f"The clone's frame does not count: {detail}. It is probed as if it had been booted.")
                self.frame = None
        await self._probe("screenshot", self._judge_screenshot if self.frame is None else self._judge_answer)

    async def _see_a_page_drawn(self) -> None:
        drawn = False
        with anyio.move_on_after(PAINT_LIMIT):
            try:
                drawn = await self.cdp.painted(PAINT_LIMIT)
            except EnvdError as error:
                self.watcher.note(f"Whether Chrome has drawn its page could not be seen: {error.detail}")
                return
        if not drawn:
            self.watcher.note(f"Chrome has drawn no page within {PAINT_LIMIT:g} s; it may be hidden.")

    async def _probe(self, name: str, judge: Judge) -> None:
        """Try until enough tries in a row were ok. Never two tries at once; a try that hangs is cut off."""
        in_a_row = 0
        while in_a_row < self._needed:
            result, detail = await self._one_try(judge, self._try_timeout(self.probes[name].attempts))
            in_a_row = in_a_row + 1 if result is ProbeResult.OK else 0
            passed = in_a_row >= self._needed
            now = Probe(
                name=name,
                result=result,
                passed=passed,
                detail=detail,
                attempts=self.probes[name].attempts + 1,
                seconds=round(time.monotonic() - self._started, 3) if passed else None,
            )
            self.probes[name] = now
            self.watcher.probed(now)
            if not passed:
                await anyio.sleep(self._pause(after_success=in_a_row > 0))

    @property
    def _needed(self) -> int:
        return NEEDED if self.frame is None else 1

    def _try_timeout(self, tried: int) -> float:
        return TRY_TIMEOUT if self.frame is None else min(TRY_TIMEOUT, CLONE_TRY * 1.5 ** min(tried, 10))

    async def _one_try(self, judge: Judge, timeout: float) -> tuple[ProbeResult, str]:
        try:
            with anyio.fail_after(timeout):
                return await judge()
        except TimeoutError:
            return ProbeResult.UNKNOWN, f"no answer within {timeout:.3g} s"
        except GuestUnreachable as error:
            return ProbeResult.UNKNOWN, error.detail
        except EnvdError as error:
            return ProbeResult.FAIL, error.detail
        except Exception as error:  # noqa: BLE001 - a mistake of ours or of a library must not end the boot
            return ProbeResult.UNKNOWN, f"the probe itself failed: {type(error).__name__}: {error}"

    def _pause(self, *, after_success: bool) -> float:
        """Grows with the time waited, so that at most a twentieth of a boot is lost to sleeping; jittered by half."""
        waited = time.monotonic() - self._started
        shortest = self.interval if self.frame is None else CLONE_PAUSE
        pause = shortest if after_success else min(SLOWEST_INTERVAL, max(shortest, waited / 20))
        return pause * random.uniform(0.5, 1.5)

    async def _judge_screenshot(self) -> tuple[ProbeResult, str]:
        try:
            picture = await self.guest.screenshot(timeout=TRY_TIMEOUT)
        except GuestMisbehaved:
            self._answered.set()
            raise
        self._answered.set()
        return await anyio.to_thread.run_sync(judge_picture, picture, self.screen)

    async def _judge_answer(self) -> tuple[ProbeResult, str]:
        began = time.monotonic()
        try:
            await self.guest.answers(TRY_TIMEOUT)
        except GuestMisbehaved:
            self._answered.set()
            raise
        self._answered.set()
        return ProbeResult.OK, f"frame from outside, guest answered in {time.monotonic() - began:.2f} s"

    async def _judge_cdp(self) -> tuple[ProbeResult, str]:
        version = await self.cdp.version()
        pages = await self.cdp.pages()
        browser = str(version["Browser"])[:60]
        if not pages:
            return ProbeResult.FAIL, f"{browser} answers but shows no page"
        return ProbeResult.OK, f"{browser}, {len(pages)} page(s)"

    async def _start_chrome_if_absent(self) -> None:
        """Published OSWorld images boot without Chrome (their tasks start it), so a silent CDP port is no failure
        yet."""
        await self._answered.wait()
        await anyio.sleep(self.chrome_grace)
        for attempt in (1, 2, 3):
            if self.probes["chrome_cdp"].result is ProbeResult.OK:
                return
            self.watcher.note(
                f"The guest answers but Chrome's CDP does not after {self.chrome_grace:g} s: "
                f"starting Chrome and the socat bridge in the guest (attempt {attempt})."
            )
            try:
                await self.guest.launch(CHROME)
                await self.guest.launch(BRIDGE)
            except EnvdError as error:
                self.watcher.note(f"The guest did not start them: {error.detail}")
                await anyio.sleep(max(self.chrome_grace, 1))
            else:
                break
        await anyio.sleep(max(2 * self.chrome_grace, 1))
        if self.probes["chrome_cdp"].result is not ProbeResult.OK:
            await self._tell_what_is_missing()

    async def _tell_what_is_missing(self) -> None:
        """Of the way from here to Chrome, as the guest sees it."""
        try:
            seen = await self.guest.execute(hops.TABLES, timeout=TRY_TIMEOUT)
        except EnvdError as error:
            self.watcher.note(f"What listens in the guest could not be seen: {error.detail}")
            return
        ports = hops.listening(seen.stdout)
        if ports is None:
            self.watcher.note(f"What listens in the guest could not be seen: {seen.stderr.strip()[:200]}")
        else:
            self.watcher.note(hops.told(ports))


def judge_picture(picture: bytes, screen: tuple[int, int]) -> tuple[ProbeResult, str]:
    """Whether `picture` shows a usable desktop of `screen` (width, height) pixels. Blocks: call it in a thread."""
    try:
        with opened(picture) as image:
            if image.size != screen:
                return ProbeResult.FAIL, f"the screen is {image.width}x{image.height}, not {screen[0]}x{screen[1]}"
            share = _largest_share(image)
    except ValueError as error:
        return ProbeResult.FAIL, f"{len(picture)} bytes that do not decode: {error}"
    if (1 - share) * screen[1] < LEAST_SHOWN:
        return ProbeResult.FAIL, f"the screen is one flat colour ({share:.1%} of it)"
    return ProbeResult.OK, f"{screen[0]}x{screen[1]}, {len(picture)} bytes"


def _largest_share(image: Image.Image) -> float:
    """How much of the picture its most frequent colour covers, from 0 to 1; every eighth pixel of each row and
    column."""
    sample = image.resize((max(1, image.width // 8), max(1, image.height // 8)), Image.Resampling.NEAREST)
    pixels = sample.width * sample.height
    colours = sample.convert("RGB").getcolors(pixels) or []
    return max(count for count, _ in colours) / pixels
