"""A driver for EC2 in a test's own body, in an account that is shared by the tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aws_faults import FaultyAccount
from aws_guests import settings_in

from envd.drivers.aws import AwsDriver
from envd.drivers.base import InstanceSpec, Report
from envd.settings import Settings

SCREEN = (1920, 1080)


class Heard(Report):
    """What a boot told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.words: list[str] = []
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def progress(self, words: str) -> None:
        self.words.append(words)

    def note(self, words: str) -> None:
        self.notes.append(words)


def spec(name: str, **more: Any) -> InstanceSpec:
    return InstanceSpec(name, SCREEN, **more)


@asynccontextmanager
async def driver_in(aws: FaultyAccount, daemon_id: str = "test", **settings: Any) -> AsyncIterator[AwsDriver]:
    """Opened; at the end all that it has is destroyed, and nothing goes wrong any more."""
    loaded = Settings(**{**settings_in(aws), "state_dir": Path(), **settings})
    async with AwsDriver(loaded, daemon_id) as driver:
        try:
            yield driver
        finally:
            aws.settled()
            aws.faults.hidden_s = aws.faults.pending_s = 0.0
            for name in await driver.list():
                await driver.destroy(name)


def instances_of(aws: FaultyAccount) -> dict[str, dict[str, Any]]:
    """Those that are not terminated, by their names."""
    pages = aws.client("ec2").describe_instances()["Reservations"]
    return {
        {tag["Key"]: tag["Value"] for tag in one["Tags"]}["Name"]: one
        for page in pages
        for one in page["Instances"]
        if one["State"]["Name"] != "terminated"
    }
