"""What a grading may see and use of the machine: Linux namespaces, capabilities and limits, by libc alone.

The zygote itself runs in bubblewrap where there is one (`envd.tasks.grading_sandbox`). Within it, each grading has a
view of its own: its working directory at one fixed path, a /tmp inside of that, nobody else's files, a process tree
that the kernel ends as a whole. A metric has no network at all: what it judges is already there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

MEMORY = 4 * 1024**3
"""Bytes that one process may allocate. Of data, not of addresses: Chrome's and Node's engines reserve far more."""
FILE = 1024**3
PROCESSES = 256


def separate(gradings: Path, workdir: Path, place: Path) -> bool:
    """Show this process `workdir` as `place`, its `tmp` as /tmp, and an empty directory where all gradings are. Its
    children are in a process namespace of their own, the first one at its head. False when this kernel refuses.

    An interpreter that lies in /tmp must stay to be seen: what it imports later would be missing, and metrics make a 0
    of that. Then /tmp stays what it was."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWIPC) != 0:
        return False
    _map_ids(uid, gid)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount(str(workdir), str(place), None, _MS_BIND)
    _mount("tmpfs", str(gradings), "tmpfs", 0, "size=4k,mode=755")
    if not any(Path(path).resolve().is_relative_to("/tmp") for path in (sys.prefix, sys.base_prefix, *sys.path)):
        _mount(str(place / "tmp"), "/tmp", None, _MS_BIND)
    return True


def without_network() -> bool:
    """Cut this process, which must have one thread, off from every network, the host's loopback included."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_NEWUSER | _NEWNET) != 0:
        return False
    with contextlib.suppress(PermissionError):  # root without capabilities may not, and owns its files all the same
        _map_ids(uid, gid)
    drop_capabilities()
    return True


def drop_capabilities() -> None:
    """Those that `separate` brought, with which its mounts could be undone. They do not come back."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def limit(seconds: float, *, separated: bool) -> None:
    """Bounds for this process and each that it starts."""
    bounds = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: MEMORY,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_CPU: int(seconds) + 5,
        resource.RLIMIT_NOFILE: 1024,
    }
    if separated:  # elsewhere it would count all processes of this user
        bounds[resource.RLIMIT_NPROC] = PROCESSES
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        least = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (least, least))


def die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Descendants whose parents die become children of this process, also when they made sessions of their own."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def end_children(spare: frozenset[int] = frozenset()) -> None:
    """Kill and reap every child, and those who become children by that, but not `spare`."""
    while children := _children() - spare:
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for pid in children:
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass


def _children() -> frozenset[int]:
    mine, found = str(os.getpid()), set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path("/proc", name, "stat").read_text(errors="replace")
            except OSError:
                continue  # it has just ended
            if stat.rpartition(")")[2].split()[1] == mine:
                found.add(int(name))
    return frozenset(found)


def _map_ids(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _check(_libc.mount(*words, flags, options and options.encode()), f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
