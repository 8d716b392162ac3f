"""Every command, and the groups of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .aws import app as aws
from .common import Json, Paths, Url, fail, server, talk

app = typer.Typer(
    name="envd",
    help="Serves computer desktops to agent trainers over one HTTP port: reset, step, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: rich would double the time that `envd --help` takes.
    rich_markup_mode=None,
    add_completion=True,
)

tasks = typer.Typer(help="Look at task files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tasks, name="tasks")
images = typer.Typer(help="What docker and qemu desktops are made of.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(images, name="images")
templates = typer.Typer(
    help="Virtual machines that others are cloned from.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(templates, name="templates")
app.add_typer(aws, name="aws")


def main() -> None:
    app()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default ENVD_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default ENVD_PORT, else 15001.")] = None,
) -> None:
    """Run the daemon until it is told to stop.

    Settings come from the environment and from .env in this folder; the README has the table. Exit codes: 0 stopped
    by a signal, 78 a setting cannot be used, 75 the port or the state directory is taken, 69 something is not
    installed, 70 a bug.
    """
    import asyncio

    from .. import daemon, log
    from ..errors import StartError
    from ..settings import load

    try:
        log.setup()
        settings = load(host=host, port=port)
        log.setup(settings.log_level, settings.log_format)
        asyncio.run(daemon.serve(settings))
    except StartError as error:
        fail(f"envd cannot start: {error.detail}", error.hint, error.exit_code)
    except Exception:  # noqa: BLE001 - the outermost boundary: told in one log line, ends non-zero
        import structlog

        structlog.get_logger("envd").exception("envd ended because one of its halves died")
        raise SystemExit(70) from None


@app.command()
def watch(
    job: Annotated[str | None, typer.Argument(help="A job's id; all jobs without it.")] = None,
    url: Url = None,
) -> None:
    """Follow boots and resets live.

    Phase and ETA, both probes, place in the queue; a restart of the daemon is survived. Exit code 0 if the job
    succeeded.
    """
    from ..client import Client
    from .watch import watch as follow

    async def run() -> int:
        async with Client(server(url)) as client:
            return await follow(client, job)

    raise SystemExit(talk(run()))


@app.command()
def logs(
    env: Annotated[int | None, typer.Option(help="Lines about this env.")] = None,
    job: Annotated[str | None, typer.Option(help="Lines about this job.")] = None,
    episode: Annotated[str | None, typer.Option(help="Lines about this episode.")] = None,
    level: Annotated[str | None, typer.Option(help="debug, info, warning or error: no line below it.")] = None,
    since: Annotated[str | None, typer.Option(help="No line older than that: 30s, 10m, 2h, 1d.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The newest so many; default 200.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with the lines that come.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show the daemon's log: its last lines, and with --follow those that come.

    A restart of the daemon is survived.
    """
    from ..client import Client
    from ..client.logs import Which
    from .logs import logs as show
    from .logs import moment

    async def run() -> int:
        async with Client(server(url)) as client:
            which = Which(env=env, job=job, episode=episode, level=level, since=moment(since), limit=limit)
            return await show(client, which, follow=follow, as_json=as_json)

    raise SystemExit(talk(run()))


@app.command()
def prewarm(url: Url = None) -> None:
    """Boot a clean desktop now and wait until it stands by.

    The next reset finds it and needs no boot of its own.
    """
    from ..client import Client
    from .watch import watch as follow

    async def run() -> int:
        async with Client(server(url)) as client:
            return await follow(client, (await client.prewarm()).id)

    raise SystemExit(talk(run()))


@tasks.command()
def check(paths: Paths, as_json: Json = False) -> None:
    """Say which tasks can be run with these settings, and what each of them needs.

    Supported is what this server can do. Whether its desktops have the programs of a task is not looked at.

    Exit codes: 0 all can, 1 some cannot, 2 no task file was found.
    """
    from ..settings import load
    from ..tasks.check import check as look

    async def run() -> int:
        return await look(paths, load(), as_json=as_json)

    raise SystemExit(talk(run()))


@tasks.command()
def prefetch(paths: Paths) -> None:
    """Download the files that tasks need into the server's cache.

    May run beside the server. Exit codes: 0 all are there, 1 some are missing, 2 no task file was found.
    """
    from ..settings import load
    from ..tasks.prefetch import prefetch as fetch

    async def run() -> int:
        return await fetch(paths, load())

    raise SystemExit(talk(run()))


@app.command()
def rescore(
    bundle: Annotated[Path, typer.Argument(help="An episode's evidence: its folder, or the archive of it.")],
    as_json: Json = False,
) -> None:
    """Run the grader again on what it saw, and compare the scores."""
    from ..settings import load
    from .rescore import rescore as again

    async def run() -> int:
        return await again(bundle, load(), as_json=as_json)

    raise SystemExit(talk(run()))


@images.command("ls")
def list_images(as_json: Json = False) -> None:
    """Show what is on this host, what these settings need, and the command that gets what is missing.

    Exit codes: 0 what they need is here, 1 something is missing.
    """
    from ..settings import load
    from .images import ls

    async def run() -> int:
        return await ls(load(), as_json=as_json)

    raise SystemExit(talk(run()))


@images.command("pull")
def pull_image(
    image: Annotated[str | None, typer.Argument(help="Its name; default ENVD_DOCKER_IMAGE.")] = None,
) -> None:
    """Get an image from its registry. Ours come from `make images`."""
    from ..settings import load
    from .pulling import pull

    async def run() -> int:
        return await pull(load(), image)

    raise SystemExit(talk(run()))


@templates.command("ls")
def list_templates(as_json: Json = False) -> None:
    """Show every template of this user: what it is of, what it takes, whether it is used and if not, why."""
    from ..settings import load
    from .templates import ls

    async def run() -> int:
        return await ls(load(), as_json=as_json)

    raise SystemExit(talk(run()))


@templates.command("create")
def create_template() -> None:
    """Boot a machine with these settings now and freeze it.

    The next reset clones it. Needs no daemon, and may run beside one. Exit codes: 0 there is one, 1 there is not.
    """
    from ..settings import load
    from .template_creation import create

    async def run() -> int:
        return await create(load())

    raise SystemExit(talk(run()))


@templates.command("rm")
def remove_templates(
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="As `ls` shows it, or its beginning.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every template of this user.")] = False,
) -> None:
    """Remove templates. One that a daemon uses is kept.

    Exit codes: 0 they are gone, 1 one was kept or there is no such template.
    """
    from ..settings import load
    from .templates import remove

    async def run() -> int:
        return await remove(load(), keys or [], everything=everything)

    raise SystemExit(talk(run()))


@templates.command("verify")
def verify_templates(
    key: Annotated[str | None, typer.Argument(help="As `ls` shows it, or its beginning; default all.")] = None,
    as_json: Json = False,
) -> None:
    """Read templates from end to end and compare them with what was written down when they were made.

    Exit codes: 0 all are as they were, 1 one is not.
    """
    from ..settings import load
    from .templates import verify

    async def run() -> int:
        return await verify(load(), key, as_json=as_json)

    raise SystemExit(talk(run()))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
