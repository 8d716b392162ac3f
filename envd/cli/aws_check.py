"""`envd aws check`: the preflight's findings for a person or a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from ..drivers.aws.check import check as look
from ..findings import Finding
from ..settings import Settings
from .findings import count, print_findings
from .listing import console, print_json


async def check(settings: Settings, *, as_json: bool = False, output: Console | None = None) -> int:
    """Print all of them. 1 if one failed, else 0."""
    findings = await look(settings)
    failed = any(one.verdict == "failed" for one in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(one) for one in findings]})
        return 1 if failed else 0
    output = output or console()
    print_findings(output, findings)
    output.out(f"\n{_summary(settings, findings)}", highlight=False)
    return 1 if failed else 0


def _summary(settings: Settings, findings: Sequence[Finding]) -> str:
    if any(one.verdict == "failed" for one in findings):
        return f"{count(findings)}. Desktops cannot be launched before what failed is put right."
    start = "envd serve" if settings.provider == "aws" else "PROVIDER=aws envd serve"
    return f"{count(findings)}. Nothing failed: {start}"
