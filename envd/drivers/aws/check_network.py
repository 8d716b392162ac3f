"""Of the preflight: subnets, zones, security groups, and the ways from this host to a desktop and from others here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...findings import Finding, Verdict
from ...settings import Settings
from .cloud import Cloud
from .metadata import HostFacts
from .reach import WORLD, Rule, Source, opening, reaches, revoking, rules_of

PORTS: Mapping[int, str] = {
    5000: "the guest's server",
    9222: "Chrome's DevTools",
    8006: "noVNC of containers",
    8080: "VLC's web page",
    5910: "noVNC",
}
OPTIONAL = (8006, 5910, 8080)
"""Ports that desktops work without: by two of them a person watches, and few tasks ask VLC."""
FEW_ADDRESSES = 8
Tree = Mapping[str, Any]


async def network(
    cloud: Cloud, settings: Settings, subnet_ids: Sequence[str], group_ids: Sequence[str], host: HostFacts | None
) -> list[Finding]:
    """Of the desktops' subnets and groups. Raises CloudRefused if AWS does not tell of them."""
    subnets = await _described(cloud, "describe_subnets", "Subnets", "subnet-id", subnet_ids)
    groups = await _described(cloud, "describe_security_groups", "SecurityGroups", "group-id", group_ids)
    vpcs = {one["VpcId"] for one in subnets}
    source = _source(settings, host)
    rules = rules_of(groups)
    return [
        *_subnets(cloud.region, subnet_ids, subnets),
        *await _offered(cloud, settings.aws_instance_type, subnets),
        *_groups(cloud.region, group_ids, groups, vpcs),
        *([_vpc(settings, vpcs, host)] if vpcs else []),
        *(_port(port, rules, groups[0]["GroupId"], source) for port in PORTS if groups),
        *(_world(rule) for rule in rules if rule.peer in WORLD),
    ]


async def inbound(cloud: Cloud, settings: Settings, host: HostFacts | None) -> list[Finding]:
    """Of this host's own groups: whether trainers come to envd's port. Raises CloudRefused."""
    what = f"port {settings.port} inbound"
    if host is None:
        return [Finding(what, "unknown", "this host is not on EC2, or may not ask; see its firewall")]
    if host.region != cloud.region:
        return [Finding(what, "unknown", f"this host is in {host.region}, and {cloud.region} was asked")]
    groups = await _described(cloud, "describe_security_groups", "SecurityGroups", "group-id", host.security_groups)
    rules = [rule for rule in rules_of(groups) if rule.covers(settings.port)]
    if not rules:
        to = f"--group-id {min(host.security_groups)} --protocol tcp --port {settings.port}"
        return [
            Finding(
                what,
                "warning",
                "no rule of this host's security groups opens it, so trainers on other hosts cannot come in",
                f"aws ec2 authorize-security-group-ingress {to} --cidr <the trainers' network>",
            )
        ]
    peers = ", ".join(dict.fromkeys(rule.peer for rule in rules))
    found = [_world(rule) for rule in rules if rule.peer in WORLD]
    return found or [Finding(what, "ok", f"open to {peers}")]


async def _described(cloud: Cloud, operation: str, key: str, name: str, ids: Sequence[str]) -> list[Any]:
    """By a filter: with it those that there are not are left out; asked by id, one of them would spoil the answer."""
    if not ids:
        return []
    return await cloud.pages("ec2", operation, key, Filters=[{"Name": name, "Values": list(ids)}])


def _subnets(region: str, wanted: Sequence[str], found: Sequence[Tree]) -> list[Finding]:
    by_id = {one["SubnetId"]: one for one in found}
    return [_subnet(region, subnet, by_id.get(subnet)) for subnet in wanted]


def _subnet(region: str, subnet: str, found: Tree | None) -> Finding:
    what = f"subnet {subnet}"
    if found is None:
        fix = f"AWS_SUBNET_ID=one of `aws ec2 describe-subnets --region {region}`"
        return Finding(what, "failed", f"there is none in {region}, for this account", fix)
    free = found["AvailableIpAddressCount"]
    detail = f"{found['AvailabilityZone']}, {found['VpcId']}, {found['CidrBlock']}, {free} addresses free"
    if free == 0:
        return Finding(what, "failed", detail, "name another subnet in AWS_SUBNET_ID")
    if free < FEW_ADDRESSES:
        return Finding(what, "warning", detail, "name another subnet in AWS_SUBNET_ID beside it")
    return Finding(what, "ok", detail)


async def _offered(cloud: Cloud, kind: str, subnets: Sequence[Tree]) -> list[Finding]:
    offers = await cloud.pages(
        "ec2",
        "describe_instance_type_offerings",
        "InstanceTypeOfferings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": [kind]}],
    )
    offering = sorted(one["Location"] for one in offers)
    zones = dict.fromkeys(one["AvailabilityZone"] for one in subnets)
    return [_zone(cloud.region, kind, zone, offering) for zone in zones]


def _zone(region: str, kind: str, zone: str, offering: Sequence[str]) -> Finding:
    what = f"{kind} in {zone}"
    if zone in offering:
        return Finding(what, "ok", "offered")
    if offering:
        fix = f"AWS_SUBNET_ID=a subnet in {', '.join(offering)}, or another AWS_INSTANCE_TYPE"
        return Finding(what, "failed", "not offered in this zone", fix)
    return Finding(what, "failed", f"not offered anywhere in {region}", "AWS_INSTANCE_TYPE=t3.xlarge")


def _groups(region: str, wanted: Sequence[str], found: Sequence[Tree], vpcs: set[str]) -> list[Finding]:
    by_id = {one["GroupId"]: one for one in found}
    return [_group(region, group, by_id.get(group), vpcs) for group in wanted]


def _group(region: str, group: str, found: Tree | None, vpcs: set[str]) -> Finding:
    what = f"security group {group}"
    if found is None:
        fix = f"AWS_SECURITY_GROUP_ID=one of `aws ec2 describe-security-groups --region {region}`"
        return Finding(what, "failed", f"there is none in {region}, for this account", fix)
    others = sorted(vpcs - {found["VpcId"]})
    if others:
        vpc = ",".join(others)
        fix = f"AWS_SECURITY_GROUP_ID=one of `aws ec2 describe-security-groups --filters Name=vpc-id,Values={vpc}`"
        return Finding(what, "failed", f"it is of {found['VpcId']}, and the subnets are of {vpc}", fix)
    return Finding(what, "ok", f"{found.get('GroupName', '')}, {found['VpcId']}")


def _vpc(settings: Settings, vpcs: set[str], host: HostFacts | None) -> Finding:
    what = "way to the desktops"
    theirs = ", ".join(sorted(vpcs))
    if settings.aws_public_ip:
        return Finding(what, "ok", "by public addresses; the subnets need a route to an internet gateway")
    if host is not None and vpcs == {host.vpc}:
        return Finding(what, "ok", f"this host ({host.private_ip}) and the subnets share {host.vpc}")
    mine = f"is in {host.vpc}" if host else "is not on EC2"
    return Finding(
        what,
        "warning",
        f"this host {mine} and the subnets are in {theirs}: their private addresses are reached from within it only",
        f"run envd in {theirs}, or join the networks (peering, VPN), or ENVD_AWS_PUBLIC_IP=1",
    )


def _source(settings: Settings, host: HostFacts | None) -> Source:
    """This host as a desktop sees it. By public addresses its own is lost on the way, and its groups with it."""
    if host is None or settings.aws_public_ip:
        return Source()
    return Source(host.private_ip, frozenset(host.security_groups))


def _port(port: int, rules: Sequence[Rule], group: str, source: Source) -> Finding:
    what = f"port {port} of desktops"
    answer, peers = reaches(rules, port, source)
    use = PORTS[port]
    if answer == "open":
        return Finding(what, "ok", f"{use}: open to this host, by {peers}")
    if answer == "unknown":
        return Finding(
            what, "unknown", f"{use}: open to {peers}; whether this host is of them cannot be told from here"
        )
    others = f"open to {peers}, and not to this host" if peers else "no rule opens it"
    verdict: Verdict = "warning" if port in OPTIONAL else "failed"
    return Finding(what, verdict, f"{use}: {others}", opening(group, port, source))


def _world(rule: Rule) -> Finding:
    return Finding(
        f"{rule.group} open to all",
        "warning",
        f"{rule.ports} is open to {rule.peer}: published images have known passwords",
        revoking(rule),
    )
