"""Traces, where the extra `otel` is installed and OTEL_EXPORTER_OTLP_ENDPOINT says where they go; else nothing of this
is imported or done. OpenTelemetry's other variables are heeded as its library does.

    GET /v1/envs/0/reset                    a request, in the trace that its traceparent names
     └─ reset                               its job, which outlives it
         ├─ queue, create, probe, …         phases as they are told, boot phases of the driver's among them
         ├─ set_up ─ download, launch, …    the steps of the task's set-up
         └─ observe                         until the first observation
    POST /v1/envs/0/step ─ step ─ act, observe
    POST /v1/envs/0/evaluate ─ evaluate

All but requests is made of events, and of the times that these tell: what is traced does not know of it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import structlog

from .. import __version__
from ..models import Event, Job
from .about import path_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

logger = structlog.get_logger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SPOKEN = "http/protobuf"
LAST_SPANS = 2.0
"""Seconds that the end of the daemon waits for spans that are not sent yet."""
TOLD = 500
"""Characters of words in a span."""


@asynccontextmanager
async def open_tracing(environ: Mapping[str, str], daemon_id: str) -> AsyncIterator[Tracing | None]:
    """As the environment wants it; None where it wants none, or cannot have it, which the log tells."""
    tracing = await anyio.to_thread.run_sync(_from, environ, daemon_id) if _wanted(environ) else None
    try:
        yield tracing
    finally:
        if tracing is not None:
            with anyio.CancelScope(shield=True):
                await tracing.close()


def _wanted(environ: Mapping[str, str]) -> bool:
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    none = environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none"
    return any(environ.get(name, "").strip() for name in ENDPOINTS) and not off and not none


def _from(environ: Mapping[str, str], daemon_id: str) -> Tracing | None:
    """Imports, which takes a moment."""
    protocol = next((set_to for name in PROTOCOLS if (set_to := environ.get(name, "").strip())), SPOKEN)
    if protocol != SPOKEN:
        logger.warning("no traces are sent", why=f"{protocol} is not spoken; set {PROTOCOLS[1]}={SPOKEN}")
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        logger.warning(
            "no traces are sent",
            why=f"the Python package {error.name} is not installed: pip install 'envd-server[otel]'",
        )
        return None
    tracing = Tracing.to(None, environ, daemon_id)
    tracing.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return tracing


class Tracing:
    """Made by `open_tracing`."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._tracer = provider.get_tracer("envd", __version__)
        self._trace, self._context = trace, context
        self._propagator = TraceContextTextMapPropagator()
        self._jobs: dict[str, _JobSpans] = {}

    @classmethod
    def to(cls, exporter: SpanExporter | None, environ: Mapping[str, str], daemon_id: str) -> Tracing:
        """Every span goes to `exporter` as it ends; with None nowhere yet."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        about = {"service.version": __version__, "service.instance.id": daemon_id}
        if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            about["service.name"] = "envd"
        provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        if exporter is not None:
            provider.add_span_processor(SimpleSpanProcessor(exporter))
        return cls(provider)

    async def close(self) -> None:
        """Send what is not sent yet, for a moment. The spans of jobs that go on in the next life end here."""
        for spans in self._jobs.values():
            spans.end(time.time())
        self._jobs.clear()
        sent, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self.provider.shutdown()
            try:
                loop.call_soon_threadsafe(sent.set)
            except RuntimeError:
                pass  # the loop has ended before

        # A daemon thread: one that cannot reach its collector must not hold up the end of the process.
        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        with anyio.move_on_after(LAST_SPANS):
            await sent.wait()

    # -- requests ---------------------------------------------------------------------------------------------------

    @contextmanager
    def request(self, scope: Mapping[str, Any]) -> Iterator[RequestSpan]:
        """The span of a request, by its ASGI scope, while it is served. Its log lines carry the id of its trace."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        parent = self._propagator.extract(headers)
        method = str(scope.get("method", "WEBSOCKET"))
        about = {"http.request.method": method, "url.path": path_of(scope)[:TOLD]}
        span = self._tracer.start_span(method, context=parent, kind=self._trace.SpanKind.SERVER, attributes=about)
        token = self._context.attach(self._trace.set_span_in_context(span, parent))
        trace_id = self._trace.format_trace_id(span.get_span_context().trace_id)
        try:
            with structlog.contextvars.bound_contextvars(trace_id=trace_id):
                yield RequestSpan(span, self)
        finally:
            self._context.detach(token)
            span.end()

    def failed(self, span: Span, code: str, detail: str) -> None:
        span.set_attribute("error.type", code)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, detail[:TOLD]))

    # -- events -----------------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        if event.job is not None:
            self._of_job(event, event.job)
        elif event.kind == "step":
            seconds = event.data["seconds"]
            span = self._past("step", event.at - sum(seconds.values()), event, step=event.data["step"])
            self._in_turn(span, seconds, event.at - sum(seconds.values()))
            span.end(_ns(event.at))
        elif event.kind == "verdict":
            told = event.data
            took = {f"seconds.{part}": value for part, value in told["seconds"].items()}
            began = event.at - told["seconds"].get("total", 0.0)
            span = self._past("evaluate", began, event, status=told["status"], score=told["score"], **took)
            if told["mask"]:
                self.failed(span, told["code"], told["detail"])
            span.end(_ns(event.at))

    def _past(self, name: str, began: float, event: Event, **facts: Any) -> Span:
        """Of something that is over, in the trace of the request that is being served."""
        about = {"env": event.env, "episode_id": event.data.get("episode_id"), "desktop_id": event.desktop_id, **facts}
        return self._tracer.start_span(name, start_time=_ns(began), attributes=_ours(about))

    def _in_turn(self, span: Span, seconds: Mapping[str, float], began: float) -> None:
        within = self._trace.set_span_in_context(span)
        for part, took in seconds.items():
            self._tracer.start_span(part, context=within, start_time=_ns(began)).end(_ns(began + took))
            began += took

    def _of_job(self, event: Event, job: Job) -> None:
        spans = self._jobs.get(job.id)
        if spans is None:
            if job.state.terminal:
                return
            about = _ours({"job_id": job.id, "env": job.env, "task_id": job.task_id})
            root = self._tracer.start_span(job.kind, start_time=_ns(job.created_at), attributes=about)
            spans = self._jobs[job.id] = _JobSpans(self, root)
        spans.follow(event, job)
        if job.state.terminal:
            del self._jobs[job.id]

    def child(self, name: str, of: Span, began: float, **facts: Any) -> Span:
        within = self._trace.set_span_in_context(of)
        return self._tracer.start_span(name, context=within, start_time=_ns(began), attributes=_ours(facts))


class RequestSpan:
    def __init__(self, span: Span, tracing: Tracing) -> None:
        self._span = span
        self._tracing = tracing

    def answered(self, route: str, method: str, status: int | None, about: Mapping[str, Any]) -> None:
        """How, and what the request was about."""
        self._span.update_name(f"{method} {route}")
        self._span.set_attribute("http.route", route)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(_ours({name: fact for name, fact in about.items() if name != "detail"}))
        if status is not None and status >= 500:
            self._tracing.failed(self._span, str(about.get("code", status)), str(about.get("detail", "")))


class _JobSpans:
    """The spans of a job that has not ended: its own, and of each of its phases one."""

    def __init__(self, tracing: Tracing, root: Span) -> None:
        self._tracing = tracing
        self._root = root
        self._phases: list[Span] = []
        self._ended = 0

    def follow(self, event: Event, job: Job) -> None:
        for phase in job.phases[len(self._phases) :]:
            self._phases.append(self._tracing.child(phase.name, self._root, phase.started_at))
        while self._ended < len(job.phases) and (seconds := job.phases[self._ended].seconds) is not None:
            self._phases[self._ended].end(_ns(job.phases[self._ended].started_at + seconds))
            self._ended += 1
        now = self._phases[-1]
        if event.kind == "setup":
            record = event.data["record"]
            step = self._tracing.child(record["type"], now, event.at - record["seconds"], index=record["index"])
            if record["outcome"] != "ok":
                self._tracing.failed(step, record["outcome"], record["detail"])
            step.end(_ns(event.at))
        elif event.kind == "probe":
            probe = event.data["probe"]
            facts = {"name": probe["name"], "result": probe["result"], "detail": probe["detail"][:TOLD]}
            now.add_event("probe", facts, _ns(event.at))
        elif event.kind == "note":
            now.add_event("note", {"message": event.data["message"][:TOLD]}, _ns(event.at))
        if job.state.terminal:
            about = {"state": job.state, "reset_path": job.reset_path, "attempts": job.attempts}
            ids = {"desktop_id": job.desktop_id, "episode_id": job.episode_id}
            self._root.set_attributes(_ours({**about, **ids}))
            if job.error is not None:
                self._tracing.failed(self._root, job.error.code, job.error.detail)
            self.end(job.ended_at or event.at)

    def end(self, at: float) -> None:
        for phase in self._phases[self._ended :]:
            phase.end(_ns(at))
        self._root.end(_ns(at))


def _ours(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As attributes, without those that are not known."""
    return {f"envd.{name}": _plain(fact) for name, fact in facts.items() if fact is not None}


def _plain(fact: Any) -> str | int | float:
    return fact if type(fact) in (int, float) else str(fact)


def _ns(at: float) -> int:
    return int(at * 1e9)
