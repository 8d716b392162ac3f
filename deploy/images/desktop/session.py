"""The programs of a desktop, and the first process of the container that shows one.

`python3 -E -S session.py` runs them around Xvfb as the user it is started by. The virtual machine runs the same ones
around Xorg (machine.py).
"""

from __future__ import annotations

import os
import socket
import sys

from runner import Program, Runner, listen, on_termination

HOME = "/home/user"
RUNTIME = "/run/user/1000"
X_SOCKET = "/tmp/.X11-unix/X0"
AGENT_PORT, CDP_PORT, CHROME_PORT, NOVNC_PORT = 5000, 9222, 1337, 8006
ENOUGH_SHARED_MEMORY = 256 * 1024 * 1024

ENVIRONMENT = {
    "HOME": HOME,
    "USER": "user",
    "LOGNAME": "user",
    "SHELL": "/bin/bash",
    "PATH": "/opt/envd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "DISPLAY": ":0",
    "XDG_RUNTIME_DIR": RUNTIME,
    "XDG_SESSION_TYPE": "x11",
    "XDG_DATA_DIRS": "/opt/envd/share:/usr/local/share:/usr/share",
    "ACCESSIBILITY_ENABLED": "1",  # Chromium offers its windows to AT-SPI only if told so when it starts
    "DBUS_SESSION_BUS_ADDRESS": f"unix:path={RUNTIME}/bus",
    "DESKTOP_CHROME": "/opt/google/chrome/chrome",
    "DESKTOP_CDP_PORT": str(CHROME_PORT),
}


def programs(x_server: Program) -> list[Program]:
    """All that makes a desktop. They start at once: X's socket and the agent's listen already, and who comes early
    waits there."""
    x_server.listener = _x_listener()
    return [
        x_server,
        Program("dbus", ["dbus-daemon", "--session", f"--address=unix:path={RUNTIME}/bus", "--nofork", "--nopidfile"]),
        Program("chromium", ["google-chrome", f"--remote-debugging-port={CHROME_PORT}", *_if_small(), "about:blank"]),
        Program(
            "guest server",
            ["python3", "-m", "envd.agent", "--host", "0.0.0.0", "--port", str(AGENT_PORT), "--fd", "3"],
            restart=True,
            listener=listen(AGENT_PORT),
            milestone=("envd-agent listening", "guest-server"),
        ),
        Program(
            "window manager",
            ["openbox", "--sm-disable", "--startup", "echo window manager is up"],
            restart=True,
            milestone=("window manager is up", "session"),
        ),
        Program("background", ["hsetroot", "-add", "#2b5876", "-add", "#4e4376", "-gradient", "160"]),
        Program("panel", ["tint2"], restart=True, quiet=True),
        Program(
            "cdp",
            ["socat", f"TCP-LISTEN:{CDP_PORT},fork,reuseaddr", f"TCP:127.0.0.1:{CHROME_PORT}"],
            restart=True,
            quiet=True,  # it would say of each connection that Chromium is not there yet
        ),
        Program("novnc", ["envd-novnc"], listener=listen(NOVNC_PORT), on_demand=True),
    ]


def screen() -> tuple[int, int]:
    """$SCREEN, "1920x1080" if it is not set. Raises SystemExit when it is no size of a screen."""
    text = os.environ.get("SCREEN") or "1920x1080"
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 320 <= int(width) <= 8192 and 200 <= int(height) <= 8192):
        sys.exit(f"SCREEN={text!r} is no size of a screen: write it like 1920x1080.")
    return int(width), int(height)


def _if_small() -> list[str]:
    """What Chromium must be told where /dev/shm is Docker's 64 MB: it would crash on large pages."""
    memory = os.statvfs("/dev/shm")
    return ["--disable-dev-shm-usage"] if memory.f_frsize * memory.f_blocks < ENOUGH_SHARED_MEMORY else []


def _x_listener() -> socket.socket:
    os.makedirs(os.path.dirname(X_SOCKET), mode=0o1777, exist_ok=True)
    try:
        os.unlink(X_SOCKET)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(X_SOCKET)
    os.chmod(X_SOCKET, 0o777)
    listener.listen(128)
    return listener


def main() -> None:
    on_termination(lambda: os._exit(128 + 15))
    width, height = screen()
    x_server = Program(
        "X server",
        [
            *("Xvfb", ":0", "-screen", "0", f"{width}x{height}x24", "-displayfd", "2", "-noreset", "-s", "0", "-ac"),
            *("-nolisten", "tcp", "-nolisten", "local", "-extension", "GLX"),
        ],
        essential=True,
        milestone=("0", "display"),
    )
    sys.exit(Runner(programs(x_server), ENVIRONMENT).run())


if __name__ == "__main__":
    main()
