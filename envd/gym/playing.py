"""One env as it is played: what a reset and a step come to, in the words of Gymnasium. Async, and without spaces."""

from __future__ import annotations

import difflib
import io
import math
import time
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import anyio.to_thread
import numpy as np
from PIL import Image

from ..client import EnvHandle, Limits
from ..errors import EnvdError, EpisodeOver, GuestMisbehaved, InfraError, InvalidRequest, error_classes
from ..models import EndReason, StepResult, Verdict

MODELS_DOING = (EndReason.DONE, EndReason.FAIL, EndReason.UNPARSABLE)
"""Ends that are a termination; every other is a truncation."""
OPTIONS = ("task", "max_steps", "counts", "episode_timeout_s")
"""What `reset(options=…)` takes."""
Pixels = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]


class Observation(TypedDict):
    screenshot: Pixels
    instruction: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step comes to. `reward` is `nan` exactly where `info["mask"]` is True."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """A reset: its task, and its limits, where None is the server's default."""

    task: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    counts: Any = None
    episode_timeout_s: float | None = None

    def changed(self, options: dict[str, Any] | None) -> Plan:
        """Raises InvalidRequest for an option that there is not."""
        given = dict(options or {})
        for name in given.keys() - set(OPTIONS):
            near = difflib.get_close_matches(str(name), OPTIONS, n=1)
            raise InvalidRequest(
                f"A reset has no option {name!r}{f', did you mean {near[0]}?' if near else '.'}",
                hint=f"There are {', '.join(OPTIONS)}.",
            )
        return Plan(**{name: given.get(name, getattr(self, name)) for name in OPTIONS})

    def limits(self, screen: tuple[int, int]) -> Limits:
        return {
            "max_steps": self.max_steps,
            "counts": self.counts,
            "episode_timeout_s": self.episode_timeout_s,
            "screen": screen,
        }


class Player:
    """Plays on one env, one call at a time.

    pause_s          wait after each action; None is the server's default
    reset_timeout_s  seconds for a reset, its wait in the queue included; None is no limit
    """

    def __init__(self, screen: tuple[int, int], pause_s: float | None, reset_timeout_s: float | None) -> None:
        self.screen = screen
        self.seen: Observation = {"screenshot": np.zeros((screen[1], screen[0], 3), np.uint8), "instruction": ""}
        """The last observation."""
        self._pause_s, self._reset_timeout_s = pause_s, reset_timeout_s
        self._handle: EnvHandle | None = None
        self._episode_id = ""
        self._over = True

    def playing(self, *, also_over: bool = False) -> EnvHandle:
        """The env, with an episode that goes on. Raises EpisodeOver."""
        if self._handle is None or (self._over and not also_over):
            raise EpisodeOver("There is no episode to play on.", hint="Call reset().")
        return self._handle

    async def reset(self, handle: EnvHandle, plan: Plan) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode. Raises as `Client.reset` does."""
        began = time.monotonic()
        self._handle, self._over = None, True
        job = await handle.reset(plan.task, timeout=self._reset_timeout_s, **plan.limits(self.screen))
        self.seen = await self._observed(await handle.screenshot(), str(plan.task.get("instruction", "")))
        self._handle, self._over, self._episode_id = handle, False, job.episode_id or ""
        info = {
            "episode_id": self._episode_id,
            "env": handle.number,
            "job_id": job.id,
            "task_id": job.task_id,
            "reset_path": str(job.reset_path),
            "warnings": list(job.warnings),
            "mask": False,
            "seconds": {"reset": time.monotonic() - began},
        }
        return self._copied(), info

    async def step(self, *, prediction: str | None = None, programs: Sequence[str] | None = None) -> Outcome:
        """Act, look, and have the episode judged where it ended with that. Raises the EnvdError that kept the step
        from being taken, or the episode from having a score: then its fact `verdict` says why."""
        handle = self.playing()
        try:
            result = await handle.client.step(
                handle.number,
                prediction=prediction,
                actions=None if programs is None else list(programs),
                pause_s=self._pause_s,
            )
        except EpisodeOver as over:
            if (end := over.facts.get("end_reason")) not in list(EndReason):
                raise
            return await self._judged(handle, EndReason(end), self._told(None))
        if result.screenshot is not None:
            self.seen = await self._observed(b64decode(result.screenshot), self.seen["instruction"])
        if result.end_reason is None:
            return Outcome(self._copied(), 0.0, False, False, self._told(result))
        return await self._judged(handle, result.end_reason, self._told(result))

    def masked(self, error: EnvdError) -> Outcome:
        """The end of an episode that must not be learnt from, in place of `error`."""
        self._over = True
        info = self._told(None) | {"mask": True, "error": error, "verdict": error.facts.get("verdict")}
        return Outcome(self._copied(), math.nan, False, True, info)

    async def history(self) -> list[dict[str, Any]]:
        handle = self.playing(also_over=True)
        return await handle.history()

    async def _judged(self, handle: EnvHandle, end: EndReason, info: dict[str, Any]) -> Outcome:
        self._over = True
        began = time.monotonic()
        verdict = await handle.evaluate()
        if verdict.score is None:
            raise no_score(verdict)
        info["seconds"]["evaluate"] = time.monotonic() - began
        info |= {"verdict": verdict, "end_reason": str(end)}
        terminated = end in MODELS_DOING
        return Outcome(self._copied(), verdict.score, terminated, not terminated, info)

    def _told(self, result: StepResult | None) -> dict[str, Any]:
        return {
            "episode_id": self._episode_id,
            "step": 0 if result is None else result.step,
            "format_reward": 0.0 if result is None else result.format_reward,
            "problem": "" if result is None else result.problem,
            "action_results": [] if result is None else [action.model_dump(mode="json") for action in result.actions],
            "end_reason": "",
            "verdict": None,
            "mask": False,
            "seconds": {} if result is None else dict(result.seconds),
        }

    async def _observed(self, picture: bytes, instruction: str) -> Observation:
        return {"screenshot": await anyio.to_thread.run_sync(_pixels, picture, self.screen), "instruction": instruction}

    def _copied(self) -> Observation:
        """Whoever is given an observation may keep it, and change it."""
        return {"screenshot": self.seen["screenshot"].copy(), "instruction": self.seen["instruction"]}


def no_score(verdict: Verdict) -> EnvdError:
    """Why there is none, with the verdict as the fact `verdict`. Asking again is answered with the same."""
    error = error_classes().get(verdict.code or "", InfraError)(verdict.detail, hint=verdict.hint)
    error.facts = {"verdict": verdict}
    error.fault, error.retryable = verdict.fault or error.fault, False
    return error


def _pixels(picture: bytes, screen: tuple[int, int]) -> Pixels:
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            if image.size != tuple(screen):  # looked at before it is unpacked: a small file may say that it is huge
                raise GuestMisbehaved(f"A screenshot is {image.width}×{image.height}, not {screen[0]}×{screen[1]}.")
            return np.array(image.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise GuestMisbehaved(f"A screenshot cannot be decoded: {error}.") from error
