"""Inbound rules: who comes through, by what, and what cannot be told from here."""

from __future__ import annotations

from typing import Any

import pytest

from envd.drivers.aws.reach import Source, opening, reaches, revoking, rules_of

HERE = Source("10.0.1.7", frozenset({"sg-host"}))
ELSEWHERE = Source()


def group(protocol: str = "tcp", first: int | None = 5000, last: int | None = 5000, **peers: str) -> dict[str, Any]:
    """With one rule for each of `peers`: cidr, cidr6, group, prefix_list."""
    ports = {} if first is None else {"FromPort": first, "ToPort": last}
    permission = {
        "IpProtocol": protocol,
        **ports,
        "IpRanges": [{"CidrIp": peers[name]} for name in peers if name == "cidr"],
        "Ipv6Ranges": [{"CidrIpv6": peers[name]} for name in peers if name == "cidr6"],
        "UserIdGroupPairs": [{"GroupId": peers[name]} for name in peers if name == "group"],
        "PrefixListIds": [{"PrefixListId": peers[name]} for name in peers if name == "prefix_list"],
    }
    return {"GroupId": "sg-desktops", "IpPermissions": [permission]}


@pytest.mark.parametrize(
    ("made", "source", "expected"),
    [
        pytest.param(group(cidr="10.0.0.0/16"), HERE, ("open", "10.0.0.0/16"), id="by a block that has the address"),
        pytest.param(group(cidr="10.0.1.7/16"), HERE, ("open", "10.0.1.7/16"), id="by a block with host bits"),
        pytest.param(group(cidr="10.1.0.0/16"), HERE, ("closed", "10.1.0.0/16"), id="not by another block"),
        pytest.param(group(group="sg-host"), HERE, ("open", "sg-host"), id="by its group"),
        pytest.param(group(group="sg-other"), HERE, ("closed", "sg-other"), id="not by another group"),
        pytest.param(group(prefix_list="pl-1"), HERE, ("unknown", "pl-1"), id="perhaps by a prefix list"),
        pytest.param(group(cidr="10.0.0.0/8"), ELSEWHERE, ("unknown", "10.0.0.0/8"), id="address not known"),
        pytest.param(group(cidr="0.0.0.0/0"), ELSEWHERE, ("open", "0.0.0.0/0"), id="the world includes everybody"),
        pytest.param(
            group(cidr6="2001:db8::/32"), HERE, ("closed", "2001:db8::/32"), id="an IPv6 block is no IPv4 one"
        ),
        pytest.param(group("-1", None, cidr="10.0.0.0/8"), HERE, ("open", "10.0.0.0/8"), id="all protocols, no ports"),
        pytest.param(group("udp", cidr="10.0.0.0/8"), HERE, ("closed", ""), id="udp is not tcp"),
        pytest.param(group("tcp", 5001, 9000, cidr="10.0.0.0/8"), HERE, ("closed", ""), id="just above"),
        pytest.param(group("tcp", 4000, 5000, cidr="10.0.0.0/8"), HERE, ("open", "10.0.0.0/8"), id="last of a range"),
    ],
)
def test_who_comes_to_port_5000(made: dict[str, Any], source: Source, expected: tuple[str, str]) -> None:
    assert reaches(rules_of([made]), 5000, source) == expected


def test_rules_of_several_groups_add_up_and_certainty_wins() -> None:
    rules = rules_of([group(prefix_list="pl-1"), group(cidr="192.0.2.0/24"), group(group="sg-host")])
    assert reaches(rules, 5000, HERE) == ("open", "sg-host")


def test_the_fix_for_a_closed_port_lets_in_this_host_alone() -> None:
    assert opening("sg-1", 9222, HERE).endswith("--protocol tcp --port 9222 --source-group sg-host")
    assert opening("sg-1", 9222, Source("10.0.1.7")).endswith("--cidr 10.0.1.7/32")
    assert "0.0.0.0" not in opening("sg-1", 9222, ELSEWHERE)


@pytest.mark.parametrize(
    ("made", "ports", "command"),
    [
        pytest.param(
            group("tcp", 22, 22, cidr="0.0.0.0/0"),
            "tcp 22",
            "'IpProtocol=tcp,FromPort=22,ToPort=22,IpRanges=[{CidrIp=0.0.0.0/0}]'",
            id="one port",
        ),
        pytest.param(
            group("-1", None, cidr6="::/0"),
            "everything",
            "'IpProtocol=-1,Ipv6Ranges=[{CidrIpv6=::/0}]'",
            id="everything",
        ),
        pytest.param(
            group("icmp", -1, -1, cidr="0.0.0.0/0"),
            "icmp",
            "'IpProtocol=icmp,FromPort=-1,ToPort=-1,IpRanges=[{CidrIp=0.0.0.0/0}]'",
            id="a ping",
        ),
    ],
)
def test_a_rule_is_named_and_can_be_taken_away(made: dict[str, Any], ports: str, command: str) -> None:
    (rule,) = rules_of([made])
    assert rule.ports == ports
    assert revoking(rule) == f"aws ec2 revoke-security-group-ingress --group-id sg-desktops --ip-permissions {command}"
