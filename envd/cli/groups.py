"""`envd tasks`, `envd images` and `envd templates`: parse and call. What they call is imported by the command that
needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, Paths, talk

tasks = typer.Typer(
    help="Whether task files can be run here, and what they need.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
images = typer.Typer(help="What docker and qemu desktops are made of.", no_args_is_help=True, rich_markup_mode=None)
templates = typer.Typer(
    help="Virtual machines that others are cloned from.", no_args_is_help=True, rich_markup_mode=None
)


@tasks.command()
def check(paths: Paths, as_json: Json = False) -> None:
    """Say which tasks can be run with these settings, and what each of them needs.

    Supported is what this server can do. Whether its desktops have the programs of a task is not looked at.

    \b
    Examples:
      envd tasks check TASKS/
      envd tasks check task.json --json | jq .tasks

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

    May run beside the server, and may be run again: what is there is not downloaded twice.

    \b
    Examples:
      envd tasks prefetch TASKS/
      ENVD_ASSET_MIRRORS=/mnt/mirror envd tasks prefetch TASKS/

    Exit codes: 0 all are there, 1 some are missing, 2 no task file was found.
    """
    from ..settings import load
    from ..tasks.prefetch import prefetch as fetch

    async def run() -> int:
        return await fetch(paths, load())

    raise SystemExit(talk(run()))


@images.command("ls")
def list_images(as_json: Json = False) -> None:
    """Show what is on this host, what these settings need, and the command that gets what is missing.

    \b
    Examples:
      envd images ls
      PROVIDER=qemu envd images ls

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
    """Get an image from its registry. Ours come from `make images`.

    What was downloaded of a pull that is interrupted is kept for the next one.

    \b
    Examples:
      envd images pull
      envd images pull happysixd/osworld-docker

    Exit codes: 0 it is here, 1 it could not be had.
    """
    from ..settings import load
    from .pulling import pull

    async def run() -> int:
        return await pull(load(), image)

    raise SystemExit(talk(run()))


@templates.command("ls")
def list_templates(as_json: Json = False) -> None:
    """Show every template of this user: what it is of, what it takes, whether it is used and if not, why.

    \b
    Examples:
      envd templates ls
      envd templates ls --json

    Exit codes: 0 it was told, 1 the folder of templates cannot be used.
    """
    from ..settings import load
    from .templates import ls

    async def run() -> int:
        return await ls(load(), as_json=as_json)

    raise SystemExit(talk(run()))


@templates.command("create")
def create_template() -> None:
    """Boot a machine with these settings now and freeze it.

    The next reset clones it. Needs no daemon, and may run beside one.

    \b
    Examples:
      PROVIDER=qemu envd templates create
      PROVIDER=docker ENVD_DOCKER_IMAGE=envd/qemu envd templates create

    Exit codes: 0 there is one, 1 there is not.
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

    \b
    Examples:
      envd templates rm 3f9a
      envd templates rm --all

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

    \b
    Examples:
      envd templates verify
      envd templates verify 3f9a --json

    Exit codes: 0 all are as they were, 1 one is not.
    """
    from ..settings import load
    from .templates import verify

    async def run() -> int:
        return await verify(load(), key, as_json=as_json)

    raise SystemExit(talk(run()))
