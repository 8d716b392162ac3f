"""Traces: what was done, in which order and under whose request; and nothing where nobody asked for them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog.testing
from aiohttp import web
from daemon_process import daemon, ended_job, reset
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import CLICK, serving

import envd.service
from envd.drivers.sim import Behaviour
from envd.telemetry.tracing import Tracing, open_tracing

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
STEPS = [{"type": "sleep", "parameters": {"seconds": 0}}, {"type": "execute", "parameters": {"command": "true"}}]
TASK = {"id": "t-1", "config": STEPS, "evaluator": {"func": "infeasible"}}


@dataclass
class Traced:
    """Every span that has ended."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def under(self, span: ReadableSpan) -> list[str]:
        """Names of its children, in the order in which they began."""
        assert span.context is not None
        found = [one for one in self.spans if one.parent is not None and one.parent.span_id == span.context.span_id]
        return [one.name for one in sorted(found, key=lambda one: one.start_time or 0)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """All daemons in this process are traced into memory."""
    into = Traced()

    @asynccontextmanager
    async def opened(environ: Mapping[str, str], daemon_id: str) -> AsyncIterator[Tracing]:
        tracing = await asyncio.to_thread(Tracing.to, into.exporter, environ, daemon_id)
        yield tracing
        await tracing.close()

    monkeypatch.setattr(envd.service, "open_tracing", opened)
    return into


def within(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    """Durations are of another clock than beginnings: by a tenth of a second."""
    assert inner.start_time and inner.end_time and outer.start_time and outer.end_time  # noqa: PT018
    slack = 100_000_000
    return outer.start_time - slack <= inner.start_time and inner.end_time <= outer.end_time + slack


async def test_a_reset_is_a_span_with_its_phases_and_set_up_in_the_trace_of_its_caller(traced: Traced) -> None:
    async with serving(Behaviour(boot_s=0.3)) as served:
        _, job, _ = await served.ask("POST", "/v1/envs/0/reset", {"task": TASK}, headers=PARENT)
        job = await served.ended(job["id"])
        assert job["state"] == "succeeded", job
    request, root = traced.named("POST /v1/envs/{env}/reset"), traced.named("reset")
    assert request.parent is not None
    assert f"{request.parent.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == CALLER
    assert request.attributes is not None
    assert (request.attributes["http.response.status_code"], request.attributes["envd.job_id"]) == (202, job["id"])
    assert request.context is not None
    assert root.parent is not None
    assert root.parent.span_id == request.context.span_id
    assert traced.under(root) == ["queue", "create", "probe", "set_up", "observe"]
    assert traced.under(traced.named("set_up")) == ["sleep", "execute"]
    assert all(within(span, root) for span in traced.spans if span.name in traced.under(root))
    assert root.attributes is not None
    facts = {name: root.attributes[f"envd.{name}"] for name in ("env", "state", "reset_path", "episode_id")}
    assert facts == {"env": 0, "state": "succeeded", "reset_path": "cold", "episode_id": job["episode_id"]}
    for name in ("reset", "queue", "sleep"):
        context = traced.named(name).context
        assert context is not None
        assert f"{context.trace_id:032x}" == TRACE
    waited = traced.named("probe")
    assert waited.start_time is not None
    assert waited.end_time is not None
    assert (waited.end_time - waited.start_time) / 1e9 == pytest.approx(0.3, abs=0.3)
    assert {event.name for event in waited.events} == {"probe"}


async def test_a_step_and_a_judgement_are_spans_of_their_requests(traced: Traced) -> None:
    async with serving() as served:
        await served.play(task=TASK)
        await served.post("/v1/envs/0/step", {"prediction": CLICK})
        verdict = await served.evaluate()
    step, request = traced.named("step"), traced.named("POST /v1/envs/{env}/step")
    assert traced.under(request) == ["step"]
    assert traced.under(step) == ["act", "observe"]
    assert within(step, request)
    judged = traced.named("evaluate")
    assert traced.under(traced.named("POST /v1/envs/{env}/evaluate")) == ["evaluate"]
    assert judged.attributes is not None
    assert (judged.attributes["envd.status"], judged.attributes["envd.score"]) == ("scored", verdict["score"])


async def test_what_fails_is_an_error_with_its_code(traced: Traced) -> None:
    async with serving(Behaviour(create_fails="injected")) as served:
        job = await served.reset()
        await served.get("/v1/envs/7")
    root, request = traced.named("reset"), traced.named("GET /v1/envs/{env}")
    assert root.attributes is not None
    assert root.attributes["error.type"] == job["error"]["code"]
    assert root.status.description == job["error"]["detail"]
    assert request.status.is_unset  # the caller's doing
    assert all(span.end_time is not None for span in traced.spans)


async def test_a_job_that_is_not_done_at_the_end_ends_with_it(traced: Traced) -> None:
    async with serving(Behaviour(boot_s=60)) as served:
        _, job = await served.post("/v1/envs/0/reset", {})
        await served.in_state(job["id"], "booting")
    assert traced.named("reset").end_time is not None


async def test_probes_of_load_balancers_and_scrapes_are_not_traced(traced: Traced) -> None:
    async with serving() as served:
        for path in ("/livez", "/readyz", "/metrics", "/nothing"):
            await served.get(path)
    assert [span.name for span in traced.spans] == ["GET none"]


async def test_lines_of_a_request_have_the_id_of_its_trace(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving() as served:
        await served.get("/v1/envs", headers=PARENT)
    (line,) = [record.__dict__ for record in caplog.records if record.getMessage() == "request"]
    assert line["trace_id"] == TRACE


# -- where they go ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[str, list[tuple[Mapping[str, str], ExportTraceServiceRequest]]]]:
    """What speaks OTLP over HTTP, and all that it was sent."""
    came: list[tuple[Mapping[str, str], ExportTraceServiceRequest]] = []

    async def take(request: web.Request) -> web.Response:
        came.append((request.headers, ExportTraceServiceRequest.FromString(await request.read())))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", came
    finally:
        await runner.cleanup()


async def test_a_collector_is_sent_what_a_daemon_did_before_it_ended(tmp_path: Path) -> None:
    async with receiver() as (url, came):
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20secret-of-the-collector",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
            "ENVD_LOG_FORMAT": "json",
        }
        async with daemon(tmp_path / "state", env=settings) as (process, session):
            job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
            process.signal()
            assert await process.ended() == 0
    assert job["state"] == "succeeded"
    assert all(headers["authorization"] == "Bearer secret-of-the-collector" for headers, _ in came)
    resources = [resource for _, sent in came for resource in sent.resource_spans]
    about = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert (about["service.name"], about["deployment.environment"]) == ("envd", "test")
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {"POST /v1/envs/{env}/reset", "reset", "queue", "create", "probe", "set_up", "observe"} <= {
        span.name for span in spans
    }
    assert "secret-of-the-collector" not in process.text
    assert not [line for line in process.records() if line["level"] in ("error", "critical")]


async def test_a_collector_that_is_not_there_holds_nothing_up(tmp_path: Path) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "ENVD_LOG_FORMAT": "json"}
    async with daemon(tmp_path / "state", env=settings) as (process, session):
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
        assert job["state"] == "succeeded"
        process.signal()
        assert await process.ended(10) == 0


async def test_without_the_extra_the_daemon_says_so_and_serves(tmp_path: Path) -> None:
    prelude = "import sys; sys.modules['opentelemetry.exporter'] = None"
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "ENVD_LOG_FORMAT": "json"}
    async with daemon(tmp_path / "state", prelude=prelude, env=settings) as (process, session):
        assert (await ended_job(session, process.url, (await reset(session, process.url))["id"]))[
            "state"
        ] == "succeeded"
    (told,) = [line for line in process.records() if line["event"] == "no traces are sent"]
    assert "envd-server[otel]" in told["why"]


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="no endpoint"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318", "OTEL_SDK_DISABLED": "true"}, id="disabled"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318", "OTEL_TRACES_EXPORTER": "none"}, id="none"),
    ],
)
async def test_who_wants_no_traces_has_none(environ: dict[str, str]) -> None:
    async with open_tracing(environ, "test01") as tracing:
        assert tracing is None


async def test_a_protocol_that_is_not_spoken_is_told() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with structlog.testing.capture_logs() as logged:
        async with open_tracing(environ, "test01") as tracing:
            assert tracing is None
    assert "http/protobuf" in logged[0]["why"]


def test_nothing_of_it_is_imported_before_it_is_wanted() -> None:
    program = "import sys; import envd.daemon; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "[]\n"
