"""What an earlier life of the daemon made is taken over by its next: the promise of `Driver.adopt`, held against the
drivers whose instances outlive their daemon, and what each of them refuses to take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from aws_driving import Heard, driver_in, instances_of, spec
from aws_faults import FaultyAccount, said

from envd.drivers.aws import AwsDriver, boot, desktops, driver, instances, roots, sweep
from envd.drivers.base import Report
from envd.errors import CloudRefused

# -- instances of EC2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def aws(account: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> FaultyAccount:
    """What takes seconds takes parts of one."""
    account.faults.heard.clear()
    account.forget_tokens()
    monkeypatch.setattr(instances, "BUSY", 0.05)
    monkeypatch.setattr(instances, "IDLE", 0.1)
    monkeypatch.setattr(boot, "LOOKS", 0.1)
    monkeypatch.setattr(desktops, "LOOKS", 0.05)
    monkeypatch.setattr(roots, "LOOKS", 0.05)
    return account


@asynccontextmanager
async def next_life(
    aws: FaultyAccount, left: Callable[[AwsDriver], Awaitable[Any]], **settings: Any
) -> AsyncIterator[AwsDriver]:
    """A driver whose earlier life did `left` and destroyed nothing."""
    async with driver_in(aws, **settings) as later:
        async with AwsDriver(later._settings, "test") as earlier:
            await left(earlier)
        yield later


async def makes(earlier: AwsDriver) -> None:
    await earlier.create(spec("a-1"), Report())


async def one(aws: FaultyAccount, name: str = "a-1") -> dict[str, Any]:
    return (await anyio.to_thread.run_sync(instances_of, aws))[name]


def schedules(aws: FaultyAccount) -> set[str]:
    told = aws.client("scheduler").list_schedules()["Schedules"]
    return {each["Name"].removeprefix("envd-ttl-") for each in told}


async def is_waiting(waiting: asyncio.Task[Any]) -> bool:
    """Still, after it had the time to look."""
    await asyncio.wait([waiting], timeout=0.5)
    return not waiting.done()


async def test_an_instance_is_taken_over_with_its_end(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        before = await one(aws)
        made = await later.adopt("a-1", Report())
        assert made is not None
        assert made.endpoints.guest == f"http://{before['PrivateIpAddress']}:5000"
        waiting = asyncio.create_task(later.wait("a-1"))
        assert await is_waiting(waiting)
        assert isinstance(await later.log_tail("a-1"), tuple)
        assert aws.count("ec2:GetConsoleOutput") >= 1
        desktop = later._opened.known["a-1"]
        first = desktop.ends
        await later._opened.prolong(1e9)
        assert first is not None
        assert desktop.ends is not None
        assert desktop.ends >= first
        assert await later.list() == {"a-1"}
        await later.destroy("a-1")
        assert before["InstanceId"] in (await waiting).reason
        assert await later.list() == frozenset()
        assert before["InstanceId"] not in await anyio.to_thread.run_sync(schedules, aws)


async def test_what_is_pending_is_waited_for(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.rewrite("ec2:DescribeInstances", said("pending", 0))
        heard = Heard()
        adopting = asyncio.create_task(later.adopt("a-1", heard))
        await later._opened._instances.fresh()
        assert await is_waiting(adopting)
        aws.settled()
        assert await adopting is not None
        assert heard.phases == ["pending", "running"]


async def test_an_instance_that_was_killed_before_its_schedule_was_made_gets_one(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        name = (await one(aws))["InstanceId"]
        await anyio.to_thread.run_sync(lambda: aws.client("scheduler").delete_schedule(Name=f"envd-ttl-{name}"))
        assert await later.adopt("a-1", Report()) is not None
        assert name in await anyio.to_thread.run_sync(schedules, aws)


async def test_an_instance_whose_end_cannot_be_scheduled_is_not_taken(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.fail("scheduler:UpdateSchedule", "AccessDeniedException", status=403, times=None)
        heard = Heard()
        assert await later.adopt("a-1", heard) is None
        assert "cannot be scheduled" in heard.notes[0]


async def test_an_instance_that_aws_will_end_is_not_taken_where_there_is_no_ttl(aws: FaultyAccount) -> None:
    async with driver_in(aws) as earlier:
        await makes(earlier)
        async with AwsDriver(earlier._settings.model_copy(update={"enable_ttl": False}), "test") as later:
            heard = Heard()
            assert await later.adopt("a-1", heard) is None
        assert "launched with a TTL" in heard.notes[0]


async def parks(earlier: AwsDriver) -> None:
    await makes(earlier)
    await earlier.park("a-1")


async def has_two(earlier: AwsDriver) -> None:
    """As two launches of one desktop would be."""
    await makes(earlier)
    await earlier.create(spec("a-2"), Report())
    other = earlier._opened.known["a-2"].instance_id
    tags = [{"Key": "envd:desktop", "Value": "a-1"}]
    await earlier._cloud.call("ec2", "create_tags", Resources=[other], Tags=tags)


async def ends(earlier: AwsDriver) -> None:
    """Without having been told to by its daemon."""
    await makes(earlier)
    name = earlier._opened.known["a-1"].instance_id
    await earlier._cloud.call("ec2", "terminate_instances", InstanceIds=[name])


async def makes_nothing(earlier: AwsDriver) -> None:
    pass


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(makes_nothing, id="never made"),
        pytest.param(parks, id="parked"),
        pytest.param(has_two, id="two of it"),
        pytest.param(ends, id="terminated"),
    ],
)
async def test_what_is_not_taken_is_gone_when_it_is_destroyed(
    left: Callable[[AwsDriver], Awaitable[None]], aws: FaultyAccount
) -> None:
    async with next_life(aws, left, aws_spares_stopped=True) as later:
        assert await later.adopt("a-1", Report()) is None
        assert "a-1" not in later._opened
        await later.destroy("a-1")
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}


async def test_an_instance_of_another_daemon_is_not_taken(aws: FaultyAccount) -> None:
    async with driver_in(aws, "other") as other, driver_in(aws) as ours:
        await makes(other)
        assert await ours.adopt("a-1", Report()) is None
        await ours.destroy("a-1")
        assert await other.list() == {"a-1"}


async def renews(earlier: AwsDriver) -> None:
    await makes(earlier)
    await earlier.renew("a-1", spec("a-2"), Report())


async def test_a_renewed_instance_is_taken_by_its_new_name(aws: FaultyAccount) -> None:
    async with next_life(aws, renews, aws_reset="replace-root") as later:
        assert await later.adopt("a-1", Report()) is None
        assert await later.adopt("a-2", Report()) is not None


async def test_an_instance_whose_renewal_was_interrupted_is_dirty_and_not_taken(aws: FaultyAccount) -> None:
    async def is_interrupted(earlier: AwsDriver) -> None:
        await makes(earlier)
        held = aws.hold("ec2:CreateReplaceRootVolumeTask", "before")
        renewing = asyncio.create_task(earlier.renew("a-1", spec("a-2"), Report()))
        await held.reached()
        renewing.cancel()
        held.drop()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing

    async with next_life(aws, is_interrupted, aws_reset="replace-root") as later:
        heard = Heard()
        assert await later.adopt("a-2", heard) is None
        assert "may not have been replaced" in heard.notes[0]
        await later.destroy("a-2")
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}


async def test_destroying_it_meanwhile_ends_the_taking_over(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        name = (await one(aws))["InstanceId"]
        held = aws.hold("scheduler:UpdateSchedule", "before")
        adopting = asyncio.create_task(later.adopt("a-1", Report()))
        await held.reached()
        destroying = asyncio.create_task(later.destroy("a-1"))
        await asyncio.sleep(0)
        held.release()
        assert await adopting is None
        await destroying
        assert await anyio.to_thread.run_sync(instances_of, aws) == {}
        assert name not in await anyio.to_thread.run_sync(schedules, aws)


async def test_that_aws_does_not_answer_is_not_taken_for_an_instance_that_is_gone(aws: FaultyAccount) -> None:
    async with next_life(aws, makes) as later:
        aws.fail("ec2:DescribeInstances", "AuthFailure", status=401, times=None)
        with pytest.raises(CloudRefused):
            await later.adopt("a-1", Report())
        aws.settled()
        assert await later.adopt("a-1", Report()) is not None


async def test_no_sweep_comes_before_instances_could_be_taken_over(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens the driver takes `a-1` over after many of EC2's answers; `a-2` is nobody's, and swept later."""

    async def makes_two(earlier: AwsDriver) -> None:
        await makes(earlier)
        await earlier.create(spec("a-2"), Report())

    defaults = sweep.sweep.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "grace", 0.0)
    async with next_life(aws, makes_two) as first:
        monkeypatch.setattr(driver, "SWEEPS", 3.0)
        async with AwsDriver(first._settings, "test") as later, asyncio.timeout(20):
            for _ in range(5):
                await later._opened._instances.fresh()
            assert set(await anyio.to_thread.run_sync(instances_of, aws)) == {"a-1", "a-2"}
            assert await later.adopt("a-1", Report()) is not None
            while set(await anyio.to_thread.run_sync(instances_of, aws)) != {"a-1"}:
                await later._opened._instances.fresh()
