"""The schedule at AWS that ends an instance: made, put off, taken away; and the role for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import anyio
import pytest
from aws_cloud import REGION
from aws_faults import FaultyAccount
from botocore.exceptions import ClientError

from envd.drivers.aws import ttl as ttl_module
from envd.drivers.aws.cloud import Cloud, open_cloud
from envd.drivers.aws.scheduler_role import DESCRIPTION, POLICY, fault_in_trust, trust_document
from envd.drivers.aws.tags import EXPIRES, as_dict, in_utc, schedule_name
from envd.drivers.aws.ttl import Ttl, open_ttl
from envd.errors import CloudRefused, SettingsError, TtlUnavailable
from envd.settings import Settings, load

ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/envd-scheduler-terminate"
NAME = "envd-scheduler-terminate"
NOT_YET = "The execution role you provide must allow AWS EventBridge Scheduler to assume the role."
"""What AWS says of a role that is too new, and of one that will never do."""


@pytest.fixture
def aws(account: FaultyAccount) -> Iterator[FaultyAccount]:
    """Without roles and schedules, and nothing was called yet."""
    account.faults.heard.clear()
    yield account
    account.settled()
    iam, scheduler = account.client("iam"), account.client("scheduler")
    for each in scheduler.list_schedules()["Schedules"]:
        scheduler.delete_schedule(Name=each["Name"])
    for role in iam.list_roles()["Roles"]:
        for policy in iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]:
            iam.delete_role_policy(RoleName=role["RoleName"], PolicyName=policy)
        iam.delete_role(RoleName=role["RoleName"])


@pytest.fixture
async def cloud(aws: FaultyAccount) -> AsyncIterator[Cloud]:
    async with open_cloud(REGION) as opened:
        yield opened


@pytest.fixture
def ttl(cloud: Cloud) -> Ttl:
    return Ttl(cloud, ROLE, 600)


@pytest.fixture
def instance(aws: FaultyAccount) -> str:
    asked = {"ImageId": aws.ami, "SubnetId": aws.subnets[0], "InstanceType": "t3.xlarge"}
    ran = aws.client("ec2").run_instances(MinCount=1, MaxCount=1, **asked)
    return str(ran["Instances"][0]["InstanceId"])


def settings(**given: Any) -> Settings:
    return load({"HOME": "/nowhere"}, None, **given)


def schedule(aws: FaultyAccount, instance_id: str) -> dict[str, Any] | None:
    try:
        return dict(aws.client("scheduler").get_schedule(Name=schedule_name(instance_id)))
    except ClientError:
        return None


def at(ends: float) -> str:
    return f"at({in_utc(ends).removesuffix('Z')})"


def role_of(aws: FaultyAccount) -> dict[str, Any]:
    return dict(aws.client("iam").get_role(RoleName=NAME)["Role"])


def make_role(aws: FaultyAccount, trust: Any, description: str = "somebody's own") -> None:
    aws.client("iam").create_role(RoleName=NAME, AssumeRolePolicyDocument=json.dumps(trust), Description=description)


# -- One instance's schedule -------------------------------------------------------------------------------------------


async def test_a_schedule_ends_that_one_instance_once_at_the_time_that_was_told(
    aws: FaultyAccount, ttl: Ttl, instance: str
) -> None:
    before = time.time()
    ends = await ttl.begin(instance)
    assert before + 600 <= ends <= time.time() + 600
    made = schedule(aws, instance)
    assert made is not None
    assert (made["ScheduleExpression"], made["ScheduleExpressionTimezone"]) == (at(ends), "UTC")
    assert (made["State"], made["ActionAfterCompletion"]) == ("ENABLED", "DELETE")
    assert made["FlexibleTimeWindow"] == {"Mode": "OFF"}
    target = made["Target"]
    assert target["Arn"] == "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances"
    assert target["RoleArn"] == ROLE
    assert json.loads(target["Input"]) == {"InstanceIds": [instance]}


async def test_beginning_twice_leaves_one_schedule_at_the_later_time(
    aws: FaultyAccount, cloud: Cloud, instance: str
) -> None:
    await Ttl(cloud, ROLE, 600).begin(instance)
    ends = await Ttl(cloud, ROLE, 1200).begin(instance)
    assert (schedule(aws, instance) or {})["ScheduleExpression"] == at(ends)
    assert len(aws.client("scheduler").list_schedules()["Schedules"]) == 1


async def test_prolonging_puts_the_end_off_and_the_instances_tag_says_so(
    aws: FaultyAccount, cloud: Cloud, instance: str
) -> None:
    await Ttl(cloud, ROLE, 600).begin(instance)
    ends = await Ttl(cloud, ROLE, 6000).prolong(instance)
    made = schedule(aws, instance) or {}
    assert made["ScheduleExpression"] == at(ends)
    assert (made["State"], made["ActionAfterCompletion"]) == ("ENABLED", "DELETE")
    told = aws.client("ec2").describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    assert as_dict(told["Tags"])[EXPIRES] == in_utc(ends)


async def test_an_update_says_all_of_a_schedule_so_that_nothing_falls_back_to_a_default(
    aws: FaultyAccount, ttl: Ttl, instance: str
) -> None:
    await ttl.begin(instance)
    await ttl.prolong(instance)
    made, put = (
        json.loads(call.body)
        for call in aws.faults.heard
        if call.action in ("scheduler:CreateSchedule", "scheduler:UpdateSchedule")
    )
    assert made.keys() - {"ClientToken"} == put.keys() - {"ClientToken"}
    assert put["ActionAfterCompletion"] == "DELETE"


async def test_prolonging_makes_a_schedule_anew_that_is_gone(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    ends = await ttl.prolong(instance)
    assert (schedule(aws, instance) or {})["ScheduleExpression"] == at(ends)


async def test_a_tag_that_cannot_be_set_is_told_while_the_instance_lives_on(
    aws: FaultyAccount, cloud: Cloud, instance: str
) -> None:
    await Ttl(cloud, ROLE, 600).begin(instance)
    aws.fail("ec2:CreateTags", "UnauthorizedOperation", "You are not authorized.", status=403, times=None)
    with pytest.raises(TtlUnavailable, match="ends later than its tag says") as caught:
        await Ttl(cloud, ROLE, 6000).prolong(instance)
    assert caught.value.facts["action"] == "ec2:CreateTags"
    assert (schedule(aws, instance) or {})["ScheduleExpression"] > at(time.time() + 5000)


async def test_ending_takes_the_schedule_away_and_again_is_nothing(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    await ttl.begin(instance)
    for _ in range(2):
        await ttl.end(instance)
        assert schedule(aws, instance) is None


async def test_an_instance_that_was_ended_is_never_given_a_schedule_again(
    aws: FaultyAccount, ttl: Ttl, instance: str
) -> None:
    await ttl.begin(instance)
    await ttl.end(instance)
    assert await ttl.prolong(instance) <= time.time()
    with pytest.raises(TtlUnavailable, match="was ended before"):
        await ttl.begin(instance)
    assert schedule(aws, instance) is None


async def test_an_end_that_failed_is_not_undone_by_prolonging_and_can_be_tried_again(
    aws: FaultyAccount, ttl: Ttl, instance: str
) -> None:
    await ttl.begin(instance)
    aws.fail("scheduler:DeleteSchedule", "AccessDeniedException", status=403)
    with pytest.raises(CloudRefused):
        await ttl.end(instance)
    await ttl.prolong(instance)
    await ttl.end(instance)
    assert aws.count("scheduler:UpdateSchedule") == 0
    assert schedule(aws, instance) is None


@pytest.mark.parametrize(
    ("action", "method"),
    [
        pytest.param("scheduler:CreateSchedule", "begin", id="begin"),
        pytest.param("scheduler:UpdateSchedule", "prolong", id="prolong"),
        pytest.param("scheduler:CreateSchedule", "prolong", id="prolong what was gone"),
    ],
)
async def test_an_end_beside_a_call_under_way_leaves_no_schedule_behind(
    aws: FaultyAccount, ttl: Ttl, instance: str, action: str, method: str
) -> None:
    if action == "scheduler:UpdateSchedule":
        await ttl.begin(instance)
    held = aws.hold(action, "before")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(getattr(ttl, method)(instance))
        await held.reached()
        tasks.create_task(ttl.end(instance))
        late = tasks.create_task(ttl.prolong(instance))
        await asyncio.sleep(0)
        held.release()
    assert late.result() <= time.time()
    assert schedule(aws, instance) is None
    assert not list(ttl._turns)


async def test_an_end_waits_for_a_beginning_that_was_given_up(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    """AWS has its call already: an end that overtakes it would leave a schedule behind."""
    held = aws.hold("scheduler:CreateSchedule", "before")
    async with asyncio.TaskGroup() as tasks:
        giving_up = anyio.CancelScope()
        tasks.create_task(_within(giving_up, ttl.begin(instance)))
        await held.reached()
        giving_up.cancel()
        ending = tasks.create_task(ttl.end(instance))
        assert not (await asyncio.wait([ending], timeout=0.5))[0]
        held.release()
    assert schedule(aws, instance) is None


async def _within(scope: anyio.CancelScope, call: Awaitable[object]) -> None:
    with scope:
        await call


async def test_two_instances_do_not_wait_for_each_other(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    held = aws.hold("scheduler:CreateSchedule", "before")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ttl.begin(instance))
        await held.reached()
        await ttl.begin("i-0123456789abcdef0")
        assert schedule(aws, instance) is None
        held.release()
    assert schedule(aws, instance) is not None


async def test_what_was_ended_is_forgotten_after_many_more(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttl_module, "_REMEMBERED", 2)
    ttl = Ttl(cloud, ROLE, 600)
    for number in range(4):
        await ttl.end(f"i-{number:017x}")
    assert list(ttl._ended) == [f"i-{number:017x}" for number in (2, 3)]


# -- Refusals ----------------------------------------------------------------------------------------------------------


async def test_a_role_that_is_too_new_is_waited_for(
    aws: FaultyAccount, ttl: Ttl, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_module, "_FIRST_PAUSE", 0.05)
    aws.fail("scheduler:CreateSchedule", "ValidationException", NOT_YET, times=3)
    await ttl.begin(instance)
    assert aws.count("scheduler:CreateSchedule") == 4
    assert schedule(aws, instance) is not None


async def test_a_role_that_never_does_is_waited_for_once_and_not_at_every_launch(
    aws: FaultyAccount, ttl: Ttl, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_module, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(ttl_module, "ASSUMABLE", 0.3)
    aws.fail("scheduler:CreateSchedule", "ValidationException", NOT_YET, times=None)
    for tries in (range(2, 7), range(1, 2)):
        before = aws.count("scheduler:CreateSchedule")
        with pytest.raises(TtlUnavailable) as caught:
            await ttl.begin(instance)
        assert aws.count("scheduler:CreateSchedule") - before in tries
    assert NOT_YET in caught.value.detail
    assert caught.value.facts["role"] == ROLE


async def test_a_role_that_did_and_was_made_anew_is_waited_for_again(
    aws: FaultyAccount, ttl: Ttl, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_module, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(ttl_module, "ASSUMABLE", 0.2)
    for _ in range(2):
        aws.fail("scheduler:CreateSchedule", "ValidationException", NOT_YET)
        await ttl.begin(instance)
        await asyncio.sleep(0.2)
    assert schedule(aws, instance) is not None


async def test_another_validation_fails_at_once(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    aws.fail("scheduler:CreateSchedule", "ValidationException", "Invalid Schedule Expression.", times=None)
    with pytest.raises(TtlUnavailable, match="Invalid Schedule Expression"):
        await ttl.begin(instance)
    assert aws.count("scheduler:CreateSchedule") == 1


async def test_a_schedule_that_may_not_be_made_says_what_to_do(aws: FaultyAccount, ttl: Ttl, instance: str) -> None:
    message = f"User: arn:aws:iam::{ACCOUNT}:user/me is not authorized to perform: iam:PassRole on resource: {ROLE}"
    aws.fail("scheduler:CreateSchedule", "AccessDeniedException", message, status=403)
    with pytest.raises(TtlUnavailable) as caught:
        await ttl.begin(instance)
    refused = caught.value
    assert refused.detail.startswith(f"The end of {instance} cannot be scheduled: ")
    assert "iam:PassRole" in str(refused)
    for way in ("deploy/aws/", "AWS_SCHEDULER_ROLE_ARN", "ENABLE_TTL=false"):
        assert way in refused.hint
    assert not refused.retryable
    assert refused.problem().code == "ttl_unavailable"
    assert refused.problem().status == 503


# -- The role ----------------------------------------------------------------------------------------------------------


async def test_without_a_ttl_nothing_is_asked(aws: FaultyAccount, cloud: Cloud) -> None:
    assert await open_ttl(cloud, settings(enable_ttl=False)) is None
    assert aws.calls == set()


async def test_a_role_that_was_named_is_used_as_it_is(aws: FaultyAccount, cloud: Cloud) -> None:
    given = "arn:aws-us-gov:iam::210987654321:role/teams/scheduler"
    ttl = await open_ttl(cloud, settings(aws_scheduler_role_arn=given, default_ttl_minutes=30))
    assert ttl is not None
    assert (ttl.role, ttl.expires(1000.0)) == (given, 2800.0)
    assert aws.calls == set()
    await ttl.begin("i-0123456789abcdef0")
    target = (schedule(aws, "i-0123456789abcdef0") or {})["Target"]
    assert target["Arn"] == "arn:aws-us-gov:scheduler:::aws-sdk:ec2:terminateInstances"


@pytest.mark.parametrize("given", ["scheduler", f"arn:aws:iam::{ACCOUNT}:user/me", "arn:aws:iam::12:role/x"])
async def test_what_is_no_roles_arn_stops_the_start(cloud: Cloud, given: str) -> None:
    with pytest.raises(SettingsError, match="is no role's ARN"):
        await open_ttl(cloud, settings(aws_scheduler_role_arn=given))


async def test_a_role_is_made_once_and_only_for_the_scheduler_of_this_account(aws: FaultyAccount, cloud: Cloud) -> None:
    ttl = await open_ttl(cloud, settings())
    assert ttl is not None
    assert ttl.role == ROLE
    assert role_of(aws)["AssumeRolePolicyDocument"] == trust_document(ACCOUNT)
    assert role_of(aws)["Description"] == DESCRIPTION
    permitted = aws.client("iam").get_role_policy(RoleName=NAME, PolicyName=POLICY)["PolicyDocument"]["Statement"]
    assert permitted == [
        {
            "Effect": "Allow",
            "Action": "ec2:TerminateInstances",
            "Resource": f"arn:aws:ec2:*:{ACCOUNT}:instance/*",
            "Condition": {"Null": {"aws:ResourceTag/envd:daemon": "false"}},
        }
    ]
    await open_ttl(cloud, settings())
    assert aws.count("iam:CreateRole") == aws.count("iam:PutRolePolicy") == 1


async def test_a_role_that_a_killed_daemon_half_made_is_completed(aws: FaultyAccount, cloud: Cloud) -> None:
    aws.fail("iam:PutRolePolicy", "ServiceFailure", times=None)
    with pytest.raises(TtlUnavailable):
        await open_ttl(cloud, settings())
    aws.settled()
    await open_ttl(cloud, settings())
    assert aws.client("iam").list_role_policies(RoleName=NAME)["PolicyNames"] == [POLICY]


async def test_somebodys_own_role_is_used_and_not_changed(aws: FaultyAccount, cloud: Cloud) -> None:
    make_role(aws, trust_document(ACCOUNT))
    ttl = await open_ttl(cloud, settings())
    assert ttl is not None
    assert ttl.role == ROLE
    assert aws.calls == {"iam:GetRole"}


async def test_a_role_that_another_daemon_makes_at_the_same_time_is_used(aws: FaultyAccount, cloud: Cloud) -> None:
    held = aws.hold("iam:CreateRole", "before")
    async with asyncio.TaskGroup() as tasks:
        slower = tasks.create_task(open_ttl(cloud, settings()))
        await held.reached()
        await open_ttl(cloud, settings())
        held.release()
    ttl = slower.result()
    assert ttl is not None
    assert ttl.role == ROLE


async def test_a_role_that_the_scheduler_cannot_assume_is_told_and_not_changed(
    aws: FaultyAccount, cloud: Cloud
) -> None:
    wrong = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}}]}
    make_role(aws, wrong, DESCRIPTION)
    with pytest.raises(TtlUnavailable) as caught:
        await open_ttl(cloud, settings())
    told = "its trust policy does not let scheduler.amazonaws.com assume it"
    assert caught.value.detail == f"The role {NAME} cannot be used: {told}."
    assert "AWS_SCHEDULER_ROLE_NAME" in caught.value.hint
    assert role_of(aws)["AssumeRolePolicyDocument"] == wrong


@pytest.mark.parametrize("action", ["iam:GetRole", "iam:CreateRole", "iam:PutRolePolicy"])
async def test_a_role_that_may_not_be_had_says_what_to_do(aws: FaultyAccount, cloud: Cloud, action: str) -> None:
    message = f"User: arn:aws:iam::{ACCOUNT}:user/me is not authorized to perform: {action} on resource: {ROLE}"
    aws.fail(action, "AccessDenied", message, status=403)
    with pytest.raises(TtlUnavailable, match=action) as caught:
        await open_ttl(cloud, settings())
    assert "AWS_SCHEDULER_ROLE_ARN" in caught.value.hint
    assert caught.value.facts["role"] == NAME
    assert not caught.value.retryable


def trusting(**statement: Any) -> dict[str, Any]:
    return {"Statement": {"Effect": "Allow", "Action": "sts:AssumeRole", **statement}}


SCHEDULER = {"Service": "scheduler.amazonaws.com"}


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        pytest.param(trust_document(ACCOUNT), "", id="our own"),
        pytest.param(trusting(Principal=SCHEDULER), "", id="no condition"),
        pytest.param(
            trusting(Principal={"Service": ["ec2.amazonaws.com", *SCHEDULER.values()]}), "", id="one of several"
        ),
        pytest.param(
            trusting(Principal=SCHEDULER, Condition={"StringLike": {"AWS:SourceAccount": ["1", ACCOUNT]}}),
            "",
            id="one of several accounts",
        ),
        pytest.param(trust_document("210987654321"), "for account 210987654321 alone", id="another account"),
        pytest.param(trusting(Principal={"Service": "events.amazonaws.com"}), "does not let", id="another service"),
        pytest.param(trusting(Principal=SCHEDULER, Action="sts:TagSession"), "does not let", id="another action"),
        pytest.param(trusting(Principal=SCHEDULER, Effect="Deny"), "does not let", id="denied"),
        pytest.param(trusting(Principal="*"), "does not let", id="anybody"),
        pytest.param({"Statement": ["?"]}, "does not let", id="garbage"),
        pytest.param("{}", "does not let", id="text"),
        pytest.param(None, "does not let", id="none"),
    ],
)
def test_a_trust_policy_is_told_apart(document: Any, fault: str) -> None:
    said = fault_in_trust(document, ACCOUNT)
    assert fault in said
    assert bool(fault) == bool(said)
