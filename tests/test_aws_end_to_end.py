"""The whole way with EC2: a real daemon, moto's server, and sim desktops that are its instances. Nothing stays.

And a daemon that dies by `kill -9` wherever that could lose an instance: its next life takes it over, or ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import aiohttp
import anyio
import pytest
from aws_faults import FaultyAccount, Held, faulty_account
from aws_guests import Guests, guests
from daemon_process import daemon, ended_job, reset, watch

QUICKLY = """
from envd.drivers.aws import boot, desktops, driver, instances, sweep
instances.BUSY, instances.IDLE, boot.LOOKS = 0.05, 0.2, 0.2
driver.TTL_LOOKS, driver.TTL_LEFT = 0.3, 1.0
driver.SWEEPS = 0.5
sweep.sweep.__kwdefaults__["grace"] = {grace}
"""
"""A prelude: what takes minutes takes parts of a second, and an end is put off at every look."""
CLICK = {"actions": ["import pyautogui; pyautogui.click(100, 100)"]}


@pytest.fixture(scope="module")
def inhabited() -> Iterator[tuple[FaultyAccount, Guests]]:
    with faulty_account() as aws, guests(aws) as there:
        yield aws, there


@pytest.fixture
def aws(inhabited: tuple[FaultyAccount, Guests]) -> Iterator[FaultyAccount]:
    """Nothing of it is out of order, and nothing in it when a test begins."""
    found, _ = inhabited
    assert (alive(found), schedules(found)) == ([], {})
    found.faults.heard.clear()
    yield found
    found.settled()
    found.faults.hidden_s = found.faults.pending_s = 0.0


def environment_in(aws: FaultyAccount, **more: str) -> dict[str, str]:
    return {
        **aws.environ,
        "PROVIDER": "aws",
        "AWS_SUBNET_ID": ",".join(aws.subnets),
        "AWS_SECURITY_GROUP_ID": aws.security_group,
        "ENVD_AWS_AMI": aws.ami,
        "ENVD_PREWARM": "0",
        "ENVD_SETTLE_QUIET": "0",
        "ENVD_ACTION_PAUSE": "0",
        "ENVD_LOG_FORMAT": "json",
        **more,
    }


def instances_of(aws: FaultyAccount) -> dict[str, dict[str, Any]]:
    pages = aws.client("ec2").describe_instances()["Reservations"]
    return {one["InstanceId"]: one for page in pages for one in page["Instances"]}


def alive(aws: FaultyAccount) -> list[str]:
    return [name for name, one in instances_of(aws).items() if one["State"]["Name"] != "terminated"]


def schedules(aws: FaultyAccount) -> dict[str, str]:
    """Instance → when it ends."""
    client = aws.client("scheduler")
    found = {}
    for one in client.list_schedules()["Schedules"]:
        with suppress(client.exceptions.ResourceNotFoundException):  # it has just been deleted
            ends = client.get_schedule(Name=one["Name"])["ScheduleExpression"]
            found[one["Name"].removeprefix("envd-ttl-")] = ends
    return found


async def until(fact: Callable[[], Any], seconds: float = 40.0) -> Any:
    """What is true at last."""
    async with asyncio.timeout(seconds):
        while not (found := await anyio.to_thread.run_sync(fact)):  # noqa: ASYNC110 - it is another process's doing
            await asyncio.sleep(0.05)
    return found


async def played(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The job of a reset that succeeded."""
    job = await ended_job(session, url, (await reset(session, url))["id"])
    assert job["state"] == "succeeded", job["error"]
    return job


async def test_from_a_launch_to_nothing_left(aws: FaultyAccount, tmp_path: Path) -> None:
    opened = asyncio.Event()
    async with daemon(tmp_path / "state", prelude=QUICKLY.format(grace=120), env=environment_in(aws)) as (served, http):
        news = asyncio.create_task(watch(http, served.url, opened))
        await opened.wait()
        await played(http, served.url)
        [first] = alive(aws)
        tags = {tag["Key"]: tag["Value"] for tag in instances_of(aws)[first]["Tags"]}
        async with http.post(f"{served.url}/v1/envs/0/step", json=CLICK) as answer:
            assert answer.status == 200, await answer.text()
        ends = schedules(aws)
        assert ends.keys() == {first}
        await until(lambda: schedules(aws).get(first, "") > ends[first])

        await played(http, served.url)
        await until(lambda: alive(aws) != [first] and len(alive(aws)) == 1)
        [second] = alive(aws)
        await until(lambda: schedules(aws).keys() == {second})
        served.signal(SIGTERM)
        assert await served.ended(60) == 0
        told = (await news).decode()
    assert (alive(aws), schedules(aws)) == ([], {})
    assert (tags["envd:env"], tags["envd:owner"]) == ("0", "moto")
    assert {"Name", "envd:daemon", "envd:desktop", "envd:job", "envd:created-at", "envd:expires-at"} < tags.keys()
    for words in ("launching a t3.xlarge", f"{first} is pending", f"{first} runs, at 127.30.", "status checks: passed"):
        assert words in told


async def test_the_new_instance_is_launched_before_the_old_one_ends(aws: FaultyAccount, tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", prelude=QUICKLY.format(grace=120), env=environment_in(aws)) as (served, http):
        await played(http, served.url)
        await played(http, served.url)
        await until(lambda: len(alive(aws)) == 1)
        served.signal(SIGTERM)
        await served.ended(60)
    heard = [call.action for call in aws.faults.heard if call.action in ("ec2:RunInstances", "ec2:TerminateInstances")]
    assert heard[:3] == ["ec2:RunInstances", "ec2:RunInstances", "ec2:TerminateInstances"]


async def test_a_reset_may_keep_the_instance_and_replace_its_disk(aws: FaultyAccount, tmp_path: Path) -> None:
    env = environment_in(aws, ENVD_AWS_RESET="replace-root")
    async with daemon(tmp_path / "state", prelude=QUICKLY.format(grace=120), env=env) as (served, http):
        await played(http, served.url)
        [first] = alive(aws)
        await played(http, served.url)
        assert (alive(aws), aws.faults.replaced[first]) == ([first], 1)
        served.signal(SIGTERM)
        await served.ended(60)
    assert (alive(aws), schedules(aws), aws.count("ec2:RunInstances")) == ([], {}, 1)


async def test_a_spare_sleeps_until_it_is_wanted(aws: FaultyAccount, tmp_path: Path) -> None:
    env = environment_in(aws, ENVD_SPARES="1", ENVD_AWS_SPARES_STOPPED="1")
    async with daemon(tmp_path / "state", prelude=QUICKLY.format(grace=120), env=env) as (served, http):
        await until(lambda: [one["State"]["Name"] for one in instances_of(aws).values()].count("stopped") == 1)
        [spare] = [name for name, one in instances_of(aws).items() if one["State"]["Name"] == "stopped"]
        await played(http, served.url)
        assert "ec2:StartInstances" in aws.calls
        assert instances_of(aws)[spare]["State"]["Name"] == "running"
        served.signal(SIGTERM)
        await served.ended(60)
    assert (alive(aws), schedules(aws)) == ([], {})


@dataclass(frozen=True)
class Point:
    """Where a daemon dies: while AWS holds its call of `action`, `before` or `after` doing it. `resets` ran before."""

    action: str
    when: str
    resets: int = 0
    hidden_s: float = 0.0
    pending_s: float = 0.0
    instances: int = 1
    """Those that there are then."""

    async def reach(self, aws: FaultyAccount, served: Any, http: aiohttp.ClientSession) -> Held:
        for _ in range(self.resets):
            await played(http, served.url)
        aws.faults.hidden_s, aws.faults.pending_s = self.hidden_s, self.pending_s
        held = aws.hold(self.action, "before" if self.when == "before" else "after")
        await reset(http, served.url)
        await held.reached()
        return held


POINTS = [
    pytest.param(Point("ec2:RunInstances", "before", instances=0), id="before the launch"),
    pytest.param(Point("ec2:RunInstances", "after"), id="launched, not told"),
    pytest.param(Point("ec2:RunInstances", "after", hidden_s=12), id="launched, and not yet to be seen"),
    pytest.param(Point("scheduler:CreateSchedule", "before"), id="told, before its schedule"),
    pytest.param(Point("scheduler:CreateSchedule", "after"), id="scheduled, not told"),
    pytest.param(Point("ec2:DescribeInstanceStatus", "before"), id="running, not ready"),
    pytest.param(Point("ec2:RunInstances", "before", resets=1), id="in use, before the next launch"),
    pytest.param(Point("ec2:RunInstances", "after", resets=1, instances=2), id="in use, and the next launched"),
    pytest.param(Point("ec2:TerminateInstances", "before", resets=1, instances=2), id="before the old one's end"),
    pytest.param(Point("ec2:TerminateInstances", "after", resets=1), id="after the old one's end"),
    pytest.param(Point("scheduler:DeleteSchedule", "before", resets=1), id="before its schedule is deleted"),
]


@pytest.mark.parametrize("point", POINTS)
async def test_a_killed_daemon_loses_no_instance_and_no_job(point: Point, aws: FaultyAccount, tmp_path: Path) -> None:
    """What it left is taken over or ended, and its job goes on: to one instance, the env's, and one schedule."""
    prelude, env = QUICKLY.format(grace=1), environment_in(aws)
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (first, http):
        held = await point.reach(aws, first, http)
        first.signal(SIGKILL)
        assert await first.ended() == -SIGKILL
        held.drop()
    assert len(alive(aws)) == point.instances
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (second, http):
        async with http.get(f"{second.url}/v1/jobs") as answer:
            jobs = (await answer.json())["jobs"]
        assert len(jobs) == point.resets + 1
        assert (await ended_job(http, second.url, jobs[0]["id"]))["state"] == "succeeded"
        await until(lambda: len(alive(aws)) == 1)
        await until(lambda: len(schedules(aws)) == 1)
        second.signal(SIGTERM)
        assert await second.ended(60) == 0
    assert (alive(aws), schedules(aws)) == ([], {})


async def test_an_instance_that_was_pending_when_its_daemon_was_killed_is_the_next_lifes(
    aws: FaultyAccount, tmp_path: Path
) -> None:
    prelude, env = QUICKLY.format(grace=1), environment_in(aws)
    aws.faults.pending_s = 3600
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (first, http):
        job = await reset(http, first.url)
        await until(lambda: schedules(aws))
        seen = aws.count("ec2:DescribeInstances")
        await until(lambda: aws.count("ec2:DescribeInstances") > seen + 2)
        first.signal(SIGKILL)
        await first.ended()
    [pending] = alive(aws)
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (second, http):
        assert alive(aws) == [pending]
        aws.faults.pending_s = 0.0
        assert (await ended_job(http, second.url, job["id"]))["state"] == "succeeded"
        assert alive(aws) == [pending]
        second.signal(SIGTERM)
        await second.ended(60)
    assert (alive(aws), schedules(aws)) == ([], {})


async def test_an_episode_on_ec2_goes_on_after_a_kill(aws: FaultyAccount, tmp_path: Path) -> None:
    prelude, env = QUICKLY.format(grace=1), environment_in(aws)
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (first, http):
        await played(http, first.url)
        first.signal(SIGKILL)
        await first.ended()
    before = alive(aws)
    async with daemon(tmp_path / "state", prelude=prelude, env=env) as (second, http):
        async with http.post(f"{second.url}/v1/envs/0/step", json=CLICK) as answer:
            assert (answer.status, (await answer.json())["actions"][0]["outcome"]) == (200, "ok")
        assert alive(aws) == before
        second.signal(SIGTERM)
        await second.ended(60)
    assert (alive(aws), schedules(aws)) == ([], {})
