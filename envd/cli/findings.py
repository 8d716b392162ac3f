"""How findings are printed: a table on a terminal, lines in a pipe, JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..findings import Finding, Verdict
from .watch import clean

STYLES: dict[Verdict, str] = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "unknown": "cyan",
    "skipped": "dim",
}


def print_findings(output: Console, findings: Sequence[Finding]) -> None:
    if output.is_terminal:
        output.print(_table(findings))
    else:
        _lines(output, findings)


def count(findings: Sequence[Finding]) -> str:
    """How many there are of each verdict, in words."""
    counted = Counter(one.verdict for one in findings)
    return ", ".join(f"{counted[verdict]} {verdict}" for verdict in STYLES if counted[verdict])


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("verdict", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("found, and what to do", ratio=1, overflow="fold")
    for one in findings:
        told = Text(clean(one.detail))
        if one.fix:
            told.append(f"\n→ {clean(one.fix)}", "bold")
        table.add_row(Text(one.verdict, STYLES[one.verdict]), Text(clean(one.what)), told)
    return table


def _lines(output: Console, findings: Sequence[Finding]) -> None:
    """In a pipe a fix has a line of its own, to be copied."""
    width = max(len(one.what) for one in findings)
    for one in findings:
        output.out(f"{one.verdict:8} {clean(one.what):{width}}  {clean(one.detail)}", highlight=False)
        if one.fix:
            output.out(f"         → {clean(one.fix)}", highlight=False)
