"""What commands have in common: the options that many take, and how work and errors are told."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help="Task files, and folders that hold some.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[str | None, typer.Option("--url", help="The server; default ENVD_URL, else http://127.0.0.1:15001.")]


def server(url: str | None) -> str:
    from ..settings import load

    return url or load().url


def talk(work: Coroutine[Any, Any, int]) -> int:
    """Run a client command; errors are told in two lines, Ctrl-C is quiet."""
    import asyncio

    from ..errors import EnvdError

    try:
        return asyncio.run(work)
    except EnvdError as error:
        fail(error.detail, error.hint, 1)
    except KeyboardInterrupt:
        return 130


def fail(detail: str, hint: str, code: int) -> NoReturn:
    try:
        typer.secho(detail, fg=typer.colors.RED, err=True)
        if hint:
            typer.echo(hint, err=True)
    except OSError:
        # Nobody can read it. The exit code still tells, if Python does not try once more to write on its way out.
        os._exit(code)
    raise SystemExit(code)
