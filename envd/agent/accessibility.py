"""The accessibility tree and the text of the focused terminal, read by a helper in a process of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

from envd.agent.errors import AgentError
from envd.agent.limits import Limits
from envd.agent.processes import Overran, Processes

_PYTHON = "/usr/bin/python3"  # the one that Debian's python3-gi is for
_HELPER = Path(__file__).with_name("atspi.py")
_GRACE = 10
"""Seconds beyond its own deadline that the helper may take for a last answer and for writing."""
_PACKAGES = "python3-gi gir1.2-atspi-2.0 at-spi2-core"


class Accessibility:
    def __init__(self, limits: Limits, processes: Processes) -> None:
        self._limits = limits
        self._processes = processes

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/accessibility", self.accessibility),
            web.get("/terminal", self.terminal),
        ]

    async def accessibility(self, request: web.Request) -> web.Response:
        """`{AT: xml, truncated: bool}`; truncated when the walk was cut short by its deadline or a limit."""
        if not _has_session_bus():
            raise AgentError(
                "this desktop has no session bus, so nothing in it is accessible: start it under dbus-run-session, "
                "with at-spi2-core installed, and its applications after that"
            )
        return web.json_response(await self._read("tree", self._limits.accessibility))

    async def terminal(self, request: web.Request) -> web.Response:
        """The text of the focused terminal, or null, also when nothing is accessible: clients take this for a ping."""
        output = None
        if _has_session_bus():
            try:
                output = (await self._read("terminal", self._limits.terminal))["output"]
            except _Unreadable:
                output = None
        return web.json_response({"output": output, "status": "success"})

    async def _read(self, what: str, seconds: float) -> dict[str, Any]:
        command = [_PYTHON, str(_HELPER), what, str(seconds)]
        try:
            done = await self._processes.run(command, seconds=seconds + _GRACE)
        except Overran:
            raise _Unreadable(f"an application did not answer within {seconds + _GRACE:g} s; close it") from None
        if done.returncode != 0:
            reason = done.error.strip().rpartition("\n")[2]
            missing = f"; install the Debian packages {_PACKAGES} in it" if "import" in done.error else ""
            raise _Unreadable(f"{reason or f'the helper ended with code {done.returncode}'}{missing}")
        if done.cut:
            raise _Unreadable(f"it is larger than {self._limits.output} bytes; close some windows")
        answer: dict[str, Any] = json.loads(done.output)
        return answer


def _has_session_bus() -> bool:
    """Whether there is one where D-Bus looks for it; starting the helper only to find none would take a while."""
    if "DBUS_SESSION_BUS_ADDRESS" in os.environ:
        return True
    return os.path.exists(os.path.join(os.environ.get("XDG_RUNTIME_DIR", "/nowhere"), "bus"))


class _Unreadable(AgentError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the accessibility tree of the desktop cannot be read: {reason}")
