"""`envd aws`: parses and asks. What it calls is in `aws_check.py` and `aws_gc.py`, imported by the command that needs
it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .common import Json, fail, talk, told

app = typer.Typer(
    help="Desktops on EC2: check, list, end what was forgotten.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def check(as_json: Json = False) -> None:
    """Look whether desktops can be launched with these settings. Launches and changes nothing.

    Credentials, permissions (by dry runs), image, type, subnets, security groups, quota, TTL role, ports; each with a
    verdict, and with what to do.

    \b
    Examples:
      envd aws check
      AWS_REGION=us-east-1 AWS_SUBNET_ID=subnet-… envd aws check
      envd aws check --json | jq '.findings[] | select(.verdict == "failed")'

    Exit codes: 0 nothing failed, 1 something did.
    """
    from ..settings import load

    with told():
        from .aws_check import check as look

        settings = load()
    raise SystemExit(talk(look(settings, as_json=as_json)))


@app.command("ls")
def list_instances(as_json: Json = False) -> None:
    """Show every instance of envd's in the region: of all daemons, with age, owner and what it cost so far.

    What is marked * is of the daemon whose state directory this is (ENVD_STATE_DIR).

    \b
    Examples:
      envd aws ls
      AWS_REGION=eu-west-3 envd aws ls --json

    Exit codes: 0 it was told, 1 AWS did not let us look.
    """
    from ..settings import load

    with told():
        from .aws_gc import ls

        settings = load()
    raise SystemExit(talk(ls(settings, as_json=as_json)))


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be ended, and end nothing.")] = False,
    expired: Annotated[
        bool, typer.Option("--expired", help="Also those of other daemons that are past their envd:expires-at.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that other daemons use. Ends their episodes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """End forgotten instances, and schedules whose instance is gone.

    Ended are those of this state directory's daemon. While that daemon runs only those past their time are: it sweeps
    the others itself, and uses some. --all does not change that: stop the daemon first.

    \b
    Examples:
      envd aws gc --dry-run            what would be ended
      envd aws gc                      what this daemon left, after it is asked
      envd aws gc --expired --yes      from cron: whatever outlived its time

    Exit codes: 0 done, or nothing to do; 1 refused, or something could not be ended.
    """
    from ..settings import load

    with told():
        from .aws_gc import Plan, end, show, survey

        settings = load()
    plans: list[Plan] = []

    async def look() -> int:
        plans.append(await survey(settings, expired=expired, everything=everything))
        return 0 if as_json else show(plans[0], dry_run=dry_run)

    # The question in between is asked while no loop runs: it takes as long as it takes.
    if code := talk(look()):
        raise SystemExit(code)
    if plans[0].chosen and not (yes or dry_run):
        if as_json or not sys.stdin.isatty():
            fail("Nothing was ended: nobody can be asked here.", "Give --yes, or --dry-run to see what it would do.", 1)
        if not typer.confirm(f"End {plans[0].number}?"):
            raise SystemExit(1)
    raise SystemExit(talk(end(settings, plans[0], dry_run=dry_run, as_json=as_json)))
