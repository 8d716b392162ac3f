"""How our instances and schedules are named, and known again by whoever finds them.

Tags are given in the call that launches, never afterwards: an instance without them would be nobody's. An instance is
found by `DESKTOP`, which the caller chose before; a daemon's instances by `DAEMON`; everybody's by `DAEMON` being
there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..base import InstanceSpec

PREFIX = "envd:"
DAEMON, DESKTOP, ENV, JOB, OWNER, CREATED, EXPIRES = (
    f"{PREFIX}{word}" for word in ("daemon", "desktop", "env", "job", "owner", "created-at", "expires-at")
)
"""`CREATED` and `EXPIRES` in UTC, as 2026-11-23T02:10:00Z."""
RENEWAL = f"{PREFIX}renewal"
"""Of an instance that was given to another desktop: `RENEWING` until its root volume is replaced, then `RENEWED`."""
RENEWING, RENEWED = "under way", "done"

Filters = list[dict[str, Any]]

ALIVE = ("pending", "running", "shutting-down", "stopping", "stopped")
"""States of an instance that still is one: all but `terminated`."""


def tags_of(spec: InstanceSpec, daemon_id: str, owner: str, now: float, expires: float | None) -> dict[str, str]:
    """Of a new instance, its volumes and its network interface. `Name` is what the console shows. `now` and `expires`
    are Unix seconds; without a TTL nothing expires."""
    tags = {"Name": spec.id, DAEMON: daemon_id, DESKTOP: spec.id, OWNER: owner, CREATED: in_utc(now)}
    if spec.env is not None:
        tags[ENV] = str(spec.env)
    if spec.job_id:
        tags[JOB] = spec.job_id
    if expires is not None:
        tags[EXPIRES] = in_utc(expires)
    return tags


def as_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """As EC2 takes them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def as_dict(tags: list[dict[str, str]] | None) -> dict[str, str]:
    """As EC2 gives them."""
    return {tag["Key"]: tag["Value"] for tag in tags or ()}


def of_daemon(daemon_id: str) -> Filters:
    return [{"Name": f"tag:{DAEMON}", "Values": [daemon_id]}, *alive()]


def of_desktop(desktop_id: str) -> Filters:
    return [{"Name": f"tag:{DESKTOP}", "Values": [desktop_id]}, *alive()]


def of_anybody() -> Filters:
    return [{"Name": "tag-key", "Values": [DAEMON]}, *alive()]


def alive() -> Filters:
    return [{"Name": "instance-state-name", "Values": list(ALIVE)}]


def schedule_name(instance_id: str) -> str:
    """Of the schedule that ends EC2's instance `instance_id`: one for each, whoever makes it."""
    return f"envd-ttl-{instance_id}"


def in_utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
