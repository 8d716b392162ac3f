"""What the journal keeps for the next life of the daemon, beside jobs and events: enough to take up each job, desktop
and episode where it was."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from .errors import Problem
from .models import Counts, Desktop, Model, Settled, StepResult


class KeptReset(Model):
    """What a job was asked for. `expires_at` is when it has waited long enough, in Unix seconds; None for never."""

    task: dict[str, Any]
    max_steps: int | None = None
    counts: Counts | None = None
    episode_timeout_s: float | None = None
    queue_timeout_s: float | None = None
    owner: str = ""
    expires_at: float | None = None


class KeptDesktop(Model):
    """A desktop, and what it was made for and of. Put before the driver is asked for an instance of its id."""

    desktop: Desktop
    job_id: str = ""
    screen: tuple[int, int] = (0, 0)
    image: str = ""


class KeptPlay(Model):
    """What an episode leaves for its verdict, beside the episode itself. `judging` once its post-configuration may have
    been begun: it is not run a second time."""

    job_id: str
    task: dict[str, Any]
    outputs: Mapping[str, str] = Field(default_factory=dict)
    """By name, in base64."""
    warnings: tuple[str, ...] = ()
    browser: str = ""
    proxied: bool = False
    settled: Settled | None = None
    judging: bool = False

    @staticmethod
    def packed(outputs: Mapping[str, bytes]) -> dict[str, str]:
        return {name: base64.b64encode(content).decode() for name, content in outputs.items()}

    def unpacked(self) -> dict[str, bytes]:
        return {name: base64.b64decode(content) for name, content in self.outputs.items()}


class KeptStep(Model):
    """A step, from before its input is sent. `result` (without its picture) or `problem` is there once it has ended;
    with neither, what was sent may have run."""

    number: int
    fingerprint: str
    prediction: str | None = None
    actions: tuple[str, ...] | None = None
    result: StepResult | None = None
    problem: Problem | None = None
    pictured: bool = False
    """There is a frame of its number in the bundle."""
    shown: bool = False
    """That frame is part of the dialogue."""
    turns: int | None = None
    """Messages of the dialogue after it; None if it added none."""

    @property
    def said(self) -> str:
        return self.prediction if self.prediction is not None else "\n\n".join(self.actions or ())

    @staticmethod
    def id(episode_id: str, number: int) -> str:
        return f"{episode_id}/{number:06d}"


class KeptAnswer(Model):
    """Of a call with an idempotency key: which call it was, and where its answer is."""

    fingerprint: str
    what: Literal["job", "step", "verdict", "lease"]
    id: str
    """Of the job, the episode or the lease."""
    step: int = 0

    @classmethod
    def of_step(cls, fingerprint: str, episode_id: str, number: int) -> Self:
        return cls(fingerprint=fingerprint, what="step", id=episode_id, step=number)
