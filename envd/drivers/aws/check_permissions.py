"""Of the preflight: who we are, and whether that one may make each call that the driver makes.

EC2 says so itself, by a dry run. Of the other services and of calls on tagged instances, where there is no instance
yet, IAM's simulator is asked, which the caller must be allowed to do.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import CloudRefused, NotAuthorized
from ...findings import Finding, Look
from ...settings import Settings
from . import tags
from .cloud import Cloud
from .findings import gather
from .launch import find_image, parameters
from .place import Place
from .scheduler_role import SCHEDULER

NOBODY = "i-00000000000000000"
"""An instance that there is not."""
POLICY = "deploy/aws/policy.json"
SCHEDULES = ("CreateSchedule", "DeleteSchedule", "UpdateSchedule")
MAKES_ROLE = ("iam:CreateRole", "iam:GetRolePolicy", "iam:PutRolePolicy")


@dataclass(frozen=True)
class Identity:
    """`arn` is what AWS calls us: a user, or a session of a role."""

    arn: str
    account: str

    @property
    def partition(self) -> str:
        """aws, aws-cn, aws-us-gov."""
        return self.arn.split(":")[1]

    @property
    def is_root(self) -> bool:
        """The account's owner may do everything, and cannot be simulated."""
        return self.arn.endswith(":root")

    @property
    def principal(self) -> str:
        """Whose policies count: of a session its role, taken to have no path."""
        session = re.fullmatch(r"arn:([\w-]+):sts::(\d+):assumed-role/([^/]+)/.*", self.arn)
        if session:
            partition, account, role = session.groups()
            return f"arn:{partition}:iam::{account}:role/{role}"
        return self.arn


def reads(settings: Settings) -> list[str]:
    """EC2's operations that look at all there is, of those that these settings lead to."""
    more = ["describe_replace_root_volume_tasks"] if settings.aws_reset == "replace-root" else []
    return ["describe_instances", "describe_instance_status", *more]


def on_instances(settings: Settings) -> dict[str, Mapping[str, Any]]:
    """EC2's operations on an instance of ours that these settings lead to → what they take beside its id."""
    wanted: dict[str, Mapping[str, Any]] = {
        "terminate_instances": {},
        "create_tags": {"Tags": tags.as_list({tags.EXPIRES: tags.in_utc(0)})},
        "get_console_output": {},
    }
    if settings.aws_spares_stopped:
        wanted |= {"stop_instances": {}, "start_instances": {}}
    if settings.aws_reset == "replace-root":
        wanted["create_replace_root_volume_task"] = {"DeleteReplacedRootVolume": True}
    return wanted


async def permissions(cloud: Cloud, settings: Settings, identity: Identity, place: Place | None) -> list[Finding]:
    """One for each action. A launch is tried in the first subnet of `place`, if that is known."""
    instance = await _one_of_ours(cloud)
    looks: list[tuple[str, Look]] = []
    if place is not None:
        looks.append((_may("ec2:RunInstances"), partial(_launch, cloud, settings, place)))
    looks += [(_may(cloud.action("ec2", name)), partial(_read, cloud, name)) for name in reads(settings)]
    for operation, beside in on_instances(settings).items():
        look = partial(_on_instance, cloud, identity, operation, instance, beside)
        looks.append((_may(cloud.action("ec2", operation)), look))
    if settings.enable_ttl:
        looks.append(("may schedule", partial(_scheduling, cloud, settings, identity)))
    return await gather(looks)


async def simulate(
    cloud: Cloud, identity: Identity, actions: Sequence[str], resource: str, context: Mapping[str, str]
) -> dict[str, str]:
    """IAM's decision for each: allowed, implicitDeny or explicitDeny. `context` is what requests would carry.

    Raises CloudRefused, mostly because the simulator may not be asked.
    """
    if identity.is_root:
        return dict.fromkeys(actions, "allowed")
    answer = await cloud.call(
        "iam",
        "simulate_principal_policy",
        PolicySourceArn=identity.principal,
        ActionNames=list(actions),
        ResourceArns=[resource],
        ContextEntries=[
            {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
            for key, value in context.items()
        ],
    )
    return {one["EvalActionName"]: one["EvalDecision"] for one in answer["EvaluationResults"]}


async def _one_of_ours(cloud: Cloud) -> str | None:
    """Any instance of envd's in this account: what is conditioned on its tag can be tried on it, dry."""
    try:
        answer = await cloud.call("ec2", "describe_instances", Filters=tags.of_anybody(), MaxResults=5)
    except CloudRefused:
        return None
    found = [one["InstanceId"] for reservation in answer["Reservations"] for one in reservation["Instances"]]
    return found[0] if found else None


async def _launch(cloud: Cloud, settings: Settings, place: Place) -> list[Finding]:
    """The very launch of a desktop, dry."""
    what = _may("ec2:RunInstances")
    try:
        image = await find_image(cloud, settings)
    except CloudRefused as refusal:
        return [Finding(what, "unknown", f"it cannot be tried without the image: {refusal.detail}")]
    marks = {"Name": "envd-preflight", tags.DAEMON: "preflight"}
    asked = parameters(settings, place, image, place.subnets[0], f"preflight-{secrets.token_hex(8)}", marks)
    try:
        await cloud.call("ec2", "run_instances", **asked, DryRun=True)
    except NotAuthorized as refusal:
        return [_denied(what, refusal)]
    except CloudRefused as refusal:
        if _was_dry(refusal):
            return [Finding(what, "ok", f"by a dry run of a desktop's launch in {place.subnets[0]}")]
        return [Finding(what, "failed", refusal.detail, refusal.hint)]
    return [_not_dry(what)]


async def _read(cloud: Cloud, operation: str) -> list[Finding]:
    what = _may(cloud.action("ec2", operation))
    try:
        await cloud.call("ec2", operation, DryRun=True)
    except NotAuthorized as refusal:
        return [_denied(what, refusal)]
    except CloudRefused as refusal:
        return [Finding(what, "ok", "by a dry run") if _was_dry(refusal) else _odd(what, refusal)]
    return [Finding(what, "ok", "it was answered")]


async def _on_instance(
    cloud: Cloud, identity: Identity, operation: str, instance: str | None, beside: Mapping[str, Any]
) -> list[Finding]:
    """Without an instance the simulator's word is taken first: a policy may allow this on envd's instances alone, and
    then a dry run on one that there is not is refused also to those who may."""
    action = cloud.action("ec2", operation)
    what = _may(action)
    simulator: CloudRefused | None = None
    if instance is None:
        resource = f"arn:{identity.partition}:ec2:{cloud.region}:{identity.account}:instance/{NOBODY}"
        try:
            return _decided(
                await simulate(cloud, identity, [action], resource, {f"aws:ResourceTag/{tags.DAEMON}": "any"})
            )
        except CloudRefused as refusal:
            simulator = refusal  # a dry run may yet tell
    one = {"Resources": [instance or NOBODY]} if operation == "create_tags" else _id(operation, instance or NOBODY)
    try:
        await cloud.call("ec2", operation, **one, **beside, DryRun=True)
    except CloudRefused as refusal:
        if _was_dry(refusal):
            return [Finding(what, "ok", f"by a dry run on {instance}" if instance else "by a dry run")]
        if simulator is not None:
            return [_not_without_instance(what, refusal, simulator)]
        return [_denied(what, refusal) if isinstance(refusal, NotAuthorized) else _odd(what, refusal)]
    return [_not_dry(what)]


def _id(operation: str, instance: str) -> dict[str, Any]:
    many = operation in ("terminate_instances", "stop_instances", "start_instances")
    return {"InstanceIds": [instance]} if many else {"InstanceId": instance}


async def _scheduling(cloud: Cloud, settings: Settings, identity: Identity) -> list[Finding]:
    """What the TTL takes: schedules, the role that they are given, and that role's making where it is not given."""
    schedule = f"arn:{identity.partition}:scheduler:{cloud.region}:{identity.account}:schedule/default/"
    role = role_arn(settings, identity)
    asked: list[tuple[Sequence[str], str, Mapping[str, str]]] = [
        ([f"scheduler:{name}" for name in SCHEDULES], f"{schedule}{tags.schedule_name(NOBODY)}", {}),
        (["scheduler:ListSchedules"], "*", {}),
        (["iam:PassRole"], role, {"iam:PassedToService": SCHEDULER}),
    ]
    if not settings.aws_scheduler_role_arn:
        asked.append((["iam:GetRole"], role, {}))
    found: list[Finding] = []
    refused: CloudRefused | None = None
    for actions, resource, context in asked:
        try:
            # Once it is known that the simulator does not answer us it is not asked again.
            if refused is None:
                found += _decided(await simulate(cloud, identity, actions, resource, context))
                continue
        except CloudRefused as error:
            refused = error
        assert refused is not None
        found += [_not_simulated(_may(action), refused) for action in actions]
    return found


def role_arn(settings: Settings, identity: Identity) -> str:
    """Of the scheduler's role: as it was given, or as it will be."""
    made = f"arn:{identity.partition}:iam::{identity.account}:role/{settings.aws_scheduler_role_name}"
    return settings.aws_scheduler_role_arn or made


def _may(action: str) -> str:
    return f"may {action}"


def _was_dry(refusal: CloudRefused) -> bool:
    return refusal.facts.get("aws_code") == "DryRunOperation"


def _decided(decisions: Mapping[str, str]) -> list[Finding]:
    return [
        Finding(_may(action), "ok", "by IAM's simulator")
        if decision == "allowed"
        else Finding(_may(action), "failed", f"IAM's simulator says {decision}", _allow(action))
        for action, decision in decisions.items()
    ]


def _denied(what: str, refusal: NotAuthorized) -> Finding:
    return Finding(what, "failed", refusal.detail, _allow(str(refusal.facts.get("denied") or refusal.facts["action"])))


def _allow(action: str) -> str:
    return f"allow {action}, as {POLICY} does"


def _odd(what: str, refusal: CloudRefused) -> Finding:
    return Finding(what, "unknown", refusal.detail, refusal.hint)


def _not_dry(what: str) -> Finding:
    return Finding(what, "unknown", "AWS answered a dry run as if it were none")


def _not_simulated(what: str, simulator: CloudRefused) -> Finding:
    detail = f"it has no dry run, and IAM's simulator was no help: {simulator.detail}"
    return Finding(what, "unknown", detail, _let_simulate(simulator))


def _not_without_instance(what: str, refusal: CloudRefused, simulator: CloudRefused) -> Finding:
    detail = (
        "there is no desktop yet to try it on, and without one it is refused also to those who may do it to envd's"
        f" instances alone: {refusal.detail}"
    )
    return Finding(what, "unknown", detail, _let_simulate(simulator))


def _let_simulate(simulator: CloudRefused) -> str:
    return _allow("iam:SimulatePrincipalPolicy") if isinstance(simulator, NotAuthorized) else ""
