"""Whether /dev/kvm executes guests: what is concluded from what is seen, and the guest that has to come to its end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from nobody import as_nobody

from envd.vm import kvm
from envd.vm.kvm import Kvm, KvmState, judge, look, on_this_host, prove
from envd.vm.kvm_guest import EXECUTED, boot_sector, proof_command


@pytest.mark.qemu
async def test_the_guest_comes_to_its_end_where_guests_are_executed() -> None:
    done = await anyio.run_process(proof_command("tcg"), check=False)
    assert done.returncode == EXECUTED, done.stderr


@pytest.mark.qemu
async def test_a_guest_that_never_ends_is_none_that_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "PROOF_SECONDS", 0.5)
    [*shell, script] = proof_command("tcg")
    endless = script.replace("\\271\\000\\341\\365\\005", "\\353\\376\\000\\000\\000")  # a jump to itself
    assert endless != script
    assert await on_this_host([*shell, endless]) == (None, "")


@pytest.mark.qemu
async def test_a_qemu_that_refuses_is_quoted() -> None:
    [*shell, script] = proof_command("tcg")
    code, printed = await on_this_host([*shell, script.replace("-cpu max", "-cpu no-such-processor")])
    assert code == 1
    assert "no-such-processor" in (await anyio.to_thread.run_sync(judge, code, printed, Path("kvm.json"))).detail


def test_the_guest_is_a_boot_sector_and_leaves_no_file_behind(tmp_path: Path) -> None:
    assert len(boot_sector()) == 512
    program = tmp_path / "qemu"
    program.write_text('#!/bin/sh\ncmp - /dev/fd/3 <&4 && ls -A "$TMPDIR"\n')
    program.chmod(0o755)
    (tmp_path / "sector").write_bytes(boot_sector())
    (tmp_path / "tmp").mkdir()
    [*shell, script] = proof_command(program=str(program))
    done = subprocess.run(
        [*shell, f"exec 4<{tmp_path / 'sector'}; {script}"],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("code", "printed", "state", "words"),
    [
        pytest.param(EXECUTED, "a warning: of no interest", KvmState.WORKS, "seen to execute", id="works"),
        pytest.param(None, "", KvmState.DOES_NOT_EXECUTE, "did not come to its end within 3 s", id="hangs"),
        pytest.param(-6, "warning: x\nfailed to set MSR\n", KvmState.DOES_NOT_EXECUTE, "(failed to set MSR)", id="msr"),
        pytest.param(0, "", KvmState.DOES_NOT_EXECUTE, "ended with code 0 instead", id="ended otherwise"),
    ],
)
def test_how_the_proof_ends_says_what_it_is(code: int | None, printed: str, state: KvmState, words: str) -> None:
    found = judge(code, printed, Path("kvm.json"))
    assert (found.state, found.works) == (state, state is KvmState.WORKS)
    assert words in found.detail
    assert bool(found.fix) is not found.works


def test_a_device_that_is_not_there_is_absent(tmp_path: Path) -> None:
    found = look(tmp_path / "kvm")
    assert found is not None
    assert found.state is KvmState.ABSENT
    assert found.fix


def test_a_device_that_may_not_be_opened_is_told_from_one_that_is_absent(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    found = as_nobody(lambda: look(device), tmp_path)
    assert "no_permission" in found
    assert "usermod -aG kvm" in found


class Counted:
    """A runner whose every run ends with the same code."""

    def __init__(self, code: int | None) -> None:
        self.code = code
        self.runs = 0

    async def __call__(self, argv: Sequence[str]) -> tuple[int | None, str]:
        assert "-accel kvm -cpu host" in argv[-1]
        self.runs += 1
        return self.code, ""


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.touch()
    return path


@pytest.mark.parametrize("code", [pytest.param(EXECUTED, id="works"), pytest.param(None, id="does not")])
async def test_the_proof_is_made_once_per_boot_of_the_host_and_qemu(
    tmp_path: Path, device: Path, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Counted(code)
    first = await prove(tmp_path, "QEMU 7.2", run, device=device)
    assert await prove(tmp_path, "QEMU 7.2", run, device=device) == first
    assert run.runs == 1
    assert await prove(tmp_path, "QEMU 8.2", run, device=device) == first
    assert run.runs == 2
    booted_again = tmp_path / "boot_id"
    booted_again.write_text("another\n")
    monkeypatch.setattr(kvm, "_BOOT_ID", booted_again)
    assert await prove(tmp_path, "QEMU 8.2", run, device=device) == first
    assert run.runs == 3


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"key": 1}', "\x00\xff"])
async def test_a_damaged_record_is_a_proof_to_be_made_again(tmp_path: Path, device: Path, kept: str) -> None:
    (tmp_path / "kvm.json").write_text(kept)
    run = Counted(EXECUTED)
    assert await prove(tmp_path, "QEMU 7.2", run, device=device) == Kvm(KvmState.WORKS, "a guest was seen to execute")
    assert run.runs == 1


async def test_a_device_that_went_away_is_noticed_at_once(tmp_path: Path, device: Path) -> None:
    assert (await prove(tmp_path, "QEMU 7.2", Counted(EXECUTED), device=device)).works
    await anyio.Path(device).unlink()
    assert (await prove(tmp_path, "QEMU 7.2", Counted(EXECUTED), device=device)).state is KvmState.ABSENT
