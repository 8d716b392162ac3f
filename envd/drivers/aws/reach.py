"""Who comes through the inbound rules of security groups: nothing is asked here, only read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal

WORLD = ("0.0.0.0/0", "::/0")
Answer = Literal["open", "closed", "unknown"]
Group = Mapping[str, Any]
"""A security group, as DescribeSecurityGroups gives it."""


@dataclass(frozen=True)
class Source:
    """Who wants in. `address` is the one that arrives, None where that cannot be known; `groups` are the security
    groups that it comes with, which only private addresses do."""

    address: str | None = None
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """One inbound rule for one peer: a CIDR block, another group (sg-…) or a prefix list (pl-…). Ports are both
    inclusive."""

    group: str
    protocol: str
    first: int
    last: int
    peer: str

    def covers(self, port: int) -> bool:
        return self.protocol in ("tcp", "-1") and self.first <= port <= self.last

    def lets_in(self, source: Source) -> bool | None:
        """None where it cannot be told."""
        if self.peer in WORLD:
            return True
        if self.peer.startswith("sg-"):
            return self.peer in source.groups
        if self.peer.startswith("pl-") or source.address is None:
            return None
        return ip_address(source.address) in ip_network(self.peer, strict=False)

    @property
    def ports(self) -> str:
        if self.protocol == "-1":
            return "everything"
        protocol = {"58": "icmpv6"}.get(self.protocol, self.protocol)
        if protocol not in ("tcp", "udp"):
            return protocol
        return f"{protocol} {self.first}" if self.first == self.last else f"{protocol} {self.first}-{self.last}"


def rules_of(groups: Sequence[Group]) -> list[Rule]:
    return [
        rule for group in groups for permission in group.get("IpPermissions", ()) for rule in _rules(group, permission)
    ]


def reaches(rules: Sequence[Rule], port: int, source: Source) -> tuple[Answer, str]:
    """Whether `source` comes to TCP `port`, and by which rules' peers; those of several groups add up, as in EC2."""
    covering = [rule for rule in rules if rule.covers(port)]
    verdicts: tuple[tuple[Answer, bool | None], ...] = (("open", True), ("unknown", None))
    for answer, wanted in verdicts:
        peers = [rule.peer for rule in covering if rule.lets_in(source) is wanted]
        if peers:
            return answer, ", ".join(dict.fromkeys(peers))
    return "closed", ", ".join(dict.fromkeys(rule.peer for rule in covering))


def revoking(rule: Rule) -> str:
    """The command that takes `rule` away."""
    ranges = f"Ipv6Ranges=[{{CidrIpv6={rule.peer}}}]" if ":" in rule.peer else f"IpRanges=[{{CidrIp={rule.peer}}}]"
    ports = "" if rule.protocol == "-1" else f"FromPort={rule.first},ToPort={rule.last},"
    return (
        f"aws ec2 revoke-security-group-ingress --group-id {rule.group}"
        f" --ip-permissions 'IpProtocol={rule.protocol},{ports}{ranges}'"
    )


def opening(group: str, port: int, source: Source) -> str:
    """The command that lets `source` in, and nobody else where that can be said."""
    if source.groups:
        peer = f"--source-group {min(source.groups)}"
    else:
        peer = f"--cidr {source.address or '<address of this host as the desktops see it>'}/32"
    return f"aws ec2 authorize-security-group-ingress --group-id {group} --protocol tcp --port {port} {peer}"


def _rules(group: Group, permission: Mapping[str, Any]) -> Iterator[Rule]:
    peers = [
        *(one["CidrIp"] for one in permission.get("IpRanges", ())),
        *(one["CidrIpv6"] for one in permission.get("Ipv6Ranges", ())),
        *(one["GroupId"] for one in permission.get("UserIdGroupPairs", ())),
        *(one["PrefixListId"] for one in permission.get("PrefixListIds", ())),
    ]
    everything = permission["IpProtocol"] == "-1"
    for peer in peers:
        yield Rule(
            group=group["GroupId"],
            protocol=permission["IpProtocol"],
            first=0 if everything else permission.get("FromPort", 0),
            last=65_535 if everything else permission.get("ToPort", 65_535),
            peer=peer,
        )
