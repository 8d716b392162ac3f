"""What can be told of an instance while its system comes up: EC2's two status checks, and its console."""

from __future__ import annotations

import re

import anyio
import structlog

from ...errors import CloudRefused
from ..base import Report
from .cloud import Cloud

logger = structlog.get_logger(__name__)

LOOKS = 5.0
"""Seconds between two looks. The checks need some minutes, mostly longer than the desktop does."""
MOST_LOOKS = 180
CALL = 20.0
_UNREADABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\t\n -￼]")


async def narrate(cloud: Cloud, instance_id: str, report: Report) -> None:
    """Tell `report` until both checks have passed. Never raises a refusal: nothing depends on it."""
    told: set[str] = set()
    try:
        for _ in range(MOST_LOOKS):
            checks = await _checks(cloud, instance_id)
            if checks not in told:
                report.progress(f"status checks: {checks}")
            if checks == "passed":
                return
            [*_, line] = ("", *await console(cloud, instance_id, 1))
            if line and line not in told:
                report.progress(f"console: {line[:120]}")
            told |= {checks, line}
            await anyio.sleep(LOOKS)
    except CloudRefused as refusal:
        logger.info("nothing can be told of the boot", instance_id=instance_id, error=refusal.detail)


async def console(cloud: Cloud, instance_id: str, lines: int) -> tuple[str, ...]:
    """The last lines that the instance wrote there: hostile bytes, of which EC2 keeps 64 KiB. Raises CloudRefused."""
    if lines <= 0:
        return ()
    try:
        answer = await cloud.call("ec2", "get_console_output", within=CALL, InstanceId=instance_id, Latest=True)
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") != "UnsupportedOperation":
            raise
        # The newest output there is of Nitro's types alone; of the others, what was kept some minutes ago.
        answer = await cloud.call("ec2", "get_console_output", within=CALL, InstanceId=instance_id)
    text = _UNREADABLE.sub("", answer.get("Output") or "").rstrip()
    return tuple(line.rstrip() for line in text.split("\n"))[-lines:] if text else ()


async def _checks(cloud: Cloud, instance_id: str) -> str:
    """`passed`, or how each stands: initializing, insufficient-data, impaired."""
    answer = await cloud.call("ec2", "describe_instance_status", within=CALL, InstanceIds=[instance_id])
    for status in answer["InstanceStatuses"]:
        system, own = (status.get(key, {}).get("Status", "unknown") for key in ("SystemStatus", "InstanceStatus"))
        return "passed" if system == own == "ok" else f"its host {system}, its system {own}"
    return "none yet"
