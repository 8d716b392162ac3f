"""What a `local` desktop can see: the files it is given, the bubblewrap command line, and what must be installed.

Inside, a desktop looks like an OSWorld guest: user `user` (1000) with home /home/user. It sees the system's programs
read-only, a home and a /tmp of its own, and its own processes. It shares the host's network, which tasks need; with it
come the abstract sockets of the host (unix(7)), so a program in the desktop can knock at an X server of the host that
admits users by name instead of by cookie (`xhost +si:localuser:…`).
"""

from __future__ import annotations

import compileall
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import stat
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...bubblewrap import proc_and_dev, system
from ...errors import MissingDependency
from . import branding

PACKAGE = Path(__file__).resolve().parents[2]
"""The package `envd` itself, which may lie elsewhere than the rest of the environment (an editable install)."""
GUEST_FILES = Path(__file__).resolve().parent / "guest"
SUPERVISOR = Path(__file__).resolve().parent / "supervisor.py"

CHROMIUM = Path("/usr/lib/chromium")
HOSTNAME = "desktop"
X_SOCKETS = Path("/tmp/.X11-unix")

_PROGRAMS = {
    "Xvfb": "xvfb",
    "openbox": "openbox",
    "bwrap": "bubblewrap",
    "socat": "socat",
    "wmctrl": "wmctrl",
    "xdotool": "xdotool",
    "xsetroot": "x11-xserver-utils",
    "xterm": "xterm",
    "dbus-daemon": "dbus",
    str(CHROMIUM / "chromium"): "chromium",
    "/usr/libexec/at-spi-bus-launcher": "at-spi2-core",
    "xdg-open": "xdg-utils",
}
_VISIBLE = ("chromium", "openbox", "xvfb")
_MODULES = ("pyautogui", "mss", "Xlib", "numpy")

# fmt: off
_ETC = (
    "X11", "alternatives", "at-spi2", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "chromium", "dconf",
    "debian_version", "dbus-1", "fonts", "gai.conf", "gtk-2.0", "gtk-3.0", "host.conf", "inputrc", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "locale.alias", "localtime", "magic", "mailcap", "mime.types", "nsswitch.conf",
    "os-release", "profile", "profile.d", "protocols", "services", "ssl/certs", "ssl/openssl.cnf",
    "terminfo", "timezone", "vulkan", "glvnd", "xdg", "python3", "python3.11", "libreoffice", "java-17-openjdk",
)
# fmt: on
"""Of /etc, what programs need and holds no secrets. A copy, since forty mounts more take 10 ms of each reset. Users,
hosts and the machine's id are made up."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are, as the desktop's own programs see them."""

    home: str
    tmp: str
    runtime: str
    programs: str
    """The directory that comes first in PATH."""
    share: str
    """The directory that comes first in XDG_DATA_DIRS: says that pages are opened by our google-chrome."""
    chrome: str
    """The browser's binary. Named `chrome` where possible, since tasks end it by that name."""


INSIDE = Places(
    home="/home/user",
    tmp="/tmp",
    runtime="/run/user/1000",
    programs="/opt/envd/bin",
    share="/opt/envd/share",
    chrome="/opt/google/chrome/chrome",
)


def outside(root: Path, desktop: Path) -> Places:
    """Without bubblewrap: everything stays where it is."""
    return Places(
        home=str(desktop / "home"),
        tmp=str(desktop / "tmp"),
        runtime=str(desktop / "run"),
        programs=str(root / "bin"),
        share=str(root / "share"),
        chrome=str(CHROMIUM / "chromium"),
    )


def require_programs(*, sandboxed: bool) -> None:
    """Raises MissingDependency that names every missing package at once."""
    packages = {
        package
        for program, package in _PROGRAMS.items()
        if shutil.which(program) is None and (sandboxed or program != "bwrap")
    }
    if importlib.util.find_spec("_tkinter") is None:
        packages.add("python3-tk")  # pyautogui does not import without
    if packages:
        raise MissingDependency(
            f"PROVIDER=local needs Debian packages that are not installed: {', '.join(sorted(packages))}.",
            hint=f"Run: apt-get install -y --no-install-recommends {' '.join(sorted(packages))}",
        )
    modules = [module for module in _MODULES if importlib.util.find_spec(module) is None]
    if modules:
        raise MissingDependency(
            f"PROVIDER=local needs Python packages that are not installed (no module {', '.join(modules)}).",
            hint=f"Run: {sys.executable} -m pip install 'envd-server[agent]'",
        )


def made_of() -> str:
    """The system and the packages that decide what a desktop looks like and does. Blocks."""
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "an unknown system")
    asked = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\n", *_VISIBLE]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    return ", ".join([system, *told.splitlines()])


def lay_out_root(root: Path, *, sandboxed: bool) -> None:
    """The files that all desktops of a daemon share, made anew at each start. Blocks."""
    if not sandboxed and not X_SOCKETS.is_dir():
        X_SOCKETS.mkdir()
        X_SOCKETS.chmod(0o1777)
    # An editable install has no bytecode yet, and a desktop may not write it.
    compileall.compile_dir(PACKAGE / "agent", quiet=2)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    (root / "desktops").mkdir(exist_ok=True)
    for made in ("bin", "etc", "share"):
        shutil.rmtree(root / made, ignore_errors=True)
        (root / made).mkdir()
    shutil.copytree(GUEST_FILES / "applications", root / "share" / "applications")
    branding.rename(CHROMIUM / "locales", root / "share" / "locales")
    for wrapper in ("google-chrome", "socat"):
        _program(root / "bin" / wrapper, (GUEST_FILES / "bin" / wrapper).read_text())
    for alias in ("google-chrome-stable", "chromium", "chromium-browser"):
        (root / "bin" / alias).symlink_to("google-chrome")
    for python in ("python", "python3"):
        # Not a link: an interpreter finds its environment by the path it was started from.
        _program(root / "bin" / python, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    etc = root / "etc"
    # Links stay links. What is not there, or not for us to read, is left out.
    subprocess.run(["cp", "-dR", "--parents", *_ETC, etc], cwd="/etc", stderr=subprocess.DEVNULL, check=False)
    (etc / "passwd").write_text("user:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n")
    (etc / "group").write_text("user:x:1000:\nnogroup:x:65534:\n")
    (etc / "hosts").write_text(f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n")
    (etc / "hostname").write_text(HOSTNAME + "\n")
    (etc / "resolv.conf").touch()
    (etc / "machine-id").write_text(uuid.uuid4().hex + "\n")


def lay_out_desktop(desktop: Path) -> None:
    """The directories of one desktop. Blocks. Raises FileExistsError when there is one already."""
    desktop.mkdir(mode=0o700)
    for name in ("home", "tmp", "run"):
        (desktop / name).mkdir(mode=0o700)
    (desktop / "tmp").chmod(0o1777)
    (desktop / "tmp" / ".X11-unix").mkdir()
    (desktop / "tmp" / ".X11-unix").chmod(0o1777)
    for name in ("Desktop", "Downloads"):
        (desktop / "home" / name).mkdir()
    shutil.copytree(GUEST_FILES / "openbox", desktop / "home" / ".config" / "openbox")


def write_cookie(path: Path, display: int, sandboxed: bool) -> None:
    """A fresh secret that X asks of its clients: an Xauthority file for both (libXau, AuWrite.c: entries of a family
    and four strings with their lengths). Blocks."""
    family_local, family_wild = 256, 65535
    cookie = secrets.token_bytes(16)
    host = HOSTNAME if sandboxed else os.uname().nodename
    # Xlib takes the entry for any host, python-xlib only one for this host and display.
    entries = ((family_local, host.encode(), str(display).encode()), (family_wild, b"", b""))
    content = b""
    for family, address, number in entries:
        content += struct.pack(">H", family)
        for part in (address, number, b"MIT-MAGIC-COOKIE-1", cookie):
            content += struct.pack(">H", len(part)) + part
    path.touch(mode=0o600)
    path.write_bytes(content)


def listen(sock: socket.socket, directory: Path, name: str) -> None:
    """Make it listen on a name in a directory whose path may be longer than a socket's may be (unix(7): 107 bytes).
    Blocks."""
    opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.bind(f"/proc/self/fd/{opened}/{name}")
    finally:
        os.close(opened)
    sock.listen(128)


def remove(desktop: Path) -> None:
    """Remove a desktop's files, whatever modes the guest gave them. Blocks. Raises OSError when something is left."""

    def force(_function: object, path: str, _error: object) -> None:
        for closed in (Path(path).parent, Path(path)):
            if not closed.is_symlink() and closed.is_dir():
                closed.chmod(stat.S_IRWXU)

    for _ in range(3):
        shutil.rmtree(desktop, onerror=force)
        if not desktop.exists():
            return
    shutil.rmtree(desktop)


def view_of_host(root: Path, *, hide: Path) -> list[str]:
    """bubblewrap's arguments for what every desktop sees of the host. `hide` is covered wherever it would be seen.
    Blocks."""
    return [*system(), *proc_and_dev(), *_etc(root), *_chrome(), *_programs(root), *_python(), *_covered(hide)]


def bubblewrap(view: list[str], desktop: Path, *, status: int) -> list[str]:
    """The command line up to the program to run. `status` is the file descriptor that gets bubblewrap's JSON."""
    return [
        *("bwrap", "--die-with-parent", "--json-status-fd", str(status)),
        *("--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"),
        *("--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try", "--unshare-uts", "--hostname", HOSTNAME),
        # First, since what is given may lie in a home of the same name, or in /tmp.
        *("--bind", str(desktop / "home"), INSIDE.home),
        *("--bind", str(desktop / "tmp"), INSIDE.tmp),
        *("--bind", str(desktop / "run"), INSIDE.runtime),
        *view,
        *("--remount-ro", "/", "--chdir", INSIDE.home, "--"),
    ]


def _etc(root: Path) -> Iterator[str]:
    yield from ("--ro-bind", str(root / "etc"), "/etc")
    yield from ("--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf")  # changes when the host's network does


def _chrome() -> Iterator[str]:
    """Chromium as /opt/google/chrome/chrome: a program is called after the path that it was started by."""
    directory = os.path.dirname(INSIDE.chrome)
    for name in os.listdir(CHROMIUM):
        if name != "chromium":
            found = f"{INSIDE.share}/{name}" if name == "locales" else str(CHROMIUM / name)
            yield from ("--symlink", found, f"{directory}/{name}")
    yield from ("--ro-bind", str(CHROMIUM / "chromium"), INSIDE.chrome)


def _programs(root: Path) -> Iterator[str]:
    yield from ("--ro-bind", str(root / "bin"), INSIDE.programs)
    yield from ("--ro-bind", str(root / "share"), INSIDE.share)


def _python() -> Iterator[str]:
    """The interpreter, its packages and ours, each at its own path and nothing around them, which may be a home."""
    for path in python_paths():
        yield from ("--ro-bind", str(path), str(path))


def python_paths() -> list[Path]:
    """What must be visible beside /usr for `sys.executable -m envd.agent` to run: no path lies in another."""
    wanted = {Path(sys.prefix), Path(sys.base_prefix), PACKAGE}
    link = Path(sys.executable)
    while link.is_symlink():  # an environment's python may lead through several links outside of it
        wanted.add(link)
        link = Path(os.path.normpath(link.parent / link.readlink()))
    wanted |= {path.resolve() for path in wanted}
    wanted.add(link)
    return [
        path
        for path in sorted(wanted)
        if not path.is_relative_to("/usr") and not any(path.is_relative_to(other) for other in wanted - {path})
    ]


def _covered(hide: Path) -> Iterator[str]:
    visible = [Path("/usr"), *python_paths()]
    if any(hide.is_relative_to(path) for path in visible):
        yield from ("--tmpfs", str(hide))


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
