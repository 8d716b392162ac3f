"""The preflight: what it finds wrong, what it says to do, and that it leaves everything as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from aws_faults import Fault, FaultyAccount, faulty_account
from aws_metadata import metadata

from envd.drivers.aws.check import check
from envd.drivers.aws.findings import AT_ONCE, gather
from envd.drivers.aws.scheduler_role import trust_document
from envd.errors import CloudRefused, NotAuthorized
from envd.findings import Finding
from envd.settings import load

ACCOUNT = "123456789012"
SIMULATE = "iam:SimulatePrincipalPolicy"
UNAUTHORIZED = "You are not authorized to perform this operation."


@pytest.fixture(scope="module")
def one_account() -> Iterator[FaultyAccount]:
    with faulty_account() as made:
        yield made


@pytest.fixture
def aws(one_account: FaultyAccount) -> Iterator[FaultyAccount]:
    """Where nothing may be simulated and the quota is 64 vCPUs, until a test says otherwise."""
    one_account.faults.heard.clear()
    yield one_account
    one_account.settled()


async def checked(aws: FaultyAccount, host: Any = None, **environ: str) -> dict[str, Finding]:
    """What was found, by what was looked at. On EC2: in the first subnet, with the desktops' group, unless `host` says
    otherwise."""
    if SIMULATE not in {fault.action for fault in aws.faults._faults}:
        aws.fail(SIMULATE, "AccessDenied", times=None)
    here: dict[str, Any] = {
        "subnet": aws.subnets[0],
        "vpc": aws.vpc,
        "security_groups": aws.security_group,
        **(host or {}),
    }
    async with metadata(**here):
        settings = load({**os.environ, "PROVIDER": "aws", "ENVD_AWS_AMI": aws.ami, **environ}, env_file=None)
        found = await check(settings)
    return {one.what: one for one in found}


def simulated(aws: FaultyAccount, decision: str) -> None:
    """IAM's simulator answers this of whatever it is asked about."""
    actions = ["CreateSchedule", "UpdateSchedule", "DeleteSchedule", "ListSchedules"]
    members = "".join(
        f"<member><EvalActionName>{name}</EvalActionName><EvalDecision>{decision}</EvalDecision></member>"
        for name in (
            *(f"scheduler:{one}" for one in actions),
            "iam:PassRole",
            "iam:CreateRole",
            "ec2:TerminateInstances",
        )
    )
    body = (
        '<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
        f"<SimulatePrincipalPolicyResult><EvaluationResults>{members}</EvaluationResults>"
        "</SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>"
    )
    answer = (200, {"Content-Type": "text/xml"}, body.encode())
    aws.faults.add(Fault(SIMULATE, times=None, refusal=answer))


def quota(aws: FaultyAccount, vcpus: int) -> None:
    body = json.dumps({"Quota": {"QuotaCode": "L-1216C47A", "Value": float(vcpus)}})
    answer = (200, {"Content-Type": "application/x-amz-json-1.1"}, body.encode())
    aws.faults.add(Fault("servicequotas:GetServiceQuota", times=None, refusal=answer))


def group(aws: FaultyAccount, vpc: str = "", *rules: dict[str, Any]) -> str:
    ec2 = aws.client("ec2")
    made = str(
        ec2.create_security_group(GroupName=os.urandom(4).hex(), Description="d", VpcId=vpc or aws.vpc)["GroupId"]
    )
    if rules:
        ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=list(rules))
    return made


def tcp(first: int, last: int, **peers: Any) -> dict[str, Any]:
    return {"IpProtocol": "tcp", "FromPort": first, "ToPort": last, **peers}


def world(first: int, last: int) -> dict[str, Any]:
    return tcp(first, last, IpRanges=[{"CidrIp": "0.0.0.0/0"}])


async def test_where_everything_is_right_nothing_has_to_be_done(aws: FaultyAccount) -> None:
    simulated(aws, "allowed")
    quota(aws, 64)
    peers = {"UserIdGroupPairs": [{"GroupId": aws.security_group}]}
    desktops = group(aws, "", tcp(5000, 9222, **peers))
    host = group(aws, "", tcp(15001, 15001, IpRanges=[{"CidrIp": "10.8.0.0/16"}]))
    found = await checked(
        aws,
        {"security_groups": f"{aws.security_group}\n{host}"},
        AWS_SECURITY_GROUP_ID=desktops,
        AWS_SUBNET_ID=aws.subnets[1],
    )
    assert {one.what: one for one in found.values() if one.verdict != "ok"} == {}
    assert found["place"].detail == (
        f"region us-east-1 (set), subnets {aws.subnets[1]} (set), security groups {desktops} (set)"
    )
    assert found["identity"].detail.endswith(f":user/moto, account {ACCOUNT}")
    assert found["port 9222 of desktops"].detail == f"Chrome's DevTools: open to this host, by {aws.security_group}"
    assert found["port 15001 inbound"].detail == "open to 10.8.0.0/16"


async def test_nothing_is_launched_changed_or_made(aws: FaultyAccount) -> None:
    await checked(aws, ENVD_AWS_SPARES_STOPPED="1")
    ec2 = aws.client("ec2")
    assert ec2.describe_instances()["Reservations"] == []
    assert aws.client("scheduler").list_schedules()["Schedules"] == []
    assert aws.client("iam").list_roles()["Roles"] == []
    dry = {call.action for call in aws.faults.heard if call.parameters.get("DryRun") == "true"}
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances"} <= dry
    looks = ("Describe", "Get", "List", "Simulate")
    assert [one for one in aws.calls - dry if not one.partition(":")[2].startswith(looks)] == []


async def test_all_that_is_missing_of_the_place_is_said_and_the_rest_is_looked_at(aws: FaultyAccount) -> None:
    found = await checked(aws, {"region": "eu-west-3"})
    assert found["place"].verdict == "failed"
    assert "AWS_SUBNET_ID and AWS_SECURITY_GROUP_ID" in found["place"].detail
    assert (found["identity"].verdict, found[f"image {aws.ami}"].verdict) == ("ok", "ok")


async def test_without_a_region_nobody_is_asked(aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = await check(load({"PROVIDER": "aws"}, env_file=None))
    assert [(one.what, one.verdict) for one in found] == [("place", "failed"), ("the rest", "unknown")]
    assert aws.calls == set()


async def test_no_credentials_is_the_one_thing_to_put_right_then(
    aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = await check(
        load({**os.environ, "AWS_SUBNET_ID": "subnet-1", "AWS_SECURITY_GROUP_ID": "sg-1"}, env_file=None)
    )
    assert [(one.what, one.verdict) for one in found] == [
        ("place", "ok"),
        ("credentials", "failed"),
        ("the rest", "unknown"),
    ]
    assert "instance profile" in found[1].fix


async def test_on_ec2_the_instances_profile_is_named(aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = await checked(aws)
    assert found["credentials"] == Finding("credentials", "ok", "this instance's profile")


async def test_credentials_that_expired_end_the_questions(aws: FaultyAccount) -> None:
    aws.fail(
        "sts:GetCallerIdentity", "ExpiredToken", "The security token included in the request is expired", status=403
    )
    found = await checked(aws)
    assert found["identity"].verdict == "failed"
    assert "expired" in found["identity"].detail
    assert list(found) == ["place", "credentials", "identity", "the rest"]


async def test_a_launch_that_is_not_allowed_is_found_by_a_dry_run(aws: FaultyAccount) -> None:
    aws.fail("ec2:RunInstances", "UnauthorizedOperation", UNAUTHORIZED, status=403)
    found = (await checked(aws))["may ec2:RunInstances"]
    assert (found.verdict, found.fix) == ("failed", "allow ec2:RunInstances, as deploy/aws/policy.json does")


async def test_a_launch_that_is_wrong_otherwise_shows_what_aws_says(aws: FaultyAccount) -> None:
    aws.fail("ec2:RunInstances", "InvalidKeyPair.NotFound", "The key pair 'mine' does not exist")
    found = (await checked(aws, ENVD_AWS_KEY_NAME="mine"))["may ec2:RunInstances"]
    assert (found.verdict, "'mine'" in found.detail, "ENVD_AWS_KEY_NAME" in found.fix) == ("failed", True, True)


@pytest.mark.parametrize(
    ("decision", "verdict"),
    [
        pytest.param(None, "unknown", id="nobody can tell"),
        pytest.param("allowed", "ok", id="the simulator says yes"),
        pytest.param("implicitDeny", "failed", id="the simulator says no"),
    ],
)
async def test_what_a_policy_may_allow_on_envds_instances_alone_is_not_called_forbidden(
    aws: FaultyAccount, decision: str | None, verdict: str
) -> None:
    aws.fail("ec2:TerminateInstances", "UnauthorizedOperation", UNAUTHORIZED, status=403)
    if decision:
        simulated(aws, decision)
    assert (await checked(aws))["may ec2:TerminateInstances"].verdict == verdict


async def test_where_a_desktop_runs_the_dry_run_is_on_it(aws: FaultyAccount) -> None:
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "envd:daemon", "Value": "0e0e0e"}]}]
    ec2 = aws.client("ec2")
    made = ec2.run_instances(ImageId=aws.ami, MinCount=1, MaxCount=1, InstanceType="t3.xlarge", TagSpecifications=tags)
    instance = made["Instances"][0]["InstanceId"]
    try:
        assert (await checked(aws))["may ec2:CreateTags"].detail == f"by a dry run on {instance}"
        aws.fail("ec2:TerminateInstances", "UnauthorizedOperation", UNAUTHORIZED, status=403)
        assert (await checked(aws))["may ec2:TerminateInstances"].verdict == "failed"
    finally:
        ec2.terminate_instances(InstanceIds=[instance])


@pytest.mark.parametrize(
    ("decision", "verdict", "fix"),
    [
        pytest.param("allowed", "ok", "", id="allowed"),
        pytest.param(
            "explicitDeny", "failed", "allow scheduler:CreateSchedule, as deploy/aws/policy.json does", id="denied"
        ),
        pytest.param(
            None, "unknown", "allow iam:SimulatePrincipalPolicy, as deploy/aws/policy.json does", id="not told"
        ),
    ],
)
async def test_schedules_have_no_dry_run_and_are_simulated(
    aws: FaultyAccount, decision: str | None, verdict: str, fix: str
) -> None:
    if decision:
        simulated(aws, decision)
    found = (await checked(aws))["may scheduler:CreateSchedule"]
    assert (found.verdict, found.fix) == (verdict, fix)


@pytest.mark.parametrize(
    ("environ", "wanted", "absent"),
    [
        pytest.param({"ENABLE_TTL": "false"}, set(), {"may scheduler:CreateSchedule", "may iam:PassRole"}, id="no TTL"),
        pytest.param(
            {"ENVD_AWS_SPARES_STOPPED": "1"}, {"may ec2:StopInstances", "may ec2:StartInstances"}, set(), id="stopped"
        ),
        pytest.param({}, set(), {"may ec2:StopInstances", "may ec2:CreateReplaceRootVolumeTask"}, id="plain"),
        pytest.param(
            {"ENVD_AWS_RESET": "replace-root"},
            {"may ec2:CreateReplaceRootVolumeTask", "may ec2:DescribeReplaceRootVolumeTasks"},
            set(),
            id="replace-root",
        ),
    ],
)
async def test_permissions_are_those_that_the_settings_lead_to(
    aws: FaultyAccount, environ: dict[str, str], wanted: set[str], absent: set[str]
) -> None:
    aws.fail("ec2:CreateReplaceRootVolumeTask", "DryRunOperation", status=412)
    aws.fail("ec2:DescribeReplaceRootVolumeTasks", "DryRunOperation", status=412)
    found = await checked(aws, **environ)
    assert wanted <= found.keys()
    assert not absent & found.keys()


@pytest.mark.parametrize(
    ("environ", "what", "told"),
    [
        pytest.param(
            {"ENVD_AWS_AMI": "ami-0123"}, "image ami-0123", "it is not in us-east-1, or not shared", id="absent"
        ),
        pytest.param(
            {"ENVD_AWS_AMI": "", "ENVD_SCREEN": "1280x720"}, "image", "No image is published for 1280x720", id="none"
        ),
        pytest.param(
            {"AWS_INSTANCE_TYPE": "t4g.xlarge"}, "image and type", "x86_64, and t4g.xlarge is arm64", id="arm"
        ),
    ],
)
async def test_an_image_that_cannot_be_used_fails(
    aws: FaultyAccount, environ: dict[str, str], what: str, told: str
) -> None:
    found = (await checked(aws, **environ))[what]
    assert (found.verdict, told in found.detail, bool(found.fix)) == ("failed", True, True), found


async def test_an_image_that_is_still_being_copied_fails(aws: FaultyAccount) -> None:
    aws.rewrite("ec2:DescribeImages", lambda body: body.replace(b">available<", b">pending<"))
    found = (await checked(aws))[f"image {aws.ami}"]
    assert (found.verdict, "pending" in found.detail) == ("failed", True)


async def test_a_zone_without_the_type_names_those_that_have_it(aws: FaultyAccount) -> None:
    ec2 = aws.client("ec2")
    made = ec2.create_subnet(VpcId=aws.vpc, CidrBlock="127.30.9.0/24", AvailabilityZone="us-east-1e")["Subnet"]
    found = await checked(aws, AWS_SUBNET_ID=f"{aws.subnets[0]},{made['SubnetId']}")
    assert found["t3.xlarge in us-east-1a"].verdict == "ok"
    assert found["t3.xlarge in us-east-1e"].verdict == "failed"
    assert "us-east-1a" in found["t3.xlarge in us-east-1e"].fix


async def test_subnets_and_groups_that_there_are_not_fail_each_by_itself(aws: FaultyAccount) -> None:
    found = await checked(aws, AWS_SUBNET_ID=f"{aws.subnets[0]},subnet-0123", AWS_SECURITY_GROUP_ID="sg-0123")
    assert found[f"subnet {aws.subnets[0]}"].verdict == "ok"
    assert (found["subnet subnet-0123"].verdict, found["security group sg-0123"].verdict) == ("failed", "failed")


@pytest.mark.parametrize(
    ("free", "verdict"), [pytest.param(0, "failed", id="none"), pytest.param(5, "warning", id="few")]
)
async def test_a_subnet_without_free_addresses_is_noticed(aws: FaultyAccount, free: int, verdict: str) -> None:
    count = b"<availableIpAddressCount>%d</availableIpAddressCount>"
    aws.rewrite("ec2:DescribeSubnets", lambda body: body.replace(count % 251, count % free))
    assert (await checked(aws))[f"subnet {aws.subnets[0]}"].verdict == verdict


async def test_a_group_of_another_vpc_fails(aws: FaultyAccount) -> None:
    other = aws.client("ec2").create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    foreign = group(aws, other)
    found = (await checked(aws, AWS_SECURITY_GROUP_ID=foreign))[f"security group {foreign}"]
    assert (found.verdict, found.detail) == ("failed", f"it is of {other}, and the subnets are of {aws.vpc}")


async def test_closed_ports_have_the_command_that_opens_them_to_this_host(aws: FaultyAccount) -> None:
    closed = group(aws)
    found = await checked(aws, AWS_SECURITY_GROUP_ID=closed)
    verdicts = {port: found[f"port {port} of desktops"].verdict for port in (5000, 9222, 8080, 8006, 5910)}
    assert verdicts == {5000: "failed", 9222: "failed", 8080: "warning", 8006: "warning", 5910: "warning"}
    assert found["port 5000 of desktops"].fix == (
        f"aws ec2 authorize-security-group-ingress --group-id {closed} --protocol tcp --port 5000"
        f" --source-group {aws.security_group}"
    )


async def test_what_is_open_to_all_works_and_is_warned_of(aws: FaultyAccount) -> None:
    wide = group(aws, "", world(5000, 5910))
    found = await checked(aws, AWS_SECURITY_GROUP_ID=wide)
    assert found["port 5000 of desktops"].verdict == "ok"
    warning = found[f"{wide} open to all"]
    assert (warning.verdict, "tcp 5000-5910 is open to 0.0.0.0/0" in warning.detail) == ("warning", True)
    assert "revoke-security-group-ingress" in warning.fix


async def test_by_public_addresses_this_hosts_group_is_no_way_in(aws: FaultyAccount) -> None:
    desktops = group(aws, "", tcp(5000, 9222, UserIdGroupPairs=[{"GroupId": aws.security_group}]))
    found = await checked(aws, AWS_SECURITY_GROUP_ID=desktops, ENVD_AWS_PUBLIC_IP="1")
    assert found["port 5000 of desktops"].verdict == "failed"
    assert "by public addresses" in found["way to the desktops"].detail


async def test_a_host_in_another_vpc_reaches_no_private_address(aws: FaultyAccount) -> None:
    found = (await checked(aws, {"vpc": "vpc-0123"}))["way to the desktops"]
    assert found.verdict == "warning"
    assert "ENVD_AWS_PUBLIC_IP=1" in found.fix


@pytest.mark.parametrize(
    ("vcpus", "environ", "verdict", "told"),
    [
        pytest.param(64, {"ENVD_ENVS": "4"}, "ok", "64 vCPUs, 0 in use: room for 16 more t3.xlarge of 4", id="room"),
        pytest.param(8, {"ENVD_ENVS": "2", "ENVD_SPARES": "1"}, "warning", "room for 2 more", id="not for all"),
        pytest.param(3, {}, "failed", "room for 0 more", id="not for one"),
        pytest.param(64, {"AWS_INSTANCE_TYPE": "g4dn.xlarge"}, "unknown", "a quota of its own", id="another quota"),
    ],
)
async def test_the_quota_is_held_against_what_the_settings_want(
    aws: FaultyAccount, vcpus: int, environ: dict[str, str], verdict: str, told: str
) -> None:
    quota(aws, vcpus)
    found = (await checked(aws, **environ))["vCPU quota"]
    assert (found.verdict, told in found.detail) == (verdict, True), found


async def test_a_quota_that_may_not_be_seen_is_unknown_and_says_what_to_allow(aws: FaultyAccount) -> None:
    aws.fail("servicequotas:GetServiceQuota", "AccessDeniedException", status=400)
    found = (await checked(aws))["vCPU quota"]
    assert (found.verdict, "servicequotas:GetServiceQuota" in found.fix) == ("unknown", True)


def role(aws: FaultyAccount, name: str, trust: dict[str, Any]) -> str:
    made = aws.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
    return str(made["Role"]["Arn"])


async def test_a_role_for_the_ttl_must_be_the_schedulers_to_assume(aws: FaultyAccount) -> None:
    good, bad = role(aws, "good", trust_document(ACCOUNT)), role(aws, "bad", trust_document("210987654321"))
    try:
        assert (await checked(aws, AWS_SCHEDULER_ROLE_ARN=good))["TTL role"].verdict == "ok"
        found = (await checked(aws, AWS_SCHEDULER_ROLE_NAME="bad"))["TTL role"]
        assert (found.verdict, bad in found.detail) == ("failed", True)
        assert "update-assume-role-policy --role-name bad" in found.fix
    finally:
        for name in ("good", "bad"):
            aws.client("iam").delete_role(RoleName=name)


@pytest.mark.parametrize(
    ("decision", "environ", "verdict", "told"),
    [
        pytest.param("allowed", {}, "ok", "the first start makes it, which is allowed", id="can be made"),
        pytest.param("implicitDeny", {}, "failed", "it may not be made", id="may not be made"),
        pytest.param(None, {}, "unknown", "if it may", id="perhaps"),
        pytest.param(
            None,
            {"AWS_SCHEDULER_ROLE_ARN": f"arn:aws:iam::{ACCOUNT}:role/gone"},
            "failed",
            "there is no",
            id="given and gone",
        ),
        pytest.param(None, {"ENABLE_TTL": "false"}, "warning", "nothing ends an instance", id="none is wanted"),
    ],
)
async def test_a_role_that_there_is_not(
    aws: FaultyAccount, decision: str | None, environ: dict[str, str], verdict: str, told: str
) -> None:
    if decision:
        simulated(aws, decision)
    found = (await checked(aws, **environ))["TTL role"]
    assert (found.verdict, told in found.detail) == (verdict, True), found


async def test_whether_trainers_come_in_is_told_of_this_hosts_groups(aws: FaultyAccount) -> None:
    closed = (await checked(aws, {"security_groups": group(aws)}))["port 15001 inbound"]
    assert (closed.verdict, "--port 15001" in closed.fix) == ("warning", True)
    wide = group(aws, "", world(15001, 15001))
    found = await checked(aws, {"security_groups": wide})
    assert found[f"{wide} open to all"].verdict == "warning"


async def test_off_ec2_what_cannot_be_told_is_unknown(aws: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    desktops = group(aws, "", tcp(5000, 9222, IpRanges=[{"CidrIp": "203.0.113.0/24"}]))
    environ = {"ENVD_AWS_AMI": aws.ami, "AWS_SUBNET_ID": aws.subnets[0], "AWS_SECURITY_GROUP_ID": desktops}
    aws.fail(SIMULATE, "AccessDenied", times=None)
    found = {one.what: one for one in await check(load({**os.environ, **environ}, env_file=None))}
    assert found["port 15001 inbound"].verdict == "unknown"
    assert found["port 5000 of desktops"].verdict == "unknown"
    assert "203.0.113.0/24" in found["port 5000 of desktops"].detail
    assert found["way to the desktops"].verdict == "warning"


async def test_one_question_without_an_answer_leaves_the_others_theirs(aws: FaultyAccount) -> None:
    aws.fail("ec2:DescribeSubnets", "UnauthorizedOperation", UNAUTHORIZED, status=403)
    found = await checked(aws)
    assert (found["network"].verdict, found["network"].fix.startswith("Allow ec2:DescribeSubnets")) == ("unknown", True)
    assert found[f"image {aws.ami}"].verdict == "ok"


async def test_looks_go_on_at_once_but_not_all_and_keep_their_order() -> None:
    going, most = 0, 0

    async def look(number: int) -> list[Finding]:
        nonlocal going, most
        going, most = going + 1, max(most, going + 1)
        for _ in range(20 - number):
            await anyio.lowlevel.checkpoint()
        going -= 1
        return [Finding(str(number), "ok", "")]

    found = await gather([(str(number), lambda number=number: look(number)) for number in range(20)])  # type: ignore[misc]
    assert [one.what for one in found] == [str(number) for number in range(20)]
    assert most == AT_ONCE


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(CloudRefused("It is down.", hint="Wait."), ("It is down.", "Wait."), id="refused"),
        pytest.param(
            NotAuthorized("No.", action="ec2:DescribeImages"),
            ("No.", "Allow ec2:DescribeImages, as deploy/aws/policy.json does."),
            id="not allowed",
        ),
        pytest.param(KeyError("Quota"), ("AWS's answer was not understood: KeyError('Quota')", ""), id="an odd answer"),
    ],
)
async def test_a_look_that_fails_is_an_unknown_of_its_name(error: Exception, told: tuple[str, str]) -> None:
    async def look() -> list[Finding]:
        raise error

    (found,) = await gather([("it", look)])
    assert (found.what, found.verdict, (found.detail, found.fix)) == ("it", "unknown", told)
