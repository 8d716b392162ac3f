"""EC2's instance metadata service on loopback, for a process that believes itself on EC2.

    async with metadata() as service:
        ... about_this_host() ...

Within the block the environment points at it, and botocore finds the credentials of a role there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal
from unittest.mock import patch

from aiohttp import web

Manner = Literal["v2", "v1", "token lost", "absent", "slow", "another cloud", "garbage"]
"""v2 refuses whoever has no token; v1 has none to give; of `token lost` the token's answer does not come, as in a
container behind one hop too many; nothing listens where it is absent; slow never answers."""
TOKEN = "a-token"
MAC = "02:00:00:00:00:01"
ROLE = "envd-host"
HOST: Mapping[str, str] = {
    "instance_id": "i-0123456789abcdef0",
    "instance_type": "c6i.large",
    "region": "us-east-1",
    "zone": "us-east-1a",
    "subnet": "subnet-00000000000000001",
    "vpc": "vpc-00000000000000001",
    "security_groups": "sg-00000000000000001\nsg-00000000000000002",
    "private_ip": "127.30.1.200",
}


@dataclass
class Metadata:
    """`asked`: method and path of each request."""

    url: str
    asked: list[tuple[str, str]] = field(default_factory=list)


@asynccontextmanager
async def metadata(manner: Manner = "v2", **host: str) -> AsyncIterator[Metadata]:
    """`host` says what differs from HOST."""
    service = Metadata("")
    never = asyncio.Event()
    pages = _pages({**HOST, **host})

    async def answer(request: web.Request) -> web.Response:
        service.asked.append((request.method, request.path))
        if manner == "slow" or (manner == "token lost" and request.method == "PUT"):
            await never.wait()
        if request.method == "PUT":
            known = manner == "v2" and "X-aws-ec2-metadata-token-ttl-seconds" in request.headers
            return web.Response(text=TOKEN) if known else web.Response(status=403)
        if manner == "v2" and request.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            return web.Response(status=401)
        if manner == "garbage":
            return web.Response(text="<html>welcome to the network</html>")
        page = None if manner == "another cloud" else pages.get(request.path)
        return web.Response(status=404) if page is None else web.Response(text=page)

    app = web.Application()
    app.router.add_route("*", "/{anything:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    if manner == "absent":
        await runner.cleanup()
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url, "AWS_EC2_METADATA_DISABLED": "false"}
    try:
        with patch.dict(os.environ, environ):
            yield service
    finally:
        never.set()
        await runner.cleanup()


def _pages(host: Mapping[str, str]) -> dict[str, str]:
    document = {
        "instanceId": host["instance_id"],
        "instanceType": host["instance_type"],
        "region": host["region"],
        "availabilityZone": host["zone"],
        "privateIp": host["private_ip"],
        "accountId": "123456789012",
    }
    interface = f"/latest/meta-data/network/interfaces/macs/{MAC}"
    credentials = {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": "ASIAEXAMPLE",
        "SecretAccessKey": "a role's secret",
        "Token": "a session",
        "LastUpdated": "2026-01-01T00:00:00Z",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    return {
        "/latest/dynamic/instance-identity/document": json.dumps(document),
        "/latest/meta-data/mac": MAC,
        f"{interface}/subnet-id": host["subnet"],
        f"{interface}/vpc-id": host["vpc"],
        f"{interface}/security-group-ids": host["security_groups"],
        "/latest/meta-data/iam/security-credentials/": ROLE,
        f"/latest/meta-data/iam/security-credentials/{ROLE}": json.dumps(credentials),
    }
