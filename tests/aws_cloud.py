"""An account at AWS for tests: moto's server, over real HTTP, in a process of its own.

    with account() as aws:
        async with open_cloud(REGION) as cloud: ...

Its VPC is 127.30.0.0/16, so that whoever listens on an instance's private address is the instance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import boto3

REGION = "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "a secret of nobody"}
NOBODY_ELSE = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Whatever this machine has of its own stays out of it."""
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""
"""Ends with whoever started it: nobody else holds the other end of its stdin."""


@dataclass(frozen=True)
class Account:
    """`url` is where AWS answers. `subnets` are in two zones and have 127.30.1.0/24 and 127.30.2.0/24; `ami` is an
    image that can be launched there. `environ` is what a process needs to be in this account."""

    url: str
    vpc: str
    subnets: tuple[str, str]
    security_group: str
    ami: str
    environ: Mapping[str, str] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        """A blocking client, to look from beside at what came of something."""
        return boto3.client(service, region_name=REGION, endpoint_url=self.url)


@contextmanager
def account() -> Iterator[Account]:
    """A fresh one. Within the block this process is in it."""
    with moto() as url:
        environ = {**NOBODY_ELSE, **KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}
        with patch.dict(os.environ, environ):
            yield _laid_out(url, environ)


def _laid_out(url: str, environ: Mapping[str, str]) -> Account:
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="127.30.0.0/16")["Vpc"]["VpcId"]
    first, second = (
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"127.30.{number}.0/24", AvailabilityZone=f"{REGION}{zone}")["Subnet"]
        for number, zone in ((1, "a"), (2, "b"))
    )
    group = ec2.create_security_group(GroupName="desktops", Description="desktops", VpcId=vpc)["GroupId"]
    root = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 30, "VolumeType": "gp3"}}
    image = ec2.register_image(
        Name="desktop", Architecture="x86_64", RootDeviceName="/dev/sda1", BlockDeviceMappings=[root]
    )["ImageId"]
    return Account(url, vpc, (first["SubnetId"], second["SubnetId"]), group, image, environ)


@contextmanager
def moto() -> Iterator[str]:
    """Where it answers."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://{process.stdout.readline().strip()}"
        finally:
            process.stdin.close()
            process.wait(10)
