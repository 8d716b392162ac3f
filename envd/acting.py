"""One step of a model on a desktop: its prediction as programs, each program run once, and what is told of it."""

from __future__ import annotations

import time
from typing import Any

import anyio

from .actions.pyautogui import Special, Step, step_for_raw, steps
from .actions.uitars import Frame, parse
from .errors import GuestMisbehaved, GuestUnreachable
from .guest import Guest
from .models import ActionOutcome, ActionResult, StepRequest, StepResult

OUTPUT_KEPT = 4000
"""Characters of a program's stdout and stderr that a step result carries."""
TOLD = 200
"""Characters of a program and of its output that a step's event carries: events are kept by the thousand."""


def plan(request: StepRequest, frame: Frame) -> tuple[Step, ...]:
    """What is to be run, in order. Raises PredictionError for a prediction that is not in the grammar."""
    if request.prediction is not None:
        return steps(parse(request.prediction, frame=frame))
    return tuple(step_for_raw(action) for action in request.actions or ())


async def act(guest: Guest, step: Step, *, pause: float, wait: float) -> ActionResult:
    """Run one program in the guest, once whatever happens, then `pause` seconds. `wait` is how long WAIT lasts."""
    began = time.monotonic()
    if isinstance(step, Special):
        if step is Special.WAIT:
            await anyio.sleep(wait)
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
