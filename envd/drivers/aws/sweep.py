"""What an earlier life or a failure left running, found by its tags, and its end."""

from __future__ import annotations

import calendar
import time
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from ...errors import CloudRefused, NotAuthorized
from . import tags
from .cloud import Cloud
from .ttl import remove_schedule

logger = structlog.get_logger(__name__)

GRACE = 120.0
"""Seconds from its launch in which an instance or a schedule is left alone: what belongs to it may not show yet."""
_AT_ONCE = 100
"""Instances in one call."""
_PREFIX = tags.schedule_name("")
_ONE_SPOILS_ALL = (
    "InvalidInstanceID.NotFound",
    "InvalidInstanceID.Malformed",
    "OperationNotPermitted",
    "UnauthorizedOperation",
)
"""Refusals to end several that may be about one: that is gone, is protected, or has no tag that a policy asks for."""


@dataclass(frozen=True, slots=True)
class Found:
    """An instance of envd's that exists, as its tags tell. Times are Unix seconds.

    launched_at  as its daemon tagged it; starting a stopped one does not change it.
    expires_at   when its daemon last meant it to end; None without a TTL.
    cost_usd     hours since the launch times the type's price: approximate, and too much for one that was stopped
                 meanwhile, since for how long is not told. None when the price is not known.
    schedule     whether a schedule at AWS ends it; None when that was not asked, or may not be.
    """

    instance_id: str
    desktop_id: str
    daemon_id: str
    env: int | None
    job: str
    owner: str
    state: str
    type: str
    launched_at: float
    expires_at: float | None
    age_s: float
    cost_usd: float | None
    schedule: bool | None


async def find_instances(cloud: Cloud, daemon_id: str | None, prices: Mapping[str, float]) -> list[Found]:
    """All of one daemon, or of all daemons, that are not terminated; the oldest first. Raises CloudRefused."""
    instances = await _described(cloud, tags.of_anybody() if daemon_id is None else tags.of_daemon(daemon_id))
    try:
        # After the instances: one that was launched in between would seem to have none.
        scheduled: Collection[str] | None = {name for name, _ in await _schedules(cloud)}
    except NotAuthorized:
        scheduled = None
    return _found(instances, prices, scheduled)


async def sweep(cloud: Cloud, daemon_id: str, known: Container[str], *, grace: float = GRACE) -> list[Found]:
    """End this daemon's instances that nobody knows, and return them; and remove schedules without an instance.

    `known` holds ids of desktops and of instances. It is looked into after AWS was asked, so it should be live: an
    instance that was given to another desktop is found under the old id for some seconds. Those younger than `grace`
    seconds are left alone. Raises CloudRefused; if it could not be seen what there is, nothing was done.
    """
    instances = await _described(cloud, tags.of_daemon(daemon_id))
    strays = [
        one
        for one in _found(instances, {}, None)
        if one.age_s >= grace
        and one.state != "shutting-down"
        and one.desktop_id not in known
        and one.instance_id not in known
    ]
    try:
        await terminate(cloud, [one.instance_id for one in strays])
    finally:
        await _remove_schedules(cloud, grace)
    return strays


async def terminate(cloud: Cloud, instance_ids: Iterable[str]) -> None:
    """End them, and take their schedules away. Returns when AWS has agreed, not when they are gone. Idempotent.

    Raises CloudRefused, once all that could be ended were.
    """
    refused: CloudRefused | None = None
    ids = list(dict.fromkeys(instance_ids))
    for first in range(0, len(ids), _AT_ONCE):
        some = ids[first : first + _AT_ONCE]
        try:
            await _end(cloud, some)
        except CloudRefused as refusal:
            if len(some) == 1 or refusal.facts.get("aws_code") not in _ONE_SPOILS_ALL:
                refused = refusal
                continue
            for one in some:
                try:
                    await _end(cloud, [one])
                except CloudRefused as of_one:
                    refused = of_one
    if refused is not None:
        raise refused


async def orphan_schedules(cloud: Cloud, *, grace: float = GRACE) -> list[str]:
    """Names of schedules of envd's, of all daemons, that are older than `grace` seconds and whose instance is gone.
    None without the right to look: who has no TTL needs none. Raises CloudRefused."""
    youngest = time.time() - grace
    try:
        names = [name for name, created_at in await _schedules(cloud) if created_at <= youngest]
    except NotAuthorized:
        return []
    ids = [_instance_of(name) for name in names]
    alive: set[str] = set()
    for first in range(0, len(ids), _AT_ONCE):
        # Asked by filter, those that do not exist are no error.
        one_of = [{"Name": "instance-id", "Values": ids[first : first + _AT_ONCE]}, *tags.alive()]
        alive.update(each["InstanceId"] for each in await _described(cloud, one_of))
    return [name for name in names if _instance_of(name) not in alive]


async def _remove_schedules(cloud: Cloud, grace: float) -> None:
    """The orphans. They would end nothing, and be gone in their time: no reason for a sweep to fail."""
    try:
        for name in await orphan_schedules(cloud, grace=grace):
            await remove_schedule(cloud, _instance_of(name))
    except CloudRefused as refusal:
        logger.warning("schedules without an instance stay until the next sweep", error=str(refusal))


async def _end(cloud: Cloud, instance_ids: Sequence[str]) -> None:
    try:
        await cloud.call("ec2", "terminate_instances", InstanceIds=list(instance_ids))
    except CloudRefused as refusal:
        if len(instance_ids) > 1 or refusal.facts.get("aws_code") != "InvalidInstanceID.NotFound":
            raise
    try:
        for instance_id in instance_ids:
            await remove_schedule(cloud, instance_id)
    except CloudRefused as refusal:
        logger.debug("schedules of ended instances stay until the next sweep", error=str(refusal))


async def _described(cloud: Cloud, filters: tags.Filters) -> list[dict[str, Any]]:
    pages = await cloud.pages("ec2", "describe_instances", "Reservations", Filters=filters, MaxResults=1000)
    return [instance for reservation in pages for instance in reservation["Instances"]]


async def _schedules(cloud: Cloud) -> list[tuple[str, float]]:
    """Name, and when it was made in Unix seconds, of each of envd's."""
    asked = {"GroupName": "default", "NamePrefix": _PREFIX, "MaxResults": 100}
    found = await cloud.pages("scheduler", "list_schedules", "Schedules", **asked)
    return [(each["Name"], each["CreationDate"].timestamp()) for each in found]


def _instance_of(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _found(
    instances: Iterable[dict[str, Any]], prices: Mapping[str, float], scheduled: Collection[str] | None
) -> list[Found]:
    now = time.time()
    return sorted((_one(each, prices, scheduled, now) for each in instances), key=lambda one: one.launched_at)


def _one(instance: dict[str, Any], prices: Mapping[str, float], scheduled: Collection[str] | None, now: float) -> Found:
    """Tags can be changed by anybody with the right to: what cannot be read is as if it were not there."""
    instance_id, told = instance["InstanceId"], tags.as_dict(instance.get("Tags"))
    launched_at = _unix(told.get(tags.CREATED, "")) or instance["LaunchTime"].timestamp()
    age, price = max(0.0, now - launched_at), prices.get(instance["InstanceType"])
    env = told.get(tags.ENV, "")
    return Found(
        instance_id=instance_id,
        desktop_id=told.get(tags.DESKTOP, ""),
        daemon_id=told.get(tags.DAEMON, ""),
        env=int(env) if env.isdecimal() else None,
        job=told.get(tags.JOB, ""),
        owner=told.get(tags.OWNER, ""),
        state=instance["State"]["Name"],
        type=instance["InstanceType"],
        launched_at=launched_at,
        expires_at=_unix(told.get(tags.EXPIRES, "")),
        age_s=age,
        cost_usd=None if price is None else age / 3600 * price,
        schedule=None if scheduled is None else tags.schedule_name(instance_id) in scheduled,
    )


def _unix(utc: str) -> float | None:
    """Seconds of what `tags.in_utc` wrote."""
    try:
        return float(calendar.timegm(time.strptime(utc, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None
