"""What is missing where no guest is executed: each case with the fix of its own, and none where none is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from anyio.to_thread import run_sync
from aws_metadata import HOST, metadata
from nobody import as_nobody

from envd.doctor import kvm
from envd.doctor.desktops import Here, _kvm
from envd.doctor.kvm import Host, kvm_of, not_needed, this_host
from envd.drivers.aws.metadata import HostFacts
from envd.findings import Finding
from envd.settings import load
from envd.vm.kvm import Kvm, KvmState, known, look, prove
from envd.vm.kvm_guest import EXECUTED

HERE = Host("kvm_intel", virtual=False, container="")


def on_ec2(kind: str) -> HostFacts:
    facts: dict[str, str] = {**HOST, "instance_type": kind}
    groups = tuple(facts.pop("security_groups").split())
    return HostFacts(**facts, security_groups=groups)


@pytest.mark.parametrize(
    ("host", "words", "fix"),
    [
        pytest.param(HERE, "the module kvm_intel is not loaded", "sudo modprobe kvm_intel;", id="no module"),
        pytest.param(
            Host("kvm_amd", virtual=False, container="Docker"),
            "no {device} in this container (Docker)",
            "docker run --device {device}",
            id="not given to the container",
        ),
        pytest.param(
            Host("", virtual=False, container=""), "switched off in the firmware", "--firmware-setup", id="CPU flag off"
        ),
        pytest.param(
            Host("", virtual=True, container=""), "nested virtualization is off", "parameters/nested", id="nested off"
        ),
        pytest.param(
            Host("", virtual=True, container="Docker"),
            "nested virtualization",
            "on the host of this",
            id="and container",
        ),
        pytest.param(
            Host("", virtual=True, container="", aws=on_ec2("t3.xlarge")),
            "t3.xlarge cannot do KVM: on EC2 bare metal can, and c8i, m8i and r8i with nested virtualization on",
            "--cpu-options NestedVirtualization=enabled",
            id="EC2 that cannot",
        ),
        pytest.param(
            Host("", virtual=True, container="", aws=on_ec2("m8i-flex.2xlarge")),
            "m8i-flex.2xlarge can, and nested virtualization is switched off",
            f"modify-instance-cpu-options --instance-id {HOST['instance_id']} --nested-virtualization enabled",
            id="EC2 that could",
        ),
        pytest.param(
            Host("", virtual=False, container="", aws=on_ec2("c6i.metal")),
            "bare metal",
            "sudo modprobe",
            id="EC2 metal",
        ),
    ],
)
def test_a_device_that_is_not_there_is_told_with_why_and_the_fix(
    tmp_path: Path, host: Host, words: str, fix: str
) -> None:
    device = tmp_path / "kvm"
    seen = look(device)
    assert seen is not None
    found = kvm_of(seen, host, device)
    assert (found.what, found.verdict) == ("KVM", "warning")
    assert words.format(device=device) in found.detail
    assert fix.format(device=device) in found.fix
    assert "emulated" in found.detail


def test_a_device_that_may_not_be_opened_asks_for_the_group_that_it_is_of(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)

    def told() -> Finding:
        seen = look(device)
        assert seen is not None
        return kvm_of(seen, HERE, device)

    found = as_nobody(told, tmp_path)
    assert "this user may not open it" in found
    assert "sudo usermod -aG" in found
    assert "log in again" in found


def test_what_not_even_root_may_open_was_not_given_to_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    seen = Kvm(KvmState.NO_PERMISSION, "")
    found = kvm_of(seen, Host("kvm_intel", virtual=False, container="Docker"))
    assert "this container (Docker) was not given it" in found.detail
    assert found.fix.startswith("docker run --device /dev/kvm")


@pytest.mark.parametrize(
    ("host", "fix"),
    [
        pytest.param(HERE, "sudo dmesg | grep -i kvm", id="bare metal"),
        pytest.param(Host("", virtual=True, container=""), "/sys/module/kvm_*/parameters/nested", id="nested"),
        pytest.param(
            Host("", virtual=True, container="", aws=on_ec2("m7i.large")), "PROVIDER=aws", id="EC2 that cannot"
        ),
    ],
)
async def test_a_device_that_opens_and_executes_nothing_is_no_kvm(tmp_path: Path, host: Host, fix: str) -> None:
    device = tmp_path / "kvm"
    device.touch()

    async def hangs(argv: object) -> tuple[int | None, str]:
        return None, ""

    seen = await prove(tmp_path, "QEMU 7.2", hangs, device=device)
    found = await run_sync(lambda: kvm_of(seen, host, device, proof=tmp_path / "kvm.json"))
    assert found.verdict == "warning"
    assert "did not come to its end within 3 s" in found.detail
    assert fix in found.fix
    assert f"rm {tmp_path / 'kvm.json'}" in found.fix


async def test_a_guest_that_was_seen_to_execute_is_the_proof(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()

    async def executes(argv: object) -> tuple[int | None, str]:
        return EXECUTED, ""

    seen = await prove(tmp_path, "QEMU 7.2", executes, device=device)
    found = await run_sync(kvm_of, seen, HERE, device)
    assert (found.verdict, found.fix) == ("ok", "")
    assert "a guest was seen to execute" in found.detail
    assert await run_sync(lambda: known(tmp_path, device=device)) == seen


def test_without_a_proof_nothing_is_known_of_a_device_that_opens(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    assert known(tmp_path, device=device) is None
    (tmp_path / "kvm.json").write_text('{"key": "another boot QEMU", "state": "works", "detail": "", "fix": ""}')
    assert known(tmp_path, device=device) is None
    (tmp_path / "kvm.json").write_text("not JSON")
    assert known(tmp_path, device=device) is None
    absent = known(tmp_path, device=tmp_path / "none")
    assert absent is not None
    assert absent.state is KvmState.ABSENT


def test_who_makes_no_machines_is_not_warned(tmp_path: Path) -> None:
    found = not_needed("PROVIDER=local", tmp_path / "kvm")
    assert (found.what, found.verdict, found.fix) == ("KVM", "skipped", "")
    assert found.detail == f"not needed by PROVIDER=local (there is no {tmp_path / 'kvm'})"


@pytest.mark.parametrize(
    ("flags", "module", "virtual"),
    [("fpu vmx sse", "kvm_intel", False), ("fpu svm hypervisor", "kvm_amd", True), ("fpu sse", "", False)],
)
def test_the_processor_says_which_module_and_whether_it_is_virtual(
    tmp_path: Path, flags: str, module: str, virtual: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert this_host("", None, tmp_path / "cpuinfo") == Host(module, virtual, "")


async def test_on_ec2_the_instance_type_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "this_host", lambda container, aws: Host("", virtual=True, container="", aws=aws))
    here = Here(load({}, None, provider="qemu", state_dir=tmp_path), None, "")
    async with metadata(instance_type="t3.xlarge"):
        found = await _kvm(here, Kvm(KvmState.ABSENT, "there is no /dev/kvm"), "machine")
    assert found.detail.startswith("t3.xlarge cannot do KVM")
