"""One env as an object, for who plays on one: the calls of `Client` that are about an env."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ..models import Env, Job, StepResult, Verdict

if TYPE_CHECKING:
    from .client import Client, Limits


@dataclass(frozen=True, slots=True)
class EnvHandle:
    """One env of one server: `env = client.env(0)`. Its methods are those of `Client`, and fail as they do."""

    client: Client
    number: int

    async def reset(
        self, task: dict[str, Any] | None = None, *, timeout: float | None = None, **limits: Unpack[Limits]
    ) -> Job:
        return await self.client.reset(task, env=self.number, timeout=timeout, **limits)

    async def submit(self, task: dict[str, Any] | None = None, **limits: Unpack[Limits]) -> Job:
        """Ask for a reset and return its job at once."""
        return await self.client.submit_reset(task, env=self.number, **limits)

    async def step(self, prediction: str, *, timeout: float | None = None) -> StepResult:
        """Do what the model said."""
        return await self.client.step(self.number, prediction=prediction, timeout=timeout)

    async def act(self, *programs: str, pause_s: float | None = None, timeout: float | None = None) -> StepResult:
        """Run pyautogui programs, one after the other; or DONE, WAIT, FAIL."""
        return await self.client.step(self.number, actions=list(programs), pause_s=pause_s, timeout=timeout)

    async def click(self, x: float, y: float) -> StepResult:
        """Click the left button at (x, y), in pixels of the desktop's screen."""
        return await self.act(f"pyautogui.click({x!r}, {y!r})")

    async def screenshot(self) -> bytes:
        return await self.client.screenshot(self.number)

    async def history(self) -> list[dict[str, Any]]:
        return await self.client.history(self.number)

    async def evaluate(self, *, timeout: float | None = None) -> Verdict:
        return await self.client.evaluate(self.number, timeout=timeout)

    async def state(self) -> Env:
        return await self.client.env_state(self.number)
