"""Where desktops go: region, subnets and security groups; as they were set, else, on EC2, those of this host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import SettingsError
from ...settings import Settings, variable
from .metadata import HostFacts, about_this_host, endpoint

Origin = Literal["set", "this host's"]

FIELDS = ("aws_region", "aws_subnet_id", "aws_security_group_id")
_HOW = {
    "aws_region": "AWS_REGION, for example us-east-1",
    "aws_subnet_id": "AWS_SUBNET_ID (`aws ec2 describe-subnets --query 'Subnets[].[SubnetId,VpcId]'` lists them)",
    "aws_security_group_id": (
        "AWS_SECURITY_GROUP_ID (`aws ec2 describe-security-groups --query 'SecurityGroups[].[GroupId,VpcId]'`)"
    ),
}


@dataclass(frozen=True)
class Place:
    """`subnets` are tried in this order. `origins`: name of the setting's field → where its value is from."""

    region: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    origins: Mapping[str, Origin]


async def find_place(settings: Settings) -> Place:
    """Asks this host's metadata for what is not set, and only then. Raises SettingsError that names all that is missing
    and how to set it."""
    missing = [field for field in FIELDS if not getattr(settings, field)]
    host = await about_this_host() if missing else None
    region = settings.aws_region or (host.region if host else "")
    subnets, groups = settings.aws_subnet_id, settings.aws_security_group_id
    if missing:
        # What this host has in its own region is nothing to another.
        if host is None or host.region != region:
            raise _lacking(missing, region, host)
        subnets, groups = subnets or (host.subnet,), groups or host.security_groups
    origins: dict[str, Origin] = {field: "set" if getattr(settings, field) else "this host's" for field in FIELDS}
    return Place(region, subnets, groups, origins)


async def find_region(settings: Settings) -> str:
    """For whoever asks AWS about what there is, and launches nothing. Raises SettingsError."""
    if settings.aws_region:
        return settings.aws_region
    host = await about_this_host()
    if host is None:
        raise _lacking(["aws_region"], "", None)
    return host.region


def _lacking(missing: Sequence[str], region: str, host: HostFacts | None) -> SettingsError:
    names = [variable(field) for field in missing]
    if host is None:
        why = f"and this host's metadata ({endpoint()}) cannot be had, so it is not on EC2 or must not ask"
    else:
        why = f"and this host's own are of {host.region}, not {region}"
    return SettingsError(
        f"EC2 desktops need {_and(names)}: not set, {why}.",
        hint=f"Set, in the environment or .env: {'; '.join(_HOW[field] for field in missing)}.",
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
