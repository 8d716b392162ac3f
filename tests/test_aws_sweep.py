"""What is found by tags, what is ended of it, and what is left alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aws_cloud import REGION
from aws_faults import FaultyAccount

from envd.drivers.aws import sweep as sweep_module
from envd.drivers.aws import tags
from envd.drivers.aws.cloud import Cloud, open_cloud
from envd.drivers.aws.sweep import GRACE, Found, find_instances, orphan_schedules, sweep, terminate
from envd.drivers.aws.ttl import Ttl
from envd.drivers.base import InstanceSpec
from envd.errors import CloudRefused, CredentialsExpired, NotAuthorized, Throttled

ROLE = "arn:aws:iam::123456789012:role/envd-scheduler-terminate"
ABSENT = "i-0123456789abcdef0"
OLD = GRACE + 60
OURS, THEIRS = "daemon-a", "daemon-b"


@pytest.fixture
def aws(account: FaultyAccount) -> Iterator[FaultyAccount]:
    """Without instances and schedules, and nothing was called yet."""
    account.faults.heard.clear()
    yield account
    account.settled()
    if running := instances(account):
        account.client("ec2").terminate_instances(InstanceIds=list(running))
    for name in schedules(account):
        account.client("scheduler").delete_schedule(Name=name)


@pytest.fixture
async def cloud(aws: FaultyAccount) -> AsyncIterator[Cloud]:
    async with open_cloud(REGION) as opened:
        yield opened


def launch(aws: FaultyAccount, desktop: str, daemon: str = OURS, *, age: float = OLD, ttl: float | None = None) -> str:
    """As a daemon does, `age` seconds ago."""
    at = time.time() - age
    spec = InstanceSpec(id=desktop, screen=(1920, 1080), job_id="job-1", env=3)
    return run(aws, tags.tags_of(spec, daemon, "me", at, ttl))


def run(aws: FaultyAccount, told: dict[str, str]) -> str:
    ran = aws.client("ec2").run_instances(
        ImageId=aws.ami,
        InstanceType="t3.xlarge",
        SubnetId=aws.subnets[0],
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags.as_list(told)}] if told else [],
    )
    return str(ran["Instances"][0]["InstanceId"])


def instances(aws: FaultyAccount) -> dict[str, str]:
    """Of those that are not terminated, by id: what state they are in."""
    found = aws.client("ec2").describe_instances(Filters=tags.alive())["Reservations"]
    return {each["InstanceId"]: each["State"]["Name"] for some in found for each in some["Instances"]}


def schedules(aws: FaultyAccount) -> set[str]:
    return {each["Name"] for each in aws.client("scheduler").list_schedules()["Schedules"]}


# -- What is found -----------------------------------------------------------------------------------------------------


async def test_an_instance_is_told_with_whose_it_is_its_age_and_its_cost(aws: FaultyAccount, cloud: Cloud) -> None:
    now = time.time()
    launched = launch(aws, "desktop-1", age=5400, ttl=now + 600)
    await Ttl(cloud, ROLE, 600).begin(launched)
    (found,) = await find_instances(cloud, OURS, {"t3.xlarge": 0.2})
    assert (found.instance_id, found.desktop_id, found.daemon_id) == (launched, "desktop-1", OURS)
    assert (found.env, found.job, found.owner) == (3, "job-1", "me")
    assert (found.state, found.type) == ("running", "t3.xlarge")
    assert found.age_s == pytest.approx(5400, abs=60)
    assert found.launched_at == pytest.approx(now - 5400, abs=2)
    assert found.expires_at == pytest.approx(now + 600, abs=2)
    assert found.cost_usd == pytest.approx(0.3, abs=0.01)
    assert found.schedule is True


async def test_what_is_not_known_is_none(aws: FaultyAccount, cloud: Cloud) -> None:
    odd = {tags.ENV: "eleven", tags.CREATED: "yesterday", tags.EXPIRES: "soon"}
    run(aws, {tags.DAEMON: OURS, tags.DESKTOP: "desktop-1", **odd})
    (found,) = await find_instances(cloud, OURS, {})
    assert (found.env, found.expires_at, found.cost_usd, found.schedule) == (None, None, None, False)
    assert found.launched_at == pytest.approx(time.time(), abs=60)


async def test_a_daemon_finds_its_own_and_everybody_finds_all_of_envd(aws: FaultyAccount, cloud: Cloud) -> None:
    younger, older = launch(aws, "desktop-1", age=10), launch(aws, "desktop-2")
    others = launch(aws, "desktop-3", THEIRS, age=OLD + 60)
    nobodys = run(aws, {"Name": "a web server"})
    gone = launch(aws, "desktop-4")
    aws.client("ec2").terminate_instances(InstanceIds=[gone])
    assert [one.instance_id for one in await find_instances(cloud, OURS, {})] == [older, younger]
    assert [one.instance_id for one in await find_instances(cloud, None, {})] == [others, older, younger]
    assert nobodys in instances(aws)


async def test_without_the_right_to_look_at_schedules_instances_are_found_all_the_same(
    aws: FaultyAccount, cloud: Cloud
) -> None:
    launch(aws, "desktop-1")
    aws.fail("scheduler:ListSchedules", "AccessDeniedException", status=403)
    (found,) = await find_instances(cloud, OURS, {})
    assert found.schedule is None


# -- The sweep ---------------------------------------------------------------------------------------------------------


async def swept(cloud: Cloud, *known: str) -> list[Found]:
    return await sweep(cloud, OURS, known)


async def test_a_sweep_ends_what_nobody_knows_and_its_schedule(aws: FaultyAccount, cloud: Cloud) -> None:
    stray = launch(aws, "desktop-1")
    await Ttl(cloud, ROLE, 600).begin(stray)
    (ended,) = await swept(cloud, "desktop-2")
    assert (ended.instance_id, ended.desktop_id) == (stray, "desktop-1")
    assert instances(aws) == {}
    assert schedules(aws) == set()
    assert await swept(cloud, "desktop-2") == []


@pytest.mark.parametrize(
    ("launched", "known"),
    [
        pytest.param({"desktop": "desktop-1"}, "desktop-1", id="known by its desktop"),
        pytest.param({"desktop": "desktop-1"}, "the instance", id="known by itself"),
        pytest.param({"desktop": "desktop-1", "age": GRACE - 30}, "", id="young"),
        pytest.param({"desktop": "desktop-1", "age": -90}, "", id="launched in the future"),
        pytest.param({"desktop": "desktop-1", "daemon": THEIRS}, "", id="of another daemon"),
    ],
)
async def test_a_sweep_leaves_alone(aws: FaultyAccount, cloud: Cloud, launched: dict[str, Any], known: str) -> None:
    kept = launch(aws, **launched)
    await Ttl(cloud, ROLE, 600).begin(kept)
    assert await swept(cloud, kept if known == "the instance" else known) == []
    assert instances(aws) == {kept: "running"}
    assert schedules(aws) == {tags.schedule_name(kept)}


async def test_a_sweep_leaves_what_has_no_tags_alone(aws: FaultyAccount, cloud: Cloud) -> None:
    kept = run(aws, {})
    assert await swept(cloud) == []
    assert list(instances(aws)) == [kept]


async def test_a_stopped_instance_that_nobody_knows_is_ended(aws: FaultyAccount, cloud: Cloud) -> None:
    stray = launch(aws, "desktop-1")
    aws.client("ec2").stop_instances(InstanceIds=[stray])
    (ended,) = await swept(cloud)
    assert (ended.instance_id, ended.state) == (stray, "stopped")
    assert instances(aws) == {}


async def test_an_instance_without_a_desktops_name_is_ended(aws: FaultyAccount, cloud: Cloud) -> None:
    run(aws, {tags.DAEMON: OURS, tags.CREATED: tags.in_utc(time.time() - OLD)})
    assert [one.desktop_id for one in await swept(cloud, "desktop-1")] == [""]


async def test_what_becomes_known_while_a_sweep_asks_is_left_alone(aws: FaultyAccount, cloud: Cloud) -> None:
    """As when an instance is given to another desktop: the sweep still finds it under the old one's name."""
    kept = launch(aws, "desktop-1")
    known: set[str] = {"desktop-1"}
    held = aws.hold("ec2:DescribeInstances", "after")
    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(sweep(cloud, OURS, known))
        await held.reached()
        known.clear()
        known.update({"desktop-2", kept})
        held.release()
    assert sweeping.result() == []
    assert list(instances(aws)) == [kept]


async def test_a_sweep_that_is_throttled_ends_nothing(aws: FaultyAccount, cloud: Cloud) -> None:
    kept = launch(aws, "desktop-1")
    await Ttl(cloud, ROLE, 600).begin(ABSENT)
    aws.fail("ec2:DescribeInstances", "RequestLimitExceeded", "Request limit exceeded.", status=503, times=None)
    with pytest.raises(Throttled):
        await swept(cloud)
    with pytest.raises(Throttled):
        await orphan_schedules(cloud, grace=0)
    assert list(instances(aws)) == [kept]
    assert schedules(aws) == {tags.schedule_name(ABSENT)}


async def test_a_sweep_without_the_right_to_schedules_still_ends_instances(aws: FaultyAccount, cloud: Cloud) -> None:
    launch(aws, "desktop-1")
    for action in ("scheduler:ListSchedules", "scheduler:DeleteSchedule"):
        aws.fail(action, "AccessDeniedException", status=403, times=None)
    assert len(await swept(cloud)) == 1
    assert instances(aws) == {}
    assert await orphan_schedules(cloud, grace=0) == []


# -- Schedules without an instance -------------------------------------------------------------------------------------


async def test_a_schedule_is_an_orphan_when_its_instance_is_gone(aws: FaultyAccount, cloud: Cloud) -> None:
    ttl = Ttl(cloud, ROLE, 600)
    alive, stopped, ended = (launch(aws, f"desktop-{name}", THEIRS) for name in "abc")
    for instance_id in (alive, stopped, ended, ABSENT):
        await ttl.begin(instance_id)
    ec2 = aws.client("ec2")
    ec2.stop_instances(InstanceIds=[stopped])
    ec2.terminate_instances(InstanceIds=[ended])
    somebodys = aws.client("scheduler").get_schedule(Name=tags.schedule_name(alive))["Target"]
    aws.client("scheduler").create_schedule(
        Name="nightly", ScheduleExpression="rate(1 day)", FlexibleTimeWindow={"Mode": "OFF"}, Target=somebodys
    )
    assert set(await orphan_schedules(cloud, grace=0)) == {tags.schedule_name(ended), tags.schedule_name(ABSENT)}
    assert await orphan_schedules(cloud) == []  # they are young
    await sweep(cloud, OURS, (), grace=0)
    assert schedules(aws) == {tags.schedule_name(alive), tags.schedule_name(stopped), "nightly"}


async def test_many_schedules_and_instances_are_seen_over_several_pages(
    aws: FaultyAccount, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "_AT_ONCE", 2)
    launched = [launch(aws, f"desktop-{number}") for number in range(5)]
    ttl = Ttl(cloud, ROLE, 600)
    for instance_id in (*launched, ABSENT):
        await ttl.begin(instance_id)
    assert await orphan_schedules(cloud, grace=0) == [tags.schedule_name(ABSENT)]
    assert len(await swept(cloud)) == 5
    assert instances(aws) == {}
    assert schedules(aws) == {tags.schedule_name(ABSENT)}


# -- Ending several ----------------------------------------------------------------------------------------------------


async def test_what_is_gone_already_does_not_keep_the_others(aws: FaultyAccount, cloud: Cloud) -> None:
    launched = [launch(aws, f"desktop-{number}") for number in range(2)]
    await terminate(cloud, [launched[0], ABSENT, launched[1], launched[0]])
    assert instances(aws) == {}
    await terminate(cloud, [])
    await terminate(cloud, [ABSENT])


async def test_one_that_is_protected_does_not_keep_the_others_and_is_told(aws: FaultyAccount, cloud: Cloud) -> None:
    guarded, plain = launch(aws, "desktop-1"), launch(aws, "desktop-2")
    aws.client("ec2").modify_instance_attribute(InstanceId=guarded, DisableApiTermination={"Value": True})
    ttl = Ttl(cloud, ROLE, 600)
    for instance_id in (guarded, plain):
        await ttl.begin(instance_id)
    with pytest.raises(CloudRefused, match=guarded):
        await terminate(cloud, [guarded, plain])
    assert list(instances(aws)) == [guarded]
    assert schedules(aws) == {tags.schedule_name(guarded)}
    aws.client("ec2").modify_instance_attribute(InstanceId=guarded, DisableApiTermination={"Value": False})


async def test_a_refusal_that_is_about_all_of_them_is_not_answered_with_one_call_for_each(
    aws: FaultyAccount, cloud: Cloud
) -> None:
    launched = [launch(aws, f"desktop-{number}") for number in range(3)]
    aws.fail("ec2:TerminateInstances", "RequestExpired", "Request has expired.", times=None)
    with pytest.raises(CredentialsExpired):
        await terminate(cloud, launched)
    assert aws.count("ec2:TerminateInstances") == 1


async def test_one_that_may_not_be_ended_does_not_keep_the_others(aws: FaultyAccount, cloud: Cloud) -> None:
    launched = [launch(aws, f"desktop-{number}") for number in range(2)]
    aws.fail("ec2:TerminateInstances", "UnauthorizedOperation", "Not that one.", status=403, times=2)
    with pytest.raises(NotAuthorized):
        await terminate(cloud, launched)
    assert list(instances(aws)) == [launched[0]]
