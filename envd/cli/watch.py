"""`envd watch [JOB]`: boots and resets as they happen, on a terminal as a live display, elsewhere as plain lines.

Follows the event stream through dropped connections and restarts of the daemon.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..client.follow import parsed_job
from ..client.transport import OnRetry
from ..errors import EnvdError
from ..models import Event, Job, JobKind, JobState, Probe, ProbeResult
from ..terminal import printable

REFRESH_SECONDS = 0.25
PROGRESS_SECONDS = 10.0
"""Plain lines: progress of one job is printed no more often."""
ENDED_SHOWN = 5
NEWS_SHOWN = 6
PANEL_LINES = 6

AS_TRAINERS_READ_IT = "Waiting for VM to be ready"
"""What logs of older servers say of any desktop, and programs look for."""

STYLES = {
    JobState.QUEUED: "yellow",
    JobState.BOOTING: "cyan",
    JobState.SETTING_UP: "blue",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "magenta",
    JobState.SUPERSEDED: "magenta",
    JobState.EXPIRED: "red",
}


class Events(Protocol):
    """Where events come from: `envd.Client`, or a queue in this process."""

    def watch(
        self, job_id: str | None = None, *, patience: float | None = None, on_retry: OnRetry | None = None
    ) -> AsyncGenerator[Event, None]: ...


async def watch(client: Events, job_id: str | None = None, console: Console | None = None) -> int:
    """Show one job until it ends, or everything until cancelled. 0 if the job succeeded, else 1.

    Raises UnknownJob, and ServerUnreachable when the server never answered; one that answered once is waited for.
    """
    console = console or Console()
    board = Board(job_id)
    if console.is_terminal:
        await _live(client, board, console)
    else:
        await _plain(client, board, console)
    return 0 if board.succeeded else 1


async def _plain(client: Events, board: Board, console: Console) -> None:
    await _feed(client, board, lambda line: console.print(line, soft_wrap=True))


async def _live(client: Events, board: Board, console: Console) -> None:
    failure: EnvdError | None = None
    news: deque[Text] = deque(maxlen=NEWS_SHOWN)

    def picture() -> RenderableType:
        return board.render(time.monotonic(), news, console.height)

    async def refresh() -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            live.refresh()

    with Live(console=console, auto_refresh=False, get_renderable=picture) as live:
        async with asyncio.TaskGroup() as tasks:
            refresher = tasks.create_task(refresh())
            try:
                await _feed(client, board, news.append)
            except EnvdError as error:
                failure = error  # raised below: out of the group it would come wrapped
            refresher.cancel()
        live.refresh()
    if failure is not None:
        raise failure


async def _feed(client: Events, board: Board, tell: Callable[[Text], Any]) -> None:
    """Bring the board up to date with each event, and tell what is new."""

    def lost(error: EnvdError, pause: float) -> None:
        if board.trouble is None:
            tell(_line(time.time(), Text(f"reconnecting: {clean(error.detail)}", "yellow")))
        board.trouble = error.detail

    async with aclosing(client.watch(board.job_id, patience=math.inf, on_retry=lost)) as events:
        async for event in events:
            for news in board.apply(event, time.monotonic()):
                tell(_line(event.at, news))


@dataclass(slots=True)
class Row:
    """A job as it was last heard of. `age` is how many seconds it had lived then, by the server's clock."""

    job: Job
    heard: float
    age: float
    told: float = -math.inf
    """When progress was last told, on our monotonic clock."""

    def elapsed(self, now: float) -> float:
        return self.age if self.job.state.terminal else self.age + max(0.0, now - self.heard)

    def total(self) -> float | None:
        """How long the job is expected to take in all; None when nobody knows."""
        if self.job.state.terminal:
            return self.age
        return None if self.job.eta_s is None else self.age + self.job.eta_s


class Board:
    """What a watcher knows. `apply` takes an event in and returns the lines it is worth; `render` draws it all."""

    def __init__(self, job_id: str | None = None) -> None:
        self.job_id = job_id
        self.trouble: str | None = None
        """Why there is no connection, while there is none."""
        self._rows: dict[str, Row] = {}
        self._started = False

    @property
    def succeeded(self) -> bool:
        row = self._rows.get(self.job_id or "")
        return row is not None and row.job.state is JobState.SUCCEEDED

    def apply(self, event: Event, now: float) -> list[Text]:
        lines = [Text("connected again", "green")] if self.trouble is not None else []
        self.trouble = None
        if event.kind == "snapshot":
            return lines + self._snapshot(event, now)
        if event.kind == "server-shutdown":
            return [*lines, Text("the daemon is shutting down", "yellow")]
        if event.job is None:
            return lines + _words(event)
        before = self._rows.get(event.job.id)
        if before is not None and event.job.version < before.job.version:
            return lines  # replayed; the snapshot was newer
        row = self._put(event.job, event.at, now)
        told = _job_words(event, before.job if before else None, row, now)
        return lines + [_about(event.job, *words) for words in told]

    def _snapshot(self, event: Event, now: float) -> list[Text]:
        """The jobs as they are; what is no longer among them has ended, or was forgotten with a restart."""
        jobs = [event.job] if event.job else _jobs(event.data.get("jobs"))
        known = {job.id for job in jobs}
        self._rows = {id: row for id, row in self._rows.items() if id in known or row.job.state.terminal}
        lines = []
        for job in jobs:
            before = self._rows.get(job.id)
            self._put(job, event.at, now)
            if before is None or before.job.state is not job.state:
                lines.append(_about(job, *_state_words(job)))
        if not jobs and not self._started:
            lines.append(Text("nothing boots and nothing waits"))
        self._started = True
        return lines

    def _put(self, job: Job, at: float, now: float) -> Row:
        age = max(0.0, (job.ended_at or at) - job.created_at)
        before = self._rows.get(job.id)
        row = self._rows[job.id] = Row(job, now, age, before.told if before else -math.inf)
        ended = [row.job.id for row in self._rows.values() if row.job.state.terminal]
        for old in ended[:-ENDED_SHOWN]:
            del self._rows[old]
        return row

    def render(self, now: float, news: Collection[Text], height: int) -> RenderableType:
        """Everything, in about `height` lines: panels for what runs, a table for what waits, a line for what ended."""
        rows = list(self._rows.values())
        parts: list[RenderableType] = []
        if self.job_id is not None:
            parts += [_panel(row, now) for row in rows]
        else:
            running = [row for row in rows if row.job.state in (JobState.BOOTING, JobState.SETTING_UP)]
            waiting = sorted(
                (row for row in rows if row.job.state is JobState.QUEUED), key=lambda row: row.job.position or 0
            )
            ended = [row for row in rows if row.job.state.terminal]
            free = height - len(news) - len(ended) - 4
            shown = max(1, free // PANEL_LINES)
            parts += [_panel(row, now) for row in running[:shown]]
            parts += [Text(f"… and {len(running) - shown} more run", "dim")] if len(running) > shown else []
            parts += [_queue(waiting, now, max(3, free - PANEL_LINES * min(shown, len(running))))] if waiting else []
            parts += [_about(row.job, *_state_words(row.job)) for row in ended]
        if not parts:
            parts.append(Text("nothing boots and nothing waits", "dim"))
        if news:
            parts += [Rule(style="dim"), *(_one_line(text) for text in news)]
        if self.trouble is not None:
            parts.append(_one_line(Text(f"reconnecting… {clean(self.trouble)}", "bold yellow")))
        return Group(*parts)


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(count: int, one: str, several: str = "") -> str:
    """`1 env`, `2 envs`."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def clean(text: str) -> str:
    return printable(" ".join(text.split()))


# What is drawn


def _panel(row: Row, now: float) -> Panel:
    """One job: bar and ETA, its place or the phases so far, both probes."""
    job = row.job
    style = STYLES[job.state]
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row(Text(_doing(job), f"bold {style}"), _bar(row, now))
    if job.state is JobState.QUEUED:
        grid.add_row(Text("queue", "dim"), Text(_place(job)))
    elif job.phases:
        grid.add_row(Text("phases", "dim"), _phases(row, now))
    for probe in job.probes:
        grid.add_row(*_probe(probe, job))
    for warning in job.warnings:
        grid.add_row(Text("warning", "yellow"), Text(clean(warning)))
    if job.error is not None:
        grid.add_row(Text(clean(job.error.code), "red"), Text(clean(f"{job.error.detail} {job.error.hint}")))
    return Panel(grid, title=Text(_title(job)), title_align="left", border_style=style)


def _bar(row: Row, now: float) -> Table:
    elapsed, total = row.elapsed(now), row.total()
    if row.job.state.terminal:
        words = f"after {clock(elapsed)}"
    elif total is None:
        words = f"{clock(elapsed)}, no earlier boot to judge by"
    elif elapsed > total + 1:
        words = f"{clock(elapsed)}, {clock(elapsed - total)} longer than expected"
    else:
        words = f"{clock(elapsed)}, about {clock(total - elapsed)} left"
    # Only success fills the bar, however long it takes.
    share = 1.0 if row.job.state is JobState.SUCCEEDED else min(0.98, elapsed / total) if total else 0.0
    pulse = total is None and not row.job.state.terminal
    style = STYLES[row.job.state]
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(
        ProgressBar(
            total=1.0, completed=share, pulse=pulse, complete_style=style, finished_style=style, pulse_style=style
        ),
        Text(words),
    )
    return line


def _phases(row: Row, now: float) -> Text:
    text = Text()
    for phase in row.job.phases:
        if phase.seconds is not None:
            text.append(f"{clean(phase.name)} {phase.seconds:.1f} s   ", "dim")
        else:
            # started_at is of the server's clock, as created_at is, so ours does not come into it.
            lasted = row.job.created_at + row.elapsed(now) - phase.started_at
            text.append(f"{clean(phase.name)} {clock(lasted)} …", "bold")
    return text


def _probe(probe: Probe, job: Job) -> tuple[Text, Text]:
    """One that has not passed is a failure only where the job is: until then it is waited for."""
    mark, style = {
        ProbeResult.OK: ("✓", "green"),
        ProbeResult.FAIL: ("✗", "red"),
        ProbeResult.UNKNOWN: ("·", "yellow"),
    }[probe.result]
    if probe.result is ProbeResult.FAIL and not probe.passed and not job.state.terminal:
        mark, style = "·", "dim"
    passed = f"{probe.seconds:.1f} s  " if probe.passed and probe.seconds is not None else ""
    tries = "" if probe.passed or not probe.attempts else f"  ({number(probe.attempts, 'try', 'tries')})"
    detail = Text(f"{passed}{clean(probe.detail)}{tries}", "dim" if probe.passed else "", no_wrap=True)
    detail.overflow = "ellipsis"
    return Text(f"{mark} {clean(probe.name)}", style), detail


def _queue(waiting: list[Row], now: float, room: int) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left")
    for name in ("#", "env", "job", "task", "waits", "done in about"):
        table.add_column(name, no_wrap=True)
    for row in waiting[:room]:
        total = row.total()
        table.add_row(
            str(row.job.position or ""),
            _env(row.job),
            clean(row.job.id),
            clean(row.job.task_id or ""),
            clock(row.elapsed(now)),
            "" if total is None else clock(total - row.elapsed(now)),
        )
    if len(waiting) > room:
        table.add_row("…", "", f"and {len(waiting) - room} more")
    return table


def _one_line(text: Text) -> Text:
    line = text.copy()
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


# What is said


def _line(at: float, text: Text) -> Text:
    return Text.assemble((time.strftime("%H:%M:%S ", time.localtime(at)), "dim"), text)


def _about(job: Job, words: str, style: str = "") -> Text:
    return Text.assemble((f"{_env(job)} {clean(job.id)}: ", "bold"), (words, style))


def _words(event: Event) -> list[Text]:
    """An event that is about no job: desktops, steps, episodes, and what the stream says of itself."""
    if event.kind == "gap":
        return [Text("events were missed while there was no connection; what is shown is current", "yellow")]
    where = " ".join(clean(x) for x in (f"env {event.env}" if event.env is not None else "", event.desktop_id) if x)
    what = clean(str(event.data.get("message") or event.kind))
    why = clean(str(event.data.get("reason") or event.data.get("why") or event.data.get("end_reason") or ""))
    return [Text.assemble((f"{where}: " if where else "", "bold"), f"{what} ({why})" if why else what)]


def _job_words(event: Event, before: Job | None, row: Row, now: float) -> list[tuple[str, str]]:
    job = row.job
    if event.kind == "state":
        return [_state_words(job)]
    if event.kind == "position":
        return [_state_words(job)] if before and before.position != job.position else []
    if event.kind == "phase":
        return [(_doing(job), STYLES[job.state])]
    if event.kind == "probe":
        return _probe_words(before, job)
    if event.kind == "progress" and now < row.told + PROGRESS_SECONDS:
        return []
    message = clean(str(event.data.get("message") or event.data.get("line") or ""))
    message = message.replace(AS_TRAINERS_READ_IT, "waiting for the desktop")
    if event.kind == "progress":
        row.told = now
    return [(message, "")] if message else []


def _state_words(job: Job) -> tuple[str, str]:
    style = STYLES[job.state]
    if job.state is JobState.QUEUED:
        return f"queued, {_place(job)}" + ("" if job.eta_s is None else f", done in about {clock(job.eta_s)}"), style
    if not job.state.terminal:
        return _doing(job) + ("" if job.eta_s is None else f", about {clock(job.eta_s)} left"), style
    words = f"{job.state} after {max(0.0, (job.ended_at or job.created_at) - job.created_at):.1f} s"
    if job.reset_path is not None:
        words += f" ({job.reset_path})"
    if job.error is not None:
        words += f": {clean(job.error.detail)} {clean(job.error.hint)} [{clean(job.error.code)}]"
    return words, style


def _probe_words(before: Job | None, job: Job) -> list[tuple[str, str]]:
    """Probes that passed, fail, or no longer answer; that nothing answers yet is no news, nor is a new detail."""
    was = {probe.name: probe for probe in (before.probes if before else ())}
    words = []
    for probe in job.probes:
        old = was.get(probe.name)
        changed = old is None or (old.result, old.passed) != (probe.result, probe.passed)
        lost = probe.result is ProbeResult.UNKNOWN and old is not None and old.result is ProbeResult.OK
        if changed and (probe.passed or lost or probe.result is ProbeResult.FAIL):
            mark, detail = _probe(probe, job)
            words.append((f"{mark.plain} {detail.plain}", str(mark.style)))
    return words


def _doing(job: Job) -> str:
    if job.state.terminal or job.state is JobState.QUEUED:
        return str(job.state)
    return f"{str(job.state).replace('_', ' ')} · {clean(job.phase)}"


def _place(job: Job) -> str:
    if job.position is None:
        return "its turn has come"
    return f"place {job.position}, {job.ahead} ahead"


def _title(job: Job) -> str:
    facts = (_env(job), job.id, job.task_id, job.reset_path, job.desktop_id)
    return " · ".join(clean(str(fact)) for fact in facts if fact)


def _env(job: Job) -> str:
    return f"env {job.env}" if job.kind is JobKind.RESET else str(job.kind)


def _jobs(documents: Any) -> list[Job]:
    """Raises InfraError when they are no jobs."""
    return [parsed_job(document) for document in documents or ()]
