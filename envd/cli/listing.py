"""How commands tell of several things of a kind: a table on a terminal, columns in a pipe, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..terminal import printable
from .watch import clean


class PlainConsole(Console):
    """Prints words of servers as words: what would steer the terminal is left out, wherever they were put in."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console() -> Console:
    return PlainConsole(markup=False, highlight=False, emoji=False)


@contextmanager
def busy(output: Console, words: str, *, quiet: bool = False) -> Iterator[None]:
    """On a terminal, what is done just now and for how long, while the block runs. Nothing elsewhere."""
    if quiet or not output.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=output, transient=True) as progress:
        progress.add_task(clean(words), total=None)
        yield


def print_json(document: dict[str, Any]) -> None:
    console().out(json.dumps(document, indent=1), highlight=False)


def print_list(output: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """`rows` of cells below the `names` of their columns; the last column has what room is left, or needs."""
    told = [[clean(cell) for cell in row] for row in rows]
    if output.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for column, name in enumerate(names[:-1]):
            # The first is what the row is of: its id is copied, and must be in one piece.
            table.add_column(name, overflow="fold", no_wrap=column == 0)
        table.add_column(names[-1], ratio=1, overflow="fold")
        for row in told:
            table.add_row(*map(Text, row))
        output.print(table)
        return
    lines = [list(names), *told]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        output.out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def ago(seconds: float | None) -> str:
    """An age in its largest unit; empty where it is not known."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
