"""`envd aws check`: whether desktops can be launched with these settings, before one is.

Nothing is launched, changed or made: all of it is questions and dry runs. Who we are and what we may do is in
`check_permissions.py`; subnets, groups and ports are in `check_network.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

import aioboto3
from anyio.to_thread import run_sync
from botocore.exceptions import BotoCoreError, NoCredentialsError

from ...errors import CloudRefused, SettingsError
from ...findings import Finding, Look
from ...settings import Settings
from .check_account import image, quota, ttl_role
from .check_network import inbound, network
from .check_permissions import Identity, permissions
from .cloud import Cloud, open_cloud
from .findings import gather
from .metadata import about_this_host
from .place import Place, find_place
from .refusals import explain

KEYS = {
    "env": "keys from the environment",
    "shared-credentials-file": "keys from ~/.aws/credentials",
    "config-file": "keys from ~/.aws/config",
}
"""botocore's ways that find keys which last, as a rule."""
WAYS: Mapping[str, str] = KEYS | {
    "iam-role": "this instance's profile",
    "container-role": "this container's role",
    "sso": "a single sign-on",
    "assume-role": "a role that is assumed",
    "assume-role-with-web-identity": "a role that is assumed with a web identity",
    "custom-process": "a program of ~/.aws/config",
}


async def check(settings: Settings) -> list[Finding]:
    """All that is found, in the order in which it is to be put right. Takes some seconds; raises nothing that AWS or
    the settings are the reason for."""
    place, found = await _place(settings)
    region = place.region if place else settings.aws_region
    if not region:
        return [found, _not_looked("there is no region to ask in")]
    credentials = await _credentials(region)
    if credentials.verdict == "failed":
        return [found, credentials, _not_looked("without credentials AWS answers nothing")]
    async with open_cloud(region) as cloud:
        try:
            identity = await _identity(cloud)
        except CloudRefused as refusal:
            unknown = Finding("identity", "failed", refusal.detail, refusal.hint)
            return [found, credentials, unknown, _not_looked("AWS does not accept who asks")]
        known = Finding("identity", "ok", f"{identity.arn}, account {identity.account}")
        return [found, credentials, known, *await _all(cloud, settings, place, identity)]


async def _all(cloud: Cloud, settings: Settings, place: Place | None, identity: Identity) -> list[Finding]:
    host = await about_this_host()
    subnets, groups = settings.aws_subnet_id, settings.aws_security_group_id
    if place is not None:
        subnets, groups = place.subnets, place.security_groups
    looks: list[tuple[str, Look]] = [
        ("permissions", partial(permissions, cloud, settings, identity, place)),
        ("image", partial(image, cloud, settings, identity)),
        ("network", partial(network, cloud, settings, subnets, groups, host)),
        ("vCPU quota", partial(quota, cloud, settings)),
        ("TTL role", partial(ttl_role, cloud, settings, identity)),
        (f"port {settings.port} inbound", partial(inbound, cloud, settings, host)),
    ]
    return await gather(looks)


async def _place(settings: Settings) -> tuple[Place | None, Finding]:
    try:
        place = await find_place(settings)
    except SettingsError as error:
        return None, Finding("place", "failed", error.detail, error.hint)

    def told(field: str, values: Sequence[str]) -> str:
        return f"{', '.join(values)} ({place.origins[field]})"

    detail = (
        f"region {told('aws_region', [place.region])}, subnets {told('aws_subnet_id', place.subnets)},"
        f" security groups {told('aws_security_group_id', place.security_groups)}"
    )
    return place, Finding("place", "ok", detail)


async def _credentials(region: str) -> Finding:
    """Which of botocore's ways found some. Whether they are good is told by who AWS says we are."""
    try:
        # In a thread, with a loop of its own: it reads files of the user's, and runs programs that they name.
        session = await run_sync(partial(aioboto3.Session, region_name=region))
        credentials = await run_sync(asyncio.run, session.get_credentials())
    except (BotoCoreError, OSError) as error:
        refusal = explain(error, "credentials", region=region, asked={})
        return Finding("credentials", "failed", refusal.detail, refusal.hint)
    if credentials is None:
        refusal = explain(NoCredentialsError(), "credentials", region=region, asked={})
        return Finding("credentials", "failed", refusal.detail, refusal.hint)
    way = WAYS.get(credentials.method, credentials.method)
    if credentials.method in KEYS and not credentials.token:
        way = f"{way}, which last until they are revoked; an instance profile needs none"
    return Finding("credentials", "ok", way)


async def _identity(cloud: Cloud) -> Identity:
    answer = await cloud.call("sts", "get_caller_identity")
    return Identity(answer["Arn"], answer["Account"])


def _not_looked(why: str) -> Finding:
    return Finding("the rest", "unknown", f"not looked at: {why}")
