"""EC2's replacement of an instance's root volume: the state it was launched from, without a new instance."""

from __future__ import annotations

from typing import Any

import anyio

from ...errors import BootFailed, CloudRefused
from ..base import Report
from .cloud import Cloud

LOOKS = 1.0
"""Seconds between two looks at how far it is."""
CALL = 30.0


async def replace_root(cloud: Cloud, instance_id: str, token: str, report: Report) -> None:
    """Return when a running instance has a new root volume, and has been started anew from it; the old one is deleted.
    With the same `token` it is done once. Raises BootFailed, CloudRefused."""
    asked = {"InstanceId": instance_id, "ClientToken": token, "DeleteReplacedRootVolume": True}
    answer = await cloud.call("ec2", "create_replace_root_volume_task", within=CALL, **asked)
    task = answer["ReplaceRootVolumeTask"]
    told = ""
    while (state := task["TaskState"]) != "succeeded":
        if state.startswith("fail"):
            raise BootFailed(f"EC2 could not replace the root volume of {instance_id}: {state}.")
        if state != told:
            report.progress(f"the root volume of {instance_id} is being replaced: {state}")
        told = state
        await anyio.sleep(LOOKS)
        task = await _now(cloud, task)


async def _now(cloud: Cloud, task: dict[str, Any]) -> dict[str, Any]:
    """As it stands now; as it stood, while EC2 does not know of it yet or is asked too often."""
    asked = {"ReplaceRootVolumeTaskIds": [task["ReplaceRootVolumeTaskId"]]}
    try:
        answer = await cloud.call("ec2", "describe_replace_root_volume_tasks", within=CALL, **asked)
    except CloudRefused as refusal:
        if not refusal.retryable:
            raise
        return task
    found: dict[str, Any] = next(iter(answer["ReplaceRootVolumeTasks"]), task)
    return found
