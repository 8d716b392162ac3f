"""What commands have in common: the options that many take, the server they talk to, and how work and errors are told.

Exit codes that all of them share: 0 done, 1 refused or failed, 2 the command line is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..terminal import printable
from . import completion

if TYPE_CHECKING:
    from ..client import Client

NO_SCORE = 3
"""Exit code of what worked and has no score, or did something else than was asked for."""
WRONG = 2
"""Exit code of a command line that is wrong."""
ENDED = 143
"""Exit code after SIGTERM, as a shell tells it."""

HINTS = {
    "unknown_job": "`envd ls --jobs` lists those that are kept.",
    "unknown_env": "`envd ls` lists them.",
    "no_episode": "`envd reset ENV TASK.json` begins one.",
    "not_found": "`envd ls --episodes` lists the episodes with evidence.",
    "lease_over": "`envd ls --leases` tells who has what; ask for a new one.",
}
"""What to do about an error that does not say so itself, in words of this command line."""

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="PATH", help="Task files, and folders that hold some.", autocompletion=completion.files),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[
    str | None, typer.Option("--url", help="The server; default ENVD_URL, else that of ENVD_HOST and ENVD_PORT.")
]
Lease = Annotated[
    str | None, typer.Option("--lease", metavar="ID", help="Play under this lease; default ENVD_LEASE, else none.")
]
EnvNumber = Annotated[
    int, typer.Argument(metavar="ENV", min=0, help="Its number.", autocompletion=completion.env_numbers)
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.", autocompletion=completion.active_jobs)]


def ask(url: str | None, work: Callable[[Client], Awaitable[int]], *, lease: str | None = None) -> NoReturn:
    """Run what talks to the server, with the token and under the lease of these settings (.env is read too), and end
    with its exit code."""

    async def run() -> int:
        async with client_of(url) as client:
            under = lease or _kept_lease()
            return await work(client.under(under) if under else client)

    raise SystemExit(talk(run()))


def client_of(url: str | None) -> Client:
    """A client of the server that is meant. Raises SettingsError."""
    from ..client import Client
    from ..settings import load

    settings = load()
    return Client(url or settings.url, token=settings.token.get_secret_value())


def _kept_lease() -> str:
    from ..settings import load

    return load().lease.get_secret_value()


def talk(work: Coroutine[Any, Any, int]) -> int:
    """Run a command to its exit code. Errors are told in two lines; Ctrl-C and SIGTERM are quiet, and let it clean
    up."""
    import asyncio

    from ..errors import EnvdError

    terminated = False

    async def run() -> int:
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        return await work

    try:
        return asyncio.run(run())
    except EnvdError as error:
        fail(error.detail, error.hint or HINTS.get(error.code, ""), 1)
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:
        if terminated:
            return ENDED
        raise
    finally:
        work.close()


@contextmanager
def told(code: int = 1) -> Iterator[None]:
    """Errors of what is imported, loaded or done where there is no loop."""
    from ..errors import EnvdError

    try:
        yield
    except EnvdError as error:
        fail(error.detail, error.hint, code)


def fail(detail: str, hint: str, code: int) -> NoReturn:
    """End with two lines: what happened, and what to do. A server may have said it, so nothing of it steers the
    terminal."""
    detail, hint = map(printable, (detail, hint))
    try:
        typer.secho(detail, fg=None if os.environ.get("NO_COLOR") else typer.colors.RED, err=True)
        if hint:
            typer.echo(hint, err=True)
    except OSError:
        # Nobody can read it. The exit code still tells, if Python does not try once more to write on its way out.
        os._exit(code)
    raise SystemExit(code)


def agreed(question: str, *, yes: bool, as_json: bool = False) -> bool:
    """Whether it may be done. Where nobody can be asked that ends the command."""
    if yes:
        return True
    if as_json or not sys.stdin.isatty():
        fail("Nothing was done: nobody can be asked here.", "Give --yes, or --dry-run to see what it would do.", 1)
    return typer.confirm(question)
