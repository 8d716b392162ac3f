"""What deploy/aws hands out: a policy with what the code calls and nothing else, a template that is valid and gives the
same, a start that looks first."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import botocore.session
import pytest
from aws_cloud import KEYS, REGION, Account, account
from aws_faults import FaultyAccount, faulty_account
from aws_metadata import metadata
from botocore import xform_name
from cfnlint.api import lint_file
from cfnlint.decode import decode

from envd.drivers.aws import AwsDriver
from envd.drivers.aws.check import check
from envd.drivers.aws.check_network import PORTS
from envd.drivers.aws.cloud import SERVICES, open_cloud
from envd.drivers.aws.scheduler_role import permissions_document, trust_document
from envd.drivers.aws.sweep import sweep
from envd.drivers.aws.ttl import open_ttl
from envd.drivers.base import InstanceSpec, Report
from envd.settings import Settings, load

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy" / "aws"
PASSED = "iam:PassRole"
"""No call of its own: who gives a schedule its role must be allowed to."""
MAKING = "MakeTheSchedulersRole"


def document(name: str) -> dict[str, Any]:
    return json.loads((DEPLOY / name).read_text())  # type: ignore[no-any-return]  # JSON


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allowed(policy: Mapping[str, Any]) -> set[str]:
    return {action for statement in policy["Statement"] for action in listed(statement["Action"])}


def operations() -> dict[str, str]:
    """Every operation of the services that are called, as clients name it → as policies do."""
    session = botocore.session.get_session()
    return {
        xform_name(name): f"{service.replace('-', '')}:{name}"
        for service in reversed(SERVICES)
        for name in session.get_service_model(service).operation_names
    }


def test_the_policy_has_every_action_that_the_code_names_and_no_other() -> None:
    known = operations()
    named = {
        node.value
        for path in (ROOT / "envd" / "drivers" / "aws").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert {known[name] for name in named & known.keys()} | {PASSED} == allowed(document("policy.json"))


def all_of_it(aws: FaultyAccount) -> Settings:
    """Settings that lead to every call there is."""
    environ = {
        **os.environ,
        "PROVIDER": "aws",
        "AWS_SUBNET_ID": aws.subnets[0],
        "AWS_SECURITY_GROUP_ID": aws.security_group,
        "ENVD_AWS_AMI": aws.ami,
        "ENVD_AWS_RESET": "replace-root",
        "ENVD_AWS_SPARES_STOPPED": "1",
    }
    return load(environ, env_file=None)


async def prolong(aws: FaultyAccount, settings: Settings) -> None:
    (reservation,) = aws.client("ec2").describe_instances()["Reservations"]
    async with open_cloud(REGION) as cloud:
        ttl = await open_ttl(cloud, settings)
        assert ttl is not None
        await ttl.prolong(reservation["Instances"][0]["InstanceId"])


async def test_the_policy_has_every_action_that_is_called_and_no_other() -> None:
    with faulty_account() as aws:
        settings = all_of_it(aws)
        first, second = (InstanceSpec(id=f"envd-0e0e0e-{word}", env=0, screen=(1920, 1080)) for word in ("a", "b"))
        async with AwsDriver(settings, "0e0e0e") as driver:
            await driver.create(first, Report())
            assert await driver.renew(first.id, second, Report())
            await driver.park(second.id)
            await driver.unpark(second.id, Report())
            await driver.log_tail(second.id)
            await prolong(aws, settings)
            await sweep(driver._cloud, "0e0e0e", driver._opened)
            async with metadata(subnet=aws.subnets[0], vpc=aws.vpc, security_groups=aws.security_group):
                await check(settings)
            await driver.destroy(second.id)
        assert aws.calls | {PASSED} == allowed(document("policy.json"))


OTHERWISE = {
    "ec2:DescribeImages",
    "ec2:DescribeInstanceTypeOfferings",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "iam:CreateRole",
    "iam:GetRolePolicy",
    "iam:PutRolePolicy",
    "iam:SimulatePrincipalPolicy",
    "servicequotas:GetServiceQuota",
    "sts:GetCallerIdentity",
}
"""Actions that the preflight needs itself, and those that make the scheduler's role: told with what they are for."""


async def test_the_preflight_tries_every_action_of_the_policy() -> None:
    with faulty_account() as aws:
        aws.fail("iam:SimulatePrincipalPolicy", "AccessDenied", times=None)
        found = {finding.what for finding in await check(all_of_it(aws))}
    tried = {what.removeprefix("may ") for what in found if what.startswith("may ")}
    assert tried | OTHERWISE == allowed(document("policy.json"))
    assert not tried & OTHERWISE


def template() -> dict[str, Any]:
    found, problems = decode(str(DEPLOY / "envd.yaml"))
    assert not problems
    return found  # type: ignore[no-any-return]  # cfn-lint's own kind of dict


def test_the_template_is_valid() -> None:
    assert [f"{match.linenumber}: {match.message}" for match in lint_file(DEPLOY / "envd.yaml")] == []


def test_the_templates_host_may_do_what_the_policy_says_but_not_write_the_schedulers_role() -> None:
    resources = template()["Resources"]
    given = [
        *resources["HostRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"],
        *resources["HostTries"]["Properties"]["PolicyDocument"]["Statement"],
    ]
    wanted = [one for one in document("policy.json")["Statement"] if one["Sid"] != MAKING]

    def told(statement: Mapping[str, Any]) -> tuple[Any, ...]:
        """Without where: the template knows region and account."""
        return statement["Sid"], statement["Effect"], listed(statement["Action"]), statement.get("Condition")

    assert [told(one) for one in given] == [told(one) for one in wanted]


def test_the_schedulers_role_is_the_one_that_the_code_makes() -> None:
    account = "123456789012"
    assert document("scheduler-trust.json") == trust_document(account)
    assert document("scheduler-policy.json") == permissions_document("aws", account)
    role = template()["Resources"]["SchedulerRole"]["Properties"]
    (trust,), (policy,) = role["AssumeRolePolicyDocument"]["Statement"], role["Policies"]
    assert (
        json.loads(json.dumps(trust).replace('{"Ref": "AWS::AccountId"}', f'"{account}"'))
        == (trust_document(account)["Statement"][0])
    )
    (given,), (wanted,) = policy["PolicyDocument"]["Statement"], permissions_document("aws", account)["Statement"]
    assert (given["Action"], given["Condition"]) == (wanted["Action"], wanted["Condition"])


def test_whoever_has_a_role_is_a_service_and_not_an_account() -> None:
    (statement,) = document("trust.json")["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert template()["Resources"]["HostRole"]["Properties"]["AssumeRolePolicyDocument"]["Statement"] == [statement]


def test_desktops_are_reached_by_the_host_alone_on_the_ports_that_the_preflight_looks_at() -> None:
    rules = template()["Resources"]["DesktopsGroup"]["Properties"]["SecurityGroupIngress"]
    assert {rule["FromPort"] for rule in rules} == {rule["ToPort"] for rule in rules} == set(PORTS)
    assert all(rule["SourceSecurityGroupId"] == {"Ref": "HostGroup"} for rule in rules)
    assert all(
        rule.keys() <= {"IpProtocol", "FromPort", "ToPort", "SourceSecurityGroupId", "Description"} for rule in rules
    )


@pytest.mark.parametrize(
    ("block", "taken"),
    [
        pytest.param("10.0.0.0/16", True, id="a network"),
        pytest.param("0.0.0.0/0", False, id="the world"),
        pytest.param("", False, id="nothing"),
        pytest.param("sg-1", False, id="no block"),
    ],
)
def test_the_world_is_not_let_in(block: str, taken: bool) -> None:
    pattern = template()["Parameters"]["TrainersCidr"]["AllowedPattern"]
    assert (re.search(pattern, block) is not None) is taken


def start(folder: Path, *arguments: str, check: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What it said, and how it called Python, which says of the check that it ended with `check`."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$PROVIDER $*" >> called\n[ "$4" != check ] && exit 0\nexit {check}\n')
    python.chmod(0o755)
    done = subprocess.run(
        [str(DEPLOY / "start-aws.sh"), *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "PROVIDER": "docker"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done, (folder / "called").read_text().splitlines()


def test_the_start_looks_first_and_then_serves(tmp_path: Path) -> None:
    done, called = start(tmp_path, "--host", "0.0.0.0", check=0)
    assert done.returncode == 0
    assert called == ["aws -m envd aws check", "aws -m envd serve --host 0.0.0.0"]


def test_nothing_is_started_where_the_check_failed_unless_told_so(tmp_path: Path) -> None:
    done, called = start(tmp_path, check=1)
    assert (done.returncode, called) == (78, ["aws -m envd aws check"])
    assert "--unchecked" in done.stderr
    (tmp_path / "called").unlink()
    done, called = start(tmp_path, "--unchecked", "--port", "1", check=1)
    assert (done.returncode, called) == (0, ["aws -m envd serve --port 1"])


async def printed(aws: Account) -> str:
    """What `envd aws check` prints on a host in this account, where a rule is missing and another is too wide. Ids are
    made up by the account: here they are counted."""
    ec2 = aws.client("ec2")
    here = ec2.create_security_group(GroupName="envd", Description="envd", VpcId=aws.vpc)["GroupId"]
    opened = [("10.0.0.0/16", here, 15001), ("0.0.0.0/0", aws.security_group, 22)]
    for block, group, port in opened:
        rule = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": block}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    for port in (5000, 8006, 8080, 5910):
        rule = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "UserIdGroupPairs": [{"GroupId": here}]}
        ec2.authorize_security_group_ingress(GroupId=aws.security_group, IpPermissions=[rule])
    async with metadata(subnet=aws.subnets[0], vpc=aws.vpc, security_groups=here):
        environ = {name: value for name, value in os.environ.items() if name not in {*KEYS, "AWS_REGION"}}
        settings = {"AWS_SECURITY_GROUP_ID": aws.security_group, "ENVD_AWS_AMI": aws.ami}
        done = await anyio.run_process(
            [sys.executable, "-m", "envd", "aws", "check"], env=environ | settings, check=False
        )
    assert done.returncode == 1
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        kind = found[1]
        count = sum(1 for known in numbers if known.startswith(f"{kind}-"))
        return numbers.setdefault(found[0], f"{kind}-{count + 1:017}")

    return re.sub(r"\b(ami|sg|subnet|vpc)-[0-9a-f]{17}", numbered, done.stdout.decode())


async def test_the_guides_show_the_preflight_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with account() as aws:
        told = [line.rstrip() for line in (await printed(aws)).splitlines()]
    shown = [path.read_text() for path in (ROOT / "README.md", DEPLOY / "README.md")]
    samples = [text.partition("$ envd aws check\n")[2].partition("\n```")[0] for text in shown]
    assert [sample.splitlines() for sample in samples if sample] == [told] * sum(1 for sample in samples if sample)
    assert samples[1]
