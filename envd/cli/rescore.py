"""`envd rescore BUNDLE`: judge an episode again by the getter values that its bundle kept, and compare.

Some episodes need no evaluators: a task that cannot be done scores 1 if the model gave up and 0 otherwise, any other
task 0 if the model gave up; and a file that the guest did not have is still not there, which counts 0. Everything else
is given to the evaluators that are installed now, which get the saved values instead of a desktop.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import anyio
import anyio.to_thread
import typer
from pydantic import ValidationError

from ..actions.pyautogui import Special
from ..bundle_files import regular_files
from ..models import EndReason, MetricRecord, Verdict
from ..settings import Settings
from ..tasks.abilities import Abilities
from ..tasks.grading import GradeReport, GradeRequest, Graders, GuestAddress
from ..tasks.schema import examine
from ..tasks.task import Evaluator
from .listing import busy, console

EQUAL, DIFFERENT, CANNOT = 0, 1, 2
TOLERANCE = 1e-9
SIDES = ("result", "expected")
NOWHERE = GuestAddress("127.0.0.1", *[0] * 4)
"""No getter has to be run; one that is run nevertheless must not reach a desktop of somebody else's."""
MEMBERS = 20_000
"""Files that an archive may hold."""
DOCUMENT = 64 * 1024**2
"""Bytes of one JSON file that are read."""


class CannotRescore(Exception):
    """Why, and what to do about it; "it" is the bundle, as whoever gave it knows it."""


@dataclass(frozen=True)
class Saved:
    """What a bundle says of an episode and of how it was judged."""

    folder: Path
    evaluator: Evaluator
    task: Mapping[str, Any]
    facts: Mapping[str, Any]
    verdict: Verdict | None
    report: Mapping[str, Any] | None

    @property
    def gave_up(self) -> bool:
        if self.verdict is not None:
            return self.verdict.provenance.end_reason is EndReason.FAIL
        return self.facts.get("last_action") == Special.FAIL


@dataclass(frozen=True)
class Outcome:
    """`raw` is what each metric returned. `by` says who judged."""

    score: float
    raw: Sequence[Any]
    by: str
    warnings: Sequence[str] = field(default=())


async def rescore(bundle: Path, settings: Settings, *, as_json: bool = False) -> int:
    """Print the score of `bundle` (its folder, or the archive that was downloaded) and what it would be now.

    Returns 0 when both are equal, 1 when they differ, 2 when the episode cannot be judged again; why is then said.
    """
    async with _scratch() as scratch:
        try:
            saved = await anyio.to_thread.run_sync(read, bundle, scratch, settings.bundle_limit)
            with busy(console(), "judging what was saved", quiet=as_json):
                outcome = by_rule(saved) or await _by_grader(saved, scratch, settings)
        except CannotRescore as error:
            _tell_failure(bundle, str(error), as_json)
            return CANNOT
    return _tell(saved, outcome, as_json)


def by_rule(saved: Saved) -> Outcome | None:
    """The score of an episode for which it does not matter what its desktop is like; None for others."""
    if saved.evaluator.infeasible or saved.gave_up:
        score = float(saved.evaluator.infeasible and saved.gave_up)
        return Outcome(score, (score,), "the rule for giving up")
    return None


async def _by_grader(saved: Saved, scratch: Path, settings: Settings) -> Outcome:
    """What the evaluators say to the saved values."""
    kept = _kept_values(saved)
    absent = [index for index, record in enumerate(kept) if _was_absent(record)]
    judged = [index for index in range(len(saved.evaluator.metrics)) if index not in absent]
    if absent and (saved.evaluator.conj == "and" or not judged):
        return Outcome(0.0, tuple(record.value for record in kept), "the rule for files that the guest did not have")
    values = {
        str(place): {side: getattr(kept[index], side) for side in SIDES if side in kept[index].model_fields_set}
        for place, index in enumerate(judged)
        if index < len(kept)
    }
    there = await anyio.to_thread.run_sync(lambda: dict(regular_files(saved.folder / "values")))
    _check(values, judged, saved, there)
    request = GradeRequest(
        metrics=[saved.evaluator.metrics[index] for index in judged],
        conj=saved.evaluator.conj,
        guest=NOWHERE,
        screen=saved.verdict.provenance.screen if saved.verdict else settings.screen,
        now=float(saved.facts.get("began_at") or 0),
        allow_internet=False,
        values=values,
    )
    # Not where a daemon has its own.
    apart = settings.model_copy(update={"state_dir": scratch / "state"})
    async with Graders.open(apart) as graders:
        workdir = await graders.make_workdir()
        await anyio.to_thread.run_sync(_place, there, workdir)
        report = await graders.grade(request, workdir, settings.evaluation_timeout)
    if report.score is None:
        raise CannotRescore(_why(report, judged))
    raw: list[Any] = [0.0 if index in absent else None for index in range(len(saved.evaluator.metrics))]
    for record in report.metrics:
        raw[judged[record.index]] = record.value
    return Outcome(report.score, raw, f"{report.evaluator_version}", report.warnings)


def _kept_values(saved: Saved) -> tuple[MetricRecord, ...]:
    """The metrics that were evaluated, by index. Raises CannotRescore when there are none."""
    if saved.report is None:
        why = f" It ended {saved.verdict.status}: {saved.verdict.detail}" if saved.verdict else ""
        raise CannotRescore(f"it has no evaluation.json: no getter's value was saved.{why}")
    try:
        report = GradeReport.model_validate(saved.report)
    except ValidationError as error:
        raise CannotRescore(f"its evaluation.json cannot be used: {error}") from error
    records = report.metrics
    if not records or [record.index for record in records] != list(range(len(records))):
        raise CannotRescore("its evaluation.json has no getter's value.")
    for record in records:
        if "result" not in record.model_fields_set and not _was_absent(record):
            told = f" ({report.failure.message})" if report.failure else ""
            raise CannotRescore(f"metric {record.index} ({record.func}) has no saved result{told}.")
    return records


def _was_absent(record: MetricRecord) -> bool:
    """Whether the metric counted 0 without being judged, since the guest said that a file was not there."""
    unjudged = "result" not in record.model_fields_set or bool(record.traceback)
    return unjudged and record.value == 0.0 and "value" in record.model_fields_set


def _check(values: Mapping[str, Any], judged: Sequence[int], saved: Saved, there: Mapping[str, Path]) -> None:
    """Raise CannotRescore for a value that was not kept as such, and for a file that is not `there`."""
    for place, index in enumerate(judged):
        for side, value in values.get(str(place), {}).items():
            where = f"the {side} of metric {index} ({saved.evaluator.metrics[index].func})"
            for tag, told in _tagged(value):
                if tag == "$repr":
                    raise CannotRescore(f"{where} was a value that cannot be saved; all that is known: {told!s:.300}")
                name = f"cache/{told}" if tag == "$file" else str(told)
                found = any(one == name or one.startswith(f"{name}/") for one in there)
                if tag in ("$file", "$saved") and not found:
                    dropped = saved.facts.get("dropped") or saved.facts.get("incomplete") or "nothing"
                    raise CannotRescore(f"{where} is a file that is not in the bundle: {name} (dropped: {dropped}).")


def _tagged(value: Any) -> Iterator[tuple[str, Any]]:
    """(tag, content) of the values that plain JSON has no word for; see `envd.grader.values`."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            tag = next(iter(item), "")
            if tag.startswith("$"):
                yield tag, item[tag]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _place(files: Mapping[str, Path], workdir: Path) -> None:
    """Put the saved files where the evaluators look for them."""
    for name, path in files.items():
        target = workdir / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(path, target, follow_symlinks=False)


def _why(report: GradeReport, judged: Sequence[int]) -> str:
    failure = report.failure
    assert failure is not None
    where = f"Metric {judged[failure.index]}, {failure.stage}: " if failure.stage != "process" else ""
    return f"{where}{failure.message} {failure.hint}".strip()


def read(bundle: Path, scratch: Path, limit: int) -> Saved:
    """Of a folder or an archive; the archive is unpacked into `scratch`, `limit` bytes at most."""
    if bundle.is_file():
        bundle = unpack(bundle, scratch / "bundle", limit)
    elif not bundle.is_dir():
        raise CannotRescore("it is not there. Give a bundle's folder, or the archive as it was downloaded.")
    facts, task = _json(bundle, "episode.json"), _json(bundle, "task.json")
    if task is None or facts is None:
        missing = "task.json" if task is None else "episode.json"
        raise CannotRescore(f"it has no {missing}, so it is no bundle, or one without what a score rests on.")
    examined = examine(task, Abilities())
    if examined.task is None or examined.task.evaluator is None:
        raise CannotRescore("its task has no evaluator that could be run.")
    return Saved(
        folder=bundle,
        evaluator=examined.task.evaluator,
        task=task,
        facts={**facts, **_last_step(bundle)},
        verdict=_verdict(bundle),
        report=_json(bundle, "evaluation.json"),
    )


def unpack(archive: Path, folder: Path, limit: int) -> Path:
    """The files of a bundle's archive, in `folder`. Only plain files with plain names come out of it."""
    total = 0
    try:
        with tarfile.open(archive) as members:
            for count, member in enumerate(members):
                name = PurePosixPath(member.name)
                total += member.size
                if count >= MEMBERS or total > limit:
                    raise CannotRescore(f"it holds more than {limit} bytes or {MEMBERS} files.")
                if member.isdir():
                    continue
                if not member.isreg() or name.is_absolute() or ".." in name.parts or len(name.parts) < 2:
                    raise CannotRescore(f"it is no archive of a bundle: it holds {member.name[:200]!r}.")
                target = folder.joinpath(*name.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                content = members.extractfile(member)
                assert content is not None
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)
    except OSError as error:
        raise CannotRescore(f"it cannot be unpacked: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise CannotRescore(f"it cannot be unpacked: {error}") from error
    return folder


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        with open(folder / name, "rb") as file:
            value = json.loads(file.read(DOCUMENT))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotRescore(f"its {name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CannotRescore(f"its {name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CannotRescore(f"its {name} is not an object.")
    return value


def _last_step(folder: Path) -> dict[str, Any]:
    """The last action in steps.jsonl, which is newer than episode.json when the daemon was killed."""
    try:
        lines = (folder / "steps.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            actions = json.loads(line)["actions"]
            if actions:
                return {"last_action": actions[-1]["action"]}
        except (ValueError, LookupError, TypeError):
            continue  # cut short
    return {}


def _verdict(folder: Path) -> Verdict | None:
    try:
        return Verdict.model_validate_json((folder / "verdict.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CannotRescore(f"its verdict.json cannot be used: {error}") from error


@asynccontextmanager
async def _scratch() -> AsyncIterator[Path]:
    """A folder of our own, removed at the end."""
    folder = Path(await anyio.to_thread.run_sync(tempfile.mkdtemp, "", "envd-rescore-"))
    try:
        yield folder
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


def _tell(saved: Saved, outcome: Outcome, as_json: bool) -> int:
    kept = saved.verdict
    old = kept.score if kept else None
    equal = old is not None and abs(old - outcome.score) <= TOLERANCE
    if as_json:
        told = {
            "episode_id": saved.facts.get("episode_id"),
            "task_id": saved.task.get("id"),
            "equal": equal,
            "kept": None if kept is None else _kept(kept),
            "now": {"score": outcome.score, "raw": outcome.raw, "by": outcome.by, "warnings": outcome.warnings},
        }
        typer.echo(json.dumps(told, indent=1, default=str))
    else:
        for line in _lines(saved, outcome, equal):
            typer.echo(line)
    return EQUAL if equal else DIFFERENT


def _lines(saved: Saved, outcome: Outcome, equal: bool) -> Iterator[str]:
    yield f"{saved.facts.get('episode_id')}, task {saved.task.get('id')}"
    kept = saved.verdict
    rows = [("", "kept", "now"), ("score", _shown(kept), f"{outcome.score:g}")]
    raw = (kept.raw if kept else None) or ()
    for index, metric in enumerate(saved.evaluator.metrics):
        before, now = (str(values[index]) if index < len(values) else "-" for values in (raw, outcome.raw))
        rows.append((f"{index} {metric.func}", before, now))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    yield from ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    yield f"{'equal' if equal else 'different'}, by {outcome.by}"
    yield from (f"warning: {warning}" for warning in outcome.warnings)
    if kept and kept.detail:
        yield f"kept: {kept.detail}"


def _shown(kept: Verdict | None) -> str:
    if kept is None:
        return "no verdict"
    return kept.status.value if kept.score is None else f"{kept.score:g}"


def _kept(kept: Verdict) -> dict[str, Any]:
    told = kept.model_dump(mode="json", include={"status", "score", "raw", "code", "detail"})
    return {**told, "evaluator_version": kept.provenance.evaluator_version}


def _tell_failure(bundle: Path, why: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "equal": None, "error": why}, indent=1))
    else:
        typer.echo(f"{bundle} cannot be judged again: {why}", err=True)
