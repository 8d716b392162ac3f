"""A desktop that is had, looked at, used and given back, with the seconds of each: `envd doctor --full`.

It is leased, so that nobody is disturbed: where no env is free, nothing is tried.
"""

from __future__ import annotations

import io
import time

import anyio.to_thread
from PIL import Image

from ..client import Client
from ..client.handle import EnvHandle
from ..errors import EnvdError, LeaseUnavailable
from ..findings import Finding
from ..models import ActionOutcome

RESET = 3600.0
"""Seconds for a reset: a machine that is emulated boots for long. Its progress is `envd watch`'s to show."""


async def desktop(url: str, token: str) -> list[Finding]:
    """A reset, a picture, a step and another picture."""
    found: list[Finding] = []
    async with Client(url, token=token, patience=5.0) as client:
        try:
            async with client.lease(1, ttl_s=60.0, wait_s=0.0, owner="envd-doctor") as (env,):
                await _use(env, found)
        except LeaseUnavailable:
            found.append(
                Finding("desktop", "unknown", "not tried: every env is taken, and nobody was disturbed", "try it later")
            )
        except EnvdError as error:
            what = ("reset", "picture", "step")[min(len(found), 2)]
            found.append(
                Finding(what, "failed", f"{error.code}: {error.detail}", error.hint or f"see {url}/errors#{error.code}")
            )
    return found


async def _use(env: EnvHandle, found: list[Finding]) -> None:
    """Raises EnvdError."""
    began = time.monotonic()
    job = await env.reset(timeout=RESET)
    how = f", {job.reset_path}" if job.reset_path else ""
    found.append(Finding("reset", "ok", f"env {env.number} in {time.monotonic() - began:.2f} s{how}"))
    began = time.monotonic()
    picture = await env.screenshot()
    took = time.monotonic() - began
    found.append(await anyio.to_thread.run_sync(_seen, picture, took))
    began = time.monotonic()
    result = await env.act("pyautogui.moveTo(100, 100)", pause_s=0.0)
    outcomes = [one.outcome for one in result.actions]
    took = time.monotonic() - began
    if outcomes == [ActionOutcome.OK]:
        found.append(Finding("step", "ok", f"the pointer was moved, and a picture taken, in {took:.2f} s"))
    else:
        told = ", ".join(outcomes) or "nothing ran"
        found.append(
            Finding("step", "failed", f"the pointer could not be moved: {told}", "envd watch; the daemon's log")
        )


def _seen(picture: bytes, seconds: float) -> Finding:
    """Blocks."""
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        return Finding("picture", "failed", f"it is no picture: {error}", "the daemon's log has more")
    told = f"{image.width}x{image.height}, {len(picture) / 1000:.0f} kB in {seconds * 1000:.0f} ms"
    if image.getcolors(1) is not None:
        return Finding("picture", "warning", f"{told}, of one colour", "look at it in the dashboard")
    return Finding("picture", "ok", told)
