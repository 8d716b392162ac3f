"""On the server: every look at this host, those that its provider needs, all at once."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import import_module

from anyio.to_thread import run_sync

from .. import last_start
from ..errors import SettingsError
from ..findings import Finding, Look, gather
from ..settings import Settings, load
from . import machine
from .remote import broke

WITHIN = 30.0
"""Seconds for one look. AWS is asked for some fifty things, and Docker may have to try a guest."""
AT_ONCE = 8


async def examine(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """All that is found, in the order in which it is to be put right. Raises nothing that this host is the reason
    for."""
    environ = os.environ if environ is None else environ
    about = await run_sync(machine.this_machine)
    verdict = machine.platform_of(about)
    if about.system != "Linux":
        return [verdict, machine.python_of(), Finding("the rest", "skipped", "there is no worker to be looked at here")]
    settings, trouble = await run_sync(_load, environ)
    found = [verdict, machine.python_of(), *trouble]
    return [*found, *await _looks(settings, environ, about.container, told_settings=not trouble)]


def _load(environ: Mapping[str, str]) -> tuple[Settings, list[Finding]]:
    """With settings that cannot be used the rest is looked at with the defaults. Blocks."""
    try:
        return load(environ), []
    except SettingsError as error:
        detail = f"{error.detail} The rest is looked at as by default"
        fix = error.hint or "put it right in the environment or .env; /docs/settings has all of them"
        kept = {name: environ[name] for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME") if name in environ}
        return load(kept, None), [Finding("settings", "failed", detail, fix)]


async def _looks(
    settings: Settings, environ: Mapping[str, str], container: str, *, told_settings: bool
) -> list[Finding]:
    await run_sync(import_module, ".desktops", __package__)  # Linux's alone
    from . import desktops, kvm, serving

    holder = await run_sync(serving.holder, settings)
    daemon = await serving.find_daemon(settings, holder)
    last = await run_sync(last_start.read, settings.state_dir)
    checkout = await run_sync(serving.in_a_checkout)
    runs = daemon is not None or await run_sync(serving.lock_holder, settings.state_dir / "lock") is not None
    settings, _ = serving.as_the_daemon(settings, daemon)
    if daemon is None:
        settings = serving.as_it_would_start(settings, last, checkout=checkout)
    provider = settings.provider
    here = desktops.Here(settings, daemon, container)
    looks: list[tuple[str, Look]] = [("packages", _thread(machine.packages_of, settings))]
    by_provider: dict[str, Callable[[desktops.Here], Awaitable[list[Finding]]]] = {
        "aws": desktops.aws,
        "docker": desktops.docker,
        "local": desktops.local,
        "qemu": desktops.qemu,
    }
    if provider in by_provider:
        looks.append((f"PROVIDER={provider}", partial(by_provider[provider], here)))
    if provider not in ("docker", "qemu"):
        looks.append(("KVM", _thread(kvm.not_needed, f"PROVIDER={provider}")))
        looks.append(("capacity", partial(desktops.capacity, here)))
    if provider != "docker":
        looks.append(("Docker", _skipped("Docker", f"not needed by PROVIDER={provider}")))
        looks.append(("leftovers", _thread(desktops.leftovers, here)))
    looks += [
        ("evaluators", partial(desktops.evaluators, here)),
        ("state directory", _threads(serving.state_of, settings, daemon)),
        ("port", _thread(serving.port_of, settings, daemon, holder)),
        ("access", _thread(serving.access_of_daemon, settings, environ, daemon)),
        ("clock", _thread(lambda: machine.clock_of(settings, machine.clock_status()))),
    ]
    if daemon is not None:
        looks.append(("ready", partial(serving.daemon_state, daemon, settings)))
    mine = [serving.settings_of(settings, daemon)] if told_settings else []
    return [
        *mine,
        serving.provider_of(settings, daemon),
        *([serving.gone(last, checkout=checkout)] if last is not None and not runs else []),
        *await gather(looks, told=broke, at_once=AT_ONCE, within=WITHIN),
    ]


def _thread(look: Callable[..., Finding], *arguments: object) -> Look:
    async def run() -> list[Finding]:
        return [await run_sync(partial(look, *arguments), abandon_on_cancel=True)]

    return run


def _threads(look: Callable[..., list[Finding]], *arguments: object) -> Look:
    async def run() -> list[Finding]:
        return await run_sync(partial(look, *arguments), abandon_on_cancel=True)

    return run


def _skipped(what: str, why: str) -> Look:
    async def run() -> list[Finding]:
        return [Finding(what, "skipped", why)]

    return run
