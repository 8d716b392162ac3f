"""The schedule at AWS that ends an instance when nobody prolongs it.

One of EventBridge Scheduler's for each instance: it happens once, ends that one instance, and then is gone itself. The
daemon puts it off for as long as it runs, and deletes it when it has ended the instance. So an instance outlives
its daemon by the TTL at most, also when the daemon's host is gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal
from weakref import WeakValueDictionary

import anyio

from ...errors import CloudRefused, TtlUnavailable
from ...settings import Settings
from .cloud import Cloud
from .scheduler_role import find_role, unavailable
from .tags import EXPIRES, as_list, in_utc, schedule_name

ASSUMABLE = 60.0
"""Seconds within which the scheduler may assume a role that was just made. It takes some 10."""
CALL = 20.0
"""Seconds that one call may take. It is not cancelled: what it did would not be known."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 8.0
_REMEMBERED = 4096
"""Ended instances that are known not to be prolonged again. No call is under way for as long as so many resets."""

_Operation = Literal["create_schedule", "update_schedule"]
_INSTEAD: dict[_Operation, tuple[str, _Operation]] = {
    "create_schedule": ("ConflictException", "update_schedule"),
    "update_schedule": ("ResourceNotFoundException", "create_schedule"),
}
"""What a call is refused with when the other one is right."""


class Ttl:
    """Schedules that end instances `seconds` after they were last prolonged. Made by `open_ttl`.

    Calls about one instance happen one after the other. Once an instance was ended, nothing makes a schedule for it.
    """

    def __init__(self, cloud: Cloud, role: str, seconds: float) -> None:
        self._cloud = cloud
        self.role = role
        self.seconds = seconds
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ended: dict[str, float] = {}
        self._patient_until: float | None = None

    def expires(self, now: float) -> float:
        """When an instance ends that is launched or prolonged at `now`. Both in Unix seconds."""
        return now + self.seconds

    async def begin(self, instance_id: str) -> float:
        """Have AWS end it, and return when, in Unix seconds. Where there is a schedule already, it is put off.

        Raises TtlUnavailable; then the instance must not be kept.
        """
        async with self._turn(instance_id):
            if instance_id in self._ended:
                raise TtlUnavailable(f"{instance_id} was ended before its end was scheduled.", role=self.role)
            return await self._set(instance_id, "create_schedule")

    async def prolong(self, instance_id: str) -> float:
        """Put its end off, and return it, in Unix seconds. A schedule that is gone is made again, and the instance's
        tag says the same. Nothing is done for one that was ended: then that was its end.

        Raises TtlUnavailable; then it ends when it would have.
        """
        async with self._turn(instance_id):
            if (ended := self._ended.get(instance_id)) is not None:
                return ended
            ends = await self._set(instance_id, "update_schedule")
            tag = as_list({EXPIRES: in_utc(ends)})
            try:
                await self._cloud.call("ec2", "create_tags", within=CALL, Resources=[instance_id], Tags=tag)
            except CloudRefused as refusal:
                raise unavailable(f"{instance_id} ends later than its tag says", refusal, self.role) from refusal
            return ends

    async def end(self, instance_id: str) -> None:
        """Take its schedule away, for good: the instance is ended, or being ended. Idempotent. Raises CloudRefused."""
        async with self._turn(instance_id):
            self._ended.setdefault(instance_id, time.time())
            while len(self._ended) > _REMEMBERED:
                del self._ended[next(iter(self._ended))]
            await remove_schedule(self._cloud, instance_id)

    def _turn(self, instance_id: str) -> asyncio.Lock:
        return self._turns.setdefault(instance_id, asyncio.Lock())

    async def _set(self, instance_id: str, operation: _Operation) -> float:
        """Create or update its schedule, patiently while the role may be too new."""
        pause = _FIRST_PAUSE
        while True:
            ends = self.expires(time.time())
            try:
                with anyio.CancelScope(shield=True):
                    await self._put(instance_id, ends, operation)
            except CloudRefused as refusal:
                if not self._may_pass(refusal):
                    raise unavailable(f"The end of {instance_id} cannot be scheduled", refusal, self.role) from refusal
            else:
                self._patient_until = None
                return ends
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _may_pass(self, refusal: CloudRefused) -> bool:
        """Whether the scheduler did not take the role, and that may be because the role is new. It is waited for once
        and not at every launch: the time runs from the first such refusal until one schedule could be made."""
        if refusal.facts.get("aws_code") != "ValidationException" or "assume" not in str(refusal.__cause__):
            return False
        if self._patient_until is None:
            self._patient_until = time.monotonic() + ASSUMABLE
        return time.monotonic() < self._patient_until

    async def _put(self, instance_id: str, ends: float, operation: _Operation) -> None:
        asked = self._schedule(instance_id, ends)
        try:
            await self._cloud.call("scheduler", operation, within=CALL, **asked)
        except CloudRefused as refusal:
            code, instead = _INSTEAD[operation]
            if refusal.facts.get("aws_code") != code:
                raise
            await self._cloud.call("scheduler", instead, within=CALL, **asked)

    def _schedule(self, instance_id: str, ends: float) -> dict[str, Any]:
        """All of it: an update puts what it is not told back to its default."""
        partition = self.role.split(":")[1]
        return {
            "Name": schedule_name(instance_id),
            "Description": f"Ends the desktop {instance_id}, unless its envd daemon puts this off.",
            "ScheduleExpression": f"at({in_utc(ends).removesuffix('Z')})",
            "ScheduleExpressionTimezone": "UTC",
            "FlexibleTimeWindow": {"Mode": "OFF"},
            "ActionAfterCompletion": "DELETE",
            "State": "ENABLED",
            "Target": {
                "Arn": f"arn:{partition}:scheduler:::aws-sdk:ec2:terminateInstances",
                "RoleArn": self.role,
                "Input": json.dumps({"InstanceIds": [instance_id]}),
            },
        }


async def open_ttl(cloud: Cloud, settings: Settings) -> Ttl | None:
    """None with ENABLE_TTL=false. Else the role is found, or made. Raises TtlUnavailable, SettingsError."""
    if not settings.enable_ttl:
        return None
    return Ttl(cloud, await find_role(cloud, settings), settings.default_ttl_minutes * 60.0)


async def remove_schedule(cloud: Cloud, instance_id: str) -> None:
    """Idempotent. Raises CloudRefused."""
    try:
        await cloud.call("scheduler", "delete_schedule", within=CALL, Name=schedule_name(instance_id))
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") != "ResourceNotFoundException":
            raise
