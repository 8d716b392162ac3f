"""What is looked at when `/metrics` is asked for: how many of what there are now, and how the host fares.

A scrape must not hold anybody up and must not fail. What the event loop owns is only counted there, without a look at
each job; what may touch a disk, and the making of the text, is done in a thread. A part that cannot be looked at is
left out, and counted; so is the disk while it hangs, for which one thread waits and no more.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..models import DesktopState, EnvState, JobKind, LeaseState, ResetPath

if TYPE_CHECKING:
    from ..service import Service

logger = structlog.get_logger(__name__)

LAGS = 30
"""Samples that make up a minute: a scrape in between must not miss what another one has not seen."""
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
DISK_SECONDS = 3.0
"""That a scrape waits for the disk: Prometheus by itself gives up after ten."""
Families = Iterator[Metric]


class _Together(Collector):
    """What was counted, and what was looked at. When each counter was made is left out: it doubles what is sent."""

    def __init__(self, counted: Iterable[Metric], looked_at: Iterable[Metric]) -> None:
        self._parts = (counted, looked_at)

    def collect(self) -> Families:
        for families in self._parts:
            for family in families:
                family.samples = [one for one in family.samples if not one.name.endswith("_created")]
                yield family


async def scrape(service: Service, accept: str = "") -> tuple[bytes, str]:
    """All metrics as text, and its content type: OpenMetrics for whoever accepts that, else Prometheus' own."""
    now = [*_looked(service, _OF_THE_LOOP), *await _look_at_the_disk(service)]
    return await anyio.to_thread.run_sync(partial(_render, service, now, accept))


async def _look_at_the_disk(service: Service) -> list[Metric]:
    metrics = service.metrics

    def look() -> list[Metric]:
        try:
            return list(_looked(service, _OF_THE_DISK))
        finally:
            metrics.looks = False

    with anyio.move_on_after(DISK_SECONDS):
        async with metrics.looking:
            if not metrics.looks:
                metrics.looks = True
                return await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
    metrics.scrape_errors.labels("disk").inc()
    return []


def _render(service: Service, now: list[Metric], accept: str) -> tuple[bytes, str]:
    together = _Together(service.metrics.registry.collect(), now)
    try:
        encode, kind = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, kind = generate_latest, PLAIN
    return encode(together), kind


def _looked(service: Service, parts: Iterable[Callable[[Service], Families]]) -> Families:
    for part in parts:
        try:
            yield from list(part(service))
        except Exception as error:  # noqa: BLE001 - whatever ails one part: the others are wanted all the more
            service.metrics.scrape_errors.labels(part.__name__.lstrip("_")).inc()
            logger.debug("a part cannot be looked at", part=part.__name__, error=repr(error))


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"envd_{name}", meaning, value=float(value))


def _gauges(name: str, meaning: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(f"envd_{name}", meaning, labels=[label])
    for value, number in values:
        family.add_metric([value], float(number))
    return family


# -- of the loop ----------------------------------------------------------------------------------------------------


def _daemon(service: Service) -> Families:
    about = {"version": __version__, "provider": service.driver.name, "python": platform.python_version()}
    yield InfoMetricFamily("envd_build", "What runs here.", value=about)
    yield _gauge("start_time_seconds", "When this life of the daemon began, in Unix seconds.", service.started_at)
    yield _gauge("ready", "Whether a reset can be served now (1), as /readyz says.", not service.not_ready())
    yield _gauge("draining", "Whether no new work is taken since the daemon ends (1).", service.closing.is_set())
    yield _gauge(
        "streams_open", "Event streams, screens, connections to Chrome and transfers that are open.", service.streams
    )
    yield _gauge("streams_limit", "How many of them may be (ENVD_MAX_STREAMS).", service.settings.max_streams)


def _queue(service: Service) -> Families:
    load = service.queue.load()
    depth = [(kind, load.waiting[kind]) for kind in JobKind]
    yield _gauges("queue_depth", "Jobs that wait for their turn.", "kind", depth)
    yield _gauge("queue_limit", "How many jobs may wait (ENVD_QUEUE_LIMIT).", service.settings.queue_limit)
    yield _gauge(
        "queue_oldest_seconds",
        "How long the job has waited that has waited longest, spares left out.",
        load.longest_wait,
    )
    flying = [(path, load.in_flight[path]) for path in (ResetPath.COLD, ResetPath.RESTORE)]
    yield _gauges("boots_in_flight", "Boots and restores that are under way.", "path", flying)
    yield _gauge("boot_oldest_seconds", "How long the boot has taken so far that has taken longest.", load.longest_boot)


def _desktops(service: Service) -> Families:
    states = Counter(desktop.state for desktop in service.fleet.desktops())
    yield _gauges(
        "desktops", "Desktops that exist, by what they do.", "state", [(one, states[one]) for one in DesktopState]
    )
    yield _gauge(
        "desktop_removing_seconds",
        "How long the desktop is being removed that is so longest.",
        service.fleet.removing_s,
    )
    yield _gauge("spares", "Clean desktops that stand by.", service.fleet.spares)
    yield _gauge("spares_wanted", "How many of them are kept ready (ENVD_SPARES).", service.settings.spares)


def _envs(service: Service) -> Families:
    states = Counter(service.envs.env(number).state for number in range(len(service.envs)))
    yield _gauges("envs", "Envs, by what they do.", "state", [(one, states[one]) for one in EnvState])
    yield _gauge("evaluations_running", "Episodes that are being judged.", service.evaluations.running)
    yield _gauge(
        "evaluations_limit", "How many evaluators may run at once (ENVD_EVALUATIONS).", service.settings.evaluations
    )


def _leases(service: Service) -> Families:
    leases = service.leases.all()
    states = Counter(lease.state for lease in leases)
    open_states = (LeaseState.HELD, LeaseState.WAITING)
    yield _gauges("leases", "Leases that have not ended.", "state", [(one, states[one]) for one in open_states])
    held = sum(len(lease.envs) for lease in leases if lease.state is LeaseState.HELD)
    yield _gauge("envs_leased", "Envs that a lease has.", held)


def _host(service: Service) -> Families:
    sample = service.host.latest
    if sample is None:
        return
    yield _gauge("host_cpu_ratio", "Share of all processors that was busy lately, 0 to 1.", sample.cpu)
    yield _gauge("host_cpus", "Processors of this host.", sample.cores)
    yield _gauge("host_load1", "Processes that ran or waited to, over a minute.", sample.load1)
    yield _gauge("host_memory_bytes", "Memory of this host.", sample.memory_total)
    yield _gauge("host_memory_available_bytes", "What of it could be used.", sample.memory_available)
    yield _gauge("disk_bytes", "Size of the state directory's disk.", sample.disk_total)
    yield _gauge("disk_free_bytes", "What is free on it.", sample.disk_free)
    latest = max(one.loop_lag_s for one in service.host.samples[-LAGS:])
    yield _gauge("loop_lag_seconds", "The latest that the event loop was within the last minute.", latest)


def _journal(service: Service) -> Families:
    trouble = bool(service.store.trouble)
    yield _gauge("journal_trouble", "Whether what is written may not last, so no new work is taken (1).", trouble)


def _costs(service: Service) -> Families:
    costs = service.driver.costs()
    if costs is None:
        return
    counts = sorted(costs.instances.items())
    yield _gauges("aws_instances", "Instances of this daemon that are paid for.", "type", counts)
    yield _gauge("aws_cost_usd_per_hour", "What they cost in an hour, as far as prices are known.", costs.usd_per_hour)
    hours = CounterMetricFamily(
        "envd_aws_instance_hours", "Hours that instances were paid for in this life of the daemon.", labels=["type"]
    )
    for kind, spent in sorted(costs.hours.items()):
        hours.add_metric([kind], spent)
    yield hours
    yield CounterMetricFamily(
        "envd_aws_cost_usd", "What that cost in US dollars, as far as prices are known.", value=costs.usd
    )


_OF_THE_LOOP = (_daemon, _queue, _desktops, _envs, _leases, _host, _journal, _costs)


# -- of the disk ----------------------------------------------------------------------------------------------------


def _journal_size(service: Service) -> Families:
    path: Path | None = getattr(service.store, "path", None)
    if path is not None:
        files = (path, path.with_name(f"{path.name}-wal"))
        yield _gauge("journal_bytes", "Size of the journal's files.", sum(map(_size, files)))


def _templates(service: Service) -> Families:
    if service.driver.name not in ("docker", "qemu"):
        return
    from ..vm.templates import Templates  # it brings all of virtual machines

    if (folder := Templates.of(service.settings).root).is_dir():
        taken = sum(_taken(Path(root) / name) for root, _, names in os.walk(folder) for name in names)
        yield _gauge("templates_bytes", "What the templates of virtual machines take.", taken)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _taken(path: Path) -> int:
    """Their memory has holes."""
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


_OF_THE_DISK = (_journal_size, _templates)
