"""The envs and what is played on them: set-up and first observation, steps, history.

An env is changed by its resets (the boot queue calls `vacate`, `begin`, `abandon`) and by at most one step at a
time. A desktop that dies or is taken away ends the step that runs on it; nothing that was sent to a guest is sent
again.
"""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import anyio
from PIL import Image

from .actions.dialogue import Dialogue, PromptTemplate
from .actions.pyautogui import Special, Step, step_for_raw, steps
from .actions.uitars import Frame, PredictionError, parse
from .boot.fleet import Fleet
from .boot.queue import Beginning, Reset
from .errors import (
    DesktopLost,
    EnvBusy,
    EnvdError,
    EpisodeOver,
    GuestMisbehaved,
    GuestUnreachable,
    NoEpisode,
    NotEvaluable,
    UnknownEnv,
)
from .events import EventLog
from .guest import Guest
from .models import (
    ActionOutcome,
    ActionResult,
    Desktop,
    DesktopState,
    EndReason,
    Env,
    EnvState,
    Episode,
    Job,
    ResetPath,
    StepRequest,
    StepResult,
)
from .settings import Settings
from .tasks import setup

T = TypeVar("T")

OUTPUT_KEPT = 4000
"""Characters of a program's stdout and stderr that a step result carries."""
INSTRUCTION_KEPT = 2000
"""Characters of the instruction that an env is shown with. The model is shown all of it."""
TOLD = 200
"""Characters of a program and of its output that a step's event carries: events are kept by the thousand."""


@dataclass
class _Slot:
    id: int
    state: EnvState = EnvState.EMPTY
    detail: str = ""
    desktop_id: str | None = None
    episode: Episode | None = None
    dialogue: Dialogue | None = None
    frame: Frame | None = None
    busy: bool = False


@dataclass(frozen=True)
class _Playing:
    """The episode that a step plays. A reset may take it away, or the desktop's death end it, between any two awaits
    of the step, and only then is the step cancelled: until then it must not touch what took the episode's place."""

    slot: _Slot
    episode_id: str
    dialogue: Dialogue

    @property
    def episode(self) -> Episode:
        """Raises DesktopLost when it is over."""
        now = self.slot.episode
        if now is None or now.id != self.episode_id or self.slot.state is not EnvState.PLAYING:
            raise DesktopLost(
                f"The desktop of env {self.slot.id} died or was taken away in the middle of the step.",
                hint="Reset the env. What was sent to the guest may have run; it is not sent again.",
            )
        return now

    def change(self, **changes: object) -> Episode:
        self.slot.episode = self.episode.model_copy(update=changes)
        return self.slot.episode


class Envs:
    def __init__(self, settings: Settings, fleet: Fleet, events: EventLog, template: PromptTemplate) -> None:
        self._settings = settings
        self._fleet = fleet
        self._events = events
        self._template = template
        self._slots = [_Slot(number) for number in range(settings.envs)]
        self._step_ended = anyio.Event()
        fleet.on_lost = self._desktop_lost

    # -- looking ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slots)

    def env(self, env: int) -> Env:
        slot = self._slot(env)
        desktop = self._fleet.get(slot.desktop_id) if slot.desktop_id else None
        return Env(id=env, state=slot.state, detail=slot.detail, desktop=desktop, episode=slot.episode)

    def dialogue(self, env: int) -> Dialogue | None:
        """The messages of the current episode; None when there is none."""
        return self._slot(env).dialogue

    async def idle(self) -> None:
        """Return when no step runs."""
        while any(slot.busy for slot in self._slots):
            await self._step_ended.wait()

    async def screenshot(self, env: int) -> bytes:
        """The screen as it is now, PNG bytes. Raises NoEpisode, EnvBusy while resetting, DesktopLost,
        GuestUnreachable."""
        slot = self._with_desktop(env)
        guest, desktop_id = self._guest(slot)
        picture, _ = await self._while_alive(desktop_id, lambda: self._picture(guest))
        return picture

    def evaluate(self, env: int) -> NoReturn:
        """Raises NoEpisode without an episode, and NotEvaluable with one: this version has no evaluators. Never a
        number."""
        slot = self._with_desktop(env)
        task = (slot.episode.task_id if slot.episode else None) or "its task"
        raise NotEvaluable(
            f"This version of envd has no evaluators: env {slot.id} cannot be judged on {task}.",
            hint="No score was made up for it: mask this episode.",
        )

    # -- resets, called by the queue ----------------------------------------------------------------------------

    def vacate(self, env: int, job: Job) -> str | None:
        slot = self._slot(env)
        desktop_id = slot.desktop_id
        self._end_episode(slot, EndReason.REPLACED)
        slot.state, slot.detail, slot.desktop_id = EnvState.RESETTING, f"{job.id} is being served", None
        return desktop_id

    async def begin(self, job: Job, reset: Reset, desktop: Desktop, phase: Callable[[str], None]) -> Beginning:
        assert job.env is not None
        slot = self._slot(job.env)
        guest = self._fleet.guest(desktop)
        warnings: list[str] = []

        async def prepare() -> tuple[bytes, tuple[int, int]]:
            await setup.run(reset.task, guest, warnings.append)
            phase("observe")
            await anyio.sleep(self._settings.settle_seconds)
            return await self._picture(guest)

        picture, size = await self._while_alive(desktop.id, prepare)
        # It may have died after its last answer and before this line, when nothing tied it to the env yet.
        now = self._fleet.get(desktop.id)
        if now is None or now.state is not DesktopState.IN_USE:
            raise _lost(desktop.id)
        instruction = str(reset.task.get("instruction") or "")
        episode = Episode(
            id=f"ep-{secrets.token_hex(6)}",
            env=slot.id,
            desktop_id=desktop.id,
            task_id=job.task_id,
            instruction=instruction[:INSTRUCTION_KEPT],
            started_at=time.time(),
            max_steps=reset.max_steps or self._settings.max_steps,
            screen=size,
            reset_path=job.reset_path or ResetPath.COLD,
        )
        pixels = {"min_pixels": self._settings.min_pixels, "max_pixels": self._settings.max_pixels}
        slot.dialogue = Dialogue(instruction, template=self._template, **pixels)
        slot.dialogue.saw(picture)
        slot.frame = Frame(*size, **pixels)
        slot.episode, slot.desktop_id, slot.state, slot.detail = episode, desktop.id, EnvState.PLAYING, ""
        self._tell(slot, "episode", state="began", episode_id=episode.id, warnings=warnings, message="episode began")
        return Beginning(episode.id, tuple(warnings))

    def abandon(self, env: int, job: Job) -> None:
        slot = self._slot(env)
        if slot.state is EnvState.RESETTING:
            slot.state, slot.detail, slot.desktop_id = EnvState.EMPTY, f"{job.id} ended {job.state}", None

    # -- steps --------------------------------------------------------------------------------------------------

    async def step(self, env: int, request: StepRequest) -> StepResult:
        """Run what the model said, wait, and look. Input is sent once, whatever happens.

        A program that fails in the guest is reported in its `ActionResult`, and the episode goes on. Raises
        EpisodeOver, EnvBusy, NoEpisode, DesktopLost; GuestUnreachable when no picture can be had afterwards (its
        facts carry the action results).
        """
        slot = self._with_desktop(env)
        if slot.episode is None or slot.dialogue is None:
            raise NoEpisode(f"Env {env} has no episode.", hint="Reset it first.")
        if slot.episode.done:
            raise EpisodeOver(
                f"The episode of env {env} ended: {slot.episode.end_reason}.",
                hint="Evaluate it or reset the env.",
                end_reason=slot.episode.end_reason,
            )
        playing = _Playing(slot, slot.episode.id, slot.dialogue)
        with self._taken(slot, "step"):
            guest, desktop_id = self._guest(slot)
            return await self._while_alive(desktop_id, lambda: self._step(playing, guest, request))

    async def _step(self, playing: _Playing, guest: Guest, request: StepRequest) -> StepResult:
        began = time.monotonic()
        problem, format_reward = "", 0.0
        end: EndReason | None = None
        try:
            planned = self._plan(playing.slot, request)
        except PredictionError as error:
            planned, problem, format_reward, end = (), str(error), -1.0, EndReason.UNPARSABLE
        results: list[ActionResult] = []
        pause = self._settings.action_pause if request.pause_s is None else request.pause_s
        for step in planned:
            results.append(await self._act(guest, step, pause))
            end = self._count_action(playing, step)
            if end or results[-1].outcome is ActionOutcome.UNKNOWN:
                break
        acted = time.monotonic()
        self._count_step(playing, end)
        picture = await self._look(guest, results) if end is None or request.include_screenshot else None
        episode = playing.episode
        said = request.prediction if request.prediction is not None else "\n\n".join(request.actions or ())
        playing.dialogue.said(said)
        if picture is not None and end is None:
            playing.dialogue.saw(picture)
        result = StepResult(
            env=episode.env,
            episode_id=episode.id,
            step=episode.steps,
            done=episode.done,
            end_reason=episode.end_reason,
            format_reward=format_reward,
            actions=tuple(results),
            problem=problem,
            seconds={"act": round(acted - began, 4), "observe": round(time.monotonic() - acted, 4)},
            screenshot=base64.b64encode(picture).decode() if picture and request.include_screenshot else None,
        )
        self._tell_step(playing.slot, result)
        return result

    def _tell_step(self, slot: _Slot, result: StepResult) -> None:
        shown = result.model_dump(mode="json", exclude={"screenshot", "env", "episode_id"})
        shown["problem"] = shown["problem"][:TOLD]
        for action in shown["actions"]:
            action |= {name: action[name][-TOLD:] for name in ("stdout", "stderr")}
            action["action"] = action["action"][:TOLD]
        self._tell(slot, "step", **shown, message="step")
        if result.done:
            self._tell_end(slot)

    def _plan(self, slot: _Slot, request: StepRequest) -> tuple[Step, ...]:
        if request.prediction is not None:
            assert slot.frame is not None
            return steps(parse(request.prediction, frame=slot.frame))
        return tuple(step_for_raw(action) for action in request.actions or ())

    async def _act(self, guest: Guest, step: Step, pause: float) -> ActionResult:
        began = time.monotonic()
        if isinstance(step, Special):
            if step is Special.WAIT:
                await anyio.sleep(self._settings.wait_seconds)
            seconds = round(time.monotonic() - began, 4)
            return ActionResult(action=str(step), outcome=ActionOutcome.SPECIAL, seconds=seconds)
        returncode, stdout, stderr = None, "", ""
        try:
            ran = await guest.execute(["python", "-c", step.code])
            returncode, stdout, stderr = ran.returncode, ran.stdout, ran.stderr
            outcome = ActionOutcome.FAILED if returncode else ActionOutcome.OK
        except GuestUnreachable as error:
            stderr = error.detail
            outcome = ActionOutcome.UNKNOWN if error.facts.get("sent") else ActionOutcome.FAILED
        except GuestMisbehaved as error:
            stderr, outcome = error.detail, ActionOutcome.FAILED
        seconds = round(time.monotonic() - began, 4)
        await anyio.sleep(pause)
        return ActionResult(
            action=step.source or step.code,
            outcome=outcome,
            returncode=returncode,
            stdout=stdout[-OUTPUT_KEPT:],
            stderr=stderr[-OUTPUT_KEPT:],
            seconds=seconds,
        )

    def _count_action(self, playing: _Playing, step: Step) -> EndReason | None:
        """Count as the servers before did: actions, not predictions."""
        episode = playing.change(actions=playing.episode.actions + 1)
        if step is Special.DONE:
            return EndReason.DONE
        if step is Special.FAIL:
            return EndReason.FAIL
        return EndReason.MAX_STEPS if episode.actions >= episode.max_steps else None

    def _count_step(self, playing: _Playing, end: EndReason | None) -> None:
        changes: dict[str, Any] = {"steps": playing.episode.steps + 1}
        if end is not None:
            changes |= {"done": True, "end_reason": end}
        playing.change(**changes)

    async def _look(self, guest: Guest, results: list[ActionResult]) -> bytes:
        try:
            picture, _ = await self._picture(guest)
        except EnvdError as error:
            error.facts["actions"] = [result.model_dump(mode="json") for result in results]
            error.hint = error.hint or "The step's actions are listed with what is known of them; none is sent again."
            raise
        return picture

    @staticmethod
    async def _picture(guest: Guest) -> tuple[bytes, tuple[int, int]]:
        """A screenshot and its size: one that cannot be opened is an error, never an observation."""
        picture = await guest.screenshot()
        try:
            with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
                return picture, image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise GuestMisbehaved(f"{guest.url}/screenshot answered a broken picture: {error}") from error

    # -- one env ------------------------------------------------------------------------------------------------

    def _slot(self, env: int) -> _Slot:
        if not 0 <= env < len(self._slots):
            last = len(self._slots) - 1
            raise UnknownEnv(
                f"There is no env {env}; this daemon serves {'env 0' if last == 0 else f'envs 0 to {last}'}.",
                hint="Start it with a larger ENVD_ENVS to serve more.",
                env=env,
            )
        return self._slots[env]

    def _with_desktop(self, env: int) -> _Slot:
        slot = self._slot(env)
        if slot.state is EnvState.RESETTING:
            raise EnvBusy(f"Env {env} is being reset: {slot.detail}.", hint="Wait for that job.", retry_after=1)
        if slot.state is EnvState.LOST:
            raise DesktopLost(f"The desktop of env {env} is gone: {slot.detail}.", hint="Reset the env.")
        if slot.state is EnvState.EMPTY:
            why = f" ({slot.detail})" if slot.detail else ""
            raise NoEpisode(f"Env {env} has no episode{why}.", hint="Reset it first.")
        return slot

    def _guest(self, slot: _Slot) -> tuple[Guest, str]:
        desktop = self._fleet.get(slot.desktop_id or "")
        if desktop is None or desktop.endpoints is None:
            raise DesktopLost(f"The desktop of env {slot.id} is gone.", hint="Reset the env.")
        return self._fleet.guest(desktop), desktop.id

    @contextmanager
    def _taken(self, slot: _Slot, what: str) -> Iterator[None]:
        if slot.busy:
            raise EnvBusy(
                f"Env {slot.id} is in the middle of a {what}.", hint="Send one call at a time.", retry_after=1
            )
        slot.busy = True
        try:
            yield
        finally:
            slot.busy = False
            self._step_ended.set()
            self._step_ended = anyio.Event()

    async def _while_alive(self, desktop_id: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, or DesktopLost as soon as the desktop dies or is taken away."""
        outcome: list[T] = []
        failure: EnvdError | None = None
        async with anyio.create_task_group() as race:

            async def end_with_the_desktop() -> None:
                await self._fleet.lost(desktop_id)
                race.cancel_scope.cancel()

            race.start_soon(end_with_the_desktop)
            try:
                outcome.append(await work())
            except EnvdError as error:
                failure = error
            race.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not outcome:
            raise _lost(desktop_id)
        return outcome[0]

    def _desktop_lost(self, desktop: Desktop, reason: str) -> None:
        for slot in self._slots:
            if slot.desktop_id == desktop.id:
                self._end_episode(slot, EndReason.LOST)
                slot.state, slot.detail = EnvState.LOST, reason

    def _end_episode(self, slot: _Slot, reason: EndReason) -> None:
        if slot.episode is not None and not slot.episode.done:
            slot.episode = slot.episode.model_copy(update={"done": True, "end_reason": reason})
            self._tell_end(slot)
        if reason is EndReason.REPLACED:
            slot.episode = slot.dialogue = slot.frame = None

    def _tell_end(self, slot: _Slot) -> None:
        assert slot.episode is not None
        ended = slot.episode
        self._tell(
            slot, "episode", state="ended", end_reason=ended.end_reason, steps=ended.steps, message="episode ended"
        )

    def _tell(self, slot: _Slot, kind: str, **data: Any) -> None:
        episode_id = slot.episode.id if slot.episode else None
        self._events.publish(kind, env=slot.id, desktop_id=slot.desktop_id, **{"episode_id": episode_id, **data})


def _lost(desktop_id: str) -> DesktopLost:
    return DesktopLost(
        f"The desktop {desktop_id} died or was taken away in the middle of the call.",
        hint="Reset the env. What was sent to the guest may have run; it is not sent again.",
        desktop_id=desktop_id,
    )
