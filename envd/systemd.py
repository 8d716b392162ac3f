"""What the service manager is told, over the socket that it names (sd_notify(3)): nothing, where there is none."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping

import anyio


class Notifier:
    """Messages never fail: a manager that does not listen changes nothing about the service."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        asked = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(asked) / 1e6 if re.fullmatch("[1-9][0-9]{0,15}", asked, re.ASCII) and mine else None
        """Seconds within which the manager wants to hear of us, if it does."""

    def tell(self, **facts: str) -> None:
        """READY="1", STATUS="…", STOPPING="1", WATCHDOG="1"."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in facts.items()).encode()
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto(message, self._address)

    async def feed(self, alive: Callable[[], bool]) -> None:
        """Tell the watchdog, for as long as the loop turns and `alive` says that the work behind it goes on. Returns at
        once where nobody watches."""
        if self.watchdog is None:
            return
        while True:
            if alive():
                self.tell(WATCHDOG="1")
            await anyio.sleep(self.watchdog / 3)


class Pulse:
    """Whether a task made progress lately: it calls `beat` at least every so often, also while it waits."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._last = time.monotonic()

    def beat(self) -> None:
        self._last = time.monotonic()

    @property
    def alive(self) -> bool:
        return time.monotonic() - self._last < self._patience
