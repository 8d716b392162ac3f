"""Several desktops of one lease as a `gymnasium.vector.VectorEnv`: reset, stepped and judged at the same time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import anyio
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from ..client import EnvHandle
from ..errors import EnvdError, EpisodeOver, InvalidRequest, Leased, LeaseOver
from .acts import Actions, action_space
from .desktop import METADATA, RESET_SECONDS, Tasks, checked, drawn, listed, observation_space, said
from .holding import DesktopLease
from .playing import Observation, Outcome, Pixels, Plan, Player

T = TypeVar("T")
Began = tuple[Observation, dict[str, Any]]
Flags = NDArray[np.bool_]


class Observations(TypedDict):
    """`screenshot` has the envs' screens one after the other in its first dimension."""

    screenshot: NDArray[np.uint8]
    instruction: tuple[str, ...]


class DesktopVectorEnv(VectorEnv[Observations, Any, NDArray[Any]]):
    """`num_envs` desktops of a server, had by one lease: all or none. What `gymnasium.make_vec("envd/Desktop-v0")`
    makes.

    autoreset_mode  as Gymnasium has it: "NextStep" (the step after an episode's end resets, and what is said to it
                    then is not done), "SameStep" (`infos` has `final_obs` and `final_info`), or "Disabled" (call
                    `reset(options={"reset_mask": …})`)
    lease           a `DesktopLease` of at least so many envs; by default one of its own

    Everything else is as in `DesktopEnv`, but for failures, which strike one env: its episode ends truncated, with
    the reward `nan`; `infos["mask"]` is True there, `infos["error"]` says why, and the env is reset in its turn. The
    others go on. A reset that fails is tried again by the next step. When it fails for every env there is nothing to
    go on with, and it raises, as does what is no action.
    """

    def __init__(
        self,
        num_envs: int = 1,
        url: str | None = None,
        *,
        tasks: Tasks = None,
        actions: Actions = "prediction",
        max_steps: int | None = None,
        counts: Literal["actions", "predictions"] | None = None,
        episode_timeout_s: float | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        token: str | None = None,
        lease: DesktopLease | None = None,
        owner: str | None = None,
        wait_s: float | None = None,
        screen: tuple[int, int] | None = None,
        pause_s: float | None = None,
        reset_timeout_s: float | None = RESET_SECONDS,
        render_mode: str | None = None,
    ) -> None:
        self.closed = True  # until there is something to give back
        checked("mask", render_mode)
        self.num_envs, self.render_mode = num_envs, render_mode
        self._mode = AutoresetMode(autoreset_mode)
        self.metadata = METADATA | {"autoreset_mode": self._mode}
        self._tasks, self._actions = listed(tasks), actions
        self._plan = Plan(max_steps=max_steps, counts=counts, episode_timeout_s=episode_timeout_s)
        self._own = lease is None
        self._lease = lease or DesktopLease(num_envs, url, token=token, owner=owner, wait_s=wait_s)
        self.closed = False
        self._places: list[int] = []
        try:
            self._places += (self._lease.take() for _ in range(num_envs))
            screen = screen or self._lease.screen
            self.single_observation_space = observation_space(screen)
            self.single_action_space = action_space(actions, screen)
        except BaseException:
            self.close()
            raise
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._screen = screen
        self._players = [Player(screen, pause_s, reset_timeout_s) for _ in range(num_envs)]
        self._random = [np.random.default_rng() for _ in range(num_envs)]
        self._ended: Flags = np.ones(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin an episode on every env, or on those where `options["reset_mask"]` is True. `options` may also have
        what `DesktopEnv.reset` takes, for all of them, and `tasks`, one for each env."""
        self._usable()
        options = dict(options or {})
        which = _flagged(options.pop("reset_mask", None), self.num_envs)
        tasks = options.pop("tasks", None)
        if tasks is not None and len(tasks) != self.num_envs:
            raise InvalidRequest(f"There are {len(tasks)} tasks for {self.num_envs} envs.", hint="Give each env one.")
        for number, one in enumerate(_seeds(seed, self.num_envs)):
            if one is not None:
                self._random[number] = np.random.default_rng(one)
        plans = {number: self._drawn(number).changed(options) for number in which}
        if tasks is not None:
            plans = {number: plan.changed({"task": tasks[number]}) for number, plan in plans.items()}
        infos: dict[str, Any] = {}
        for number, began in self._begin(plans, enough=1).items():
            infos = self._add_info(infos, began.info, number)
            self._ended[number] = began.truncated
        return self._observations(), infos

    def step(self, actions: Any) -> tuple[Observations, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """A step of every env. See `DesktopEnv.step`."""
        self._usable()
        asked = [said(self._actions, action, self._screen) for action in iterate(self.action_space, actions)]
        if len(asked) != self.num_envs:
            raise InvalidRequest(f"There are {len(asked)} actions for {self.num_envs} envs.", hint="Give each env one.")
        if self._mode is AutoresetMode.DISABLED and self._ended.any():
            over = ", ".join(str(number) for number in np.flatnonzero(self._ended))
            raise EpisodeOver(f"There is no episode in env {over}.", hint='Call reset(options={"reset_mask": …}).')
        outcomes = self._all({number: asked[number] for number in np.flatnonzero(~self._ended).tolist()})
        outcomes |= self._begin(self._anew(np.flatnonzero(self._ended)), enough=1 - len(outcomes))
        rewards = np.array([outcomes[number].reward for number in range(self.num_envs)], np.float64)
        terminations = np.array([outcomes[number].terminated for number in range(self.num_envs)], np.bool_)
        truncations = np.array([outcomes[number].truncated for number in range(self.num_envs)], np.bool_)
        self._ended = terminations | truncations
        infos: dict[str, Any] = {}
        if self._mode is AutoresetMode.SAME_STEP:
            for number in np.flatnonzero(self._ended).tolist():
                ended = outcomes[number]
                final = {"final_obs": ended.observation, "final_info": ended.info}
                infos = self._add_info(infos, final, number)
            began = self._begin(self._anew(np.flatnonzero(self._ended)), enough=0)
            outcomes |= began
            for number, outcome in began.items():
                self._ended[number] = outcome.truncated
        for number, outcome in outcomes.items():
            infos = self._add_info(infos, outcome.info, number)
        return self._observations(), rewards, terminations, truncations, infos

    def render(self) -> tuple[Pixels, ...] | None:
        """The screens as they were last seen."""
        if self.render_mode is None:
            return None
        return tuple(player.seen["screenshot"].copy() for player in self._players)

    def close_extras(self, **kwargs: Any) -> None:
        for place in self._places:
            self._lease.put_back(place)
        if self._own:
            self._lease.close()

    def _all(self, asked: dict[int, dict[str, Any]]) -> dict[int, Outcome]:
        """The outcomes of steps, each taken with its arguments."""
        found = self._together({number: self._step_of(number, how) for number, how in asked.items()})
        return {
            number: self._players[number].masked(outcome) if isinstance(outcome, EnvdError) else outcome
            for number, outcome in found.items()
        }

    def _step_of(self, number: int, how: dict[str, Any]) -> Callable[[], Coroutine[Any, Any, Outcome]]:
        return lambda: self._players[number].step(**how)

    def _begin(self, plans: dict[int, Plan], *, enough: int) -> dict[int, Outcome]:
        """Reset envs, as outcomes: without a reward, or masked. Raises when fewer than `enough` could be."""
        if not plans:
            return {}
        handles = {number: self._lease.env(self._places[number]) for number in plans}
        found = self._together({number: self._reset_of(number, handles[number], plans[number]) for number in plans})
        over = [number for number, began in found.items() if isinstance(began, LeaseOver | Leased)]
        handles |= {number: self._lease.env(self._places[number], instead_of=handles[number]) for number in over}
        found |= self._together({number: self._reset_of(number, handles[number], plans[number]) for number in over})
        failures = [began for began in found.values() if isinstance(began, EnvdError)]
        if len(found) - len(failures) < enough:
            raise failures[0]
        return {
            number: self._players[number].masked(began)
            if isinstance(began, EnvdError)
            else Outcome(began[0], 0.0, False, False, began[1])
            for number, began in found.items()
        }

    def _reset_of(self, number: int, handle: EnvHandle, plan: Plan) -> Callable[[], Coroutine[Any, Any, Began]]:
        return lambda: self._players[number].reset(handle, plan)

    def _together(self, calls: dict[int, Callable[[], Coroutine[Any, Any, T]]]) -> dict[int, T | EnvdError]:
        """What each call, by its env, returns or fails with; all of them at once."""
        found: dict[int, T | EnvdError] = {}

        async def one(number: int) -> None:
            try:
                found[number] = await calls[number]()
            except EnvdError as error:
                found[number] = error

        async def all_of_them() -> None:
            async with anyio.create_task_group() as tasks:
                for number in calls:
                    tasks.start_soon(one, number)

        self._lease.run(all_of_them)
        return found

    def _anew(self, numbers: Iterable[int]) -> dict[int, Plan]:
        return {int(number): self._drawn(int(number)) for number in numbers}

    def _drawn(self, number: int) -> Plan:
        return drawn(self._plan, self._tasks, self._random[number])

    def _observations(self) -> Observations:
        empty: Any = create_empty_array(self.single_observation_space, self.num_envs)
        seen: Any = concatenate(self.single_observation_space, [player.seen for player in self._players], empty)
        return {"screenshot": seen["screenshot"], "instruction": seen["instruction"]}

    def _usable(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("These envs were closed.")


def _flagged(mask: Any, count: int) -> list[int]:
    """The numbers where `mask` is True, or all. Raises InvalidRequest."""
    if mask is None:
        return list(range(count))
    flags = np.asarray(mask)
    if flags.shape != (count,) or flags.dtype != np.bool_ or not flags.any():
        raise InvalidRequest(
            f"reset_mask is {mask!r:.100}, not {count} times True or False, with one True at least.",
            hint="numpy.array([True, …]), for example terminations | truncations.",
        )
    return [int(number) for number in np.flatnonzero(flags)]


def _seeds(seed: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    """One for each env: numbers that follow each other, as Gymnasium's own vectors have it."""
    if seed is None or isinstance(seed, int):
        return [None if seed is None else seed + number for number in range(count)]
    if len(seed) != count:
        raise InvalidRequest(f"There are {len(seed)} seeds for {count} envs.", hint="Give each env one.")
    return list(seed)
