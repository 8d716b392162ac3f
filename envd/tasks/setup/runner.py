"""Runs the steps of a set-up or a post-configuration, one after another, and keeps what became of each.

A step fails the whole: no later step runs, and a desktop is never handed out half set up. The one error that leaves
here is SetupFailed; its fault tells a task that asks for what cannot be (a healthy guest said no) from a machine, a
download or a mistake of ours that failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import anyio
import structlog

from ...errors import (
    AssetUnavailable,
    EnvdError,
    Fault,
    GuestMisbehaved,
    GuestUnreachable,
    InfraError,
    InternalError,
    SetupFailed,
    TaskInvalid,
)
from ...models import SetupOutcome, SetupRecord
from ...settings import Settings, secret_password
from ..task import Step
from . import chrome, commands, files, google, history, proxy
from .context import Context, Run

logger = structlog.get_logger(__name__)

STEPS: dict[str, Run] = {
    **commands.STEPS,
    **files.STEPS,
    **chrome.STEPS,
    **history.STEPS,
    **google.STEPS,
    **proxy.STEPS,
}
"""Every type of step there is."""

LIMITS: dict[str, float] = {
    "launch": 60,
    "execute": 300,  # the guest ends a command after 120 s, and one with `until` is repeated
    "command": 300,
    "execute_with_verification": 300,
    "open": 300,  # upstream waits 1810 s; a window that is not there by now does not come
    "activate_window": 60,
    "close_window": 60,
    "change_wallpaper": 60,
    "chrome_open_tabs": 600,
    "chrome_close_tabs": 180,
    "update_browse_history": 180,
    "login": 300,
    "googledrive": 300,
    "proxy": 600,
}
"""Seconds that a step may take. The others move files, as large as they are, or sleep: they have what is left of
`setup_timeout`, which is the limit of all together."""

DETAIL_KEPT = 2000
PASSWORD = "{CLIENT_PASSWORD}"
"""As tasks write it."""


async def run(steps: Sequence[Step], context: Context) -> tuple[SetupRecord, ...]:
    """Run `steps` in their order; what became of each. `context.record` is told as each of them ends.

    Raises SetupFailed. Its fact `records` has what became of the steps up to and with the one that failed.
    """
    records: list[SetupRecord] = []
    ends = anyio.current_time() + context.settings.setup_timeout
    for index, step in enumerate(steps):
        began = time.monotonic()
        warning, failure = _without_password(context.settings, *await _run_one(step, context, ends))
        record = SetupRecord(
            index=index,
            type=step.type[:100],
            outcome=_outcome(warning, failure),
            seconds=round(time.monotonic() - began, 4),
            detail=(_words(failure) if failure else warning)[:DETAIL_KEPT],
        )
        records.append(record)
        context.record(record)
        if failure is not None:
            raise _failed(record, failure, records) from failure
    return tuple(records)


async def _run_one(step: Step, context: Context, ends: float) -> tuple[str, EnvdError | None]:
    """A warning or "", and why the step failed or None."""
    run_step = STEPS.get(step.type)
    if run_step is None:
        return "", TaskInvalid(f"there is no such type; there are {', '.join(sorted(STEPS))}")
    left = ends - anyio.current_time()
    limit = LIMITS.get(step.type, left)
    try:
        with anyio.move_on_after(min(limit, left)) as deadline:
            return await run_step(context, step.parameters), None
    except GuestMisbehaved as error:
        if "refused" in error.facts:
            # The guest is well; it is the task that asks for what this desktop does not have.
            error.fault, error.retryable = Fault.TASK, False
        return "", error
    except EnvdError as error:
        return "", error
    except Exception as error:
        # Whatever it is, the desktop is not set up, and the job must say so.
        logger.exception("a set-up step failed in a way nobody foresaw", step_type=step.type[:100])
        return "", InternalError(f"{type(error).__name__}: {error}"[:DETAIL_KEPT])
    assert deadline.cancelled_caught
    if left < limit or step.type not in LIMITS:
        total = context.settings.setup_timeout
        return "", InfraError(f"it was not done when the {total:g} s of the whole set-up were over")
    return "", GuestUnreachable(f"it was not done within {limit:g} s", sent=True)


def _without_password(settings: Settings, warning: str, failure: EnvdError | None) -> tuple[str, EnvdError | None]:
    """The same without the desktops' password: a guest that complains of a command may repeat it."""
    if password := secret_password(settings):
        warning = warning.replace(password, PASSWORD)
        if failure is not None:
            failure.detail = failure.detail.replace(password, PASSWORD)
            if isinstance(said := failure.facts.get("refused"), str):
                failure.facts["refused"] = said.replace(password, PASSWORD)
    return warning, failure


def _outcome(warning: str, failure: EnvdError | None) -> SetupOutcome:
    if failure is not None:
        return SetupOutcome.FAILED
    return SetupOutcome.WARNING if warning else SetupOutcome.OK


def _words(failure: EnvdError) -> str:
    """The guest's own where it has any."""
    return str(failure.facts.get("refused") or failure.detail)


def _failed(record: SetupRecord, failure: EnvdError, records: Sequence[SetupRecord]) -> SetupFailed:
    return SetupFailed(
        f"Set-up step {record.index} ({record.type}) failed: {failure.detail}",
        behind=failure,
        step=record.index,
        step_type=record.type,
        records=[one.model_dump(mode="json") for one in records],
        hint=_advice(failure),
    )


def _advice(failure: EnvdError) -> str:
    """What to do about it."""
    if failure.hint:
        return failure.hint
    if "refused" in failure.facts and failure.fault is Fault.TASK:
        return (
            "Either this step of the task is wrong, or the desktop is not the image that the task was written for: "
            "the desktop is well, and a program, file or window that the step asks for is not in it."
        )
    if failure.fault is Fault.TASK:
        return "Look at this step of the task: the desktop it was tried on is well, and does not have what it needs."
    if isinstance(failure, AssetUnavailable):
        return "See that the file can be had from this host, or give a mirror that has it in ENVD_ASSET_MIRRORS."
    if isinstance(failure, InternalError):
        return "This is a mistake of the daemon; its log has the traceback."
    if type(failure) is InfraError:
        return "Give the set-up more time in ENVD_SETUP_TIMEOUT, or see in the records which step took so long."
    return "Reset again, which takes a fresh desktop. If it fails at the same step, look at the desktop's log."
