"""From a desktop whose episode is over to its grade: what the evaluator needs is fetched, Chrome and the clock are seen
to, and the evaluator's report becomes a number or an error.

The evaluator itself runs in a process of its own: see `grading`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import structlog
from anyio.to_thread import run_sync

from ..errors import EnvdError, EvaluationInvalid, SettingsError
from ..models import Desktop, MetricRecord
from ..settings import Settings
from . import catalog
from .abilities import has_ocr
from .assets import Assets
from .grading import GradeReport, GradeRequest, Graders, GuestAddress, find_interpreter
from .needs import assets_of_metrics
from .setup import drive
from .setup.chrome import answering, start
from .setup.context import Context
from .task import Evaluator

if TYPE_CHECKING:
    from ..episodes import Play

logger = structlog.get_logger(__name__)

ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]{0,40}(?:/[A-Za-z0-9_+-]{1,40}){0,2}")
ASK_ZONE = "cat /etc/timezone 2>/dev/null || readlink /etc/localtime | sed 's,.*zoneinfo/,,'"
LOOK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('desktop_env') is None)"
RELATIVE_TIME = "rule_relativeTime"
DRIVE_FILE = "googledrive_file"


@dataclass(frozen=True)
class Grade:
    """A number, or `failure`; and what it rests on. `folder` is the working directory, with the files that values in
    `report` name; it is gone when the preparation is left."""

    score: float | None
    failure: EnvdError | None
    metrics: tuple[MetricRecord, ...]
    raw: tuple[Any, ...]
    warnings: tuple[str, ...]
    evaluator_version: str
    seconds: dict[str, float]
    report: dict[str, Any]
    folder: Path


class Evaluators:
    """Evaluators that are ready, or can be made so."""

    def __init__(
        self, graders: Graders, assets: Assets, *, ocr: bool, settings: Settings, missing: bool = False
    ) -> None:
        self.graders = graders
        self.assets = assets
        self.ocr = ocr
        """Whether text in pictures can be read."""
        self.missing = missing
        """Whether there were none when they were last looked for."""
        self._settings = settings

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, assets: Assets) -> AsyncIterator[Evaluators]:
        async with Graders.open(settings) as graders:
            # What a daemon that was killed had not finished.
            await run_sync(_clear, graders.directory)
            python = await run_sync(find_interpreter, settings)
            if settings.evaluators is not None:
                await _see_that_it_has_them(settings.evaluators, python)
            elif python is None:
                logger.warning("no evaluators: episodes can be played but not judged", hint="Run: make evaluators.")
            ocr = python is not None and await run_sync(has_ocr, python)
            yield cls(graders, assets, ocr=ocr, settings=settings, missing=python is None)

    async def look(self) -> bool:
        """Look whether there are any: they may be made, or go, while the daemon runs."""
        self.missing = await run_sync(find_interpreter, self._settings) is None
        return not self.missing

    async def warm(self) -> None:
        """Have the evaluators imported, if there are any; whoever needs them is told when there are none."""
        try:
            await self.graders.warm()
        except EnvdError as error:
            logger.warning("no evaluators", detail=error.detail, hint=error.hint)

    @asynccontextmanager
    async def prepare(self, evaluator: Evaluator) -> AsyncIterator[Preparation]:
        """Begin to fetch what the evaluator needs, while the desktop is still busy with its post-configuration."""
        workdir = await self.graders.make_workdir()
        preparation = Preparation(self, evaluator, workdir)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(preparation.fetch)
                tasks.start_soon(self.warm)
                try:
                    yield preparation
                except EnvdError as error:
                    # Out of the group by another way: it would wrap it.
                    preparation.failure = error
                tasks.cancel_scope.cancel()
            if preparation.failure is not None:
                raise preparation.failure
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(lambda: shutil.rmtree(workdir, ignore_errors=True))


@dataclass
class Preparation:
    """One evaluation's files, in `workdir`/cache, where getters look for them before they fetch any."""

    evaluators: Evaluators
    evaluator: Evaluator
    workdir: Path
    failure: EnvdError | None = None
    _fetched: anyio.Event = field(default_factory=anyio.Event)
    _missing: EnvdError | None = None

    @property
    def cache(self) -> Path:
        return self.workdir / "cache"

    async def fetch(self) -> None:
        """The files that are compared with. What cannot be had is told by `ready`."""
        try:
            for url, name in assets_of_metrics(self.evaluator.metrics):
                await self._place(await self.evaluators.assets.fetch(url), name)
        except EnvdError as error:
            self._missing = error
        finally:
            self._fetched.set()

    async def ready(self) -> None:
        """Return when the files are there and the evaluators imported. Raises AssetUnavailable."""
        await self._fetched.wait()
        if self._missing is not None:
            raise self._missing
        await self.evaluators.warm()

    async def grade(self, desktop: Desktop, context: Context, play: Play, began_at: float, deadline_s: float) -> Grade:
        """Have the desktop judged as it is, once `ready`. Raises GuestUnreachable and EvaluationInvalid for what kept
        the evaluator from being asked."""
        for name, content in play.outputs.items():
            await self._place(content, name)
        warnings = await self._see_to_chrome(context)
        values = await self._drive_files(context)
        request = GradeRequest(
            metrics=self.evaluator.metrics,
            conj=self.evaluator.conj,
            guest=_address(desktop),
            screen=context.screen,
            now=began_at,
            timezone=await self._zone(context),
            proxy=play.proxied,
            client_password=context.settings.client_password,
            allow_internet=not context.settings.offline,
            values=values,
        )
        report = await self.evaluators.graders.grade(request, self.workdir, deadline_s)
        return self._grade(report, warnings)

    def _grade(self, report: GradeReport, warnings: list[str]) -> Grade:
        by_index = {record.index: record for record in report.metrics}
        return Grade(
            score=report.score,
            failure=report.failure.error() if report.failure else None,
            metrics=report.metrics,
            raw=tuple(
                by_index[index].value if index in by_index else None for index in range(len(self.evaluator.metrics))
            ),
            warnings=(*warnings, *report.warnings),
            evaluator_version=report.evaluator_version,
            seconds={name: spent for name, spent in report.seconds.items() if name != "total"},
            # What was never asked for is left out: a rescore must not take it for None.
            report=report.model_dump(mode="json", exclude_unset=True),
            folder=self.workdir,
        )

    async def _place(self, content: Path | bytes, name: str) -> None:
        target = self.cache / name

        def place() -> bool:
            if not target.resolve().is_relative_to(self.cache.resolve()) or target == self.cache:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)
            return True

        if not await run_sync(place):
            raise EvaluationInvalid(f"The evaluator keeps a file under {name[:200]!r}, outside of its own folder.")

    async def _see_to_chrome(self, context: Context) -> list[str]:
        """A getter that finds no Chrome gives something else than what it was asked for, so there is one. That the
        model closed it is no failure: what it then shows is what counts."""
        if not any(getter.needs_cdp for getter in self._getters()):
            return []
        try:
            if await context.cdp.pages():
                return []
        except EnvdError:
            pass
        await start(context)
        await answering(context)
        return ["Chrome did not answer before the evaluation and was started again"]

    async def _drive_files(self, context: Context) -> Mapping[str, Mapping[str, Any]]:
        """Files of Google Drive are fetched here: the evaluator's process is given no credentials."""
        values: dict[str, dict[str, Any]] = {}
        for getter in self._getters():
            if getter.type == DRIVE_FILE:
                found = await drive.download(context, getter.config, self.cache)
                encoded = [_by_name(file) for file in (found if isinstance(found, list) else [found])]
                values.setdefault(str(getter.index), {})[getter.side] = (
                    encoded if isinstance(found, list) else encoded[0]
                )
        return values

    async def _zone(self, context: Context) -> str:
        """The guest's own time zone, for rules that speak of tomorrow. Asked only when one does."""
        if not any(getter.type == RELATIVE_TIME for getter in self._getters()):
            return "UTC"
        said = (await context.guest.execute(["bash", "-c", ASK_ZONE], timeout=30)).stdout.strip()
        return said if ZONE.fullmatch(said) else "UTC"

    def _getters(self) -> list[_Getter]:
        return [
            _Getter(index, side, str(config["type"]), config)
            for index, metric in enumerate(self.evaluator.metrics)
            for side, config in (("result", metric.result), ("expected", metric.expected))
            if config
        ]


@dataclass(frozen=True)
class _Getter:
    index: int
    side: str
    type: str
    config: Mapping[str, Any]

    @property
    def needs_cdp(self) -> bool:
        return self.type in catalog.GETTERS and "cdp" in catalog.GETTERS[self.type].needs


def _by_name(file: Path | None) -> dict[str, str] | None:
    """A file as the evaluator's values name it."""
    return None if file is None else {"$file": file.name}


async def _see_that_it_has_them(given: Path, python: Path | None) -> None:
    """Raise SettingsError unless ENVD_EVALUATORS can be used. Takes tens of milliseconds."""
    try:
        ran = await anyio.run_process([str(python), "-I", "-c", LOOK], check=False) if python is not None else None
    except OSError:
        ran = None
    if ran is None or ran.returncode != 0:
        what = "is no program" if ran is None else "is a Python without desktop-env"
        raise SettingsError(
            f"ENVD_EVALUATORS: {given} {what}.",
            hint="Run `make evaluators` and leave it unset, or name one that has it.",
        )


def _address(desktop: Desktop) -> GuestAddress:
    assert desktop.endpoints is not None
    at = desktop.endpoints
    ports = {name: urlsplit(url).port or 0 for name, url in (("vnc", at.vnc), ("vlc", at.vlc)) if url}
    guest = urlsplit(at.guest)
    return GuestAddress(
        host=guest.hostname or "127.0.0.1",
        server_port=guest.port or 80,
        chromium_port=urlsplit(at.cdp).port or 80,
        vnc_port=ports.get("vnc", 0),
        vlc_port=ports.get("vlc", 0),
    )


def _clear(directory: Path) -> None:
    for left in directory.glob("*"):
        shutil.rmtree(left, ignore_errors=True)
