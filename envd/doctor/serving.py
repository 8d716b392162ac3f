"""What the daemon of this host is run with: settings, state directory, port, who can come in; and the one that runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import SecretStr, ValidationError

from .. import __version__
from ..access import access_of, is_loopback
from ..errors import SettingsError
from ..findings import Finding
from ..journal import ROOM
from ..last_start import LastStart
from ..network import Holder, command_of, holder_of, urls
from ..settings import KNOWN_PROVIDERS, VARIABLES, Settings, effective, own_url
from ..vm.disks import GIB, in_words
from .remote import UNJUDGED, readiness, server_at
from .wire import ask, opened

THE_DAEMON = "the daemon that runs"
"""Origin of a setting that was taken from it."""
THE_LAST = "the daemon that ran last"
MAKE_SERVE = "make serve, which takes local where nothing is chosen"
"""Origins of a provider that nobody chose, where no daemon runs."""
PATIENCE = 2.0
"""Seconds in which a daemon of this host answers, unless it is stuck."""
LITTLE = 2 * GIB
"""Bytes from which on evidence and caches fit for a while."""
_OURS = frozenset({"host", "port", "token", "client_password", "url", "log_level", "log_format"})
"""Settings that are not taken from a daemon that runs: where it was found, secrets, which it does not tell, and what is
a client's own."""

_NOT_COMPARED = _OURS - {"host", "token"} | {"lease"}
"""And the port, at which it was found."""
_ABOUT_ACCESS = {"ENVD_HOST", "ENVD_TOKEN", "ENVD_TOKEN_FILE", "ENVD_ALLOW", "ENVD_INSECURE", "ENVD_TLS_CERT"}
_ONE_OF_TWO = "stop that daemon (envd drain --limit 0), or give this one an ENVD_STATE_DIR and an ENVD_PORT of its own"


@dataclass(frozen=True, slots=True)
class Daemon:
    """An envd that answers on the configured port. `settings` are None where it does not tell us: it wants a token."""

    url: str
    version: str
    provider: str
    started_at: float | None
    settings: Mapping[str, Any] | None
    holder: Holder | None

    def __str__(self) -> str:
        pid = f", process {self.holder.pid}" if self.holder is not None and self.holder.pid else ""
        up = f", up {_lasted(time.time() - self.started_at)}" if self.started_at else ""
        return f"envd {self.version} at {self.url}{pid}{up}"


def _lasted(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


async def find_daemon(settings: Settings, holder: Holder | None) -> Daemon | None:
    """The envd that listens where these settings would have one listen."""
    if not settings.port:
        return None
    where = own_url({"host": settings.host, "port": settings.port}).removeprefix("http://")
    for scheme in ("https", "http") if settings.tls_cert else ("http", "https"):
        url = f"{scheme}://{where}"
        try:
            async with opened(settings.token.get_secret_value().strip(), verify=False) as session:
                health = await ask(session, f"{url}/health", PATIENCE)
                if not health.envd:
                    continue
                version = await ask(session, f"{url}/version", PATIENCE)
        except (aiohttp.ClientError, OSError):
            continue
        told = version.json() if version.status == 200 else {}
        provider, began, has = health.json().get("provider"), told.get("started_at"), told.get("settings")
        # It may be of another version, or mean harm: what is taken from it is of the kind that it should be.
        return Daemon(
            url,
            health.envd,
            provider if provider in KNOWN_PROVIDERS else "",
            began if isinstance(began, int | float) else None,
            {name: one for name, one in has.items() if isinstance(one, dict)} if isinstance(has, dict) else None,
            holder,
        )
    return None


def as_the_daemon(settings: Settings, daemon: Daemon | None) -> tuple[Settings, tuple[str, ...]]:
    """What nothing is said of here is looked at as the daemon that runs has it: a service has a file of settings of its
    own. Returns the names of what was taken, too."""
    if daemon is None:
        return settings, ()
    told = {VARIABLES[name]: entry.get("value") for name, entry in (daemon.settings or {}).items() if name in VARIABLES}
    told.setdefault("provider", daemon.provider or settings.provider)
    mine = settings.model_dump()
    plain = settings.model_dump(mode="json")
    taken = {
        field: value
        for field, value in told.items()
        if field not in _OURS and settings.origins.get(field) == "default" and value != plain[field]
    }
    origins = {**settings.origins, **dict.fromkeys(taken, THE_DAEMON)}
    try:
        return Settings.model_validate({**mine, **taken, "origins": origins}), tuple(taken)
    except ValidationError:  # of a version that has other settings
        return settings, ()


def as_it_would_start(settings: Settings, last: LastStart | None, *, checkout: bool) -> Settings:
    """Where no daemon runs and no provider is chosen: with that of the last one, else with what `make serve` takes in a
    `checkout`."""
    if settings.origins.get("provider") != "default" or not (last or checkout):
        return settings
    provider, origin = (last.provider, THE_LAST) if last else ("local", MAKE_SERVE)
    origins = {**settings.origins, "provider": origin}
    return Settings.model_validate({**settings.model_dump(), "provider": provider, "origins": origins})


def in_a_checkout(folder: Path = Path()) -> bool:
    """Whether `make serve` works here. Blocks."""
    return (folder / "Makefile").is_file() and (folder / "deploy" / "serve.sh").is_file()


def gone(last: LastStart, *, checkout: bool) -> Finding:
    """That no daemon runs, where one did."""
    start = "make serve" if checkout else "envd serve"
    return Finding("daemon", "warning", f"none runs; the last one was {last}", f"{start}; or sudo systemctl start envd")


def differing(settings: Settings, daemon: Daemon | None) -> tuple[str, ...]:
    """Names of settings that are chosen here and are others with the daemon that runs, as far as it tells."""
    if daemon is None or daemon.settings is None:
        return ()
    plain, found = settings.model_dump(mode="json"), []
    for name, field in VARIABLES.items():
        theirs = daemon.settings.get(name)
        if theirs is None or settings.origins.get(field) in ("default", THE_DAEMON) or field in _NOT_COMPARED:
            continue
        mine, has = plain[field], theirs.get("value")
        # Of secrets no more is told than that there are some; and ours was let in.
        if bool(mine) != bool(has) if isinstance(getattr(settings, field), SecretStr) else mine != has:
            found.append(name)
    return tuple(found)


def settings_of(settings: Settings, daemon: Daemon | None) -> Finding:
    """Those that are set, with where. `settings` are those that `as_the_daemon` gives."""
    chosen = [
        f"{name}={_shown(entry['value'])} ({entry['origin']})"
        for name, entry in effective(settings).items()
        if entry["origin"] != "default"
    ]
    detail = ", ".join(chosen) or "all as by default"
    if daemon is not None and daemon.settings is None:
        detail += "; those of the daemon that runs are told to who has a token: ENVD_TOKEN=… envd doctor"
        if settings.token.get_secret_value():
            return Finding("settings", "warning", f"{detail}, and ENVD_TOKEN as it is here is none of its", _ONE_OF_TWO)
    if others := differing(settings, daemon):
        told = f"{detail}; the daemon that runs has others, and is what answers here: {', '.join(others)} differ"
        return Finding(
            "settings", "warning", f"{told}{'s' * (len(others) == 1)}. `envd serve` here is refused", _ONE_OF_TWO
        )
    return Finding("settings", "ok", detail)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def provider_of(settings: Settings, daemon: Daemon | None) -> Finding:
    """Which provider is looked at. `settings` are those that `as_the_daemon` gives."""
    what, mine, origin = "provider", settings.provider, settings.origins.get("provider", "argument")
    if origin == THE_DAEMON:
        return Finding(what, "ok", f"{mine}, as the daemon that runs has it; here nothing is chosen")
    if origin == THE_LAST:
        return Finding(what, "ok", f"{mine}, as the daemon that ran last had it; here nothing is chosen")
    if origin == MAKE_SERVE:
        words = f"{mine}, which `make serve` takes where nothing is chosen; `envd serve` takes docker"
        return Finding(what, "ok", words)
    if daemon is not None and daemon.provider and daemon.provider != mine:
        return Finding(
            what,
            "warning",
            f"{mine}, by {origin}; the daemon that runs has {daemon.provider}",
            f"restart it to have it take {mine}, or PROVIDER={daemon.provider} envd doctor",
        )
    hint = "; make serve takes local where nothing is chosen" if origin == "default" and daemon is None else ""
    return Finding(what, "ok", f"{mine}, by {origin}{hint}")


def port_of(settings: Settings, daemon: Daemon | None, holder: Holder | None) -> Finding:
    """Free, ours, or whose. Blocks."""
    port, what = settings.port, f"port {settings.port}"
    if not port:
        return Finding("port", "ok", "0: a free one is taken at each start")
    if daemon is not None:
        same = (
            "" if daemon.version == __version__ else f"; this command is {__version__}: restart it to have it take that"
        )
        return Finding(
            what, "ok" if not same else "warning", f"{daemon}{same}", "sudo systemctl restart envd" if same else ""
        )
    if holder is not None and holder.is_envd:
        return Finding(
            what,
            "failed",
            f"an envd has it, {holder}, and does not answer within {PATIENCE:g} s",
            f"journalctl -u envd -n 50; then kill {holder.pid}, and start it again",
        )
    if holder is not None:
        stop = f"kill {holder.pid}; or " if holder.pid else f"sudo ss -ltnp 'sport = :{port}' says who; "
        return Finding(what, "failed", f"another program listens on it: {holder}", f"{stop}ENVD_PORT=another port")
    trouble = bindable(settings.host, port)
    if trouble is None:
        return Finding(what, "ok", "free; no daemon runs on it")
    if trouble.errno == errno.EACCES:
        return Finding(what, "failed", "this user may not listen on it", "ENVD_PORT=15001, or any above 1023")
    if trouble.errno == errno.EADDRINUSE:
        fix = f"sudo ss -ltnp 'sport = :{port}'; or ENVD_PORT=another port"
        return Finding(what, "failed", "taken, by a process that is not seen from here", fix)
    return Finding(
        what, "failed", f"ENVD_HOST={settings.host} cannot be listened on: {trouble.strerror}", "ENVD_HOST=127.0.0.1"
    )


def bindable(host: str, port: int) -> OSError | None:
    """What keeps a daemon from the port, if anything does. Listens on nothing."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        return error
    return None


def access_of_daemon(settings: Settings, environ: Mapping[str, str], daemon: Daemon | None = None) -> Finding:
    """Who reaches the daemon, and who of them may use it: the one that runs, if it tells. Blocks."""
    what = "access"
    if daemon is not None and daemon.settings is not None:
        told = _told_access(daemon.settings)
        if not set(differing(settings, daemon)) & _ABOUT_ACCESS:
            return told
        # The line about settings says what is chosen here: this one must not seem to be about that.
        return replace(told, detail=f"of the daemon that runs, not by these settings: {told.detail}")
    try:
        access = access_of(settings, environ)
    except SettingsError as error:
        return Finding(what, "failed", error.detail.rstrip("."), error.hint)
    tokens = f"{len(access.tokens)} token{'s' * (len(access.tokens) != 1)}" if access.tokens else ""
    tls, allowed = settings.tls_cert is not None, [str(network) for network in access.allowed]
    return _access(settings.host, settings.port, tokens, allowed, insecure=settings.insecure, tls=tls)


def _told_access(told: Mapping[str, Any]) -> Finding:
    """By what a daemon tells of its settings."""

    def value(name: str) -> Any:
        return (told.get(name) or {}).get("value")

    tokens = ["ENVD_TOKEN"] if value("ENVD_TOKEN") else []
    tokens += ["the tokens of ENVD_TOKEN_FILE"] if value("ENVD_TOKEN_FILE") else []
    host, port, allowed = str(value("ENVD_HOST") or ""), int(value("ENVD_PORT") or 0), value("ENVD_ALLOW") or []
    insecure, tls = bool(value("ENVD_INSECURE")), bool(value("ENVD_TLS_CERT"))
    if not (tokens or allowed or insecure or is_loopback(host)):
        tokens = ["the tokens of its service's credentials"]  # without any it would not have started
    return _access(host, port, " and ".join(tokens), allowed, insecure=insecure, tls=tls)


def _access(host: str, port: int, tokens: str, allowed: Sequence[str], *, insecure: bool, tls: bool) -> Finding:
    what = "access"
    networks = f"no token wanted from {', '.join(allowed)}" if allowed else ""
    who = ", ".join(filter(None, (tokens, networks))) or "no token"
    if is_loopback(host):
        missing = "ENVD_HOST=0.0.0.0" + ("" if tokens or allowed else " and ENVD_TOKEN")
        return Finding(what, "ok", f"ENVD_HOST={host}: this host alone, {who}. For others: {missing}")
    reached = ", ".join(urls(host, port, "https" if tls else "http"))
    if insecure:
        return Finding(
            what,
            "warning",
            f"ENVD_INSECURE: whoever reaches {reached} may run programs on its desktops",
            "ENVD_TOKEN=$(openssl rand -hex 32) instead of ENVD_INSECURE=1",
        )
    return Finding(what, "ok", f"{reached}; {who}{'' if tls else '; without TLS, so for a network of yours'}")


def state_of(settings: Settings, daemon: Daemon | None) -> list[Finding]:
    """The state directory, and the disk it is on. Blocks."""
    what, directory = "state directory", settings.state_dir
    if settings.origins.get("state_dir") == THE_DAEMON:
        # Of another user, perhaps, who alone may look into it.
        told = Finding(what, "ok", f"{directory}, of the daemon that runs")
        try:
            return [told, disk_of(directory, shutil.disk_usage(directory))]
        except OSError as error:
            return [told, Finding("disk", "unknown", f"{directory} cannot be looked at: {error.strerror}")]
    there = next((path for path in (directory, *directory.absolute().parents) if path.exists()), Path("/"))
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        with tempfile.NamedTemporaryFile(dir=there, prefix=".envd-doctor-"):
            pass
    except OSError as error:
        fix = f"sudo chown -R $USER {there}; or ENVD_STATE_DIR=a folder of yours"
        return [Finding(what, "failed", f"{directory} cannot be written to: {error.strerror}", fix)]
    pid = lock_holder(directory / "lock")
    used = Finding(what, "ok", f"{directory}{'' if there == directory else ', which the first start makes'}")
    if pid is not None:
        ours = daemon is not None and daemon.holder is not None and daemon.holder.pid in (pid, None)
        if ours or (daemon is not None and daemon.holder is None):
            used = Finding(what, "ok", f"{directory}, of the daemon that runs (process {pid})")
        else:
            used = Finding(
                what,
                "warning",
                f"{directory} is of a daemon that runs elsewhere than port {settings.port}: process {pid} "
                f"({command_of(pid)}); another cannot start with it",
                "ENVD_PORT=its port envd doctor; or ENVD_STATE_DIR=another folder for another daemon",
            )
    return [used, disk_of(there, shutil.disk_usage(there))]


def disk_of(directory: Path, usage: Any) -> Finding:
    """`usage` is what shutil.disk_usage tells."""
    floor = min(ROOM, usage.total // 50)
    told = f"{in_words(usage.free)} of {in_words(usage.total)} free at {directory}"
    if usage.free < floor:
        return Finding(
            "disk",
            "failed",
            f"{told}, and {in_words(floor)} must be: no new work is taken",
            f"du -xh --max-depth=2 {directory} | sort -h | tail; or ENVD_STATE_DIR on a larger disk",
        )
    if usage.free < min(LITTLE, usage.total // 20):
        return Finding(
            "disk",
            "warning",
            f"{told}: evidence and caches of tasks fill that soon",
            "ENVD_BUNDLES, ENVD_ASSET_LIMIT and ENVD_JOURNAL_LIMIT say how much they take; or a larger disk",
        )
    return Finding("disk", "ok", f"{told}; new work is taken down to {in_words(floor)}")


def lock_holder(lock: Path, proc: Path = Path("/proc")) -> int | None:
    """The process that has this file locked. The lock is not tried: a daemon that starts meanwhile would find it
    taken. Blocks."""
    try:
        status = lock.stat()
        lines = (proc / "locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        match = re.search(r"FLOCK\s+ADVISORY\s+WRITE\s+(\d+)\s+([0-9a-f]+):([0-9a-f]+):(\d+)", line)
        if match is None or int(match[4]) != status.st_ino:
            continue
        if (int(match[2], 16), int(match[3], 16)) == (os.major(status.st_dev), os.minor(status.st_dev)):
            return int(match[1])
    return None


async def daemon_state(daemon: Daemon, settings: Settings) -> list[Finding]:
    """Whether the one that runs serves resets now."""
    server = server_at(daemon.url, "")
    async with opened(settings.token.get_secret_value().strip(), verify=False) as session:
        found = await readiness(session, server)
    # Of evaluators a line of their own tells.
    return [one for one in found if UNJUDGED not in one.detail]


def holder(settings: Settings) -> Holder | None:
    """Who listens where these settings would have a daemon listen. Blocks."""
    if not settings.port:
        return None
    try:
        address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None
    return holder_of(settings.port, str(address))
