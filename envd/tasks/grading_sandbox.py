"""What the evaluator process may see of this host: the bubblewrap command line around it, and its environment.

It sees the system's programs and its own interpreter, read-only, and the directory of gradings. No home, no state of
the daemon, no environment of the daemon. It shares the network, over which its getters talk to desktops.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..bubblewrap import proc_and_dev, system

GRADER = Path(__file__).resolve().parents[1] / "grader"
GRADINGS = "/gradings"
PLACE = "/grading"
"""Where a grading sees its own directory, whatever it is called outside."""

_ETC = (
    *("alternatives", "fonts", "hosts", "ld.so.cache", "localtime", "magic", "mime.types", "nsswitch.conf"),
    *("os-release", "resolv.conf", "ssl/certs", "ssl/openssl.cnf", "ca-certificates", "timezone", "netpbm"),
)
"""Of /etc, what the evaluators' libraries read and holds no secrets."""

_NAMESPACES = (
    *("--unshare-user", "--uid", "1000", "--gid", "1000", "--unshare-pid", "--unshare-ipc"),
    *("--unshare-uts", "--hostname", "grader", "--unshare-cgroup-try"),
)


def environment() -> dict[str, str]:
    """All that the evaluators are told by environment: nothing of the daemon's."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "MPLBACKEND": "Agg",
    }


def works() -> bool:
    """Whether bubblewrap is there and this kernel lets it make what we ask of it. Blocks for some 10 ms."""
    if shutil.which("bwrap") is None:
        return False
    command = ["bwrap", *_NAMESPACES, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def sandboxed(python: Path, gradings: Path, control: int, modules: Sequence[Path]) -> list[str]:
    """The command line of an evaluator process that sees nothing else. Blocks."""
    inside = [f"/opt/modules/{number}.py" for number in range(len(modules))]
    view = [*system(), "--perms", "1777", "--tmpfs", "/tmp", *proc_and_dev(), *_etc(), *_python(python)]
    for module, name in zip(modules, inside, strict=True):
        view += ["--ro-bind", str(module), name]
    return [
        *("bwrap", "--die-with-parent", *_NAMESPACES, *view),
        *("--ro-bind", str(GRADER), "/opt/grader", "--bind", str(gradings), GRADINGS, "--dir", PLACE),
        *("--remount-ro", "/", "--chdir", "/", "--"),
        *(str(python), "-I", "-B", "/opt/grader/__main__.py", str(control), GRADINGS, PLACE, *inside),
    ]


def plain(python: Path, gradings: Path, control: int, modules: Sequence[Path]) -> list[str]:
    """The same without bubblewrap."""
    return [str(python), "-I", "-B", str(GRADER / "__main__.py"), str(control), str(gradings), "", *map(str, modules)]


def _etc() -> Iterator[str]:
    for name in _ETC:
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")


def _python(python: Path) -> Iterator[str]:
    """The interpreter, what it was made from and the links between, each at its own path."""
    asked = "import sys; print(sys.prefix, sys.base_prefix, sep='\\n')"
    ran = subprocess.run([python, "-I", "-c", asked], capture_output=True, text=True, check=True, timeout=20)
    wanted = {Path(line) for line in ran.stdout.splitlines()}
    link = python
    while link.is_symlink():
        wanted.add(link)
        link = Path(os.path.normpath(link.parent / link.readlink()))
    wanted |= {path.resolve() for path in wanted} | {link}
    for path in sorted(wanted):
        if not path.is_relative_to("/usr") and not any(path.is_relative_to(other) for other in wanted - {path}):
            yield from ("--ro-bind", str(path), str(path))
