"""A Debian host to install on: a container of our base image, with systemd as its first process where this machine lets
that be.

pip inside finds packages as pip here does: what this machine's configuration names is handed in, and is nowhere in the
project.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = "envd/base:bookworm"
LABEL = "io.envd.test"
HOST = """
ARG BASE
FROM $BASE
RUN apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \\
    systemd systemd-sysv dbus
"""
CONTROL_GROUPS = ("--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw")
SYSTEMD = "mount --make-rshared / && exec /lib/systemd/systemd"
"""systemd hands credentials over by a mount that has to be seen outside of where it is made. On a host it sees to that
itself, in a container it leaves it to whoever started that."""
TO_BOOT = 60.0
CERTIFICATES = "/etc/envd-test/certificates.pem"


def docker(*arguments: str | Path, timeout: float = 60, check: bool = True) -> str:
    """What the command prints, errors too. Raises AssertionError with that when it fails."""
    command = ["docker", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout
    )
    assert not check or done.returncode == 0, f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@cache
def base() -> str:
    """Our base image, or Debian's own; empty where there is neither."""
    for name in (BASE, "debian:bookworm-slim"):
        if "Id" in docker("image", "inspect", name, check=False):
            return name
    return ""


@cache
def pip_of_this_host() -> tuple[dict[str, str], dict[str, str]]:
    """How pip here finds packages: environment for a pip elsewhere, and the files that it names, here → there."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    environment, files = {}, {}
    for line in listed.splitlines():
        name, _, shown = line.partition("=")
        words = " ".join(shown.strip("'\"").replace("\\n", " ").split())
        key = "PIP_" + name.rpartition(".")[2].upper().replace("-", "_")
        for word in words.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index is a folder with others beside it that it points to.
                mounted = path.parent if path.name == "simple" else path
                files[str(mounted)] = str(mounted)
        if key == "PIP_CERT" and words in files:
            # Not into the folder that Debian's own package of certificates writes to.
            files[words] = words = CERTIFICATES
        environment[key] = words
    if os.environ.get("PIP_INDEX_URL"):
        environment["PIP_INDEX_URL"] = os.environ["PIP_INDEX_URL"]
    return environment, files


class ServiceHost:
    """A container that was started. `why_no_systemd` is empty where systemd is its first process."""

    def __init__(self, name: str, why_no_systemd: str) -> None:
        self.name = name
        self.why_no_systemd = why_no_systemd

    def run(self, command: str, *, timeout: float = 60, check: bool = True) -> str:
        """What a shell in there prints for it, errors too."""
        return docker("exec", self.name, "bash", "-c", command, timeout=timeout, check=check)

    def fails(self, command: str, timeout: float = 60) -> str:
        """The same of a command that has to fail."""
        return docker("exec", self.name, "bash", "-c", f"! ({command})", timeout=timeout)

    def leave(self, command: str) -> None:
        """Have a shell in there run it, and do not wait."""
        docker("exec", "--detach", self.name, "bash", "-c", command)

    def write(self, path: str, text: str) -> None:
        subprocess.run(
            ["docker", "exec", "-i", self.name, "sh", "-c", f"mkdir -p {Path(path).parent} && cat >{path}"],
            input=text,
            text=True,
            check=True,
            timeout=30,
        )


@cache
def image() -> str:
    name = "envd/test-host:latest"
    command = ["docker", "build", "--network", "host", "--quiet", "--label", f"{LABEL}=host", "--tag", name]
    done = subprocess.run(
        [*command, "--build-arg", f"BASE={base()}", "-"], input=HOST, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return name


@contextmanager
def service_host(*arguments: str, systemd: bool = True) -> Iterator[ServiceHost]:
    """One that is up, with the checkout at /src, read-only; it is removed at the end. It shares this host's network.

    `why_no_systemd` says why systemd does not run in it although it was wanted.
    """
    name = f"envd-test-host-{secrets.token_hex(4)}"
    environment, files = pip_of_this_host()
    common = ["--detach", "--name", name, "--label", f"{LABEL}=host", "--network", "host", *arguments]
    for key, value in (environment | {"container": "docker"}).items():
        common += ["--env", f"{key}={value}"]
    for here, there in (files | {str(ROOT): "/src"}).items():
        common += ["--volume", f"{here}:{there}:ro"]
    rights = ["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"]
    rights += ["--security-opt", "systempaths=unconfined"]
    memory = ["--tmpfs", "/run", "--tmpfs", "/run/lock", "--tmpfs", "/tmp:exec"]
    why = ""
    try:
        if systemd:
            docker("run", *common, *rights, *CONTROL_GROUPS, *memory, image(), "sh", "-c", SYSTEMD, timeout=120)
            why = _boot(name)
            if why:
                docker("rm", "--force", "--volumes", name)
        if why or not systemd:
            docker("run", *common, image(), "sleep", "infinity", timeout=120)
        yield ServiceHost(name, why)
    finally:
        docker("rm", "--force", "--volumes", name, timeout=120, check=False)


def _boot(name: str) -> str:
    """Wait until systemd is up in there. Returns why it is not."""
    deadline = time.monotonic() + TO_BOOT
    while True:
        said = docker("exec", name, "systemctl", "is-system-running", check=False).strip()
        if said in ("running", "degraded"):
            return ""
        if time.monotonic() > deadline or "is not running" in said:
            log = docker("logs", "--tail", "5", name, check=False)
            return f"systemd does not come up in a container here: {said or 'no answer'} {log}".strip()
        time.sleep(0.2)
