"""One RunInstances, what it asks for, and the subnets that are tried one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from ...errors import AmiUnavailable, InsufficientCapacity
from ...settings import Settings
from ..base import InstanceSpec, Report
from .cloud import Cloud
from .place import Place
from .tags import as_list

logger = structlog.get_logger(__name__)

IMAGES: Mapping[str, Mapping[tuple[int, int], str]] = {
    "us-east-1": {(1920, 1080): "ami-0d23263edb96951d8"},
    "ap-east-1": {(1920, 1080): "ami-06850864d18fad836"},
}
"""Region → screen → image that OSWorld published, as its provider for AWS names them (IMAGE_ID_MAP)."""
LEAST_GIB = 30
"""Size of a root volume, if its image asks for no more. OSWorld's are made for it."""
CALL = 60.0
"""Seconds for one RunInstances. It is heard to its end, or what it launched would be unknown."""
TAGGED = ("instance", "volume", "network-interface")


@dataclass(frozen=True)
class Image:
    """What desktops boot from. `root` is the device name of its root volume."""

    id: str
    name: str
    root: str
    gib: int


def ami_of(settings: Settings, region: str) -> str:
    """The image that is set, else OSWorld's for this region and screen. Raises AmiUnavailable where there is none."""
    if settings.aws_ami:
        return settings.aws_ami
    if found := IMAGES.get(region, {}).get(settings.screen):
        return found
    there_are = "; ".join(
        f"{one} for {' and '.join(_size(screen) for screen in sizes)}" for one, sizes in IMAGES.items()
    )
    raise AmiUnavailable(
        f"No image is published for {_size(settings.screen)} in {region}: there is one in {there_are}.",
        hint="Copy one to your region (`aws ec2 copy-image`) or make one, and set ENVD_AWS_AMI to it; or set "
        "AWS_REGION and ENVD_SCREEN to where one is.",
        ami=None,
        region=region,
    )


async def find_image(cloud: Cloud, settings: Settings) -> Image:
    """Raises AmiUnavailable if it cannot be launched here, CloudRefused."""
    ami = ami_of(settings, cloud.region)
    images = (await cloud.call("ec2", "describe_images", ImageIds=[ami]))["Images"]
    if not images or images[0].get("State", "available") != "available":
        state = images[0]["State"] if images else "absent, or not shared with this account"
        raise AmiUnavailable(
            f"The image {ami} is {state} in {cloud.region}.",
            hint="Set ENVD_AWS_AMI to one of `aws ec2 describe-images --owners self --region "
            f"{cloud.region}`, or copy one there with `aws ec2 copy-image`.",
            ami=ami,
            region=cloud.region,
        )
    about = images[0]
    root = about.get("RootDeviceName") or "/dev/sda1"
    own = [
        one["Ebs"].get("VolumeSize", 0)
        for one in about.get("BlockDeviceMappings", ())
        if one.get("DeviceName") == root and "Ebs" in one
    ]
    return Image(ami, about.get("Name", ""), root, max(LEAST_GIB, *own, LEAST_GIB))


def parameters(
    settings: Settings, place: Place, image: Image, subnet: str, token: str, tags: Mapping[str, str]
) -> dict[str, Any]:
    """Of a RunInstances for one desktop. `token` is what makes a repeated call the same one: up to 64 characters."""
    asked: dict[str, Any] = {
        "ImageId": image.id,
        "InstanceType": settings.aws_instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": token,
        "EbsOptimized": True,
        "InstanceInitiatedShutdownBehavior": "terminate",
        # Of the guest nothing may ask for this host's or the instance's credentials: it has none, and stays without.
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "SubnetId": subnet,
                "Groups": list(place.security_groups),
                "AssociatePublicIpAddress": settings.aws_public_ip,
                "DeleteOnTermination": True,
            }
        ],
        "BlockDeviceMappings": [
            {
                "DeviceName": image.root,
                "Ebs": {
                    "VolumeSize": image.gib,
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        "TagSpecifications": [{"ResourceType": kind, "Tags": as_list(tags)} for kind in TAGGED],
    }
    return asked | ({"KeyName": settings.aws_key_name} if settings.aws_key_name else {})


async def launch(
    cloud: Cloud,
    settings: Settings,
    place: Place,
    image: Image,
    spec: InstanceSpec,
    tags: Mapping[str, str],
    report: Report,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The instance, as EC2 tells of it, and what it was launched with. Raises InsufficientCapacity when no subnet has
    room, CloudRefused."""
    tried: dict[str, str] = {}
    for number, subnet in enumerate(place.subnets, 1):
        token = spec.id if number == 1 else f"{spec.id}-{number}"
        asked = parameters(settings, place, image, subnet, token, tags)
        report.progress(f"launching a {settings.aws_instance_type} in {subnet}")
        try:
            answer = await cloud.call("ec2", "run_instances", within=CALL, **asked)
        except InsufficientCapacity as refusal:
            tried.update(refusal.facts["tried"])
            report.note(f"There is no room in {subnet}: {tried.get(subnet, refusal.detail)}")
            logger.info("no capacity", desktop_id=spec.id, subnet=subnet, aws_code=refusal.facts.get("aws_code"))
            last = refusal
        else:
            return answer["Instances"][0], asked
    raise InsufficientCapacity(
        f"No {settings.aws_instance_type} can be had in {cloud.region}: "
        + " ".join(f"{subnet}: {what}" for subnet, what in tried.items()),
        hint=last.hint,
        **last.facts | {"tried": tried},
    )


def _size(screen: tuple[int, int]) -> str:
    return f"{screen[0]}x{screen[1]}"
