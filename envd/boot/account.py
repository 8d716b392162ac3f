"""The account of one boot: what its driver and its probes tell, for whoever watches it and for the error it may end
with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import anyio

from ..drivers.base import Report
from ..errors import BootFailed, BootTimeout, EnvdError
from ..events import EventLog
from ..models import Endpoints, Probe, ProbeResult, ResetPath
from .probes import Readiness, Watcher

MOST_PHASES = 40
"""Of one boot. A driver may take them from what a guest writes, and a guest may restart for ever."""
MOST_NOTES = 20
"""Of one boot, the latest: whether the machine is emulated, that Chrome was started, …"""


class BootWatcher(Protocol):
    """Told how a boot goes. Calls never block and never raise."""

    @property
    def job_id(self) -> str:
        """The job that it serves now."""

    @property
    def env(self) -> int | None:
        """The env that it is for now."""

    def phase(self, name: str, desktop_id: str) -> None:
        """`admit` (where something has to be waited for; the desktop's id is "" yet), `create` (of a parked spare
        `unpark`), those that the driver tells, `probe`."""

    def made(self, path: ResetPath) -> None:
        """The instance exists, and was made in this way."""

    def probed(self, probe: Probe) -> None: ...

    def note(self, message: str) -> None: ...

    def progress(self, message: str) -> None: ...


class Admission(Report):
    """What a driver says while there is no room for another instance."""

    def __init__(self, watcher: BootWatcher) -> None:
        self._watcher = watcher
        self._waits = False

    def progress(self, words: str) -> None:
        if not self._waits:
            self._waits = True
            self._watcher.phase("admit", "")
        self._watcher.progress(words)

    def note(self, words: str) -> None:
        self._watcher.note(words)


class BootAccount(Report):
    """Begins with the phase `begins`. Once `over`, what the driver still has to say is no longer about a job.

    `readiness_of` makes the probes of a desktop, to be told to the first argument, at some endpoints, with a clone's
    frame or None; `limit` is the seconds that the boot may take.
    """

    def __init__(
        self,
        desktop_id: str,
        watcher: BootWatcher,
        events: EventLog,
        readiness_of: Callable[[Watcher, Endpoints, bytes | None], Readiness],
        limit: float,
        begins: str = "create",
    ) -> None:
        self._desktop_id = desktop_id
        self._watcher = watcher
        self._events = events
        self._readiness_of = readiness_of
        self._limit = limit
        self._began = time.monotonic()
        self._phases: list[tuple[str, float]] = []
        self._notes: deque[str] = deque(maxlen=MOST_NOTES)
        self._readiness: Readiness | None = None
        self.over = False
        self.phase(begins)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def progress(self, words: str) -> None:
        if not self.over:
            self._watcher.progress(words)

    def phase(self, name: str) -> None:
        news = not self._phases or self._phases[-1][0] != name
        if news and not self.over and len(self._phases) < MOST_PHASES:
            self._phases.append((name, time.monotonic()))
            self._watcher.phase(name, self._desktop_id)

    def note(self, words: str) -> None:
        if self.over:
            self._events.publish("note", desktop_id=self._desktop_id, message=words)
        else:
            self._notes.append(words)
            self._watcher.note(words)

    def probed(self, probe: Probe) -> None:
        self._watcher.probed(probe)

    async def ready(self, endpoints: Endpoints, frame: bytes | None = None) -> None:
        self._readiness = self._readiness_of(self, endpoints, frame)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell_progress, self._readiness)
            await self._readiness.wait()
            tasks.cancel_scope.cancel()

    async def _tell_progress(self, readiness: Readiness) -> None:
        """The line that users of older servers look for: every second at first, later every ten."""
        while True:
            await anyio.sleep(1 if self.seconds < 30 else 10)
            passed = ", ".join(f"{name}={probe.passed}" for name, probe in readiness.probes.items())
            self.progress(f"Waiting for VM to be ready… {self.seconds:.0f}s / {self._limit:.0f}s ({passed})")

    def explain(self, error: EnvdError | TimeoutError, log: Sequence[str]) -> BootFailed:
        """What ended the boot, with everything that is known of it. `log` is the instance's last lines."""
        phase, _ = self._phases[-1]
        probes = self._readiness.probes if self._readiness else {}
        facts: dict[str, Any] = {
            "desktop_id": self._desktop_id,
            "phase": phase,
            "phases": self._phase_seconds(),
            "probes": {name: f"{probe.result}: {probe.detail}" for name, probe in probes.items()},
            "notes": list(self._notes),
            "log": list(log),
        }
        if isinstance(error, TimeoutError):
            missing = " and ".join(name for name, probe in probes.items() if not probe.passed) or "its instance"
            return BootTimeout(
                f"Not ready after {self.seconds:.0f} s, in phase {phase}: still waiting for {missing}.",
                hint=_remedy(probes, self._limit),
                **facts,
            )
        return boot_failure(error, facts)

    def _phase_seconds(self) -> dict[str, float]:
        ends = [at for _, at in self._phases[1:]] + [time.monotonic()]
        spent: dict[str, float] = {}
        for (name, at), end in zip(self._phases, ends, strict=True):
            spent[name] = round(spent.get(name, 0.0) + end - at, 3)
        return spent


def _remedy(probes: Mapping[str, Probe], limit: float) -> str:
    """What the last tries of the probes tell about a boot that took too long."""
    if not probes:
        return "The provider had not made the instance yet: the notes and log lines say what it waited for."
    screen, chrome = probes["screenshot"], probes["chrome_cdp"]
    if screen.passed:
        return (
            f"The desktop is there and Chrome's DevTools (port 9222 of the guest) are not: {chrome.detail}. The notes "
            "tell whether the guest could start Chrome and the bridge to it; more time rarely helps."
        )
    if screen.result is ProbeResult.FAIL:
        return (
            f"The guest answers, and not with a usable desktop: {screen.detail}. That is the image's doing or its "
            "settings'; more time rarely helps."
        )
    return (
        "Nothing in the guest answered yet. If the log lines and notes show that it was still coming up, raise "
        f"DOCKER_VM_READY_TIMEOUT (it is {limit:g} s); else they are where it stopped."
    )


def boot_failure(error: EnvdError, facts: dict[str, Any]) -> BootFailed:
    """The error as one of a boot, with `facts` added."""
    kind = type(error) if isinstance(error, BootFailed) else BootFailed
    return kind(error.detail, hint=error.hint, retry_after=error.retry_after, **{**error.facts, **facts})
