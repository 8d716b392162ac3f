"""What shapes a machine, and QEMU's command line for it. Paths are those inside a cell (`cell.py`).

The machine is q35, pinned to the version that QEMU has when it is chosen: PCI Express is what virtio is written for,
and it starts no slower than i440fx. Its screen is the plain VGA adapter, since `screendump` reads that at the host's
speed and every guest has a driver for it. Its pointer is a tablet, so that positions are absolute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .cell import RUN, TEMPLATE

Accel = Literal["tcg", "kvm"]
Ram = Literal["own", "template", "clone"]
"""own: plain memory. template: a file that others will map. clone: that file, copied page by page when written to."""

MIB = 1024**2
IDENTITY_PORT = "envd.identity"
"""Name of the virtio port, /dev/virtio-ports/… in the guest, whose other end is /run/vm/identity.sock."""

_MIN_VGA = 16 * MIB


@dataclass(frozen=True, slots=True)
class Machine:
    """memory: bytes, made whole MiB (downwards). screen: (width, height) in pixels. qemu: the version that runs it."""

    memory: int
    cpus: int
    accel: Accel
    screen: tuple[int, int]
    qemu: tuple[int, int, int]
    mac: str = "52:54:00:12:34:56"

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", self.memory // MIB * MIB)

    @property
    def type(self) -> str:
        """QEMU's name of the hardware, which a later QEMU makes the same. Micro versions do not have their own."""
        return f"pc-q35-{self.qemu[0]}.{self.qemu[1]}"


def clones_read_only(qemu: tuple[int, int, int]) -> bool:
    """Whether clones of this version open /template/ram for reading only. Before 8.2 that would have given the guest
    ROM instead of memory, so the file must be writable though a clone never writes to it."""
    return qemu >= (8, 2, 0)


def fingerprint(machine: Machine) -> str:
    """All of its hardware, as text: equal for two machines if one can go on from the other's state. With `kvm` the
    host's processor is part of it, which this does not know."""
    return " ".join((f"qemu-{'.'.join(map(str, machine.qemu))}", *_hardware(machine)))


def command(
    machine: Machine, *, forwards: Mapping[int, str], ram: Ram, program: str = "qemu-system-x86_64"
) -> list[str]:
    """`forwards`: the guest's port → the host's side of it, as `tcp:127.0.0.1:0`. A clone waits for its state
    (`Monitor.load_state`), the others boot."""
    rules = "".join(f",hostfwd={host}-:{port}" for port, host in forwards.items())
    return [
        program,
        *("-no-user-config", "-nodefaults", "-msg", "timestamp=on"),
        # Whoever breaks out of the guest into this process still starts no other.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *_accelerator(machine),
        *("-object", _memory(machine, ram)),
        *("-netdev", f"user,id=net{rules}"),
        # Bounded by its reader, who may cut the file at any time: what is appended then begins a new one.
        *("-chardev", f"file,id=serial,path={RUN}/serial.log,append=on"),
        *("-chardev", f"socket,id=identity,path={RUN}/identity.sock,server=on,wait=off"),
        # An overlay is thrown away with its machine, so nothing of it must survive a crash of the host.
        *("-drive", f"file={RUN}/overlay.qcow2,format=qcow2,if=none,id=disk,cache=unsafe,discard=unmap"),
        *("-object", "rng-random,id=entropy,filename=/dev/urandom"),
        *("-display", "none", "-vnc", f"unix:{RUN}/vnc.sock"),
        *("-qmp", f"unix:{RUN}/qmp.sock,server=on,wait=off"),
        *_hardware(machine),
        *(("-incoming", "defer") if ram == "clone" else ()),
    ]


def _hardware(machine: Machine) -> Iterator[str]:
    """What the guest can see of it, in an order that gives each device the same address every time."""
    width, height = machine.screen
    yield from ("-machine", f"{machine.type},memory-backend=ram,vmport=off,dump-guest-core=off")
    yield from ("-cpu", "host" if machine.accel == "kvm" else "max")
    yield from ("-smp", f"cpus={machine.cpus},sockets=1,cores={machine.cpus},threads=1")
    yield from ("-m", f"size={machine.memory // MIB}M")
    yield from ("-rtc", "base=utc,clock=host")
    yield from ("-boot", "menu=off,strict=on")
    yield from ("-device", f"VGA,edid=on,xres={width},yres={height},vgamem_mb={_vga_memory(width, height) // MIB}")
    # virtio, since its queues can be looked into (`console.py`); of USB devices nobody knows what they lost.
    yield from ("-device", "virtio-keyboard-pci,id=keyboard", "-device", "virtio-tablet-pci,id=tablet")
    yield from ("-device", "virtio-blk-pci,drive=disk,bootindex=0")
    yield from ("-device", f"virtio-net-pci,netdev=net,mac={machine.mac},romfile=")
    yield from ("-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=identity,name={IDENTITY_PORT}")
    yield from ("-device", "virtio-rng-pci,rng=entropy")
    # A new number for each process: a guest that goes on in a clone learns that it is one, and reseeds its random pool.
    yield from ("-device", "vmgenid,guid=auto")
    yield from ("-device", "isa-serial,chardev=serial")


def _accelerator(machine: Machine) -> tuple[str, str]:
    if machine.accel == "kvm":
        return "-accel", "kvm"
    # The cache of translated code, in MiB; it takes memory as it fills. Debian to a desktop with a browser measured
    # 21 to 25 s with 128 to 512, 28 to 31 s with 32 and 64; one thread for all processors, 34 s.
    return "-accel", "tcg,thread=multi,tb-size=256"


def _memory(machine: Machine, ram: Ram) -> str:
    if ram == "own":
        return f"memory-backend-ram,id=ram,size={machine.memory}"
    shared = f"memory-backend-file,id=ram,size={machine.memory},mem-path={TEMPLATE}/ram"
    if ram == "template":
        return f"{shared},share=on"
    return f"{shared},share=off{',readonly=on,rom=off' if clones_read_only(machine.qemu) else ''}"


def _vga_memory(width: int, height: int) -> int:
    """Linux takes a mode of this adapter only if its picture fits in half of the memory (drm_gem_vram_helper.c)."""
    wanted = 2 * 4 * width * height
    return max(_MIN_VGA, 1 << (wanted - 1).bit_length())
