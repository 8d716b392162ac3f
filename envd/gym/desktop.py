"""One desktop as a `gymnasium.Env`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError

from ..errors import EnvdError, InvalidRequest, Leased, LeaseOver, SettingsError
from .acts import Actions, AnyText, action_space, program
from .holding import DesktopLease
from .playing import Observation, Outcome, Pixels, Plan, Player

OnFailure = Literal["raise", "mask"]
Tasks = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
RESET_SECONDS = 3900.0
"""A boot without KVM may take 40 minutes."""
METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}
INSTRUCTION = 1_000_000
"""Characters."""


class DesktopEnv(gymnasium.Env[Observation, Any]):
    """A desktop of a server; `import envd.gym` and `gymnasium.make("envd/Desktop-v0", …)`, or by itself.

    url, token       as `envd.Client` takes them
    tasks            an OSWorld task, or several: each reset draws one of them by the env's seed. None: a bare desktop,
                     whose episodes have no score
    actions          "prediction" (what a UI-TARS model said), "program" (pyautogui, or DONE, WAIT, FAIL) or "gesture"
                     (a dictionary, see `envd.gym.acts.gestures`)
    max_steps, counts, episode_timeout_s
                     as a reset takes them; None is the server's default
    on_failure       "raise", or "mask": a step that fails, or an episode without a score, ends truncated, with the
                     reward `nan`, `info["mask"]` True and `info["error"]`. A reset raises all the same
    lease            a `DesktopLease` to take an env of; by default one of its own, of one env, which `owner` and
                     `wait_s` are for
    screen           (width, height) that is counted on; by default the server's. With another one a reset is refused
    pause_s          wait after each action; None is the server's default
    reset_timeout_s  seconds for a reset, its wait in the queue included; a job that is late goes on, and the next
                     reset of the same task joins it

    Blocks, and belongs to one thread at a time. What fails raises an EnvdError.
    """

    metadata: ClassVar[dict[str, Any]] = METADATA  # type: ignore[misc]  # of the class there, too, but not said to be

    def __init__(
        self,
        url: str | None = None,
        *,
        tasks: Tasks = None,
        actions: Actions = "prediction",
        max_steps: int | None = None,
        counts: Literal["actions", "predictions"] | None = None,
        episode_timeout_s: float | None = None,
        on_failure: OnFailure = "raise",
        token: str | None = None,
        lease: DesktopLease | None = None,
        owner: str | None = None,
        wait_s: float | None = None,
        screen: tuple[int, int] | None = None,
        pause_s: float | None = None,
        reset_timeout_s: float | None = RESET_SECONDS,
        render_mode: str | None = None,
    ) -> None:
        checked(on_failure, render_mode)
        self.render_mode = render_mode
        self._tasks = listed(tasks)
        self._plan = Plan(max_steps=max_steps, counts=counts, episode_timeout_s=episode_timeout_s)
        self._actions, self._on_failure = actions, on_failure
        self._own = lease is None
        self._closed = False
        self._lease = lease or DesktopLease(1, url, token=token, owner=owner, wait_s=wait_s)
        self._place = self._lease.take()
        try:
            screen = screen or self._lease.screen
            self.observation_space = observation_space(screen)
            self.action_space = action_space(actions, screen)
        except BaseException:
            self.close()
            raise
        self._player = Player(screen, pause_s, reset_timeout_s)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode on a fresh desktop. `options` may have `task`, `max_steps`, `counts` and
        `episode_timeout_s`, for this episode only.

        Raises what the boot or the set-up failed with, whatever `on_failure` says. A lease that was lost is asked
        for again.
        """
        super().reset(seed=seed)
        self._usable()
        plan = drawn(self._plan, self._tasks, self.np_random).changed(options)
        handle = self._lease.env(self._place)
        try:
            return self._lease.run(self._player.reset, handle, plan)
        except (LeaseOver, Leased):
            return self._lease.run(self._player.reset, self._lease.env(self._place, instead_of=handle), plan)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Act; and where the episode ends with that, have it judged, which may take minutes.

        `info` has `episode_id`, `step`, `action_results`, `end_reason`, `format_reward`, `problem` (why what was said
        cannot be read), `seconds`, `mask`, and at the end the `verdict`. Raises InvalidRequest for what is no action
        and EpisodeOver when there is no episode, whatever `on_failure` says.
        """
        self._usable()
        self._player.playing()
        asked = said(self._actions, action, self._player.screen)

        async def act() -> Outcome:
            return await self._player.step(**asked)

        try:
            outcome = self._lease.run(act)
        except EnvdError as error:
            if self._on_failure == "raise":
                raise
            outcome = self._player.masked(error)
        return outcome.observation, outcome.reward, outcome.terminated, outcome.truncated, outcome.info

    def render(self) -> Pixels | None:
        """The screen as it was last seen."""
        return None if self.render_mode is None else self._player.seen["screenshot"].copy()

    def history(self) -> list[dict[str, Any]]:
        """The episode's messages so far, as a model is shown them: {"role": …, "content": [part, …]}."""
        self._usable()
        return self._lease.run(self._player.history)

    def close(self) -> None:
        """Give the env back. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        self._lease.put_back(self._place)
        if self._own:
            self._lease.close()

    def _usable(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError("This env was closed.")


def observation_space(screen: tuple[int, int]) -> spaces.Space[Any]:
    width, height = screen
    return spaces.Dict(
        {"screenshot": spaces.Box(0, 255, (height, width, 3), np.uint8), "instruction": AnyText(INSTRUCTION)}
    )


def checked(on_failure: str, render_mode: str | None) -> None:
    """Raises SettingsError."""
    if on_failure not in ("raise", "mask"):
        raise SettingsError(f"on_failure={on_failure!r} is neither 'raise' nor 'mask'.")
    if render_mode not in (None, *METADATA["render_modes"]):
        raise SettingsError(f"render_mode={render_mode!r} is not one of {', '.join(METADATA['render_modes'])}.")


def listed(tasks: Tasks) -> list[dict[str, Any]]:
    """Raises SettingsError."""
    found = [tasks] if isinstance(tasks, Mapping) else list(tasks or [])
    for task in found:
        if not isinstance(task, Mapping):
            raise SettingsError(f"A task is a dictionary, not {task!r:.80}.", hint="json.loads(Path(…).read_text())")
    return [dict(task) for task in found]


def drawn(plan: Plan, tasks: list[dict[str, Any]], random: np.random.Generator) -> Plan:
    """The plan with one of `tasks`, if there are any."""
    return plan.changed({"task": tasks[int(random.integers(len(tasks)))]}) if tasks else plan


def said(actions: Actions, action: Any, screen: tuple[int, int]) -> dict[str, Any]:
    """How a step is asked for. Raises InvalidRequest for what is no action."""
    if actions == "gesture":
        try:
            return {"programs": [program(action, screen)]}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidRequest(f"That is no gesture: {action!r:.200} ({error!r}).") from error
    if not isinstance(action, str):
        raise InvalidRequest(
            f"With actions={actions!r} an action is a text, not {action!r:.80}.",
            hint="There are actions='prediction', 'program' and 'gesture'.",
        )
    return {"prediction": action} if actions == "prediction" else {"programs": [action]}
