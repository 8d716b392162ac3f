"""What EC2 tells an instance about itself, by its metadata service: version 2, which wants a token, then version 1."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import aiohttp
import anyio

ENDPOINT = "http://169.254.169.254"
PATIENCE = 1.8
"""Seconds for all of it. On EC2 it takes milliseconds; elsewhere nothing answers, and a start waits for that."""
_TOKEN_PATIENCE = 0.8
"""Seconds for the token. In a container it can be lost on its way: the answer may be good for one hop alone."""
_MOST = 65_536
"""Bytes of an answer that are read. The longest, the identity document, has about 500."""


@dataclass(frozen=True)
class HostFacts:
    """This host, as an instance: ids, and of its first network interface where it is."""

    instance_id: str
    instance_type: str
    region: str
    zone: str
    subnet: str
    vpc: str
    security_groups: tuple[str, ...]
    private_ip: str


async def about_this_host() -> HostFacts | None:
    """None where no metadata service answers as EC2's does, within 2 seconds; also where it is switched off for this
    process by AWS_EC2_METADATA_DISABLED, as it is for botocore."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    with anyio.move_on_after(PATIENCE):
        # Never by a proxy, whatever the environment says: that would tell of the proxy's host.
        async with aiohttp.ClientSession(trust_env=False) as session:
            try:
                return await _facts(session, await _token(session))
            except (aiohttp.ClientError, OSError, ValueError, KeyError):
                return None
    return None


def endpoint() -> str:
    """Where it is asked."""
    return (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT).rstrip("/")


async def _token(session: aiohttp.ClientSession) -> str | None:
    """For version 2; None where there is version 1 alone. Raises ClientError where nothing can be connected to."""
    with anyio.move_on_after(_TOKEN_PATIENCE):
        async with session.put(
            f"{endpoint()}/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        ) as answer:
            if answer.status == 200:
                return await _text(answer)
    return None


async def _facts(session: aiohttp.ClientSession, token: str | None) -> HostFacts:
    async def get(path: str) -> str:
        headers = {"X-aws-ec2-metadata-token": token} if token else {}
        async with session.get(f"{endpoint()}/latest/{path}", headers=headers, raise_for_status=True) as answer:
            return await _text(answer)

    document = json.loads(await get("dynamic/instance-identity/document"))
    if not isinstance(document, dict):
        raise ValueError("not an identity document")
    interface = f"meta-data/network/interfaces/macs/{await get('meta-data/mac')}"
    return HostFacts(
        instance_id=str(document["instanceId"]),
        instance_type=str(document["instanceType"]),
        region=str(document["region"]),
        zone=str(document["availabilityZone"]),
        subnet=await get(f"{interface}/subnet-id"),
        vpc=await get(f"{interface}/vpc-id"),
        security_groups=tuple((await get(f"{interface}/security-group-ids")).split()),
        private_ip=str(document["privateIp"]),
    )


async def _text(answer: aiohttp.ClientResponse) -> str:
    read = b""
    async for chunk in answer.content.iter_any():
        read += chunk
        if len(read) > _MOST:
            raise ValueError("more than a metadata service has to say")
    return read.decode().strip()
