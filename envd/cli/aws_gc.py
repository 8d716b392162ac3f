"""`envd aws ls` and `gc`: which instances of envd's there are, and the end of those that nobody uses.

Whose an instance is says its tag. A daemon that runs puts off the end of what it uses, so what is past its time is used
by nobody, whoever launched it. Of a daemon that does not run nothing is used; whether it runs is told by the lock of
its state directory, on this host alone.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from anyio.to_thread import run_sync
from rich.console import Console

from ..daemon import daemon_id, locked
from ..drivers.aws.budget import load_prices
from ..drivers.aws.cloud import Cloud, open_cloud
from ..drivers.aws.place import find_region
from ..drivers.aws.sweep import Found, find_instances, orphan_schedules, terminate
from ..drivers.aws.tags import schedule_name
from ..drivers.aws.ttl import remove_schedule
from ..errors import StateDirLocked
from ..settings import Settings
from .listing import ago, console, print_json, print_list


@dataclass(frozen=True)
class Plan:
    """`ours` is the id of this state directory's daemon, None where there never was one; `running` whether it runs.
    `kept` are its instances that are left to it. `schedules` are names of those whose instance is gone."""

    region: str
    ours: str | None
    running: bool
    expired: bool
    everything: bool
    chosen: Sequence[Found]
    kept: Sequence[Found]
    schedules: Sequence[str]

    @property
    def number(self) -> str:
        return f"{len(self.chosen)} instance{'s' * (len(self.chosen) != 1)}"


async def ls(settings: Settings, *, as_json: bool = False, output: Console | None = None) -> int:
    """Print all in the region. Always 0. Raises SettingsError, CloudRefused."""
    ours = await run_sync(_our_id, settings)
    region = await find_region(settings)
    async with open_cloud(region) as cloud:
        found = await _find(cloud, settings)
    if as_json:
        print_json({"region": region, "daemon_id": ours, "instances": [_facts(one, ours) for one in found]})
        return 0
    output = output or console()
    if not found:
        output.out(f"There is no instance of envd's in {region}.", highlight=False)
        return 0
    _print(output, found, ours)
    output.out(f"\n{_summary(found, ours, region)}", highlight=False)
    return 0


async def survey(settings: Settings, *, expired: bool, everything: bool) -> Plan:
    """What would be ended. Raises SettingsError, CloudRefused."""
    ours = await run_sync(_our_id, settings)
    region = await find_region(settings)
    async with _lock_unless_running(settings, ours) as running, open_cloud(region) as cloud:
        plan = Plan(region, ours, running, expired, everything, (), (), await orphan_schedules(cloud))
        return _choose(plan, await _find(cloud, settings))


def show(plan: Plan, *, dry_run: bool, output: Console | None = None) -> int:
    """Print it. Always 0."""
    output = output or console()
    if plan.chosen:
        _print(output, plan.chosen, plan.ours)
    if plan.kept:
        output.out(
            f"{len(plan.kept)} of daemon {plan.ours} left to it, since it runs (stop it to end them).", highlight=False
        )
    verb = "would be" if dry_run else "to be"
    output.out(f"{plan.number} {verb} ended, {_schedules(plan)} {verb} removed, in {plan.region}.", highlight=False)
    return 0


async def end(settings: Settings, agreed: Plan, *, dry_run: bool, as_json: bool, output: Console | None = None) -> int:
    """End what was agreed to and may still be ended: the daemon may have been started meanwhile, and an instance's end
    been put off. While it is done the daemon cannot start. 0; Raises CloudRefused once all that could be ended were."""
    ended: Sequence[Found] = ()
    if not dry_run:
        ids = {one.instance_id for one in agreed.chosen}
        async with _lock_unless_running(settings, agreed.ours) as running, open_cloud(agreed.region) as cloud:
            plan = _choose(replace(agreed, running=running), await _find(cloud, settings))
            ended = [one for one in plan.chosen if one.instance_id in ids]
            await terminate(cloud, [one.instance_id for one in ended])
            for name in agreed.schedules:
                await remove_schedule(cloud, name.removeprefix(schedule_name("")))
    if as_json:
        print_json(
            {
                "region": agreed.region,
                "daemon_id": agreed.ours,
                "daemon_runs": agreed.running,
                "dry_run": dry_run,
                "chosen": [_facts(one, agreed.ours) for one in agreed.chosen],
                "kept": [_facts(one, agreed.ours) for one in agreed.kept],
                "ended": [one.instance_id for one in ended],
                "schedules": list(agreed.schedules),
            }
        )
    elif not dry_run and (ended or agreed.schedules):
        done = replace(agreed, chosen=ended)
        (output or console()).out(f"Ended {done.number}, removed {_schedules(done)}.", highlight=False)
    return 0


def _choose(plan: Plan, found: Sequence[Found]) -> Plan:
    chosen: list[Found] = []
    kept: list[Found] = []
    now = time.time()
    for one in found:
        past = one.expires_at is not None and one.expires_at <= now
        if one.state == "shutting-down":
            continue
        if one.daemon_id == plan.ours:
            (kept if plan.running and not past else chosen).append(one)
        elif plan.everything or (plan.expired and past):
            chosen.append(one)
    return replace(plan, chosen=chosen, kept=kept)


async def _find(cloud: Cloud, settings: Settings) -> list[Found]:
    return await find_instances(cloud, None, await run_sync(load_prices, settings.aws_prices))


def _our_id(settings: Settings) -> str | None:
    """None where no daemon ever was: then none is made up."""
    return daemon_id(settings.state_dir) if (settings.state_dir / "daemon-id").exists() else None


@asynccontextmanager
async def _lock_unless_running(settings: Settings, ours: str | None) -> AsyncIterator[bool]:
    """Whether the daemon of the state directory runs. If it does not, it cannot start within the block."""
    if ours is None:
        yield False
        return
    with ExitStack() as stack:
        try:
            await run_sync(stack.enter_context, locked(settings.state_dir))
        except StateDirLocked:
            running = True
        else:
            running = False
        yield running


def _print(output: Console, found: Sequence[Found], ours: str | None) -> None:
    names = ("", "instance", "desktop", "state", "type", "age", "env", "owner", "ends", "cost so far")
    print_list(output, names, [_row(one, ours) for one in found])


def _row(one: Found, ours: str | None) -> tuple[str, ...]:
    return (
        "*" if one.daemon_id == ours else "",
        one.instance_id,
        one.desktop_id,
        one.state,
        one.type,
        ago(one.age_s),
        "" if one.env is None else str(one.env),
        one.owner,
        _ends(one),
        "" if one.cost_usd is None else f"${one.cost_usd:.2f}",
    )


def _ends(one: Found) -> str:
    if one.expires_at is None:
        return "never"
    left = one.expires_at - time.time()
    when = f"in {ago(left)}" if left > 0 else f"{ago(-left)} ago"
    return f"{when}, no schedule" if one.schedule is False else when


def _summary(found: Sequence[Found], ours: str | None, region: str) -> str:
    known = [one.cost_usd for one in found if one.cost_usd is not None]
    daemons = len({one.daemon_id for one in found})
    words = [
        f"{len(found)} of {daemons} daemon{'s' * (daemons != 1)} in {region}, some ${sum(known):.2f} so far"
        " (on-demand prices of us-east-1, disks and traffic apart)."
    ]
    if any(one.daemon_id == ours for one in found):
        words.append(f"* are of this state directory's daemon, {ours}.")
    if any(one.state == "stopped" for one in found):
        words.append("While it is stopped an instance costs its disk alone; its cost here counts that time in full.")
    if any(one.schedule is False for one in found):
        words.append("What has no schedule is ended by its daemon's sweep or `envd aws gc` only.")
    return "\n".join(words)


def _schedules(plan: Plan) -> str:
    number = len(plan.schedules)
    return f"{number} schedule{'s' * (number != 1)} without an instance"


def _facts(one: Found, ours: str | None) -> dict[str, Any]:
    return {**asdict(one), "ours": one.daemon_id == ours}
