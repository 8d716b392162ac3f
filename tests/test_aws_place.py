"""Where desktops go: what was set wins, what was not is found on EC2, and all that is missing is said at once."""

from __future__ import annotations

import pytest
from aws_metadata import metadata

from envd.drivers.aws.place import FIELDS, Place, find_place, find_region
from envd.errors import SettingsError
from envd.settings import Settings, load

ALL = {"AWS_REGION": "eu-west-3", "AWS_SUBNET_ID": "subnet-1,subnet-2", "AWS_SECURITY_GROUP_ID": "sg-1"}


def settings(**environ: str) -> Settings:
    return load({"HOME": "/home/someone", "PROVIDER": "aws", **environ}, env_file=None)


async def refused(**environ: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        await find_place(settings(**environ))
    return caught.value


async def test_nobody_is_asked_when_all_is_set() -> None:
    async with metadata() as service:
        place = await find_place(settings(**ALL))
    assert place == Place("eu-west-3", ("subnet-1", "subnet-2"), ("sg-1",), dict.fromkeys(FIELDS, "set"))
    assert service.asked == []


async def test_on_ec2_what_is_not_set_is_this_hosts() -> None:
    async with metadata():
        place = await find_place(settings(AWS_SUBNET_ID="subnet-1"))
    assert (place.region, place.subnets) == ("us-east-1", ("subnet-1",))
    assert place.security_groups == ("sg-00000000000000001", "sg-00000000000000002")
    assert place.origins == {
        "aws_region": "this host's",
        "aws_subnet_id": "set",
        "aws_security_group_id": "this host's",
    }


async def test_elsewhere_all_that_is_missing_is_named_at_once() -> None:
    async with metadata("absent"):
        error = await refused()
    assert "need AWS_REGION, AWS_SUBNET_ID and AWS_SECURITY_GROUP_ID: not set, and this host" in error.detail
    assert all(f"{name}" in error.hint for name in ("us-east-1", "describe-subnets", "describe-security-groups"))
    assert error.exit_code == 78


async def test_what_this_host_has_in_another_region_is_of_no_use() -> None:
    async with metadata():
        error = await refused(AWS_REGION="eu-west-3", AWS_SUBNET_ID="subnet-1")
    assert "need AWS_SECURITY_GROUP_ID: not set, and this host's own are of us-east-1, not eu-west-3" in error.detail
    assert "AWS_SUBNET_ID" not in str(error)


async def test_who_launches_nothing_needs_the_region_alone() -> None:
    assert await find_region(settings(AWS_REGION="eu-west-3")) == "eu-west-3"
    async with metadata("v1"):
        assert await find_region(settings()) == "us-east-1"
    async with metadata("absent"):
        with pytest.raises(SettingsError, match="need AWS_REGION: not set"):
            await find_region(settings())
