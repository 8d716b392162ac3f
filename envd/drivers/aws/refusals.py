"""What AWS says when it refuses, told apart, and made into errors that say what to do.

AWS's codes are those of https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html and of the other
services' references. What AWS wrote is quoted, without what nobody should read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidConfigError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

from ...errors import (
    AmiUnavailable,
    BootFailed,
    CloudRefused,
    CloudUnreachable,
    CredentialsExpired,
    InstanceDied,
    InsufficientCapacity,
    NetworkUnusable,
    NoCredentials,
    NotAuthorized,
    QuotaExceeded,
    Throttled,
)

AGAIN = 10.0
"""Seconds after which a call that was throttled, botocore's own retries included, may be made again."""
SHOWN = 500
"""Characters of AWS's own words that an error quotes."""
MORE_OF = "aws service-quotas request-service-quota-increase --region {region} --service-code {service} --quota-code "
STANDARD_VCPUS, GP3_STORAGE, ADDRESSES = "L-1216C47A", "L-7A658B76", "L-0263D0A3"
"""Quotas: vCPUs of running on-demand standard instances (A, C, D, H, I, M, R, T, Z); TiB of gp3; elastic addresses."""
CHECK = "`envd aws check` shows what is set and what there is."

_GIVE = (
    "On EC2 give this host an instance profile (deploy/aws has the policy). Elsewhere run `aws configure` or "
    "`aws sso login`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
)
_RENEW = "Renew them (`aws sso login`, or new temporary keys) and start envd again; an instance profile renews itself."
_REACH = "See whether this host reaches AWS: its DNS, a NAT gateway or VPC endpoint, a proxy (HTTPS_PROXY)."


@dataclass(frozen=True)
class _Rule:
    """For AWS's `codes` (a pattern for the whole code), of messages in which `says` is found. `detail` and `hint` are
    filled in with what `_about` has."""

    codes: str
    error: type[CloudRefused]
    detail: str
    hint: str
    says: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, code: str, message: str) -> bool:
        return bool(re.fullmatch(self.codes, code) and re.search(self.says, message, re.IGNORECASE))


_OFF = "{action}: AWS finds that the request was signed too long ago, or in the future."
_SET = "Set this host's clock: `timedatectl set-ntp true`, then `timedatectl` shows whether it is synchronized."
_QUOTA = "{action}: a quota of the account in {region} is used up: {message}"
_RULES = (
    _Rule("RequestExpired|RequestInTheFuture|RequestTimeTooSkewed", CredentialsExpired, _OFF, _SET),
    # A signature that does not fit is answered with all that was signed, a session's token included: not quoted.
    _Rule(
        "SignatureDoesNotMatch|InvalidSignatureException",
        CredentialsExpired,
        _OFF,
        _SET,
        says="signature expired|not yet current",
    ),
    _Rule(
        "ExpiredToken|ExpiredTokenException|TokenRefreshRequired|ExpiredCredentials",
        CredentialsExpired,
        "{action}: the credentials have expired.",
        _RENEW,
    ),
    _Rule(
        "AuthFailure",
        AmiUnavailable,
        "The image {ami} is not shared with this account in {region}.",
        "Let its owner share it (`aws ec2 modify-image-attribute --launch-permission`), or copy one that you may use "
        "(`aws ec2 copy-image`) and set ENVD_AWS_AMI to the copy.",
        says="images?:",
    ),
    _Rule(
        "AuthFailure|InvalidClientTokenId|UnrecognizedClientException|SignatureDoesNotMatch|InvalidSignatureException"
        "|IncompleteSignature|MissingAuthenticationToken(Exception)?|InvalidAccessKeyId|InvalidSecurity",
        NoCredentials,
        "{action}: AWS does not accept the credentials: the key is unknown or deleted, its secret is another, or the "
        "account has not enabled the region {region}.",
        "`aws sts get-caller-identity --region {region}` shows whose they are. " + _GIVE,
    ),
    _Rule(
        "UnauthorizedOperation|AccessDenied|AccessDeniedException|NotAuthorized",
        NotAuthorized,
        "{identity} may not do {denied} on {resource}{because}.",
        "Allow it: deploy/aws has the whole policy. {decode}",
    ),
    _Rule(
        "OptInRequired|PendingVerification|Blocked|SubscriptionRequiredException",
        NotAuthorized,
        "{action}: the account cannot be used yet: {message}",
        "This is about the account itself: see the AWS console's account page, or ask AWS's support.",
    ),
    _Rule(
        r"InvalidAMIID\.\w+|InvalidSnapshot\.NotFound",
        AmiUnavailable,
        "The image {ami} cannot be used in {region}: {message}",
        "An image belongs to one region, and may be withdrawn by its owner. Copy one there (`aws ec2 copy-image`) and "
        "set ENVD_AWS_AMI, or set AWS_REGION to where it is.",
    ),
    _Rule(
        r"InvalidSubnet(ID|Id)?(\.\w+)?|InvalidVpcI[dD]\.NotFound",
        NetworkUnusable,
        "A subnet of {subnets} cannot be used in {region}: {message}",
        "Set AWS_SUBNET_ID to subnets of this region: `aws ec2 describe-subnets --region {region}`. " + CHECK,
    ),
    _Rule(
        r"InvalidGroup\.NotFound|InvalidSecurityGroupI[dD]\.\w+|InvalidGroupI[dD]\.\w+",
        NetworkUnusable,
        "A security group of {groups} cannot be used in {region}: {message}",
        "Set AWS_SECURITY_GROUP_ID to groups of the subnets' VPC: `aws ec2 describe-security-groups --region {region}`."
        " " + CHECK,
    ),
    _Rule(
        "InvalidParameter(Value|Combination)?",
        NetworkUnusable,
        "The subnet and the security group are not of one VPC ({subnets}; {groups}): {message}",
        "Set AWS_SECURITY_GROUP_ID to a group of the VPC that the subnet of AWS_SUBNET_ID is in. " + CHECK,
        says="different networks|different vpc|not in the same vpc|another vpc",
    ),
    _Rule(
        "InsufficientInstanceCapacity|InsufficientHostCapacity|InsufficientCapacity|InsufficientAddressCapacity"
        "|InsufficientFreeAddressesInSubnet|InsufficientVolumeCapacity|Unsupported|SpotMaxPriceTooLow",
        InsufficientCapacity,
        "No {type} can be had in {subnets}: {message}",
        "Name subnets of more zones in AWS_SUBNET_ID, set another AWS_INSTANCE_TYPE, or try again later.",
    ),
    _Rule(
        "VcpuLimitExceeded",
        QuotaExceeded,
        _QUOTA,
        f"Ask for more (`{MORE_OF}{STANDARD_VCPUS} --desired-value …`), set a smaller AWS_INSTANCE_TYPE, or end "
        "instances: `envd aws ls` shows envd's.",
        facts={"quota": "vcpus", "service": "ec2"},
    ),
    _Rule(
        "InstanceLimitExceeded|MaxSpotInstanceCountExceeded|ResourceCountExceeded",
        QuotaExceeded,
        _QUOTA,
        f"Ask for more (`{MORE_OF}{STANDARD_VCPUS} --desired-value …`), or end instances: `envd aws ls` shows envd's.",
        facts={"quota": "instances", "service": "ec2"},
    ),
    _Rule(
        "VolumeLimitExceeded|MaxIOPSLimitExceeded|VolumeSizeLimitExceeded|MaxVolumeLimitExceeded"
        "|ConcurrentVolumeLimitExceeded|GpVolumeLimitExceeded",
        QuotaExceeded,
        _QUOTA,
        f"Ask for more (`{MORE_OF}{GP3_STORAGE} --desired-value …`, in TiB), or delete volumes that nobody uses: "
        "`aws ec2 describe-volumes --region {region} --filters Name=status,Values=available`.",
        facts={"quota": "volumes", "service": "ebs"},
    ),
    _Rule(
        "AddressLimitExceeded|NetworkInterfaceLimitExceeded|PrivateIpAddressLimitExceeded",
        QuotaExceeded,
        _QUOTA,
        f"Ask for more (`{MORE_OF}{ADDRESSES} --desired-value …`), or leave ENVD_AWS_PUBLIC_IP off.",
        facts={"quota": "addresses", "service": "ec2"},
    ),
    _Rule(
        "RequestLimitExceeded|Throttling(Exception)?|ThrottledException|TooManyRequestsException|RequestThrottled"
        "|RequestThrottledException|EC2ThrottledException|SlowDown|BandwidthLimitExceeded|PriorRequestNotComplete",
        Throttled,
        "{action} was refused in {region}: the account asks AWS too often ({code}).",
        "It is tried again. If it lasts, lower ENVD_AWS_BOOT_WIDTH, or see who else uses the account.",
    ),
    _Rule(
        r"InvalidKeyPair\.\w+",
        CloudRefused,
        "There is no such key pair in {region}: {message}",
        "Set ENVD_AWS_KEY_NAME to one of `aws ec2 describe-key-pairs --region {region}`, or leave it out.",
    ),
    _Rule(
        r"InvalidKMSKey\.\w+|KMS\.\w+",
        CloudRefused,
        "The volume cannot be encrypted: {message}",
        "See the key that the account encrypts volumes with by default, `aws ec2 get-ebs-default-kms-key-id --region "
        "{region}`: it must be enabled, and its policy must let these credentials use it.",
    ),
    _Rule(
        "InternalError|InternalFailure|InternalServer(Error|Exception)|ServiceUnavailable(Exception)?|Unavailable|50\\d",
        CloudRefused,
        "{action} failed at AWS: {code}: {message}",
        "That is AWS's own failure; it is tried again. health.aws.amazon.com says how the region is.",
    ),
)
_ELSE = _Rule(".*", CloudRefused, "{action} was refused: {code}: {message}", CHECK)


def explain(error: Exception, action: str, *, region: str, asked: Mapping[str, Any]) -> CloudRefused:
    """The error of this project for one of botocore, or of the network below it. `asked` are the call's parameters."""
    if isinstance(error, ClientError):
        said = error.response.get("Error", {})
        request_id = error.response.get("ResponseMetadata", {}).get("RequestId")
        return refusal(
            said.get("Code", ""), said.get("Message", ""), action, region=region, asked=asked, request_id=request_id
        )
    words = clean(str(error))
    if isinstance(error, SSOError | TokenRetrievalError | NoAuthTokenError) or (
        isinstance(error, CredentialRetrievalError) and "expired" in words
    ):
        return CredentialsExpired(f"{action}: {words}", hint=_RENEW, action=action)
    if isinstance(error, NoCredentialsError):
        return NoCredentials(f"{action}: this host has no credentials for AWS.", hint=_GIVE, action=action)
    if isinstance(error, PartialCredentialsError | CredentialRetrievalError | ProfileNotFound):
        return NoCredentials(f"{action}: the credentials cannot be had: {words}", hint=_GIVE, action=action)
    if isinstance(error, ConfigParseError | ConfigNotFound | InvalidConfigError):
        return NoCredentials(f"{action}: AWS's own settings cannot be read: {words}", hint=_GIVE, action=action)
    if isinstance(error, BotoCoreError) and not _of_the_network(error):
        return CloudRefused(f"{action} failed: {words}", hint=CHECK, action=action)
    endpoint = getattr(error, "kwargs", {}).get("endpoint_url") or ""
    return CloudUnreachable(
        f"{action} in {region} did not reach AWS: {words or type(error).__name__}",
        hint=_REACH,
        action=action,
        endpoint=clean(str(endpoint)),
    )


def refusal(
    code: str, message: str, action: str, *, region: str, asked: Mapping[str, Any], request_id: str | None = None
) -> CloudRefused:
    """The error for AWS's `code` and `message`."""
    rule = next((rule for rule in _RULES if rule.fits(code, message)), _ELSE)
    about = {"service": "ec2", **_about(code, message, action, region, asked), **rule.facts}
    detail, hint = rule.detail.format(**about), rule.hint.format(**about)
    facts = {"action": action, "aws_code": code, "request_id": request_id, **_facts(rule, about, asked)}
    return rule.error(detail, hint=hint.strip(), retry_after=AGAIN if rule.error is Throttled else None, **facts)


def early_end(reason_code: str, reason: str, instance_id: str, *, region: str, asked: Mapping[str, Any]) -> BootFailed:
    """Of an instance that was launched and ended before it ran. `reason_code` and `reason` are its StateReason, of
    which either may be what is at fault, as `Client.VolumeLimitExceeded`."""
    codes = [code for text in (reason, reason_code) for code in re.findall(r"\b(?:Client|Server)\.([\w.]*\w)", text)]
    words = f"EC2 ended {instance_id} while it was pending"
    told = clean(reason or reason_code) or "no reason was given"
    for code in codes:
        if any(rule.fits(code, reason) for rule in _RULES if rule.error is not CloudRefused):
            return refusal(code, reason, "ec2:RunInstances", region=region, asked=asked)
    if "InternalError" in codes:
        hint = (
            "Mostly the volume could not be encrypted: these credentials may not use the KMS key that the account has "
            f"for it (`aws ec2 get-ebs-default-kms-key-id --region {region}`), or the image's snapshot has another "
            "account's key."
        )
        return InstanceDied(f"{words}: {told}.", hint=hint, aws_code=codes[0])
    return InstanceDied(f"{words}: {told}.", aws_code=codes[0] if codes else reason_code)


def clean(text: str) -> str:
    """A line of somebody else's words without keys, tokens, signatures and passwords in addresses."""
    line = " ".join(text.split("\n\n")[0].split())
    for pattern, instead in (
        (r"\b(AKIA|ASIA)[A-Z0-9]{8,}\b", r"\1…"),
        (
            r"(?i)\b(x-amz-security-token|x-amz-signature|x-amz-credential|signature|credential)([=:]\s?)[^\s,&']+",
            r"\1\2…",
        ),
        (r"(?i)\b(authorization)([=:]\s?).*", r"\1\2…"),
        (r"://[^/@\s]+@", "://…@"),
        (r"(?i)(encoded authorization failure message:).*", r"\1 …"),
        (r"\b[A-Za-z0-9+/_-]{100,}={0,2}", "…"),
    ):
        line = re.sub(pattern, instead, line)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _of_the_network(error: BotoCoreError) -> bool:
    """botocore's own names for what happens below it."""
    return bool(re.search(r"Connect|Timeout|HTTPClient|SSL|Endpoint|Stream|Proxy|Incomplete", type(error).__name__))


def _about(code: str, message: str, action: str, region: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """All that a text may be filled in with."""
    interfaces = asked.get("NetworkInterfaces") or [{}]
    subnets = [one["SubnetId"] for one in interfaces if "SubnetId" in one] or list(asked.get("SubnetIds", ()))
    groups = [group for one in interfaces for group in one.get("Groups", ())] or list(asked.get("GroupIds", ()))
    ami = asked.get("ImageId") or next(iter(asked.get("ImageIds") or re.findall(r"ami-\w+", message)), "that is set")
    denied = re.search(
        r"(?P<identity>arn:\S+) is not authorized to perform: (?P<denied>\S+)(?: on resource: (?P<resource>\S+))?"
        r"(?: (?P<because>(?:because|with an explicit deny).*?))?(?:\. ?Encoded|\.?$)",
        message,
    )
    told = {key: value for key, value in (denied.groupdict() if denied else {}).items() if value}
    encoded = re.search(r"[Ee]ncoded authorization failure message: ?(\S+)", message)
    return {
        "code": code,
        "message": clean(message).rstrip(".") + ".",
        "action": action,
        "region": region,
        "ami": ami,
        "subnets": ", ".join(subnets) or "those that are set",
        "groups": ", ".join(groups) or "those that are set",
        "type": asked.get("InstanceType", "such instance"),
        "identity": told.get("identity", "The identity of these credentials"),
        "denied": told.get("denied", action).strip("."),
        "resource": told.get("resource", "what it asked for").rstrip("."),
        "because": f" {told['because']}" if "because" in told else "",
        "encoded": encoded[1] if encoded else None,
        "decode": "`aws sts decode-authorization-message --encoded-message …`, with the fact `encoded`, says why."
        if encoded
        else "",
        "found": told,
        "subnet_ids": subnets,
        "group_ids": groups,
    }


def _facts(rule: _Rule, about: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the error's own class promises."""
    if rule.error is NotAuthorized:
        return {
            "identity": about["found"].get("identity"),
            "resource": about["found"].get("resource"),
            "denied": about["denied"],
            "encoded": about["encoded"],
        }
    if rule.error is AmiUnavailable:
        return {"ami": about["ami"], "region": about["region"]}
    if rule.error is NetworkUnusable:
        return {"subnets": about["subnet_ids"], "security_groups": about["group_ids"]}
    if rule.error is InsufficientCapacity:
        tried = dict.fromkeys(about["subnet_ids"], f"{about['code']}: {about['message']}")
        return {"instance_type": asked.get("InstanceType"), "tried": tried}
    if rule.error is QuotaExceeded:
        return {"quota": about["quota"]}
    return {}
