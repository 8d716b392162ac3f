"""/metrics: what happened is counted once, under names and labels that are bounded, and a scrape neither fails nor
holds anybody up."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from figures import FIGURES
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from serving import CLICK, Served, eventually, serving

from envd.drivers.aws.budget import Budget
from envd.drivers.aws.meter import Meter
from envd.drivers.base import Costs
from envd.drivers.sim import Behaviour
from envd.models import Event, Job, JobState, Phase
from envd.telemetry import state
from envd.telemetry.metrics import MOST_PHASES, Metrics

INFEASIBLE = {"id": "t-1", "config": [], "evaluator": {"func": "infeasible"}}
READ, PLAY = "r" * 32, "p" * 32


class Scraped:
    """All samples of a scrape."""

    def __init__(self, text: str) -> None:
        self.families: list[Metric] = list(plain(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def get(self, name: str, **labels: str) -> float:
        """The one sample with that name and these labels, at least."""
        found = [one.value for one in self.samples if one.name == name and labels.items() <= one.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return float(found[0])

    def sum(self, name: str, **labels: str) -> float:
        return sum(one.value for one in self.samples if one.name == name and labels.items() <= one.labels.items())


async def scrape(served: Served, **how: Any) -> Scraped:
    status, body = await served.get("/metrics", **how)
    assert status == 200, body
    return Scraped(body.decode())


async def test_an_episode_is_counted_from_its_reset_to_its_verdict() -> None:
    async with serving() as served:
        await served.play(task=INFEASIBLE)
        await served.post("/v1/envs/0/step", {"prediction": CLICK})
        await served.post("/v1/envs/0/step", {"prediction": "nothing that parses"})
        verdict = await served.evaluate()
        now = await scrape(served)
    assert verdict["status"] == "scored"
    assert now.get("envd_boots_total", path="cold", outcome="ready") == 1
    assert now.get("envd_boot_seconds_count", path="cold") == 1
    assert now.get("envd_jobs_total", kind="reset", outcome="succeeded") == 1
    assert now.get("envd_reset_seconds_count", path="cold", outcome="succeeded") == 1
    assert now.get("envd_queue_wait_seconds_count", kind="reset") == 1
    phases = {"queue", "create", "probe", "set_up", "observe"}
    assert {one.labels["phase"] for one in now.samples if one.name == "envd_phase_seconds_count"} == phases
    assert now.get("envd_probes_total", probe="screenshot", result="passed") == 1
    assert now.get("envd_probes_total", probe="chrome_cdp", result="passed") == 1
    assert (now.get("envd_episodes_total"), now.get("envd_episodes_ended_total", reason="unparsable")) == (1, 1)
    assert now.get("envd_step_seconds_count", part="act") == 2
    assert now.get("envd_actions_total", outcome="ok") == 1
    assert now.get("envd_unparsable_predictions_total") == 1
    assert now.get("envd_verdicts_total", status="scored") == 1
    assert now.get("envd_evaluate_seconds_count", status="scored") == 1
    assert now.get("envd_http_requests_total", route="/v1/envs/{env}/step", method="POST", status="200") == 2
    assert now.get("envd_envs", state="playing") == 1
    assert now.get("envd_desktops", state="in_use") == 1
    assert now.get("envd_ready") == 1
    assert now.get("envd_build_info", provider="sim") == 1
    assert now.sum("envd_faults_total") == 0
    assert now.sum("envd_scrape_errors_total") == 0


async def test_what_fails_is_counted_by_its_code_and_whose_doing_it_was() -> None:
    async with serving(Behaviour(boot_s=0.05, create_fails="injected"), envs=2) as served:
        job = await served.reset()
        await served.post("/v1/envs/9/step", {"prediction": CLICK})
        now = await scrape(served)
    code, fault = job["error"]["code"], job["error"]["fault"]
    assert now.get("envd_boots_total", path="cold", outcome="failed") == 1
    assert now.get("envd_jobs_total", kind="reset", outcome="failed") == 1
    assert now.get("envd_faults_total", where="job", code=code, fault=fault) == 1
    assert now.get("envd_faults_total", where="answer", code="unknown_env", fault="client") == 1


async def test_an_episode_that_was_not_judged_is_masked() -> None:
    async with serving() as served:
        await served.play(task={"id": "t-1"})
        verdict = await served.evaluate()
        now = await scrape(served)
    assert verdict["mask"]
    assert now.get("envd_verdicts_masked_total", fault=verdict["fault"], code=verdict["code"]) == 1
    assert now.get("envd_faults_total", where="verdict", code=verdict["code"]) == 1


async def test_a_boot_that_is_cancelled_is_no_failure() -> None:
    async with serving(Behaviour(boot_s=60)) as served:
        _, job = await served.post("/v1/envs/0/reset", {})
        await served.in_state(job["id"], "booting")
        waiting = await scrape(served)
        await served.post(f"/v1/jobs/{job['id']}/cancel")
        await served.ended(job["id"])
        now = await scrape(served)
    assert waiting.get("envd_boots_in_flight", path="cold") == 1
    assert waiting.get("envd_envs", state="resetting") == 1
    assert now.get("envd_boots_total", path="cold", outcome="cancelled") == 1
    assert now.get("envd_boots_total", path="cold", outcome="failed") == 0
    assert now.get("envd_jobs_total", kind="reset", outcome="cancelled") == 1


async def test_labels_are_routes_and_never_what_strangers_send() -> None:
    async with serving() as served:
        for path in ("/nothing/here", "/v1/jobs/made-up", "/v1/envs/7", "/v1/envs/no%20number/step"):
            await served.get(path)
        await served.ask("BREW", "/v1/envs")
        now = await scrape(served)
    routes = {one.labels["route"] for one in now.samples if one.name == "envd_http_requests_total"}
    assert routes == {"none", "/v1/jobs/{job}", "/v1/envs/{env}", "/v1/envs/{env}/step", "/v1/envs"}
    assert now.get("envd_http_requests_total", route="/v1/envs", method="other", status="405") == 1


async def test_a_stream_is_counted_while_it_is_open_and_is_no_slow_answer() -> None:
    async with serving() as served:
        async with served.stream("/v1/events") as reader:
            await reader.next()
            now = await scrape(served)
        assert (now.get("envd_streams_open"), now.get("envd_http_requests_in_progress")) == (1, 2)
        await eventually(lambda: served.service.streams == 0)
        later = await scrape(served)
    assert later.get("envd_http_requests_total", route="/v1/events") == 1
    assert later.sum("envd_http_request_seconds_count", route="/v1/events") == 0


async def test_openmetrics_is_spoken_to_whoever_accepts_it() -> None:
    async with serving() as served:
        await served.play()
        kinds = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        status, body, headers = await served.ask("GET", "/metrics", headers=kinds)
        odd, _, _ = await served.ask("GET", "/metrics", headers={"Accept": "application/openmetrics-text;version=x.y"})
        _, _, usual = await served.ask("GET", "/metrics")
    assert (status, odd) == (200, 200)
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert usual["Content-Type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in openmetrics(body.decode())}  # type: ignore[no-untyped-call]
    assert {"envd_boots", "envd_build", "envd_queue_depth", "process_resident_memory_bytes"} <= names


async def test_a_scrape_needs_the_scope_that_looking_needs(tmp_path: Any) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"watcher read {READ}\n")
    tokens.chmod(0o600)
    async with serving(token=PLAY, token_file=tokens) as served:
        assert (await served.get("/metrics"))[0] == 401
        await scrape(served, headers={"Authorization": f"Bearer {READ}"})


PARTS: dict[str, tuple[str, str]] = {
    "daemon": ("envd.service.Service.not_ready", "envd_ready"),
    "queue": ("envd.boot.queue.BootQueue.load", "envd_queue_depth"),
    "desktops": ("envd.boot.fleet.Fleet.desktops", "envd_desktops"),
    "envs": ("envd.episodes.Envs.env", "envd_envs"),
    "leases": ("envd.leases.Leases.all", "envd_leases"),
    "costs": ("envd.drivers.base.Driver.costs", ""),
    "journal_size": ("envd.telemetry.state._size", "envd_journal_bytes"),
}


@pytest.mark.parametrize("part", list(PARTS))
async def test_a_scrape_does_without_a_part_that_is_in_trouble(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise OSError("injected")

    async with serving() as served:
        before = await scrape(served)
        with monkeypatch.context() as patch:
            patch.setattr(PARTS[part][0], breaks)
            now = await scrape(served)
            again = await scrape(served)
    # A part of the disk is looked at after what was counted was read.
    assert again.get("envd_scrape_errors_total", part=part) >= 1
    gone = {family.name for family in before.families} - {family.name for family in now.families}
    assert (PARTS[part][1] in gone) is bool(PARTS[part][1])
    assert len(gone) <= 7


async def test_for_a_disk_that_hangs_one_thread_waits_and_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, threads = threading.Event(), []

    def hang(path: Path) -> int:
        threads.append(path)
        assert hangs.wait(30)
        return 0

    monkeypatch.setattr("envd.telemetry.state.DISK_SECONDS", 0.2)
    async with serving() as served:
        monkeypatch.setattr("envd.telemetry.state._size", hang)
        try:
            scraped = [await scrape(served) for _ in range(5)]
            assert len(threads) == 1
        finally:
            hangs.set()
        await eventually(lambda: not served.service.metrics.looks)
        monkeypatch.undo()
        assert (await scrape(served)).get("envd_journal_bytes") > 0
    assert all(now.get("envd_ready") == 1 for now in scraped)
    assert scraped[-1].get("envd_scrape_errors_total", part="disk") == 5


async def test_a_disk_that_is_full_is_told_with_what_is_kept_there(tmp_path: Path) -> None:
    (tmp_path / "template").write_bytes(b"x" * 10_000)
    async with serving(template_dir=tmp_path) as served:
        well = await scrape(served)
        served.service.store._low = "the disk is full"  # type: ignore[attr-defined]
        served.driver.name = "qemu"  # type: ignore[misc]
        try:
            now = await scrape(served)
        finally:
            served.driver.name = "sim"  # type: ignore[misc]
    assert (well.get("envd_journal_trouble"), well.get("envd_ready")) == (0, 1)
    assert (now.get("envd_journal_trouble"), now.get("envd_ready")) == (1, 0)
    assert now.get("envd_journal_bytes") > 0
    assert now.get("envd_templates_bytes") >= 10_000


async def test_an_event_that_cannot_be_counted_still_happens(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(event: Event) -> None:
        raise ValueError("injected")

    async with serving() as served:
        served.service.events.listen(breaks)
        await served.play()
    assert any("could not be counted" in record.message for record in caplog.records)


async def test_what_a_provider_is_paid_is_told() -> None:
    async with serving() as served:
        costs = Costs({"t3.xlarge": 2}, 0.33, {"t3.xlarge": 1.5}, 0.25)
        served.driver.costs = lambda: costs  # type: ignore[method-assign]  # a sim desktop costs nothing
        now = await scrape(served)
    assert now.get("envd_aws_instances", type="t3.xlarge") == 2
    assert now.get("envd_aws_cost_usd_per_hour") == pytest.approx(0.33)
    assert now.get("envd_aws_instance_hours_total", type="t3.xlarge") == pytest.approx(1.5)
    assert now.get("envd_aws_cost_usd_total") == pytest.approx(0.25)


def test_a_meter_counts_the_hours_of_what_was_there() -> None:
    now = [0.0]
    meter = Meter(Budget({"a": 1.0, "b": 0.5}, None, None), clock=lambda: now[0])
    assert meter.look(["a", "a", "unknown"]) == Costs({"a": 2, "unknown": 1}, 2.0, {}, 0.0)
    now[0] = 1800
    assert meter.look(["b"]) == Costs({"b": 1}, 0.5, {"a": 1.0, "unknown": 0.5}, 1.0)
    now[0] = 5400
    assert meter.look([]) == Costs({}, 0.0, {"a": 1.0, "unknown": 0.5, "b": 1.0}, 1.5)


def ended(*phases: str) -> Event:
    told = tuple(Phase(name=name, started_at=0.0, seconds=1.0) for name in phases)
    job = Job(id="job-1", env=0, state=JobState.SUCCEEDED, created_at=0.0, ended_at=1.0, phases=told)
    return Event(id="e-1", kind="state", at=1.0, job=job)


def phases_of(metrics: Metrics) -> set[str]:
    families = metrics.registry.collect()
    return {one.labels["phase"] for family in families for one in family.samples if "phase" in one.labels}


def test_a_guest_that_makes_up_phases_makes_no_more_labels_than_there_may_be() -> None:
    metrics = Metrics()
    for number in range(3 * MOST_PHASES):
        metrics.observe(ended("queue", f"made-up-{number}"))
    assert len(phases_of(metrics)) == MOST_PHASES + 1
    assert {"queue", "other"} <= phases_of(metrics)


def test_a_code_that_is_none_is_no_label() -> None:
    metrics = Metrics()
    metrics.failed("answer", "made-up", "infra")
    assert metrics.registry.get_sample_value(
        "envd_faults_total", {"where": "answer", "code": "other", "fault": "other"}
    )


async def test_every_metric_says_what_it_is_in_a_sentence_and_its_name_has_its_unit() -> None:
    async with serving() as served:
        served.driver.costs = lambda: Costs({}, 0, {}, 0)  # type: ignore[method-assign]
        now = await scrape(served)
    ours = {family.name: family for family in now.families if family.name.startswith("envd_")}
    assert len(ours) > 45
    for name, family in ours.items():
        assert re.fullmatch(r"[A-Z].*[^.]\.", family.documentation), name
        assert not re.search(r"_(ms|millis|minutes|kb|mb|percent)(_|$)", name)
        if family.type == "histogram":
            assert name.endswith("_seconds"), name
    counts: Mapping[str, str] = {name: family.type for name, family in ours.items()}
    assert counts["envd_boots"] == counts["envd_aws_cost_usd"] == "counter"
    assert counts["envd_queue_depth"] == "gauge"


async def test_a_scrape_costs_little_with_64_envs_and_1024_jobs_in_line() -> None:
    async with serving(Behaviour(boot_s=600), envs=64, queue_limit=2000, spares=960, request_rate=0) as served:
        for env in range(64):
            assert (await served.post(f"/v1/envs/{env}/reset", {}))[0] == 202
        while served.service.queue.load().waiting.total() < 1024:
            served.service.queue.submit_spare()
        looked, took = [], []
        for _ in range(10):
            began = time.perf_counter()
            list(state._looked(served.service, state._OF_THE_LOOP))
            looked.append(time.perf_counter() - began)
            began = time.perf_counter()
            now = await scrape(served)
            took.append(time.perf_counter() - began)
        size = len((await served.get("/metrics"))[1])
    depth = now.sum("envd_queue_depth")
    whole, held = (sorted(times)[5] * 1000 for times in (took, looked))
    FIGURES.append(
        f"/metrics with 64 envs and {depth:.0f} jobs in line: {whole:.0f} ms, of which the event loop is held for "
        f"{held:.1f} ms (medians of 10); {size / 1024:.0f} KiB"
    )
    assert depth == 1024
    assert now.get("envd_queue_depth", kind="reset") == 63
    assert held < 100
    assert whole < 1000
