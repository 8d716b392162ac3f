"""One step of a model on a desktop: its prediction as programs, each program run once, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from .actions.gestures import Gesture
from .actions.pyautogui import Special, Step, step_for_raw, steps
from .actions.translate import gestures_for
from .actions.uitars import Frame, parse
from .drivers.base import Console
from .errors import EnvdError, GuestMisbehaved, GuestUnreachable, InfraError
from .guest import Guest
from .models import ActionOutcome, ActionResult, StepRequest, StepResult, Way

OUTPUT_KEPT = 4000
"""Characters of a program's stdout and stderr that a step result carries."""
TOLD = 200
"""Characters of a program and of its output that a step's event carries: events are kept by the thousand."""


def plan(request: StepRequest, frame: Frame) -> tuple[Step, ...]:
    """What is to be run, in order. Raises PredictionError for a prediction that is not in the grammar."""
    if request.prediction is not None:
        return steps(parse(request.prediction, frame=frame))
    return tuple(step_for_raw(action) for action in request.actions or ())


@dataclass(frozen=True, slots=True)
class Sight:
    """Where pictures of a desktop come from. `look` gives PNG (or JPEG) bytes; `name` is what errors call it."""

    look: Callable[[], Awaitable[bytes]]
    via: Way
    name: str


def sight(guest: Guest, console: Console | None) -> Sight:
    """From outside where that was seen to show the same; so a guest whose own server hangs can still be seen."""
    if console is not None and console.pictures:
        return Sight(console.picture, "host", "the machine's screen")
    return Sight(guest.screenshot, "guest", f"{guest.url}/screenshot")


async def act(
    guest: Guest,
    step: Step,
    *,
    pause: float,
    wait: float,
    console: Console | None = None,
    screen: tuple[int, int] = (0, 0),
) -> ActionResult:
    """Carry out one program, once whatever happens, then rest `pause` seconds. `wait` is how long WAIT lasts.

    At the `console` of a screen of (width, height) px if that is all that the program needs and the console takes so
    much at once (no long text), else in the guest. What fails one way is not tried the other way.
    """
    began = time.monotonic()
    if isinstance(step, Special):
        if step is Special.WAIT:
            await anyio.sleep(wait)
        seconds = round(time.monotonic() - began, 4)
        return ActionResult(action=str(step), outcome=ActionOutcome.SPECIAL, seconds=seconds)
    gestures = gestures_for(step.code, screen) if console is not None and console.input else None
    if console is not None and gestures is not None and console.takes(gestures):
        done = await _at_the_console(console, gestures)
    else:
        done = await _in_the_guest(guest, step.code)
    seconds = round(time.monotonic() - began, 4)
    await anyio.sleep(pause)
    return ActionResult(
        action=step.source or step.code,
        outcome=done.outcome,
        via=done.via,
        returncode=done.returncode,
        stdout=done.stdout[-OUTPUT_KEPT:],
        stderr=done.stderr[-OUTPUT_KEPT:],
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Done:
    via: Way
    outcome: ActionOutcome
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""


async def _at_the_console(console: Console, gestures: Sequence[Gesture]) -> _Done:
    try:
        await console.perform(gestures)
    except InfraError as error:
        return _Done("host", _of_an_unanswered(error), stderr=error.detail)
    return _Done("host", ActionOutcome.OK, returncode=0)


async def _in_the_guest(guest: Guest, code: str) -> _Done:
    try:
        ran = await guest.execute(["python", "-c", code])
    except GuestUnreachable as error:
        return _Done("guest", _of_an_unanswered(error), stderr=error.detail)
    except GuestMisbehaved as error:
        return _Done("guest", ActionOutcome.FAILED, stderr=error.detail)
    outcome = ActionOutcome.FAILED if ran.returncode else ActionOutcome.OK
    return _Done("guest", outcome, ran.returncode, ran.stdout, ran.stderr)


def _of_an_unanswered(error: EnvdError) -> ActionOutcome:
    return ActionOutcome.UNKNOWN if error.facts.get("sent") else ActionOutcome.FAILED


def as_told(result: StepResult) -> dict[str, Any]:
    """A step as its event has it: without the picture, and cut short."""
    shown = result.model_dump(mode="json", exclude={"screenshot", "env", "episode_id"})
    shown["problem"] = shown["problem"][:TOLD]
    for action in shown["actions"]:
        action |= {name: action[name][-TOLD:] for name in ("stdout", "stderr")}
        action["action"] = action["action"][:TOLD]
    return shown


def shaped_reward(planned: tuple[Step, ...], *, seen: bool) -> float:
    """What one older server gave for a prediction that parses: 0.10, and 0.05 if it begins with an action in the GUI,
    0.10 if it finishes, 0.05 if the episode goes on."""
    acts = bool(planned) and not isinstance(planned[0], Special)
    return round(0.10 + 0.05 * acts + 0.10 * (Special.DONE in planned) + 0.05 * seen, 2)
