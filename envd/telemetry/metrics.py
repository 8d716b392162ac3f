"""What is counted and timed as it happens: fed by every event, by the end of every boot, and by every answer.

Each daemon has a registry of its own, and counts from 0 in each of its lives. Names begin with `envd_`, units are
seconds, bytes and US dollars, and no label has more values than the code has words for it: what strangers send, and
what a task or a guest says, is never one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from ..errors import Fault, error_classes
from ..models import Event, Job, JobKind, VerdictStatus

RESETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 2700, 3600)
"""Seconds: a clone takes less than one of them, a boot of the stock image 40 minutes."""
PHASES = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
STEPS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EVALUATIONS = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 270, 600)
REQUESTS = (0.005, 0.025, 0.1, 0.5, 1, 5, 30, 60, 300, 900, 3600)
"""A request may be held for a minute, and an old trainer's reset for as long as a boot takes."""
MOST_PHASES = 40
"""Names of phases that are told apart. A driver tells them, and may have them of a guest."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "WEBSOCKET"})
OTHER = "other"
NO_PATH = "none"
"""Of what ended before it was known how its desktop would be had."""


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"envd_{name}", meaning, labels, registry=registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"envd_{name}", meaning, labels, buckets=buckets, registry=registry)

        self.boots = counter(
            "boots",
            "Boots and restores that ended: ready, failed or cancelled, by how they were to be had.",
            "path",
            "outcome",
        )
        self.boot_seconds = histogram(
            "boot_seconds", "From room for a boot to a ready desktop, of boots that came to one.", RESETS, "path"
        )
        self.jobs = counter("jobs", "Jobs that ended, by what they were and how they ended.", "kind", "outcome")
        self.phase_seconds = histogram(
            "phase_seconds", "What the phases of jobs took, told when the job ends.", PHASES, "phase", "path"
        )
        self.reset_seconds = histogram(
            "reset_seconds", "From accepting a reset to its end, waiting included.", RESETS, "path", "outcome"
        )
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "How long jobs stood in line, told when they end.", RESETS, "kind"
        )
        self.probes = counter(
            "probes", "Readiness probes of boots, by what came of them in the end.", "probe", "result"
        )
        self.probe_attempts = counter("probe_attempts", "Tries of readiness probes.", "probe")
        self.probe_seconds = histogram(
            "probe_seconds", "From the start of a boot until its readiness probe passed.", RESETS, "probe"
        )
        self.setup_steps = counter("setup_steps", "Set-up steps of tasks.", "type", "outcome")
        self.episodes = counter("episodes", "Episodes that began.")
        self.episodes_ended = counter("episodes_ended", "Episodes that ended, by why.", "reason")
        self.step_seconds = histogram(
            "step_seconds", "What steps took: to act, and to observe afterwards.", STEPS, "part"
        )
        self.actions = counter("actions", "Actions of steps, by what became of them.", "outcome")
        self.unparsable = counter("unparsable_predictions", "Predictions that were not in the grammar.")
        self.verdicts = counter("verdicts", "Episodes that were judged, by what the verdict is.", "status")
        self.masked = counter(
            "verdicts_masked",
            "Verdicts without a score, which a trainer leaves out, by whose doing that was.",
            "fault",
            "code",
        )
        self.evaluate_seconds = histogram("evaluate_seconds", "What finding a verdict took.", EVALUATIONS, "status")
        self.desktops_lost = counter("desktops_lost", "Desktops that died by themselves once they were ready.")
        self.faults = counter(
            "faults", "Failures that somebody was told of, in a job, a verdict or an answer.", "where", "code", "fault"
        )
        self.requests = counter("http_requests", "Requests that were answered.", "route", "method", "status")
        self.request_seconds = histogram(
            "http_request_seconds",
            "From a request to the end of its answer, streams left out.",
            REQUESTS,
            "route",
            "method",
        )
        self.requests_now = Gauge(
            "envd_http_requests_in_progress", "Requests that are being answered, streams included.", registry=registry
        )
        self.scrape_errors = counter("scrape_errors", "Parts of the daemon that could not be looked at.", "part")
        self.looking = anyio.Lock()
        """At the disk: by one scrape at a time."""
        self.looks = False
        """A thread does so, also when nobody waits for it any more."""
        self._phases: set[str] = set()
        self._paths: dict[str, str] = {}
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A rate over a series that is not there yet is nothing, and the first failure would not be seen."""
        for status in VerdictStatus:
            self.verdicts.labels(status)
        for outcome in ("ready", "failed", "cancelled"):
            for path in ("cold", "restore"):
                self.boots.labels(path, outcome)
        for kind in JobKind:
            for outcome in ("succeeded", "failed"):
                self.jobs.labels(kind, outcome)

    # -- what is told ---------------------------------------------------------------------------------------------

    def booted(self, job_id: str, path: str, outcome: str, seconds: float) -> None:
        """A boot or restore has ended. `path` is how its desktop was had, or was to be; `outcome` is ready, failed or
        cancelled."""
        self._paths[job_id] = path
        self.boots.labels(path, outcome).inc()
        if outcome == "ready":
            self.boot_seconds.labels(path).observe(seconds)

    def observe(self, event: Event) -> None:
        match event.kind:
            case "state" if event.job is not None and event.job.state.terminal:
                self._job_ended(event.job)
            case "setup":
                record = event.data["record"]
                self.setup_steps.labels(record["type"], record["outcome"]).inc()
            case "step":
                self._stepped(event.data)
            case "verdict":
                self._judged(event.data)
            case "episode" if event.data.get("state") == "began":
                self.episodes.inc()
            case "episode" if event.data.get("state") == "ended":
                self.episodes_ended.labels(event.data["end_reason"]).inc()
            case "desktop" if event.data.get("state") == "lost":
                self.desktops_lost.inc()

    def _job_ended(self, job: Job) -> None:
        path = job.reset_path or self._paths.pop(job.id, NO_PATH)
        self._paths.pop(job.id, None)
        self.jobs.labels(job.kind, job.state).inc()
        if job.ended_at is not None and job.kind is JobKind.RESET:
            self.reset_seconds.labels(path, job.state).observe(max(0.0, job.ended_at - job.created_at))
        for phase in job.phases:
            if phase.seconds is not None:
                self.phase_seconds.labels(self._name_of(phase.name), path).observe(phase.seconds)
        waited = sum(phase.seconds or 0.0 for phase in job.phases if phase.name == "queue")
        self.queue_wait_seconds.labels(job.kind).observe(waited)
        for probe in job.probes:
            self.probes.labels(probe.name, "passed" if probe.passed else probe.result).inc()
            self.probe_attempts.labels(probe.name).inc(probe.attempts)
            if probe.passed and probe.seconds is not None:
                self.probe_seconds.labels(probe.name).observe(probe.seconds)
        if job.error is not None:
            self.failed("job", job.error.code, job.error.fault)

    def _name_of(self, phase: str) -> str:
        if phase not in self._phases and len(self._phases) >= MOST_PHASES:
            return OTHER
        self._phases.add(phase)
        return phase

    def _stepped(self, step: Mapping[str, Any]) -> None:
        for part, seconds in step["seconds"].items():
            self.step_seconds.labels(part).observe(seconds)
        for action in step["actions"]:
            self.actions.labels(action["outcome"]).inc()
        if step["problem"]:
            self.unparsable.inc()

    def _judged(self, verdict: Mapping[str, Any]) -> None:
        self.verdicts.labels(verdict["status"]).inc()
        if (seconds := verdict["seconds"].get("total")) is not None:
            self.evaluate_seconds.labels(verdict["status"]).observe(seconds)
        if verdict["mask"]:
            self.masked.labels(verdict["fault"], verdict["code"]).inc()
            self.failed("verdict", verdict["code"], verdict["fault"])

    def failed(self, where: str, code: str, fault: str) -> None:
        """`where` is job, verdict or answer."""
        known = code in error_classes() and fault in set(Fault)
        self.faults.labels(where, code if known else OTHER, fault if known else OTHER).inc()

    def answered(self, route: str, method: str, status: int | None, seconds: float | None) -> None:
        """A request of the route with that template has its answer; None is the status of one whose client left before,
        and the seconds of a stream, which lasts as long as somebody reads."""
        method = method if method in METHODS else OTHER
        self.requests.labels(route, method, "none" if status is None else str(status)).inc()
        if seconds is not None:
            self.request_seconds.labels(route, method).observe(seconds)
