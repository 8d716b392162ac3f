"""Whether /dev/kvm executes guests, seen and not concluded; and where it does not, what of it is missing.

A virtual machine without KVM is emulated: it works, and boots slowly. So what is missing is a warning, and only with a
provider that makes such machines.
"""

from __future__ import annotations

import grp
import os
from dataclasses import dataclass
from pathlib import Path

from ..drivers.aws.metadata import HostFacts
from ..findings import Finding
from ..vm.kvm import DEVICE, Kvm, KvmState, look

NESTING = ("c8i", "m8i", "r8i")
"""Families of EC2's that are virtual machines and may have some of their own, and variants such as m8i-flex."""
EMULATED = (
    "virtual machines are emulated: one of ours boots in about a minute, once, and is cloned ever after (clones need "
    "no KVM to be quick); the published OSWorld image takes 20 to 40 minutes"
)
_GROUP = "kvm"


@dataclass(frozen=True, slots=True)
class Host:
    """What decides whether there can be KVM. `module` is kvm_intel or kvm_amd; empty where the processor shows no
    virtualization. `virtual`: this host is a virtual machine itself. `container`: which it is in, if any."""

    module: str
    virtual: bool
    container: str
    aws: HostFacts | None = None


def this_host(container: str, aws: HostFacts | None, cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """Blocks."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        words = set()
    module = "kvm_intel" if "vmx" in words else "kvm_amd" if "svm" in words else ""
    return Host(module, "hypervisor" in words, container, aws)


def not_needed(why: str, device: Path = DEVICE) -> Finding:
    """Of a provider that makes no virtual machines here: only what a look shows. Blocks."""
    seen = look(device)
    told = seen.detail if seen is not None else f"{device} opens"
    return Finding("KVM", "skipped", f"not needed by {why} ({told})")


def kvm_of(seen: Kvm, host: Host, device: Path = DEVICE, *, proof: Path | None = None) -> Finding:
    """`seen` is what a look, or a guest that was tried, has shown; `proof` is the file that keeps it until the host
    boots again. Blocks."""
    if seen.works:
        return Finding("KVM", "ok", f"{device}: {seen.detail}")
    why, fix = _missing(seen, host, device)
    if proof is not None and proof.exists() and seen.state is KvmState.DOES_NOT_EXECUTE:
        fix += f"; then rm {proof}, to have it tried again"
    return Finding("KVM", "warning", f"{why}. Until then {EMULATED}", fix)


def _missing(seen: Kvm, host: Host, device: Path) -> tuple[str, str]:
    if seen.state is KvmState.NO_PERMISSION:
        return _no_permission(host, device)
    if seen.state is KvmState.DOES_NOT_EXECUTE:
        if host.aws is not None:
            return f"{seen.detail}; {_on_ec2(host.aws)[0]}", _on_ec2(host.aws)[1]
        return seen.detail, "sudo dmesg | grep -i kvm" if host.module else _nested(host)
    if host.aws is not None and not host.module:
        return _on_ec2(host.aws)
    if host.module and host.container:
        return (
            f"there is no {device} in this container ({host.container}), though the processor has virtualization",
            f"give it to the container: docker run --device {device} …",
        )
    if host.module:
        return (
            f"there is no {device}, though the processor has virtualization: the module {host.module} is not loaded",
            f"sudo modprobe {host.module}; echo {host.module} | sudo tee /etc/modules-load.d/kvm.conf",
        )
    if host.virtual:
        return (
            f"there is no {device}: this host is a virtual machine, and is shown no virtualization (nested "
            "virtualization is off)",
            _nested(host),
        )
    return (
        f"there is no {device}: the processor shows no virtualization (vmx, svm); it is switched off in the firmware",
        "sudo systemctl reboot --firmware-setup; then switch on Intel VT-x, or AMD-V (SVM)",
    )


def _no_permission(host: Host, device: Path) -> tuple[str, str]:
    if os.geteuid() == 0:
        # The device group of a container lets nobody, not even root.
        where = f"this container ({host.container})" if host.container else "this process"
        return f"{device} is there, and {where} was not given it", f"docker run --device {device} …"
    user, group = os.environ.get("USER", "$USER"), _GROUP
    try:
        group = grp.getgrgid(device.stat().st_gid).gr_name
        listed = user in grp.getgrnam(group).gr_mem
    except (OSError, KeyError):
        listed = False
    if listed:
        return (
            f"{device} is there; this user is of its group {group}, and this session does not know yet",
            "log in again",
        )
    return f"{device} is there, and this user may not open it", f"sudo usermod -aG {group} {user}; then log in again"


def _nested(host: Host) -> str:
    if host.container:
        return "on the host of this container: cat /sys/module/kvm_*/parameters/nested, which is to say Y or 1"
    return (
        "switch nested virtualization on where this machine is made (its hypervisor: cat "
        "/sys/module/kvm_*/parameters/nested says Y or 1), or take a kind of machine that has it"
    )


def _on_ec2(aws: HostFacts) -> tuple[str, str]:
    """Which instances can: metal ones, and of virtual ones a few families, where it is switched on."""
    kind = aws.instance_type
    family = kind.partition(".")[0]
    if ".metal" in kind:
        return (
            f"{kind} is bare metal and has virtualization, which is not seen",
            "sudo modprobe kvm_intel || sudo modprobe kvm_amd",
        )
    if family.startswith(NESTING):
        told = f"--instance-ids {aws.instance_id}"
        return (
            f"{kind} can, and nested virtualization is switched off for {aws.instance_id}",
            f"from elsewhere: aws ec2 stop-instances {told}; aws ec2 wait instance-stopped {told}; "
            f"aws ec2 modify-instance-cpu-options --instance-id {aws.instance_id} --nested-virtualization enabled; "
            f"aws ec2 start-instances {told}",
        )
    return (
        f"{kind} cannot do KVM: on EC2 bare metal can, and c8i, m8i and r8i with nested virtualization on",
        "use m8i.2xlarge launched with --cpu-options NestedVirtualization=enabled, a .metal type, or PROVIDER=aws, "
        "whose desktops are instances of their own",
    )
