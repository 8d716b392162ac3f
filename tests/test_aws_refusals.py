"""What AWS says when it refuses, told apart: the texts as people get them, and what must never be in one."""

from __future__ import annotations

from typing import Any

import botocore.exceptions as boto
import pytest
from aws_cloud import REGION
from aws_faults import faulty_account
from botocore.exceptions import ClientError

from envd.drivers.aws.cloud import open_cloud
from envd.drivers.aws.refusals import early_end, explain
from envd.errors import (
    AmiUnavailable,
    CloudRefused,
    CloudUnreachable,
    CredentialsExpired,
    EnvdError,
    InstanceDied,
    InsufficientCapacity,
    NetworkUnusable,
    NoCredentials,
    NotAuthorized,
    QuotaExceeded,
    Throttled,
)

LAUNCH: dict[str, Any] = {
    "ImageId": "ami-0d23",
    "InstanceType": "t3.xlarge",
    "NetworkInterfaces": [{"SubnetId": "subnet-1", "Groups": ["sg-1"]}],
}
DENIED = (
    "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/trainer is not authorized "
    "to perform: ec2:RunInstances on resource: arn:aws:ec2:us-east-1:123456789012:instance/* because no "
    "identity-based policy allows the ec2:RunInstances action. Encoded authorization failure message: 4Ai9" + "q" * 300
)
SIGNED = (
    "The request signature we calculated does not match the signature you provided.\n\nThe Canonical String for this "
    "request should have been\nPOST\n/\nx-amz-security-token:FwoGZXIvYXdzEJr SESAME\n"
)


def refused(code: str, message: str, action: str = "ec2:RunInstances", **asked: Any) -> CloudRefused:
    said: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"RequestId": "0f3a"}}
    error = ClientError(said, action.partition(":")[2])
    return explain(error, action, region=REGION, asked=LAUNCH | asked)


@pytest.mark.parametrize(
    ("code", "message", "error", "words"),
    [
        pytest.param("ExpiredToken", "x", CredentialsExpired, "Renew them (`aws sso login`", id="expired"),
        pytest.param("RequestExpired", "x", CredentialsExpired, "Set this host's clock", id="clock"),
        pytest.param(
            "SignatureDoesNotMatch", "Signature expired: 2026", CredentialsExpired, "host's clock", id="clock of a key"
        ),
        pytest.param("SignatureDoesNotMatch", SIGNED, NoCredentials, "its secret is another", id="wrong secret"),
        pytest.param(
            "AuthFailure",
            "AWS was not able to validate the provided access credentials",
            NoCredentials,
            "does not accept the credentials",
            id="unknown key",
        ),
        pytest.param(
            "UnauthorizedOperation",
            DENIED,
            NotAuthorized,
            "arn:aws:iam::123456789012:user/trainer may not do ec2:RunInstances on "
            "arn:aws:ec2:us-east-1:123456789012:instance/* because no identity-based policy allows the "
            "ec2:RunInstances action. Allow it: deploy/aws has the whole policy. `aws sts decode-authorization-message",
            id="not authorized",
        ),
        pytest.param(
            "UnauthorizedOperation",
            "You are not authorized to perform this operation.",
            NotAuthorized,
            "The identity of these credentials may not do ec2:RunInstances on what it asked for. Allow it",
            id="not authorized and no more",
        ),
        pytest.param(
            "AccessDeniedException",
            "User: arn:aws:sts::1:assumed-role/envd/i-1 is not authorized to perform: iam:PassRole on resource: "
            "arn:aws:iam::1:role/ends with an explicit deny in an identity-based policy",
            NotAuthorized,
            "may not do iam:PassRole on arn:aws:iam::1:role/ends with an explicit deny in an identity-based policy.",
            id="denied",
        ),
        pytest.param(
            "InvalidAMIID.NotFound",
            "The image id '[ami-0d23]' does not exist",
            AmiUnavailable,
            "The image ami-0d23 cannot be used in us-east-1: The image id '[ami-0d23]' does not exist. An image "
            "belongs to one region",
            id="no image",
        ),
        pytest.param(
            "AuthFailure",
            "Not authorized for images: [ami-0d23]",
            AmiUnavailable,
            "ami-0d23 is not shared with this account in us-east-1. Let its owner share it",
            id="image not shared",
        ),
        pytest.param(
            "InvalidSubnetID.NotFound",
            "The subnet ID 'subnet-1' does not exist",
            NetworkUnusable,
            "A subnet of subnet-1 cannot be used in us-east-1: The subnet ID 'subnet-1' does not exist. Set "
            "AWS_SUBNET_ID",
            id="no subnet",
        ),
        pytest.param(
            "InvalidGroup.NotFound",
            "The security group 'sg-1' does not exist",
            NetworkUnusable,
            "Set AWS_SECURITY_GROUP_ID to groups of the subnets' VPC",
            id="no security group",
        ),
        pytest.param(
            "InvalidParameter",
            "Security group sg-1 and subnet subnet-1 belong to different networks.",
            NetworkUnusable,
            "are not of one VPC (subnet-1; sg-1)",
            id="another VPC",
        ),
        pytest.param(
            "InsufficientInstanceCapacity",
            "We currently do not have sufficient t3.xlarge capacity",
            InsufficientCapacity,
            "No t3.xlarge can be had in subnet-1: We currently do not have sufficient t3.xlarge capacity. Name subnets",
            id="no capacity",
        ),
        pytest.param(
            "VcpuLimitExceeded",
            "You have requested more vCPU capacity than your current vCPU limit of 32 allows",
            QuotaExceeded,
            "vCPU limit of 32 allows. Ask for more (`aws service-quotas request-service-quota-increase --region "
            "us-east-1 --service-code ec2 --quota-code L-1216C47A --desired-value …`)",
            id="vcpus",
        ),
        pytest.param(
            "VolumeLimitExceeded",
            "You have exceeded your maximum gp3 storage limit of 50 TiB",
            QuotaExceeded,
            "--service-code ebs --quota-code L-7A658B76",
            id="disks",
        ),
        pytest.param("MaxSpotInstanceCountExceeded", "Max", QuotaExceeded, "envd aws ls", id="instances"),
        pytest.param("AddressLimitExceeded", "Max", QuotaExceeded, "leave ENVD_AWS_PUBLIC_IP off", id="addresses"),
        pytest.param("RequestLimitExceeded", "Slow.", Throttled, "too often (RequestLimitExceeded)", id="throttled"),
        pytest.param("TooManyRequestsException", "Slow.", Throttled, "ENVD_AWS_BOOT_WIDTH", id="scheduler throttled"),
        pytest.param("InvalidKeyPair.NotFound", "No k", CloudRefused, "Set ENVD_AWS_KEY_NAME", id="no key pair"),
        pytest.param("InternalError", "Oops", CloudRefused, "AWS's own failure", id="AWS fails"),
        pytest.param(
            "InvalidParameter", "Iops is odd", CloudRefused, "was refused: InvalidParameter: Iops is odd.", id="else"
        ),
    ],
)
def test_a_refusal_says_what_happened_and_what_to_do(
    code: str, message: str, error: type[CloudRefused], words: str
) -> None:
    made = refused(code, message)
    assert type(made) is error
    assert words in str(made)
    assert {"action": "ec2:RunInstances", "aws_code": code, "request_id": "0f3a"}.items() <= made.facts.items()
    assert made.problem().status == 503


@pytest.mark.parametrize(
    ("code", "message", "facts"),
    [
        pytest.param(
            "UnauthorizedOperation",
            DENIED,
            {
                "identity": "arn:aws:iam::123456789012:user/trainer",
                "resource": "arn:aws:ec2:us-east-1:123456789012:instance/*",
                "denied": "ec2:RunInstances",
                "encoded": "4Ai9" + "q" * 300,
            },
            id="not authorized",
        ),
        pytest.param("InvalidAMIID.NotFound", "x", {"ami": "ami-0d23", "region": REGION}, id="image"),
        pytest.param(
            "InvalidGroup.NotFound", "x", {"subnets": ["subnet-1"], "security_groups": ["sg-1"]}, id="network"
        ),
        pytest.param(
            "Unsupported",
            "Not here",
            {"instance_type": "t3.xlarge", "tried": {"subnet-1": "Unsupported: Not here."}},
            id="capacity",
        ),
        pytest.param("VcpuLimitExceeded", "x", {"quota": "vcpus"}, id="quota"),
    ],
)
def test_a_refusal_carries_the_facts_of_its_class(code: str, message: str, facts: dict[str, Any]) -> None:
    assert facts.items() <= refused(code, message).facts.items()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        pytest.param(boto.NoCredentialsError(), NoCredentials, "On EC2 give this host an instance profile", id="none"),
        pytest.param(
            boto.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            NoCredentials,
            "missing: AWS_SECRET_ACCESS_KEY",
            id="half",
        ),
        pytest.param(boto.ProfileNotFound(profile="work"), NoCredentials, "profile (work)", id="no profile"),
        pytest.param(boto.SSOTokenLoadError(error_msg="gone"), CredentialsExpired, "aws sso login", id="sso"),
        pytest.param(
            boto.CredentialRetrievalError(provider="sso", error_msg="Token has expired"),
            CredentialsExpired,
            "Token has expired",
            id="token",
        ),
        pytest.param(
            boto.EndpointConnectionError(endpoint_url="https://ec2.mars-1.amazonaws.com/"),
            CloudUnreachable,
            "NAT gateway or VPC endpoint",
            id="no endpoint",
        ),
        pytest.param(
            boto.ProxyConnectionError(proxy_url="http://me:secret@p:1"),
            CloudUnreachable,
            "HTTPS_PROXY",
            id="proxy",
        ),
        pytest.param(boto.ReadTimeoutError(endpoint_url="https://x"), CloudUnreachable, "its DNS", id="no answer"),
        pytest.param(OSError("no route"), CloudUnreachable, "no route", id="no route"),
        pytest.param(boto.ParamValidationError(report="Unknown"), CloudRefused, "Unknown", id="our own mistake"),
    ],
)
def test_what_never_reached_aws_is_told_apart(error: Exception, kind: type[CloudRefused], words: str) -> None:
    made = explain(error, "ec2:DescribeImages", region="mars-1", asked={})
    assert type(made) is kind
    assert words in str(made)
    assert "secret" not in f"{made}{made.facts}"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param("SignatureDoesNotMatch", SIGNED, id="what was signed"),
        pytest.param("Odd", "Credential=AKIAIOSFODNN7SESAME/2026, Signature=SESAME0f3a", id="header"),
        pytest.param("Odd", "the key ASIAIOSFODNNSESAME is odd", id="key"),
        pytest.param("Odd", "see https://x/?X-Amz-Security-Token=SESAME&a=1", id="address"),
        pytest.param("Odd", "Authorization: AWS4-HMAC-SHA256 SESAME", id="authorization"),
    ],
)
def test_no_refusal_quotes_a_secret(code: str, message: str) -> None:
    made = refused(code, message)
    assert "SESAME" not in f"{made} {made.facts}"


@pytest.mark.parametrize(
    ("code", "reason", "error", "words"),
    [
        pytest.param(
            "Server.InternalError",
            "Client.InternalError: Client error on launch",
            InstanceDied,
            "while it was pending: Client.InternalError: Client error on launch. Mostly the volume could not be",
            id="no right to the key",
        ),
        pytest.param(
            "Server.InsufficientInstanceCapacity",
            "Server.InsufficientInstanceCapacity: Insufficient capacity",
            InsufficientCapacity,
            "No t3.xlarge",
            id="capacity",
        ),
        pytest.param(
            "Client.VolumeLimitExceeded",
            "Client.VolumeLimitExceeded: Volume limit exceeded",
            QuotaExceeded,
            "L-7A658B76",
            id="disks",
        ),
        pytest.param(
            "Client.UserInitiatedShutdown", "User initiated shutdown", InstanceDied, "User initiated", id="else"
        ),
        pytest.param("", "", InstanceDied, "no reason was given", id="no reason"),
    ],
)
def test_an_instance_that_ends_while_pending_says_why(
    code: str, reason: str, error: type[EnvdError], words: str
) -> None:
    made = early_end(code, reason, "i-1", region=REGION, asked=LAUNCH)
    assert type(made) is error
    assert words in str(made)


async def test_a_refusal_over_the_wire_is_the_same() -> None:
    with faulty_account() as aws:
        aws.fail("ec2:DescribeImages", "UnauthorizedOperation", DENIED, status=403)
        aws.fail("scheduler:ListSchedules", "AccessDeniedException", "No.", status=403)
        async with open_cloud(REGION) as cloud:
            with pytest.raises(NotAuthorized, match="user/trainer may not do ec2:RunInstances") as caught:
                await cloud.call("ec2", "describe_images", ImageIds=[aws.ami])
            with pytest.raises(NotAuthorized, match="may not do scheduler:ListSchedules"):
                await cloud.call("scheduler", "list_schedules")
    assert caught.value.facts["request_id"] == "0f3a-request"


async def test_throttling_is_sat_out_and_then_told() -> None:
    with faulty_account() as aws:
        aws.fail("ec2:DescribeImages", "RequestLimitExceeded", status=503)
        async with open_cloud(REGION) as cloud:
            assert (await cloud.call("ec2", "describe_images", ImageIds=[aws.ami]))["Images"]
            aws.fail("ec2:DescribeImages", "RequestLimitExceeded", status=503, times=None)
            with pytest.raises(Throttled) as caught:
                await cloud.call("ec2", "describe_images", ImageIds=[aws.ami])
    assert caught.value.retryable
    assert caught.value.retry_after


async def test_a_call_that_nobody_answers_ends_in_time() -> None:
    with faulty_account() as aws:
        held = aws.hold("ec2:DescribeImages", "before")
        async with open_cloud(REGION) as cloud:
            with pytest.raises(CloudUnreachable, match=r"ec2:DescribeImages got no answer within 0\.3 s"):
                await cloud.call("ec2", "describe_images", within=0.3)
        held.drop()
