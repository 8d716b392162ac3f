"""`envd doctor`: what is found for a person or a program."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

from anyio.to_thread import run_sync
from dotenv import dotenv_values
from rich.console import Console

from ..doctor.host import examine as examine_host
from ..doctor.remote import examine as examine_server
from ..findings import Finding
from .findings import count, print_findings
from .listing import console, print_json
from .watch import clean


async def doctor(
    url: str | None = None, *, full: bool = False, as_json: bool = False, output: Console | None = None
) -> int:
    """Print all that is found on this host, or of the server at `url`. 1 if something failed, else 0."""
    output = output or console()
    quiet = as_json or not output.is_terminal
    with nullcontext() if quiet else output.status("looking …"):
        findings = await _look(url, full=full)
    failed = any(one.verdict == "failed" for one in findings)
    if as_json:
        first = _first(findings)
        print_json(
            {
                "ok": not failed,
                "of": url or "this host",
                "first": asdict(first) if first is not None else None,
                "findings": [asdict(one) for one in findings],
            }
        )
    else:
        print_findings(output, findings)
        output.out(f"\n{_summary(findings, url)}", highlight=False)
    return 1 if failed else 0


async def _look(url: str | None, *, full: bool) -> list[Finding]:
    if url is None and not full:
        return await examine_host()
    server, token = await run_sync(_server, url)
    return await examine_server(server, token, full=full)


def _server(url: str | None) -> tuple[str, str]:
    """URL and token, as clients have them, and as the daemon's own .env does. Blocks."""
    from ..settings import load

    token = (os.environ.get("ENVD_TOKEN") or dotenv_values(".env").get("ENVD_TOKEN") or "").strip()
    return url or load().url, token


def _first(findings: Sequence[Finding]) -> Finding | None:
    """What to do first: what failed first, since that may be why the rest does."""
    for verdict in ("failed", "warning"):
        for one in findings:
            if one.verdict == verdict:
                return one
    return None


def _summary(findings: Sequence[Finding], url: str | None) -> str:
    numbers = count(findings)
    first = _first(findings)
    if first is None:
        well = f"{url} can be used from here" if url else "Nothing is in the way of desktops"
        return f"{numbers}. {well}."
    fix = f" → {clean(first.fix)}" if first.fix else ""
    if first.verdict == "failed":
        return f"{numbers}. First put this right: {first.what}.{fix}"
    return f"{numbers}. Nothing failed. First look at: {first.what}.{fix}"
