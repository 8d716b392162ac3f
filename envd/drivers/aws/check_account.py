"""Of the preflight: what the account has to have: the image, room for vCPUs, the role of the TTL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import AmiUnavailable, CloudRefused, NotAuthorized
from ...findings import Finding
from ...settings import Settings
from .check_permissions import MAKES_ROLE, Identity, role_arn, simulate
from .cloud import Cloud
from .launch import ami_of
from .refusals import MORE_OF, STANDARD_VCPUS
from .scheduler_role import fault_in_trust

STANDARD = frozenset("acdhimrtz")
"""First letters of the types that the quota of standard instances counts, and names that begin so and are others."""
OTHERS = ("inf", "trn", "dl", "mac", "hpc")
GIVE_ROLE = "make it of deploy/aws/scheduler-trust.json and scheduler-policy.json, and set AWS_SCHEDULER_ROLE_ARN"
TRUST = "aws iam update-assume-role-policy --role-name {name} --policy-document file://deploy/aws/scheduler-trust.json"


async def image(cloud: Cloud, settings: Settings, identity: Identity) -> list[Finding]:
    """Raises CloudRefused."""
    try:
        ami = ami_of(settings, cloud.region)
    except AmiUnavailable as refusal:
        return [Finding("image", "failed", refusal.detail, refusal.hint)]
    what = f"image {ami}"
    found = await cloud.pages("ec2", "describe_images", "Images", Filters=[{"Name": "image-id", "Values": [ami]}])
    if not found:
        detail = f"it is not in {cloud.region}, or not shared with account {identity.account}"
        copy = (
            f"aws ec2 copy-image --region {cloud.region} --source-region … --source-image-id {ami} --name envd-desktop"
        )
        return [Finding(what, "failed", detail, f"{copy}, and ENVD_AWS_AMI=the copy; or have its owner share it")]
    return [_judged(what, found[0], identity), *await _architecture(cloud, settings, found[0])]


def _judged(what: str, found: Mapping[str, Any], identity: Identity) -> Finding:
    whose = "ours" if found.get("OwnerId") == identity.account else f"shared by {found.get('OwnerId')}"
    device, state = found.get("RootDeviceName", "no root device"), found.get("State", "unknown")
    detail = f"{found.get('Name', 'without a name')}, {whose}, {found.get('Architecture', 'x86_64')}, {device}, {state}"
    if state != "available":
        return Finding(what, "failed", detail, f"aws ec2 wait image-available --image-ids {found['ImageId']}")
    if found.get("RootDeviceType") == "instance-store":
        return Finding(what, "failed", f"{detail}; its root is no EBS volume", "ENVD_AWS_AMI=an image with an EBS root")
    return Finding(what, "ok", detail)


async def _architecture(cloud: Cloud, settings: Settings, found: Mapping[str, Any]) -> list[Finding]:
    """Nothing where image and type fit."""
    kind = settings.aws_instance_type
    architecture = found.get("Architecture", "x86_64")
    supported = (await _type(cloud, kind))["ProcessorInfo"]["SupportedArchitectures"]
    if architecture in supported:
        return []
    detail = f"the image is for {architecture}, and {kind} is {' or '.join(supported)}"
    return [Finding("image and type", "failed", detail, f"AWS_INSTANCE_TYPE=a type for {architecture}")]


async def _type(cloud: Cloud, kind: str) -> Mapping[str, Any]:
    """Raises CloudRefused also for a type that there is not."""
    answer = await cloud.call("ec2", "describe_instance_types", InstanceTypes=[kind])
    found: Mapping[str, Any] = answer["InstanceTypes"][0]
    return found


async def quota(cloud: Cloud, settings: Settings) -> list[Finding]:
    """Of vCPUs, against what runs in the account and what these settings will want. Raises CloudRefused."""
    what, kind = "vCPU quota", settings.aws_instance_type
    if not _is_standard(kind):
        detail = f"{kind} is no standard type, and has a quota of its own"
        return [
            Finding(what, "unknown", detail, "look it up: aws service-quotas list-service-quotas --service-code ec2")
        ]
    each = (await _type(cloud, kind))["VCpuInfo"]["DefaultVCpus"]
    quota = await cloud.call("service-quotas", "get_service_quota", ServiceCode="ec2", QuotaCode=STANDARD_VCPUS)
    limit, used = int(quota["Quota"]["Value"]), await _vcpus(cloud)
    room = max(0, limit - used) // each
    wanted = settings.envs + settings.spares
    detail = f"{limit} vCPUs, {used} in use: room for {room} more {kind} of {each}; {wanted} are configured"
    more = MORE_OF.format(region=cloud.region, service="ec2")
    fix = f"{more}{STANDARD_VCPUS} --desired-value {used + max(wanted, 1) * each}"
    if room == 0:
        return [Finding(what, "failed", detail, fix)]
    return [Finding(what, "ok" if room >= wanted else "warning", detail, "" if room >= wanted else fix)]


async def _vcpus(cloud: Cloud) -> int:
    """Of all on-demand standard instances that run. Raises CloudRefused."""
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    reservations = await cloud.pages("ec2", "describe_instances", "Reservations", Filters=states)
    running = [one for reservation in reservations for one in reservation["Instances"]]
    return sum(
        one["CpuOptions"]["CoreCount"] * one["CpuOptions"]["ThreadsPerCore"]
        for one in running
        if _is_standard(one["InstanceType"]) and "InstanceLifecycle" not in one and "CpuOptions" in one
    )


async def ttl_role(cloud: Cloud, settings: Settings, identity: Identity) -> list[Finding]:
    what = "TTL role"
    if not settings.enable_ttl:
        return [
            Finding(
                what, "warning", "ENABLE_TTL=false: nothing ends an instance if this daemon is lost", "ENABLE_TTL=true"
            )
        ]
    arn = role_arn(settings, identity)
    try:
        role = (await cloud.call("iam", "get_role", RoleName=arn.rsplit("/", 1)[1]))["Role"]
    except NotAuthorized as refusal:
        if settings.aws_scheduler_role_arn:
            return [Finding(what, "unknown", f"{arn} is given, and may not be looked at: {refusal.detail}")]
        return [Finding(what, "failed", refusal.detail, GIVE_ROLE)]
    except CloudRefused as refusal:
        if refusal.facts.get("aws_code") != "NoSuchEntity":
            raise
        return [await _role_to_be_made(cloud, settings, identity, arn)]
    if fault := fault_in_trust(role.get("AssumeRolePolicyDocument"), identity.account):
        return [Finding(what, "failed", f"{arn}: {fault}", TRUST.format(name=role["RoleName"]))]
    return [Finding(what, "ok", f"{arn} is there, and the scheduler may assume it")]


async def _role_to_be_made(cloud: Cloud, settings: Settings, identity: Identity, arn: str) -> Finding:
    what = "TTL role"
    if settings.aws_scheduler_role_arn:
        return Finding(what, "failed", f"there is no {arn}", GIVE_ROLE)
    try:
        decisions = await simulate(cloud, identity, MAKES_ROLE, arn, {})
    except CloudRefused:
        return Finding(what, "unknown", f"there is no {arn} yet; the first start makes it, if it may", GIVE_ROLE)
    denied = sorted(action for action, decision in decisions.items() if decision != "allowed")
    if denied:
        return Finding(what, "failed", f"there is no {arn}, and it may not be made: {', '.join(denied)}", GIVE_ROLE)
    return Finding(what, "ok", f"there is no {arn} yet; the first start makes it, which is allowed")


def _is_standard(kind: str) -> bool:
    return kind[:1] in STANDARD and not kind.startswith(OTHERS)
