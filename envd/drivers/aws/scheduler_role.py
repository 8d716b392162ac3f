"""The role as which EventBridge Scheduler ends instances: the one that was named, else one that is made once.

find_role(cloud, settings)       its ARN
trust_document(account)          who may assume it: the scheduler, on behalf of this account
permissions_document(…)          what it may do: end instances of envd
fault_in_trust(document, …)      why the scheduler could not assume a role
"""

from __future__ import annotations

import json
import re
from typing import Any

import structlog

from ...errors import CloudRefused, SettingsError, TtlUnavailable
from ...settings import Settings
from .cloud import Cloud
from .tags import DAEMON

logger = structlog.get_logger(__name__)

DESCRIPTION = "EventBridge Scheduler ends envd desktops with it. Made by envd."
"""By which a role is known that was made here."""
POLICY = "terminate-envd-desktops"
SCHEDULER = "scheduler.amazonaws.com"
_ARN = re.compile(r"arn:(?P<partition>aws[\w-]*):iam::(?P<account>\d{12}):role/[\w+=,.@/-]+")
_SOURCE = "aws:SourceAccount"
_WAYS_OUT = (
    "The policy and the role are in deploy/aws/; a role that there is goes into AWS_SCHEDULER_ROLE_ARN. With"
    " ENABLE_TTL=false desktops are launched that nothing ends if this daemon is lost."
)


async def find_role(cloud: Cloud, settings: Settings) -> str:
    """The ARN of AWS_SCHEDULER_ROLE_ARN, as it is; else of AWS_SCHEDULER_ROLE_NAME, which is made if it is missing.

    Raises SettingsError for what is no ARN of a role, and TtlUnavailable.
    """
    if given := settings.aws_scheduler_role_arn:
        if _ARN.fullmatch(given) is None:
            raise SettingsError(
                f"AWS_SCHEDULER_ROLE_ARN={given:.200} is no role's ARN.",
                hint="It looks like arn:aws:iam::123456789012:role/envd-scheduler-terminate.",
            )
        return given
    name = settings.aws_scheduler_role_name
    try:
        role = await _look(cloud, name) or await _make(cloud, name)
        return await _checked(cloud, role)
    except TtlUnavailable:
        raise
    except CloudRefused as refusal:
        raise unavailable(f"The role {name}, as which AWS ends desktops, cannot be had", refusal, name) from refusal


def unavailable(what: str, refusal: CloudRefused, role: str) -> TtlUnavailable:
    """`what` happened because of `refusal`, and what to do."""
    error = TtlUnavailable(
        f"{what}: {refusal.detail}", hint=f"{refusal.hint} {_WAYS_OUT}".strip(), **{**refusal.facts, "role": role}
    )
    error.retryable = refusal.retryable
    return error


def trust_document(account: str) -> dict[str, Any]:
    """As IAM takes it."""
    return _policy(
        Principal={"Service": SCHEDULER}, Action="sts:AssumeRole", Condition={"StringEquals": {_SOURCE: account}}
    )


def permissions_document(partition: str, account: str) -> dict[str, Any]:
    """Instances without a tag of envd's are nothing to it, whatever a schedule says."""
    return _policy(
        Action="ec2:TerminateInstances",
        Resource=f"arn:{partition}:ec2:*:{account}:instance/*",
        Condition={"Null": {f"aws:ResourceTag/{DAEMON}": "false"}},
    )


def fault_in_trust(document: Any, account: str) -> str:
    """Why the scheduler cannot assume a role of `account` whose trust policy this is; empty if it can, as far as can be
    said: of conditions the account's is looked at alone."""
    found = _listed(document.get("Statement")) if isinstance(document, dict) else []
    statements = [one for one in found if isinstance(one, dict) and _is_for_scheduler(one)]
    if not statements:
        return f"its trust policy does not let {SCHEDULER} assume it"
    wanted = [_accounts(one) for one in statements]
    if any(accounts is None or account in accounts for accounts in wanted):
        return ""
    others = sorted({other for accounts in wanted for other in accounts or ()})
    return f"its trust policy lets the scheduler assume it for account {', '.join(others)} alone, and this is {account}"


async def _look(cloud: Cloud, name: str) -> dict[str, Any] | None:
    try:
        answer = await cloud.call("iam", "get_role", RoleName=name)
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") == "NoSuchEntity":
            return None
        raise
    role: dict[str, Any] = answer["Role"]
    return role


async def _make(cloud: Cloud, name: str) -> dict[str, Any]:
    account = (await cloud.call("sts", "get_caller_identity"))["Account"]
    trust = json.dumps(trust_document(account))
    try:
        answer = await cloud.call(
            "iam", "create_role", RoleName=name, AssumeRolePolicyDocument=trust, Description=DESCRIPTION
        )
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") != "EntityAlreadyExists" or (role := await _look(cloud, name)) is None:
            raise
        return role  # another daemon was faster
    made: dict[str, Any] = answer["Role"]
    logger.info("a role was made for the scheduler", role=made["Arn"])
    return {**made, "AssumeRolePolicyDocument": json.loads(trust)}


async def _checked(cloud: Cloud, role: dict[str, Any]) -> str:
    """Its ARN. A role that somebody else made is used as it is, or told to be unusable; of our own, what a daemon that
    was killed between the two calls left out is done now."""
    arn, name = str(role["Arn"]), str(role["RoleName"])
    parts = _ARN.fullmatch(arn)
    account, partition = (parts["account"], parts["partition"]) if parts else ("", "aws")
    if fault := fault_in_trust(role.get("AssumeRolePolicyDocument"), account):
        raise TtlUnavailable(
            f"The role {name} cannot be used: {fault}.",
            hint="Correct it in IAM, or name another role in AWS_SCHEDULER_ROLE_NAME: it is made if it is missing. "
            + _WAYS_OUT,
            action="iam:GetRole",
            role=arn,
        )
    if role.get("Description") == DESCRIPTION:
        await _permit(cloud, name, permissions_document(partition, account))
    return arn


async def _permit(cloud: Cloud, name: str, permissions: dict[str, Any]) -> None:
    try:
        await cloud.call("iam", "get_role_policy", RoleName=name, PolicyName=POLICY)
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") != "NoSuchEntity":
            raise
        await cloud.call(
            "iam", "put_role_policy", RoleName=name, PolicyName=POLICY, PolicyDocument=json.dumps(permissions)
        )


def _policy(**statement: Any) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]}


def _is_for_scheduler(statement: dict[str, Any]) -> bool:
    principal = statement.get("Principal")
    services = _listed(principal.get("Service")) if isinstance(principal, dict) else []
    return (
        statement.get("Effect") == "Allow"
        and SCHEDULER in services
        and bool({"sts:AssumeRole", "sts:*", "*"} & {*_listed(statement.get("Action"))})
    )


def _accounts(statement: dict[str, Any]) -> set[str] | None:
    """Those for which it holds; None for all."""
    for tests in (statement.get("Condition") or {}).values():
        for key, values in tests.items():
            if key.lower() == _SOURCE.lower():
                return {str(value) for value in _listed(values)}
    return None


def _listed(value: Any) -> list[Any]:
    """Policies write a list of one as the one."""
    return value if isinstance(value, list) else [] if value is None else [value]
