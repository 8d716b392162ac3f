"""What `/v1/events?stats=1` tells beside the events, for whoever shows the whole daemon: a snapshot with some of what
was before, `env` messages (an env as it now is), and `stats` every few seconds. None of it is in the log of events.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Collection, Iterator
from typing import Any

from ... import __version__
from ...models import Env, Event, Job
from ...service import Service

HOST_SHOWN = 180
"""Samples of the host in a snapshot: of half an hour every fifth."""
ENDED_SHOWN = 500
VERDICTS_SHOWN = 200
NEWS_SHOWN = 60
BOOT_LINES = 12
"""Of one job."""
UNTOLD = frozenset({"position", "probe", "phase", "progress"})
"""Kinds of events that are no news to people: a job tells of them itself."""
LINE = 400
"""Characters of a line."""


class View:
    """Of one watcher: knows which envs it was told of."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._told: dict[int, Env] = {}

    def snapshot(self) -> dict[str, Any]:
        """All of it as it is now."""
        service = self._service
        self._told = {env.id: env for env in service.all_envs()}
        active = {job.id for job in service.queue.active()}
        jobs = [job for job in service.store.jobs() if job.ended_at is not None][-ENDED_SHOWN:]
        events = service.events.recent()
        return {
            **service.snapshot(),
            "daemon": self._daemon(),
            "stats": self.stats(),
            "host": [sample.as_json for sample in _thinned(service.host.samples)],
            "ended": [_ended(job) for job in jobs],
            "verdicts": [_verdict(event) for event in events if event.kind == "verdict"][-VERDICTS_SHOWN:],
            "news": [_news(event) for event in events if event.kind not in UNTOLD][-NEWS_SHOWN:],
            "lines": _boot_lines(events, active),
        }

    def _daemon(self) -> dict[str, Any]:
        service = self._service
        return {
            "name": socket.gethostname(),
            "daemon_id": service.daemon_id,
            "version": __version__,
            "provider": service.driver.name,
            "image": service.driver.image,
            "epoch": service.events.epoch,
            "started_at": service.started_at,
            "screen": service.settings.screen,
            "now": time.time(),
        }

    def stats(self) -> dict[str, Any]:
        service = self._service
        left = None if service.drain_until is None else max(0.0, service.drain_until - time.monotonic())
        latest = service.host.latest
        return {
            "at": time.time(),
            "host": latest.as_json if latest else None,
            "readiness": service.readiness(),
            "draining": service.closing.is_set(),
            "drain_left_s": left and round(left, 1),
            "spares": service.fleet.spares,
            "spares_wanted": service.settings.spares,
            "streams": service.streams,
        }

    def envs(self, concerned: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
        """Those (of all, unless it is said which are concerned) that are not as this watcher was told last."""
        for number in range(len(self._service.envs)):
            if concerned is not None and number not in concerned:
                continue  # of an earlier life with more envs there may be events, too
            env = self._service.env(number)
            if self._told.get(number) != env:
                self._told[number] = env
                yield env.model_dump(mode="json")


def concerned(events: Collection[Event]) -> set[int]:
    """The envs that these events are about."""
    found = {event.env for event in events if event.env is not None}
    return found.union(*(event.data.get("envs", ()) for event in events if event.kind == "lease"))


def _thinned(samples: tuple[Any, ...]) -> tuple[Any, ...]:
    every = -(-len(samples) // HOST_SHOWN) or 1
    return samples[::-every][::-1]


def _ended(job: Job) -> dict[str, Any]:
    assert job.ended_at is not None
    told = job.model_dump(
        mode="json", include={"id", "kind", "env", "state", "started_at", "ended_at", "reset_path", "task_id", "error"}
    )
    if told["error"] is not None:
        told["error"] = {name: told["error"][name] for name in ("code", "fault", "detail", "hint")}
    return told


def _verdict(event: Event) -> dict[str, Any]:
    return {"env": event.env, "at": event.at, **event.data}


def _news(event: Event) -> dict[str, Any]:
    """A line about an event, as a page makes it of those that come later."""
    told = event.model_dump(mode="json", include={"id", "kind", "at", "env", "job_id", "desktop_id", "data"})
    if event.job is not None:
        told["job"] = event.job.model_dump(mode="json", include={"kind", "state", "error"})
    return told


def _boot_lines(events: Collection[Event], jobs: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """What was said of each of these jobs lately."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.job_id in jobs and event.kind in ("progress", "note") and (words := event.data.get("message")):
            assert event.job_id is not None
            lines = found.setdefault(event.job_id, [])
            if lines and _pattern(lines[-1]["message"]) == _pattern(words):
                lines.pop()  # it only counts on
            lines.append({"at": event.at, "kind": event.kind, "message": str(words)[:LINE]})
    return {job: lines[-BOOT_LINES:] for job, lines in found.items()}


def _pattern(words: str) -> str:
    return re.sub(r"\d+", "#", words[:LINE])
