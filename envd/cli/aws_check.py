"""`envd aws check`: the preflight's findings for a person or a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..drivers.aws.check import Finding
from ..drivers.aws.check import check as look
from ..drivers.aws.findings import Verdict
from ..settings import Settings
from .listing import console, print_json
from .watch import clean

STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "unknown": "cyan"}


async def check(settings: Settings, *, as_json: bool = False, output: Console | None = None) -> int:
    """Print all of them. 1 if one failed, else 0."""
    findings = await look(settings)
    failed = any(one.verdict == "failed" for one in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(one) for one in findings]})
        return 1 if failed else 0
    output = output or console()
    if output.is_terminal:
        output.print(_table(findings))
    else:
        _lines(output, findings)
    output.out(f"\n{_summary(settings, findings)}", highlight=False)
    return 1 if failed else 0


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


def _summary(settings: Settings, findings: Sequence[Finding]) -> str:
    counted = Counter(one.verdict for one in findings)
    numbers = ", ".join(f"{counted[verdict]} {verdict}" for verdict in STYLES if counted[verdict])
    if counted["failed"]:
        return f"{numbers}. Desktops cannot be launched before what failed is put right."
    start = "envd serve" if settings.provider == "aws" else "PROVIDER=aws envd serve"
    return f"{numbers}. Nothing failed: {start}"
