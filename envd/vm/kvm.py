"""Whether /dev/kvm executes guests: seen, not concluded from a file that exists and opens.

Where this host is a virtual machine itself, /dev/kvm may open and take a machine, and still nothing runs in it: QEMU
ends on a register that it cannot set, or the guest never leaves its firmware. So a tiny guest has to come to its end
(`kvm_guest.py`), under the QEMU and the processor model that desktops get, and within a deadline.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import anyio

from .kvm_guest import EXECUTED, proof_command

DEVICE = Path("/dev/kvm")
PROOF_SECONDS = 3.0
"""A host with KVM needs 0.3; a process that is started in a container, a second more."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CACHE = "kvm.json"


class KvmState(StrEnum):
    ABSENT = "absent"
    NO_PERMISSION = "no_permission"
    DOES_NOT_EXECUTE = "does_not_execute"
    WORKS = "works"


@dataclass(frozen=True, slots=True)
class Kvm:
    """`detail` says what was seen, `fix` what somebody may do about it (empty when there is nothing to mend)."""

    state: KvmState
    detail: str
    fix: str = ""

    @property
    def works(self) -> bool:
        return self.state is KvmState.WORKS


Runner = Callable[[Sequence[str]], Awaitable[tuple[int | None, str]]]
"""Runs a command line where desktops' QEMUs run, given /dev/kvm, and kills it after PROOF_SECONDS. Returns its exit
code, None if it had to be killed, and what it printed."""


async def prove(state_dir: Path, qemu: str, run: Runner | None = None, *, device: Path = DEVICE) -> Kvm:
    """`qemu` names the QEMU that is asked, with its version. What it showed is kept in `state_dir` until this host
    boots again, or another QEMU is asked."""
    seen = await anyio.to_thread.run_sync(look, device)
    if seen is not None:
        return seen
    key = f"{(await anyio.Path(_BOOT_ID).read_text()).strip()} {qemu}"
    cache = state_dir / _CACHE
    kept = await anyio.to_thread.run_sync(_kept, cache, key)
    if kept is not None:
        return kept
    code, printed = await (run or on_this_host)(proof_command())
    found = await anyio.to_thread.run_sync(judge, code, printed, cache)
    await anyio.to_thread.run_sync(_keep, cache, key, found)
    return found


def known(state_dir: Path, *, device: Path = DEVICE) -> Kvm | None:
    """What can be said without trying a guest: what the device itself shows, else what a proof since this host booted
    showed, with whatever QEMU; None where there was none. Blocks."""
    seen = look(device)
    if seen is not None:
        return seen
    try:
        boot, key = _BOOT_ID.read_text().strip(), str(json.loads((state_dir / _CACHE).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _kept(state_dir / _CACHE, key) if key.startswith(f"{boot} ") else None


def look(device: Path = DEVICE) -> Kvm | None:
    """What can be said without a guest; None where one has to be tried. Blocks."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Kvm(KvmState.ABSENT, f"there is no {device}", _way_to_kvm())
    except PermissionError:
        return Kvm(
            KvmState.NO_PERMISSION,
            f"{device} is there, and this user may not open it",
            "Run: sudo usermod -aG kvm $USER; then log in again.",
        )
    except OSError as error:
        return Kvm(KvmState.ABSENT, f"{device} cannot be opened: {error.strerror}", _way_to_kvm())
    return None


def judge(code: int | None, printed: str, cache: Path) -> Kvm:
    """What the proof's end means. Blocks."""
    if code == EXECUTED:
        return Kvm(KvmState.WORKS, "a guest was seen to execute")
    complaint = next((line.strip() for line in printed.splitlines() if "warning:" not in line and line.strip()), "")
    if code is None:
        seen = f"a guest of a few instructions did not come to its end within {PROOF_SECONDS:g} s"
    else:
        seen = f"QEMU ended with code {code} instead of running a guest"
    return Kvm(
        KvmState.DOES_NOT_EXECUTE,
        f"{DEVICE} opens, but {seen}{f' ({complaint:.200})' if complaint else ''}",
        f"{_nesting()} To have it tried again before the next boot of this host, remove {cache}.",
    )


async def on_this_host(argv: Sequence[str]) -> tuple[int | None, str]:
    """A `Runner`."""
    with anyio.move_on_after(PROOF_SECONDS):
        done = await anyio.run_process(argv, check=False)
        return done.returncode, (done.stderr + done.stdout).decode(errors="replace")
    return None, ""


def _way_to_kvm() -> str:
    if _has_extensions():
        return "Run: sudo modprobe kvm_intel || sudo modprobe kvm_amd. In a container, give it with --device /dev/kvm."
    return _nesting()


def _nesting() -> str:
    if _has_extensions():
        return "Look for complaints of kvm in the kernel's log (dmesg)."
    return (
        "The processor shows this host no virtualization: turn it on in the firmware, or, where this host is a "
        "virtual machine itself, turn on nested virtualization for it or take a kind of machine that has it."
    )


def _has_extensions() -> bool:
    """Whether the processor says that it can execute guests (vmx of Intel, svm of AMD). Blocks."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "vmx" in words or "svm" in words


def _kept(cache: Path, key: str) -> Kvm | None:
    try:
        found = json.loads(cache.read_text())
        return Kvm(KvmState(found["state"]), found["detail"], found["fix"]) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(cache: Path, key: str, found: Kvm) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    fresh = cache.with_suffix(".new")
    fresh.write_text(json.dumps({"key": key, **asdict(found)}))
    fresh.replace(cache)
