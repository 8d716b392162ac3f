"""The driver for EC2 where things go wrong, or slowly; and what it does beside the drivers' contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from aws_driving import Heard, driver_in, instances_of, spec
from aws_faults import FaultyAccount, said

from envd.drivers.aws import AwsDriver, boot, desktops, driver, instances, roots, sweep
from envd.drivers.base import Report
from envd.errors import (
    BootFailed,
    BudgetExhausted,
    CloudRefused,
    CloudUnreachable,
    CredentialsExpired,
    InfraError,
    InstanceDied,
    InsufficientCapacity,
    StartError,
    TtlUnavailable,
)
from envd.settings import Settings

KMS = ("Client.InternalError", "Client.InternalError: Client error on launch")


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
    monkeypatch.setattr(desktops, "AGAIN", 1.0)
    return account


async def until(fact: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await anyio.to_thread.run_sync(fact):  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.02)


async def states(aws: FaultyAccount) -> dict[str, str]:
    return {name: one["State"]["Name"] for name, one in (await anyio.to_thread.run_sync(instances_of, aws)).items()}


async def test_what_is_paid_is_what_runs(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        before = opened.costs()
        await opened.create(one := spec("paid"), Report())
        during = opened.costs()
        await asyncio.sleep(0)
        await opened.destroy(one.id)
        after = opened.costs()
    assert before is not None
    assert during is not None
    assert after is not None
    assert (before.instances, before.usd_per_hour) == ({}, 0.0)
    assert during.instances == {"t3.xlarge": 1}
    assert during.usd_per_hour == pytest.approx(0.1664, rel=0.5)
    assert (after.instances, after.usd_per_hour) == ({}, 0.0)
    assert after.hours["t3.xlarge"] > 0
    assert after.usd == pytest.approx(after.hours["t3.xlarge"] * during.usd_per_hour)


# -- the start --------------------------------------------------------------------------------------------------


async def test_the_start_says_where_desktops_go_and_who_said_so(
    aws: FaultyAccount, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with driver_in(aws):
        pass
    told = next(record.__dict__ for record in caplog.records if record.message == "aws")
    assert told["region"] == "us-east-1 (set)"
    assert told["subnets"] == f"{aws.subnets[0]}, {aws.subnets[1]} (set)"
    assert told["security_groups"] == f"{aws.security_group} (set)"
    assert (told["account"], told["identity"]) == ("123456789012", "arn:aws:sts::123456789012:user/moto")


@pytest.mark.parametrize(
    ("action", "code", "message", "words"),
    [
        pytest.param("sts:GetCallerIdentity", "ExpiredToken", "x", "have expired. Renew them", id="expired"),
        pytest.param("ec2:DescribeImages", "InvalidAMIID.NotFound", "x", "set ENVD_AWS_AMI", id="no image"),
        pytest.param("ec2:DescribeImages", "UnauthorizedOperation", "x", "may not do ec2:DescribeImages", id="rights"),
        pytest.param("iam:GetRole", "AccessDenied", "x", "ENABLE_TTL=false", id="no role"),
    ],
)
async def test_what_aws_refuses_at_the_start_keeps_the_daemon_from_starting(
    aws: FaultyAccount, action: str, code: str, message: str, words: str
) -> None:
    aws.fail(action, code, message, times=None)
    with pytest.raises(StartError) as caught:
        async with driver_in(aws):
            pass
    aws.settled()
    assert words in str(caught.value)
    assert caught.value.facts["action"]


async def test_without_credentials_the_start_says_how_to_give_some(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StartError, match=r"no credentials for AWS\. On EC2 give this host an instance profile"):
        async with driver_in(aws):
            pass


async def test_an_image_that_is_not_here_is_told_before_anything_is_launched(aws: FaultyAccount) -> None:
    with pytest.raises(StartError, match=r"ami-0123456789abcdef0 cannot be used in us-east-1"):
        async with driver_in(aws, aws_ami="ami-0123456789abcdef0"):
            pass


# -- booting ----------------------------------------------------------------------------------------------------


async def test_a_boot_tells_each_state_it_is_in(aws: FaultyAccount) -> None:
    heard = Heard()
    aws.faults.pending_s = 0.5
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), heard)
        one = instances_of(aws)["a-1"]
        await until(lambda: "status checks: passed" in heard.words)
    assert heard.phases == ["launch", "pending", "running"]
    assert heard.words[:4] == [
        f"launching a t3.xlarge in {aws.subnets[0]}",
        f"{one['InstanceId']} is launched",
        f"{one['InstanceId']} is pending",
        f"{one['InstanceId']} runs, at {one['PrivateIpAddress']}",
    ]


async def test_an_instance_that_ec2_does_not_know_of_yet_is_not_dead(aws: FaultyAccount) -> None:
    aws.faults.hidden_s = 1.0
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        waiting = asyncio.create_task(opened.wait("a-1"))
        await opened._opened._instances.fresh()
        assert not waiting.done()
        waiting.cancel()


async def test_an_instance_that_ec2_knows_no_more_is_dead_after_a_while(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        waiting = asyncio.create_task(opened.wait("a-1"))
        aws.faults.hidden_s = 3600
        await opened._opened._instances.fresh()
        assert not waiting.done()
        monkeypatch.setattr(instances, "LAG", 0.0)
        async with asyncio.timeout(10):
            assert "is gone" in (await waiting).reason


@pytest.mark.parametrize(
    "known",
    [pytest.param(True, id="it was there all the while"), pytest.param(False, id="EC2 says that there is none")],
)
async def test_what_was_taken_for_gone_is_told_to_end_all_the_same(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        aws.faults.hidden_s = 3600
        monkeypatch.setattr(instances, "LAG", 0.0)
        async with asyncio.timeout(10):
            assert "is gone" in (await opened.wait("a-1")).reason
        monkeypatch.setattr(instances, "LAG", 0.3)
        if not known:
            aws.fail("ec2:TerminateInstances", "InvalidInstanceID.NotFound", "There is none.", times=None)
        async with asyncio.timeout(10):
            await opened.destroy("a-1")
        assert aws.count("ec2:TerminateInstances") == 1
        assert (await states(aws) == {}) is known


async def test_an_instance_is_ended_also_before_ec2_knows_of_it(aws: FaultyAccount) -> None:
    aws.faults.hidden_s = 1.0
    aws.fail("ec2:TerminateInstances", "InvalidInstanceID.NotFound", "Not yet.")
    async with driver_in(aws) as opened:
        with anyio.move_on_after(0):
            await opened.create(spec("a-1"), Report())
        await opened.destroy("a-1")
        assert await states(aws) == {}


async def test_throttling_while_it_boots_is_sat_out(aws: FaultyAccount) -> None:
    aws.faults.pending_s = 0.3
    async with driver_in(aws) as opened:
        aws.fail("ec2:DescribeInstances", "RequestLimitExceeded", status=503, times=5)
        await opened.create(spec("a-1"), Report())
        assert await states(aws) == {"a-1": "running"}


async def test_credentials_that_expire_while_it_boots_are_told_at_once(aws: FaultyAccount) -> None:
    aws.faults.pending_s = 3600
    async with driver_in(aws) as opened:
        creating = asyncio.create_task(opened.create(spec("a-1"), Report()))
        await until(lambda: aws.count("scheduler:CreateSchedule"))
        aws.fail("ec2:DescribeInstances", "ExpiredToken", times=None)
        with pytest.raises(CredentialsExpired, match="aws sso login"):
            await creating


@pytest.mark.parametrize(
    ("reason", "error", "words"),
    [
        pytest.param(KMS, InstanceDied, "get-ebs-default-kms-key-id", id="no right to the key"),
        pytest.param(
            ("Server.InsufficientInstanceCapacity", "Server.InsufficientInstanceCapacity: None."),
            InsufficientCapacity,
            "No t3.xlarge can be had",
            id="no capacity after all",
        ),
    ],
)
async def test_an_instance_that_ends_while_pending_says_why(
    aws: FaultyAccount, reason: tuple[str, str], error: type[BootFailed], words: str
) -> None:
    async with driver_in(aws) as opened:
        aws.rewrite("ec2:DescribeInstances", said("terminated", 48, reason))
        with pytest.raises(error) as caught:
            await opened.create(spec("a-1"), Report())
    assert words in str(caught.value)


async def test_a_launch_whose_asker_is_gone_is_heard_to_its_end(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        held = aws.hold("ec2:RunInstances", "after")
        creating = asyncio.create_task(opened.create(spec("a-1"), Report()))
        await held.reached()
        creating.cancel()
        await asyncio.wait([creating])
        destroying = asyncio.create_task(opened.destroy("a-1"))
        await asyncio.sleep(0)
        held.release()
        await destroying
        assert await states(aws) == {}


async def test_a_launch_that_nobody_answered_is_looked_for(aws: FaultyAccount) -> None:
    aws.cut("ec2:RunInstances", times=None)
    async with driver_in(aws) as opened:
        with pytest.raises(CloudUnreachable):
            await opened.create(spec("a-1"), Report())
        aws.faults.hidden_s = 8.0
        assert await states(aws) == {"a-1": "running"}
        await opened.destroy("a-1")
        assert await states(aws) == {}


async def test_leaving_the_driver_waits_for_a_launch_and_ends_nothing(aws: FaultyAccount) -> None:
    held = aws.hold("ec2:RunInstances", "after")
    leaving: asyncio.Task[None]

    async def live() -> None:
        async with AwsDriver(opened._settings, "test") as second:
            creating = asyncio.create_task(second.create(spec("b-1"), Report()))
            await held.reached()
            creating.cancel()

    async with driver_in(aws) as opened:
        leaving = asyncio.create_task(live())
        await held.reached()
        held.release()
        await leaving
        assert await states(aws) == {"b-1": "running"}
        assert await opened.list() == {"b-1"}


# -- limits -----------------------------------------------------------------------------------------------------


async def test_an_instance_without_a_schedule_is_not_kept(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        aws.fail("scheduler:CreateSchedule", "AccessDeniedException", status=403, times=None)
        with pytest.raises(TtlUnavailable):
            await opened.create(spec("a-1"), Report())
        assert await states(aws) == {}


async def test_with_the_ttl_off_no_schedule_is_asked_for(aws: FaultyAccount) -> None:
    async with driver_in(aws, enable_ttl=False) as opened:
        await opened.create(spec("a-1"), Report())
        tags = {tag["Key"] for tag in instances_of(aws)["a-1"]["Tags"]}
        await opened.destroy("a-1")
    assert "envd:expires-at" not in tags
    assert not {"scheduler:CreateSchedule", "iam:GetRole"} & aws.calls


async def test_a_limit_refuses_the_launch_and_its_room_comes_back(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_max_instances=1) as opened:
        assert opened.traits.make_before_break
        both = (opened.create(spec(name), Report()) for name in ("a-1", "a-2"))
        outcomes = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(outcomes[1], BudgetExhausted)
        assert aws.count("ec2:RunInstances") == 1
        assert [opened.traits.keeps_old, opened.traits.make_before_break] == [False, False]
        await opened.destroy("a-1")
        assert [opened.traits.keeps_old, opened.traits.make_before_break] == [True, True]
        await opened.create(spec("a-3"), Report())


async def test_a_price_refuses_the_launch(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_max_hourly_usd=0.25) as opened:
        await opened.create(spec("a-1"), Report())
        with pytest.raises(BudgetExhausted, match="ENVD_AWS_MAX_HOURLY_USD"):
            await opened.create(spec("a-2"), Report())


# -- ending -----------------------------------------------------------------------------------------------------


async def test_an_instance_is_gone_only_when_it_is_terminated(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        aws.rewrite("ec2:DescribeInstances", said("shutting-down", 32))
        destroying = asyncio.create_task(opened.destroy("a-1"))
        seen = aws.count("ec2:DescribeInstances")
        await until(lambda: aws.count("ec2:DescribeInstances") > seen + 3)
        assert not destroying.done()
        aws.settled()
        await destroying


async def test_a_refusal_to_end_it_is_told_and_can_be_tried_again(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        aws.fail("ec2:TerminateInstances", "OperationNotPermitted", "It is protected.")
        with pytest.raises(InfraError, match="protected"):
            await opened.destroy("a-1")
        assert await opened.list() == {"a-1"}
        await opened.destroy("a-1")
        assert await states(aws) == {}


async def test_what_earlier_lives_left_is_swept_in_the_background(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driver_in(aws) as first:
        await first.create(spec("a-1"), Report())
        monkeypatch.setattr(driver, "SWEEPS", 0.1)
        defaults = sweep.sweep.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "grace", 0.0)
        async with AwsDriver(first._settings, "test"):
            await until(lambda: instances_of(aws) == {})


@pytest.mark.parametrize("name", ["*", "a-?", "a-*"])
async def test_what_stands_for_anything_in_filters_ends_nothing(aws: FaultyAccount, name: str) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        await opened.destroy(name)
        assert await states(aws) == {"a-1": "running"}


# -- living -----------------------------------------------------------------------------------------------------


async def test_an_instance_that_somebody_stops_is_dead(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        await opened.create(spec("a-1"), Report())
        waiting = asyncio.create_task(opened.wait("a-1"))
        name = instances_of(aws)["a-1"]["InstanceId"]
        aws.client("ec2").stop_instances(InstanceIds=[name])
        async with asyncio.timeout(10):
            assert f"{name} is stopped" in (await waiting).reason


async def test_a_parked_one_is_stopped_and_lives(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_spares_stopped=True) as opened:
        assert opened.traits.parks_spares
        await opened.create(spec("a-1"), Report())
        waiting = asyncio.create_task(opened.wait("a-1"))
        await opened.park("a-1")
        assert await states(aws) == {"a-1": "stopped"}
        await opened._opened._instances.fresh()
        heard = Heard()
        made = await opened.unpark("a-1", heard)
        assert await states(aws) == {"a-1": "running"}
        assert made.endpoints.guest == f"http://{instances_of(aws)['a-1']['PrivateIpAddress']}:5000"
        assert not waiting.done()
        waiting.cancel()
    assert heard.phases == ["start", "running"]


async def test_a_parked_one_that_cannot_be_started_says_why(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_spares_stopped=True) as opened:
        await opened.create(spec("a-1"), Report())
        await opened.park("a-1")
        aws.fail("ec2:StartInstances", "InsufficientInstanceCapacity", "None left.")
        with pytest.raises(InsufficientCapacity, match="None left"):
            await opened.unpark("a-1", Report())


async def test_a_renewed_one_is_the_same_instance_by_another_name(aws: FaultyAccount) -> None:
    heard = Heard()
    async with driver_in(aws, aws_reset="replace-root") as opened:
        made = await opened.create(spec("a-1", env=1), Report())
        waiting = asyncio.create_task(opened.wait("a-1"))
        name = instances_of(aws)["a-1"]["InstanceId"]
        again = await opened.renew("a-1", spec("a-2", job_id="job-2", env=1), heard)
        await opened.destroy("a-1")
        async with asyncio.timeout(10):
            await waiting
        assert again == made
        assert await opened.list() == {"a-2"}
        one = instances_of(aws)["a-2"]
        assert (one["InstanceId"], aws.faults.replaced[name]) == (name, 1)
        assert {tag["Key"]: tag["Value"] for tag in one["Tags"]}["envd:job"] == "job-2"
    assert heard.phases == ["replace-root", "running"]
    assert heard.words[0] == f"the root volume of {name} is being replaced: in-progress"


async def test_a_renewed_one_is_not_ended_by_its_old_name_while_ec2_still_tells_of_that(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_reset="replace-root") as opened:
        await opened.create(spec("a-1"), Report())
        aws.fail("ec2:CreateReplaceRootVolumeTask", "InternalError", "Oops.", status=500, times=None)
        aws.cut("ec2:CreateTags", times=None)
        with pytest.raises(CloudRefused):
            await opened.renew("a-1", spec("a-2"), Report())
        await opened.destroy("a-1")
        assert len(await states(aws)) == 1
        await opened.destroy("a-2")
        assert await states(aws) == {}


async def test_a_sweep_spares_one_that_is_renewed_while_ec2_still_tells_of_its_old_tags(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_reset="replace-root") as opened:
        await opened.create(spec("a-1"), Report())
        held = aws.hold("ec2:CreateTags", "before")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(opened.renew, "a-1", spec("a-2"), Report())
            await held.reached()
            assert await sweep.sweep(opened._cloud, "test", opened._opened, grace=0.0) == []
            held.release()
        assert await states(aws) == {"a-2": "running"}


async def test_what_is_no_answer_of_aws_is_told_as_such(aws: FaultyAccount) -> None:
    async with driver_in(aws) as opened:
        with pytest.raises(CloudRefused, match="what is not its answer"):
            await opened._cloud.call(
                "iam", "simulate_principal_policy", PolicySourceArn=f"arn:aws:iam::{1:012}:user/x", ActionNames=["a:b"]
            )


async def test_a_root_volume_that_cannot_be_replaced_fails_the_boot(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_reset="replace-root") as opened:
        await opened.create(spec("a-1"), Report())
        aws.rewrite("ec2:CreateReplaceRootVolumeTask", lambda body: body.replace(b"in-progress", b"failed-detached"))
        with pytest.raises(BootFailed, match=r"could not replace the root volume of i-.*: failed-detached"):
            await opened.renew("a-1", spec("a-2"), Report())
        await opened.destroy("a-2")
        assert await states(aws) == {}


@pytest.mark.parametrize("mode", ["replace", "replace-root"])
async def test_what_cannot_be_renewed_is_not_begun(aws: FaultyAccount, mode: str) -> None:
    async with driver_in(aws, aws_reset=mode) as opened:
        await opened.create(spec("a-1"), Report())
        if mode == "replace-root":
            aws.client("ec2").stop_instances(InstanceIds=[instances_of(aws)["a-1"]["InstanceId"]])
            await opened.wait("a-1")
        assert await opened.renew("a-1", spec("a-2"), Report()) is None
        assert await opened.renew("b-1", spec("a-2"), Report()) is None
        assert await opened.list() == {"a-1"}


@pytest.mark.parametrize(
    ("setting", "value", "trait"),
    [
        pytest.param("aws_boot_width", 7, "boot_width", id="boot width"),
        pytest.param("aws_reset", "replace-root", "keeps_old", id="renewing keeps the old one"),
    ],
)
def test_traits_follow_the_settings(aws: FaultyAccount, setting: str, value: Any, trait: str) -> None:
    made = AwsDriver(Settings(**{setting: value}), "test")
    assert getattr(made.traits, trait) == (value if isinstance(value, int) else True)
