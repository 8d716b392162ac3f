"""The daemon's side of evaluation: the evaluator process, kept warm, and one call for each grading.

    async with Graders.open(settings) as graders:
        workdir = await graders.make_workdir()
        … files that getters expect, in workdir / "cache" …
        report = await graders.grade(request, workdir, deadline_s=270)

Nothing that a guest said is evaluated or imported here; see `envd.grader` for what happens over there.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
from anyio import move_on_after, to_thread
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import (
    AssetUnavailable,
    EnvdError,
    EvaluationExpired,
    EvaluationInvalid,
    EvaluatorError,
    EvaluatorsMissing,
    GuestMisbehaved,
)
from ..guest.client import parse_json
from ..models import MetricRecord
from ..settings import Settings
from . import grading_sandbox
from .task import Metric

log = structlog.get_logger(__name__)

START_SECONDS = 120
"""The evaluators' imports take 3 s on an idle machine."""
GRACE_SECONDS = 10
"""After a grading's own deadline, for its end to be told."""
LARGEST_REPORT = 16 * 1024 * 1024

Kind = Literal["infra", "evaluator", "task", "missing_library", "timeout", "killed"]
Stage = Literal["process", "result", "expected", "metric"]


@dataclass(frozen=True)
class GuestAddress:
    """Where the desktop is reached from this host."""

    host: str
    server_port: int
    chromium_port: int
    vnc_port: int
    vlc_port: int


@dataclass(frozen=True, kw_only=True)
class GradeRequest:
    """What to judge. `now` is the reset's Unix time, from which relative dates of rules count; `timezone` the guest's
    (IANA name). `values` are getter values of an earlier report, by metric's index ("0") and side ("result",
    "expected"): getters whose value is there are not run."""

    metrics: Sequence[Metric]
    conj: Literal["and", "or"] = "and"
    guest: GuestAddress
    screen: tuple[int, int]
    now: float
    timezone: str = "UTC"
    platform: str = "Linux"
    machine: str = "x86_64"
    proxy: bool = False
    client_password: str = "password"
    allow_internet: bool = True
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class GradeFailure(BaseModel):
    """Why there is no number, where it happened, and the traceback of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Kind
    stage: Stage = "process"
    index: int = 0
    message: str
    hint: str = ""
    traceback: str = ""
    facts: dict[str, Any] = {}

    def error(self) -> EnvdError:
        """It as an error of the daemon."""
        if self.kind == "infra" and "url" in self.facts:
            return AssetUnavailable(self.message, hint=self.hint, url=self.facts["url"], http_status=None, tried=[])
        if self.kind == "infra":
            return GuestMisbehaved(self.message, hint=self.hint)
        cls: dict[Kind, type[EnvdError]] = {
            "task": EvaluationInvalid,
            "missing_library": EvaluatorsMissing,
            "timeout": EvaluationExpired,
        }
        raised = cls.get(self.kind, EvaluatorError)
        return raised(self.message, hint=self.hint, stage=self.stage, index=self.index, traceback=self.traceback)


class GradeCall(BaseModel):
    """One call of a getter to the guest, to Chrome in it or to the internet."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    what: str
    status: int | None = None
    seconds: float | None = None
    error: str = ""


class GradeReport(BaseModel):
    """What came of a grading: `score` in 0…1, or `failure`. `log` is the end of what the evaluators printed; all of
    it (1 MB at most) is in log.txt of the working directory."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Literal["scored", "failed"]
    score: float | None = None
    metrics: tuple[MetricRecord, ...] = ()
    failure: GradeFailure | None = None
    warnings: tuple[str, ...] = ()
    calls: tuple[GradeCall, ...] = ()
    call_count: int = 0
    evaluator_version: str = ""
    separated: bool = False
    """Whether the grading had namespaces of its own."""
    seconds: dict[str, float] = {}
    """getters, metrics, overhead, total."""
    log: str = ""

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """For `GradeRequest.values` of a rescore."""
        return {
            str(record.index): {side: getattr(record, side) for side in ("result", "expected") if side in sides}
            for record in self.metrics
            if (sides := record.model_fields_set)
        }


def find_interpreter(settings: Settings) -> Path | None:
    """The evaluators' Python: the one of the settings, else what `make evaluators` made. Blocks."""
    if settings.evaluators is not None:
        return settings.evaluators if os.access(settings.evaluators, os.X_OK) else None
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        python = root / ".venv-evaluators" / "bin" / "python"
        if os.access(python, os.X_OK):
            return python
    return None


class Graders:
    """At most `settings.evaluations` gradings at once. `modules` are files with metrics and getters (`get_…`) beside
    desktop-env's; for tests."""

    def __init__(self, settings: Settings, modules: Sequence[Path] = ()) -> None:
        self._settings = settings
        self._modules = modules
        self._slots = asyncio.Semaphore(settings.evaluations)
        self._starting = asyncio.Lock()
        self._zygote: _Zygote | None = None
        self._warned = False
        self.directory = settings.state_dir / "grading"
        """Has the working directories, and nothing else."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, modules: Sequence[Path] = ()) -> AsyncIterator[Graders]:
        graders = cls(settings, modules)
        try:
            yield graders
        finally:
            with move_on_after(5, shield=True):
                await graders._end()

    async def warm(self) -> _Zygote:
        """Start the evaluator process unless it runs, and wait until it has imported everything. Raises
        EvaluatorsMissing when there is no interpreter, EvaluatorError when it does not start."""
        async with self._starting:
            if self._zygote is None or self._zygote.ended:
                await self._end()
                self._zygote = await self._start()
            return self._zygote

    async def make_workdir(self) -> Path:
        """A new working directory, with an empty `cache` in it. It is the caller's to keep or to remove."""

        def make() -> Path:
            workdir = self.directory / secrets.token_hex(16)
            (workdir / "cache").mkdir(parents=True, mode=0o700)
            return workdir

        return await to_thread.run_sync(make)

    async def grade(self, request: GradeRequest, workdir: Path, deadline_s: float) -> GradeReport:
        """Judge. `workdir` is one of `make_workdir`. Everything that goes wrong is a report, but a cancellation: then
        all processes of the grading have ended when it comes out of here."""
        end = time.monotonic() + deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._slots.acquire()
        except TimeoutError:
            return _failed("timeout", f"No evaluator became free within {deadline_s:g} s.")
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
                zygote = await self.warm()
        except TimeoutError:
            return _failed("timeout", f"The evaluator process was not ready within {deadline_s:g} s.")
        except EvaluatorsMissing as error:
            return _failed("missing_library", error.detail, error.hint)
        except EvaluatorError as error:
            return _failed("evaluator", error.detail, error.hint)
        else:
            return await self._grade(zygote, request, workdir, end)
        finally:
            self._slots.release()

    async def _grade(self, zygote: _Zygote, request: GradeRequest, workdir: Path, end: float) -> GradeReport:
        start = time.monotonic()
        if start >= end:
            return _failed("timeout", "There was no time left to evaluate.")
        asked = asdict(request) | {"workdir": workdir.name, "deadline_s": end - start}
        body = await to_thread.run_sync(lambda: json.dumps(asked, default=dict).encode())
        patience = end - start + GRACE_SECONDS
        raw = await zygote.grade(struct.pack(">I", len(body)) + body, patience)
        if raw is None:
            report = _failed("killed", "The evaluator's processes ended in the middle of the work.")
        else:
            report = await to_thread.run_sync(_read_report, raw)
        return _timed(report, zygote.version, time.monotonic() - start)

    async def _start(self) -> _Zygote:
        python = await to_thread.run_sync(find_interpreter, self._settings)
        if python is None:
            raise EvaluatorsMissing(
                f"There is no interpreter with the evaluators ({self._settings.evaluators or '.venv-evaluators'}).",
                hint="Run: make evaluators. Or set ENVD_EVALUATORS to a Python that has desktop-env.",
            )
        sandbox = await to_thread.run_sync(grading_sandbox.works)
        if not sandbox and not self._warned:
            self._warned = True
            log.warning("evaluators run without a sandbox", hint="Run: apt-get install -y bubblewrap")
        return await _Zygote.start(python, self.directory, self._modules, sandbox=sandbox)

    async def _end(self) -> None:
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            await zygote.end()


class _Zygote:
    """The warm process, and our end of the socket to it."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, ready: dict[str, Any]) -> None:
        self.process = process
        self._control = control
        self.ready = ready
        self.version = f"desktop-env {ready.get('version')}, Python {ready.get('python')}"

    @classmethod
    async def start(cls, python: Path, gradings: Path, modules: Sequence[Path], *, sandbox: bool) -> _Zygote:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        build = grading_sandbox.sandboxed if sandbox else grading_sandbox.plain

        def prepare() -> tuple[list[str], int]:
            gradings.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            return build(python, gradings, theirs.fileno(), modules), os.open(gradings.parent / "grading.log", flags)

        try:
            with theirs:
                command, output = await to_thread.run_sync(prepare)
                try:
                    process = await asyncio.create_subprocess_exec(
                        *command,
                        pass_fds=(theirs.fileno(),),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=grading_sandbox.environment(),
                        start_new_session=True,
                    )
                finally:
                    os.close(output)
        except BaseException:
            ours.close()
            raise
        zygote = cls(process, ours, {})
        try:
            async with asyncio.timeout(START_SECONDS):
                raw = await asyncio.get_running_loop().sock_recv(ours, 1024 * 1024)
            ready = json.loads(raw or b"{}")
            if "version" not in ready:
                raise EvaluatorError(
                    f"The evaluator process did not start: {ready.get('failed') or await _last_line(gradings)}",
                    hint="Run: make evaluators. It makes the interpreter anew.",
                )
        except BaseException:
            with move_on_after(5, shield=True):
                await zygote.end()
            raise
        log.info("evaluators ready", seconds=ready["seconds"], version=ready["version"], sandbox=sandbox)
        return cls(process, ours, ready)

    @property
    def ended(self) -> bool:
        """Whether it can fork no more. Its socket tells sooner than its process."""
        try:
            return self._control.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def grade(self, request: bytes, patience: float) -> bytes | None:
        """The raw report; None when the process at the other end ended without one."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"g"], [theirs.fileno()])
        except OSError:  # it has ended since it was looked at
            ours.close()
            return None
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(patience):
                writer.write(request)
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                return await reader.readexactly(size) if size <= LARGEST_REPORT else b""
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return None
        finally:
            with move_on_after(5, shield=True):
                await _hang_up(reader, writer)

    async def end(self) -> None:
        """Idempotent."""
        self._control.close()
        try:
            self.process.kill()
        except ProcessLookupError:
            pass
        await self.process.wait()


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closing our side cancels; theirs closes when all processes of the grading have ended."""
    try:
        if writer.can_write_eof():
            writer.write_eof()
        while await reader.read(65_536):
            pass
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass
    finally:
        writer.close()


async def _last_line(gradings: Path) -> str:
    def read() -> str:
        lines = (gradings.parent / "grading.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it ended without a word."

    return await to_thread.run_sync(read)


def _failed(kind: Kind, message: str, hint: str = "") -> GradeReport:
    return GradeReport(status="failed", failure=GradeFailure(kind=kind, message=message, hint=hint))


def _read_report(raw: bytes) -> GradeReport:
    """It was written where a guest's data is at work: nothing in it is taken on trust but its text."""
    try:
        report = GradeReport.model_validate(parse_json(raw))
        number = report.score
        if (report.status == "scored") != (number is not None) or (report.status == "failed") != bool(report.failure):
            raise ValueError(f"it is {report.status} with score {number}")
        if number is not None and not (math.isfinite(number) and 0 <= number <= 1):
            raise ValueError(f"its score is {number}")
    except (ValueError, ValidationError) as error:
        return _failed("evaluator", f"The evaluator's report cannot be read: {error}"[:1000])
    return report


def _timed(report: GradeReport, version: str, total: float) -> GradeReport:
    metrics = sum(record.seconds.get("metric", 0) for record in report.metrics)
    getters = sum(sum(record.seconds.values()) for record in report.metrics) - metrics
    spent = {"getters": getters, "metrics": metrics, "overhead": total - getters - metrics, "total": total}
    seconds = {name: round(value, 4) for name, value in spent.items()}
    return report.model_copy(update={"evaluator_version": version, "seconds": seconds})
