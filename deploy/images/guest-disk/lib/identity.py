"""Makes a clone another machine: the host writes a JSON object in one line to a port, and gets one back.

`python3 -E -S identity.py DEVICE`, resident as root. Asked for (all optional): "time" (Unix seconds), "hostname",
"machine_id" (32 hexadecimal digits), "seed" (base64, mixed into the kernel's random numbers), "mac", "ssh" (true: new
host keys if there are any). Answers {"ok": true, "did": [...]} or {"ok": false, "did": [...], "error": ...}.
All but SSH's keys is done by system calls, since it is on the path of every reset.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import glob
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time

import network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LONGEST_REQUEST = 65536
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_PR_SET_NAME = 15


def serve(device: str) -> None:
    """Answer for ever. A port whose other end nobody holds reads as ended; a signal tells when somebody does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    port = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    fcntl.fcntl(port, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(port, fcntl.F_SETFL, fcntl.fcntl(port, fcntl.F_GETFL) | os.O_ASYNC)
    rest = b""
    while True:
        read = os.read(port, 4096)
        if not read:
            rest = b""
            signal.sigwaitinfo({signal.SIGIO})
            continue
        *lines, rest = (rest + read).split(b"\n")
        rest = rest[-LONGEST_REQUEST:]
        for line in lines:
            os.write(port, json.dumps(become(line)).encode() + b"\n")


def become(line: bytes) -> dict[str, object]:
    """Do what a request asks, as far as it can be done."""
    did: list[str] = []
    try:
        asked = json.loads(line)
        if not isinstance(asked, dict):
            raise ValueError("a request is a JSON object")
        for name, do in _DOES.items():
            if asked.get(name) is not None:
                do(asked[name])
                did.append(name)
    except Exception as error:  # noqa: BLE001 - whatever it was, the host must hear of it
        return {"ok": False, "did": did, "error": f"{type(error).__name__}: {error}"}
    return {"ok": True, "did": did}


def _set_time(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, float(seconds))


def _set_hostname(name: str) -> None:
    socket.sethostname(name)
    _write("/etc/hostname", name + "\n")
    _write("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost\n")


def _set_machine_id(number: str) -> None:
    if len(number) != 32 or int(number, 16) < 0:
        raise ValueError("a machine id has 32 hexadecimal digits")
    _write("/etc/machine-id", number + "\n")
    if not os.path.islink("/var/lib/dbus/machine-id"):
        _write("/var/lib/dbus/machine-id", number + "\n")


def _add_seed(text: str) -> None:
    seed = base64.b64decode(text, validate=True)
    with open("/dev/urandom", "wb") as urandom:
        fcntl.ioctl(urandom, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(urandom, _RNDRESEEDCRNG)


def _set_mac(address: str) -> None:
    octets = bytes.fromhex(address.replace(":", ""))
    if len(octets) != 6:
        raise ValueError("a MAC has 6 octets")
    network.set_hardware_address(octets)


def _renew_ssh_keys(wanted: bool) -> None:
    keys = glob.glob("/etc/ssh/ssh_host_*") if wanted else []
    if keys:
        for key in keys:
            os.unlink(key)
        subprocess.run(["ssh-keygen", "-A"], check=True, capture_output=True, timeout=60)


_DOES: dict[str, Callable[[Any], None]] = {
    "seed": _add_seed,
    "time": _set_time,
    "hostname": _set_hostname,
    "machine_id": _set_machine_id,
    "mac": _set_mac,
    "ssh": _renew_ssh_keys,
}


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    # Not to be found by `killall python3`.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"envd-identity", 0, 0, 0)
    serve(sys.argv[1])
