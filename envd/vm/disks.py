"""Disks of virtual machines: whether one can be used, and overlays on it.

A disk is a qcow2 file that nobody writes to; what a machine writes goes to an overlay of its own. The format is that
of QEMU's docs/interop/qcow2.txt. Everything here blocks and belongs into a thread.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import subprocess
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DiskUnusable, NoSpace

GIB = 1024**3
DESKTOP_BUDGET = 2 * GIB
"""Bytes that one desktop is expected to write to its overlay, at most. What it really takes is far less for most
tasks, and freed with the desktop; a host with less than this free is about to be full."""

_CHECK_SECONDS = 60
_MAGIC = b"QFI\xfb"
_BACKING_FORMAT = 0xE2792ACA
_CLUSTER = 65536
_MAX_L1 = 32 * 1024**2  # QEMU's own limit, in bytes
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_EXTENDED = struct.Struct(">QQQII")
_CORRUPT, _EXTERNAL_DATA, _EXTENDED_L2 = 2, 4, 16


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that was found usable.

    path      absolute, with links followed
    size      bytes as the guest sees it
    identity  the same for the same content wherever it lies: of a file as large as these, its size, its time of
              change and a digest of its first MiB, which has the tables that place everything else
    """

    path: Path
    size: int
    identity: str


def check_disk(path: Path, program: str | None = None) -> Disk:
    """The disk at `path`. Raises DiskUnusable, whose `cause` says in what way it is not.

    `program` is `qemu-img`, where there is one: it then looks through the disk's tables as well. What was found is
    kept for as long as the file is the same (place, inode, size, time of change).
    """
    try:
        path = path.resolve(strict=True)  # a link may be pointed elsewhere while machines run
        status = path.stat()
        key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, program is not None)
        if key not in _checked:
            found = _look(path, status)
            if program is not None:
                _run_check(path, program)
            _checked.clear()  # one daemon has one disk; an older state of it is of no use
            _checked[key] = found
        return _checked[key]
    except FileNotFoundError as error:
        raise _unusable(path, "absent", "there is no such file", hint=_GET_ONE) from error
    except OSError as error:
        raise _unusable(
            path,
            "unreadable",
            error.strerror or str(error),
            hint=f"Make the file readable for the user with id {os.geteuid()}, who runs envd.",
        ) from error


_checked: dict[tuple[str, int, int, int, bool], Disk] = {}

_GET_ONE = "Set ENVD_VM_DISK to a .qcow2 file of this host, or build our own with `make images`."


def write_overlay(path: Path, *, backing: str, size: int) -> None:
    """An empty qcow2 of `size` bytes on top of the qcow2 `backing`, a path as QEMU will see it, which is not opened.

    The same file as `qemu-img create -u` makes, without a process: this is on the path of every reset. Raises OSError.
    """
    entries = -(-size // (_CLUSTER * _CLUSTER // 8))
    table = -(-entries * 8 // _CLUSTER)
    name = os.fsencode(backing)
    extensions = struct.pack(">II8s", _BACKING_FORMAT, 5, b"qcow2") + struct.pack(">II", 0, 0)
    place = _HEADER.size + _EXTENDED.size + len(extensions)
    header = _HEADER.pack(_MAGIC, 3, place, len(name), 16, size, 0, entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0)
    header += _EXTENDED.pack(0, 0, 0, 4, _HEADER.size + _EXTENDED.size) + extensions + name
    used = 3 + table  # header, table of reference counts, reference counts, L1 table
    with path.open("xb") as file:
        file.write(header)
        file.seek(_CLUSTER)
        file.write(struct.pack(">Q", 2 * _CLUSTER))
        file.seek(2 * _CLUSTER)
        file.write(struct.pack(">H", 1) * used)
        file.truncate(used * _CLUSTER)


def require_space(directory: Path, needed: int, purpose: str) -> None:
    """Raises NoSpace unless `needed` bytes are free where `directory` is."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NoSpace(
            f"{purpose} needs {in_words(needed)} in {directory}, where {in_words(free)} are free.",
            hint="Free some space there, or give envd another place.",
            needed_bytes=needed,
            free_bytes=free,
            where=str(directory),
        )


def in_words(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _look(path: Path, status: os.stat_result) -> Disk:
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(path, "not_a_disk", "it is no ordinary file")
    with path.open("rb") as file:
        start = file.read(1024**2)
    _require_whole(path, start, status.st_size)
    size: int = _HEADER.unpack_from(start)[5]
    shape = f"{status.st_size} {status.st_mtime_ns} ".encode()
    return Disk(path, size, hashlib.sha256(shape + start).hexdigest()[:32])


def _require_whole(path: Path, start: bytes, length: int) -> None:
    """Raises DiskUnusable unless `start` is the beginning of a qcow2 file whose tables lie within `length` bytes."""
    if not start.startswith(_MAGIC):
        what = "it is empty" if not start else "it does not begin as a .qcow2 file does"
        hint = "Another kind of disk becomes one by `qemu-img convert -O qcow2`; an archive must be unpacked first."
        raise _unusable(path, "not_a_disk", what, hint=hint)
    if len(start) < _HEADER.size:
        raise _unusable(path, "truncated", f"only {length} bytes are there")
    _, version, backing, _, bits, size, encrypted, entries, table, counts, clusters, _, _ = _HEADER.unpack_from(start)
    if version not in (2, 3) or not 9 <= bits <= 21 or not size:
        raise _unusable(path, "damaged", f"its header says version {version}, {2 ** min(bits, 32)} bytes a cluster")
    if backing:
        raise _unusable(
            path,
            "not_a_disk",
            "it is an overlay, which lies on another file",
            hint="Make it one file: `qemu-img convert -O qcow2 OVERLAY DISK`.",
        )
    if encrypted:
        raise _unusable(path, "unreadable", "it is encrypted", hint="envd has no key for it: convert it first.")
    features = 0
    if version == 3 and len(start) >= _HEADER.size + _EXTENDED.size:
        features = _EXTENDED.unpack_from(start, _HEADER.size)[0]
        if features & _EXTERNAL_DATA:
            raise _unusable(path, "not_a_disk", "its data is in another file")
        if features & _CORRUPT:
            raise _unusable(path, "damaged", "it is marked as corrupt")
    if entries * 8 > _MAX_L1 or entries < -(-size // (2**bits * 2**bits // 8)):
        raise _unusable(path, "damaged", f"its first table has {entries} entries for {in_words(size)}")
    end = max(table + entries * 8, counts + clusters * 2**bits)
    if end <= length and not features & _EXTENDED_L2:
        end = _end_of_data(path, table, entries, bits)
    if end > length:
        raise _unusable(
            path,
            "truncated",
            f"it is {length} bytes long, and what its tables name reaches to byte {end}",
            hint="It was not copied or downloaded to its end: do it again.",
        )


def _end_of_data(path: Path, table: int, entries: int, bits: int) -> int:
    """Where the last cluster ends that the disk's tables name. Raises OSError."""
    place, packed = (1 << 56) - 512, (1 << (70 - bits)) - 1
    end = 0
    with path.open("rb") as file:
        for first in _entries(file, table, entries):
            second = first & place
            if not second:
                continue
            end = max(end, second + 2**bits)
            for entry in set(_entries(file, second, 2**bits // 8)):
                if entry & 1 << 62:  # compressed: begins at any byte, and ends somewhere in the sectors after it
                    end = max(end, (entry & packed) + 1)
                elif entry & place:
                    end = max(end, (entry & place) + 2**bits)
    return end


def _entries(file: BinaryIO, offset: int, count: int) -> array[int]:
    """Of a table; fewer where the file ends."""
    file.seek(offset)
    data = file.read(count * 8)
    found = array("Q", data[: len(data) // 8 * 8])
    if sys.byteorder == "little":
        found.byteswap()
    return found


def _run_check(path: Path, program: str) -> None:
    """Raises DiskUnusable for a disk whose clusters are not where its tables say. Leaked clusters do no harm."""
    command = [program, "check", "-f", "qcow2", "--force-share", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_CHECK_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return  # not looked at is not damaged: of a large disk this takes its time
    if done.returncode in (0, 3, 63):  # fine; leaks only; checks are not supported
        return
    told = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    raise _unusable(
        path,
        "truncated" if "past end of file" in done.stderr else "damaged",
        f"qemu-img check says: {'; '.join(told[:3])[:300] or f'code {done.returncode}'}",
        hint="It was changed or not copied to its end: get it anew.",
    )


def _unusable(path: Path, cause: str, what: str, hint: str = "") -> DiskUnusable:
    return DiskUnusable(f"The disk {path} cannot be used: {what}.", hint=hint, disk=str(path), cause=cause)
