"""What EC2 tells of this host: by both versions, and that its absence is noticed soon."""

from __future__ import annotations

import time

import pytest
from aws_metadata import Manner, metadata

from envd.drivers.aws.metadata import HostFacts, about_this_host, endpoint

FACTS = HostFacts(
    instance_id="i-0123456789abcdef0",
    instance_type="c6i.large",
    region="us-east-1",
    zone="us-east-1a",
    subnet="subnet-00000000000000001",
    vpc="vpc-00000000000000001",
    security_groups=("sg-00000000000000001", "sg-00000000000000002"),
    private_ip="127.30.1.200",
)


@pytest.mark.parametrize("manner", [pytest.param(name, id=name) for name in ("v2", "v1", "token lost")])
async def test_the_same_is_learnt_of_either_version(manner: Manner) -> None:
    async with metadata(manner) as service:
        assert await about_this_host() == FACTS
    assert service.asked[0] == ("PUT", "/latest/api/token")


@pytest.mark.parametrize(
    "manner", [pytest.param(name, id=name) for name in ("absent", "slow", "another cloud", "garbage")]
)
async def test_where_there_is_none_that_is_known_within_two_seconds(manner: Manner) -> None:
    async with metadata(manner):
        began = time.monotonic()
        assert await about_this_host() is None
    assert time.monotonic() - began < 2


async def test_it_is_not_asked_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with metadata() as service:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert await about_this_host() is None
    assert service.asked == []


async def test_no_proxy_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with metadata():
        assert await about_this_host() == FACTS


def test_where_it_is_asked_follows_botocores_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", raising=False)
    assert endpoint() == "http://169.254.169.254"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1338/")
    assert endpoint() == "http://127.0.0.1:1338"
