"""A guest of 134 bytes that shows whether a processor executes guests: a boot sector that does what every system does.

It is reached by way of the firmware, sets up page tables, enters 64-bit mode, counts down from a hundred million, and
writes to a port that ends QEMU. Less would prove too little: a hypervisor inside of another one may emulate real mode
instruction by instruction, so a few bytes that write to a port pass there though no system ever comes up.
"""

from __future__ import annotations

from collections.abc import Sequence

from .machine import Accel

EXECUTED = 33
"""QEMU's exit code once it was done: isa-debug-exit makes 2 n + 1 of what is written to it."""

_DONE = 0x10
_CODE = bytes.fromhex(
    # 16-bit code at 0x7c00: interrupts off, segments at 0, a stack
    "fa 31c0 8ed8 8ec0 8ed0 bc007c fc"
    # three tables of 4 KiB from 0x1000 cleared: one entry each, the last one a page of 2 MiB at address 0
    "bf0010 b90018 f3ab c70600100320 c70600200330 c70600308300"
    # CR4.PAE, CR3 = 0x1000, EFER.LME, the segments below, CR0.PG and CR0.PE, a far jump
    "0f20e0 0c20 0f22e0 66b800100000 0f22d8 66b9800000c0 0f32 80cc01 0f30 0f0116807c 0f20c0 660d01000080 0f22c0"
    "ea5b7c0800"
    # 64-bit code: ECX = 100000000, down to 0
    "b900e1f505 ffc9 75fc"
    # 0x10 to port 0xf4; halt for ever
    f"66baf400 b0{_DONE:02x} ee f4 ebfd 6690"
    # at 0x7c70: no segment, a segment of 64-bit code; at 0x7c80: where these are
    "0000000000000000 00000000009a2000 0f00 707c0000"
)


def boot_sector() -> bytes:
    return _CODE.ljust(510, b"\0") + b"\x55\xaa"


def proof_command(accel: Accel = "kvm", program: str = "qemu-system-x86_64") -> Sequence[str]:
    """A command line that ends with EXECUTED if guests are executed. It brings the guest with it, so it can be run in
    a container; it needs `sh` and a /tmp. The processor is the one that machines are given (`machine.py`)."""
    octal = "".join(f"\\{byte:03o}" for byte in boot_sector())
    cpu = "host" if accel == "kvm" else "max"
    script = (
        f'ulimit -c 0; f=$(mktemp) && printf \'{octal}\' >"$f" && exec 3<>"$f" && rm "$f" && '
        f"exec {program} -nodefaults -no-user-config -display none -machine pc -accel {accel} -cpu {cpu} -m 16M "
        "-device isa-debug-exit,iobase=0xf4,iosize=1 -drive file=/dev/fd/3,format=raw,if=ide"
    )
    return "sh", "-c", script
