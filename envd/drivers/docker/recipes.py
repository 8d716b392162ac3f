"""What the engine is told of a container, by the kind of its image. Nothing here talks to it.

Never privileged, never restarted by the engine, never more of its log than `LOG_LIMIT`, no swap. A desktop that takes
more than its memory ends alone. Its ports are published on 127.0.0.1 alone, with numbers that the engine chooses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...models import Endpoints
from ...vm.cell import DISK, RUN, TEMPLATE, CellSpec
from ...vm.kvm import DEVICE

MIB, GIB = 1024**2, 1024**3

PORTS = {"guest": 5000, "cdp": 9222, "vnc": 8006, "vlc": 8080}
"""OSWorld's ports: every image that keeps them is a desktop."""
KIND = "io.envd.kind"
"""Label of our images: desktop or qemu."""
DAEMON, DESKTOP, ROLE = "io.envd.daemon", "io.envd.desktop", "io.envd.role"

LOG_LIMIT = 8 * MIB
TASKS = 8192
"""Processes and threads of one desktop. Chromium with a dozen pages has some 600."""
BESIDE = GIB
"""What our QEMU takes beside its guest's memory, at most. A limit, not a reservation, as all of these."""
BESIDE_FOREIGN = 2 * GIB
"""The same of an image that we do not know: QEMU by itself gives translated code 1 GiB."""
SHARED_MEMORY = GIB
"""Of /dev/shm, where Chromium keeps what its processes share. Part of the desktop's memory."""

_SUDO = ("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID")
"""What sudo, apt and ordinary services in a desktop need; of Docker's default it leaves out device files, raw packets,
chroot, and giving capabilities to files."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a container is known by, written before it is made. Times in Unix seconds."""

    daemon: str
    desktop: str
    role: Literal["desktop", "template", "trial"] = "desktop"
    job: str = ""
    env: int | None = None
    deadline: float | None = None

    def labels(self) -> dict[str, str]:
        return {
            DAEMON: self.daemon,
            DESKTOP: self.desktop,
            ROLE: self.role,
            "io.envd.job": self.job,
            "io.envd.env": "" if self.env is None else str(self.env),
            "io.envd.created": f"{time.time():.0f}",
            "io.envd.deadline": "" if self.deadline is None else f"{self.deadline:.0f}",
        }


def of_desktop(image: str, who: Identity, *, screen: tuple[int, int], memory: int, cpus: int | None) -> dict[str, Any]:
    """Our container desktop. Its user has sudo, so privileges can be gained inside; few are there to be gained.
    `cpus` is None where it may have all of them."""
    return _recipe(
        image,
        who,
        environment={"SCREEN": f"{screen[0]}x{screen[1]}"},
        memory=memory,
        host={
            "CapDrop": ["ALL"],
            "CapAdd": list(_SUDO),
            "ShmSize": min(SHARED_MEMORY, memory // 2),
            "NanoCpus": (cpus or 0) * 10**9,
        },
    )


def of_foreign(
    image: str,
    who: Identity,
    *,
    memory: int,
    cpus: int,
    disk_size: int,
    disk: str | None,
    kvm: bool,
) -> dict[str, Any]:
    """Any image that is used as OSWorld uses its own (desktop_env/providers/docker): the same names and mounts.

    NET_ADMIN, since such images may set up a bridge for their guest. `disk` is a file of the engine's host.
    """
    environment = {"DISK_SIZE": _letters(disk_size), "RAM_SIZE": _letters(memory), "CPU_CORES": str(cpus)}
    host: dict[str, Any] = {"CapAdd": ["NET_ADMIN"]}
    if kvm:
        host |= _kvm()
    else:
        environment["KVM"] = "N"
    if disk is not None:
        host["Mounts"] = [_mount(disk, DISK, read_only=True)]
    return _recipe(image, who, environment=environment, memory=memory + BESIDE_FOREIGN, host=host)


def of_cell(image: str, who: Identity, spec: CellSpec, *, user: str, own_users: bool) -> dict[str, Any]:
    """A QEMU process of ours. It runs as `user` (uid:gid) and gains nothing. `own_users` is true where the engine maps
    users, which this container must not be: its files are those of this process."""
    mounts = [_mount(str(spec.run), RUN)]
    if spec.disk is not None:
        mounts.append(_mount(str(spec.disk), DISK, read_only=True))
    if spec.template is not None:
        mounts.append(_mount(str(spec.template), TEMPLATE, read_only=spec.role != "template"))
        if spec.role != "template":
            # Before version 8.2 QEMU opens a clone's memory for writing, though it maps it privately.
            mounts.append(_mount(f"{spec.template}/ram", f"{TEMPLATE}/ram"))
    host: dict[str, Any] = {
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Mounts": mounts,
        "ShmSize": 64 * MIB,
    }
    if own_users:
        host["UsernsMode"] = "host"
    if spec.kvm:
        host |= _kvm()
    recipe = _recipe(image, who, environment={}, memory=spec.memory + BESIDE, host=host)
    return recipe | {"Cmd": list(spec.argv), "User": user}


def of_trial(image: str, who: Identity, argv: Sequence[str], *, user: str, kvm: bool) -> dict[str, Any]:
    """A program of the image that is run once, to see what it does: without ports, network or rights."""
    host: dict[str, Any] = {"CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges:true"], "NetworkMode": "none"}
    recipe = _recipe(image, who, environment={}, memory=GIB, host=host | (_kvm() if kvm else {}))
    recipe["HostConfig"].pop("PortBindings")
    return recipe | {"Entrypoint": list(argv), "Cmd": [], "ExposedPorts": {}, "User": user}


def endpoints(ports: Mapping[int, int]) -> Endpoints:
    """`ports`: of the container → of this host."""
    return Endpoints(**{name: f"http://127.0.0.1:{ports[port]}" for name, port in PORTS.items()})


def _recipe(
    image: str, who: Identity, *, environment: Mapping[str, str], memory: int, host: dict[str, Any]
) -> dict[str, Any]:
    ports = [f"{port}/tcp" for port in PORTS.values()]
    return {
        "Image": image,
        "Labels": who.labels(),
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "ExposedPorts": {port: {} for port in ports},
        "Tty": False,
        "HostConfig": {
            "PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}] for port in ports},
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": str(LOG_LIMIT), "max-file": "1"}},
            "Memory": memory,
            "MemorySwap": memory,
            "PidsLimit": TASKS,
            **host,
        },
    }


def _kvm() -> dict[str, Any]:
    """The device, and its group for who is not root in there. Blocks."""
    device = {"PathOnHost": str(DEVICE), "PathInContainer": str(DEVICE), "CgroupPermissions": "rwm"}
    return {"Devices": [device], "GroupAdd": [str(DEVICE.stat().st_gid)]}


def _mount(source: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    """A mount, since a bind (`-v`) would make an empty directory where there is nothing."""
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}


def _letters(size: int) -> str:
    """As OSWorld writes sizes: 4G."""
    return f"{size // GIB}G" if size % GIB == 0 else f"{size // MIB}M"
