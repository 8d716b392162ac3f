"""One RunInstances: what it asks for, once, and where it is tried next."""

from __future__ import annotations

import pytest
from aws_driving import Heard, driver_in, instances_of, spec
from aws_faults import FaultyAccount

from envd.drivers.aws import instances
from envd.drivers.aws.launch import ami_of
from envd.drivers.base import Report
from envd.errors import AmiUnavailable, InsufficientCapacity, QuotaExceeded
from envd.settings import Settings


@pytest.fixture
def aws(account: FaultyAccount, monkeypatch: pytest.MonkeyPatch) -> FaultyAccount:
    account.faults.heard.clear()
    account.forget_tokens()
    monkeypatch.setattr(instances, "BUSY", 0.05)
    return account


def launches(aws: FaultyAccount) -> list[dict[str, str]]:
    """The parameters of each, as they were sent."""
    return [dict(call.parameters) for call in aws.faults.heard if call.action == "ec2:RunInstances"]


async def test_a_launch_asks_for_all_of_this(aws: FaultyAccount) -> None:
    async with driver_in(aws, aws_owner="trainer") as driver:
        await driver.create(spec("a-1", job_id="job-7", env=3), Report())
    [asked] = launches(aws)
    assert {
        "ClientToken": "a-1",
        "ImageId": aws.ami,
        "InstanceType": "t3.xlarge",
        "MinCount": "1",
        "MaxCount": "1",
        "EbsOptimized": "true",
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions.HttpTokens": "required",
        "MetadataOptions.HttpEndpoint": "enabled",
        "MetadataOptions.HttpPutResponseHopLimit": "1",
        "NetworkInterface.1.DeviceIndex": "0",
        "NetworkInterface.1.SubnetId": aws.subnets[0],
        "NetworkInterface.1.SecurityGroupId.1": aws.security_group,
        "NetworkInterface.1.AssociatePublicIpAddress": "false",
        "BlockDeviceMapping.1.DeviceName": "/dev/sda1",
        "BlockDeviceMapping.1.Ebs.VolumeSize": "30",
        "BlockDeviceMapping.1.Ebs.VolumeType": "gp3",
        "BlockDeviceMapping.1.Ebs.Encrypted": "true",
        "BlockDeviceMapping.1.Ebs.DeleteOnTermination": "true",
    }.items() <= asked.items()
    assert "KeyName" not in asked


@pytest.mark.parametrize("place", ["1", "2", "3"])
async def test_everything_that_a_launch_makes_has_its_tags_from_the_first(aws: FaultyAccount, place: str) -> None:
    async with driver_in(aws, aws_owner="trainer") as driver:
        await driver.create(spec("a-1", job_id="job-7", env=3), Report())
    [asked] = launches(aws)
    of = f"TagSpecification.{place}."
    keys = {value: key for key, value in asked.items() if key.startswith(of) and key.endswith(".Key")}
    tags = {name: asked[key.removesuffix("Key") + "Value"] for name, key in keys.items()}
    times = [tags.pop("envd:created-at"), tags.pop("envd:expires-at")]
    kinds = {"1": "instance", "2": "volume", "3": "network-interface"}
    assert asked[of + "ResourceType"] == kinds[place]
    assert times == sorted(times)
    assert tags == {
        "Name": "a-1",
        "envd:daemon": "test",
        "envd:desktop": "a-1",
        "envd:job": "job-7",
        "envd:env": "3",
        "envd:owner": "trainer",
    }


async def test_an_owner_who_is_not_named_is_whoever_launches(aws: FaultyAccount) -> None:
    async with driver_in(aws) as driver:
        await driver.create(spec("a-1"), Report())
        tags = {tag["Key"]: tag["Value"] for tag in instances_of(aws)["a-1"]["Tags"]}
    assert tags["envd:owner"] == "moto"


async def test_a_public_address_and_a_key_pair_are_had_by_asking(aws: FaultyAccount) -> None:
    aws.client("ec2").create_key_pair(KeyName="mine")
    async with driver_in(aws, aws_public_ip=True, aws_key_name="mine") as driver:
        made = await driver.create(spec("a-1"), Report())
        public = instances_of(aws)["a-1"]["PublicIpAddress"]
    [asked] = launches(aws)
    assert (asked["KeyName"], asked["NetworkInterface.1.AssociatePublicIpAddress"]) == ("mine", "true")
    assert made.endpoints.guest == f"http://{public}:5000"


async def test_a_root_volume_is_as_large_as_its_image_asks(aws: FaultyAccount) -> None:
    def larger(body: bytes) -> bytes:
        return body.replace(b"/dev/sda1", b"/dev/xvda").replace(b"<volumeSize>15<", b"<volumeSize>64<")

    aws.rewrite("ec2:DescribeImages", larger)
    async with driver_in(aws) as driver:
        await driver.create(spec("a-1"), Report())
    [asked] = launches(aws)
    assert asked["BlockDeviceMapping.1.DeviceName"] == "/dev/xvda"
    assert asked["BlockDeviceMapping.1.Ebs.VolumeSize"] == "64"


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "InsufficientFreeAddressesInSubnet", "Unsupported"])
async def test_where_one_subnet_has_no_room_the_next_is_tried(aws: FaultyAccount, code: str) -> None:
    aws.fail("ec2:RunInstances", code, "No room.")
    heard = Heard()
    async with driver_in(aws) as driver:
        await driver.create(spec("a-1"), heard)
        assert instances_of(aws)["a-1"]["SubnetId"] == aws.subnets[1]
    assert [asked["ClientToken"] for asked in launches(aws)] == ["a-1", "a-1-2"]
    assert heard.notes == [f"There is no room in {aws.subnets[0]}: {code}: No room."]


async def test_where_no_subnet_has_room_the_error_says_what_each_said(aws: FaultyAccount) -> None:
    aws.fail("ec2:RunInstances", "InsufficientInstanceCapacity", "None left.")
    aws.fail("ec2:RunInstances", "Unsupported", "Not in this zone.", skip=1)
    async with driver_in(aws) as driver:
        with pytest.raises(InsufficientCapacity, match=r"No t3\.xlarge can be had in us-east-1") as caught:
            await driver.create(spec("a-1"), Report())
    first, second = aws.subnets
    assert caught.value.facts["tried"] == {
        first: "InsufficientInstanceCapacity: None left.",
        second: "Unsupported: Not in this zone.",
    }
    assert f"{second}: Unsupported: Not in this zone." in caught.value.detail
    assert "AWS_SUBNET_ID" in caught.value.hint


async def test_a_quota_is_the_same_in_every_subnet(aws: FaultyAccount) -> None:
    aws.fail("ec2:RunInstances", "VcpuLimitExceeded", "32 are yours.")
    async with driver_in(aws) as driver:
        with pytest.raises(QuotaExceeded, match="32 are yours"):
            await driver.create(spec("a-1"), Report())
    assert aws.count("ec2:RunInstances") == 1


async def test_a_launch_that_was_done_and_not_answered_is_asked_for_again_and_is_one(aws: FaultyAccount) -> None:
    aws.cut("ec2:RunInstances")
    async with driver_in(aws) as driver:
        await driver.create(spec("a-1"), Report())
        assert len(instances_of(aws)) == 1
    assert [asked["ClientToken"] for asked in launches(aws)] == ["a-1", "a-1"]


def test_an_image_is_known_for_some_regions_and_screens() -> None:
    assert ami_of(Settings(), "us-east-1") == "ami-0d23263edb96951d8"
    assert ami_of(Settings(), "ap-east-1") == "ami-06850864d18fad836"
    assert ami_of(Settings(aws_ami="ami-1"), "eu-west-3") == "ami-1"


@pytest.mark.parametrize(
    ("screen", "region"), [pytest.param((1920, 1080), "eu-west-3", id="region"), ((1280, 720), "us-east-1")]
)
def test_where_no_image_is_known_the_error_says_which_are(screen: tuple[int, int], region: str) -> None:
    with pytest.raises(AmiUnavailable) as caught:
        ami_of(Settings(screen=screen), region)
    assert str(caught.value).startswith(
        f"No image is published for {screen[0]}x{screen[1]} in {region}: there is one in us-east-1 for 1920x1080; "
        "ap-east-1 for 1920x1080. Copy one to your region"
    )
    assert "ENVD_AWS_AMI" in caught.value.hint
