"""What the daemon of this host is run with: settings, state directory, port, who can come in; and the one that runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from .. import __version__
from ..access import access_of, is_loopback
from ..errors import SettingsError
from ..findings import Finding
from ..network import Holder, command_of, holder_of, urls
from ..settings import Settings, effective
from ..vm.disks import GIB, in_words
from .remote import readiness, server_at
from .wire import ask, opened

PATIENCE = 2.0
"""Seconds in which a daemon of this host answers, unless it is stuck."""
FLOOR = 64 * 1024**2
"""Bytes below which no new work is taken (`journal.py`)."""
LITTLE = 2 * GIB
"""Bytes from which on evidence and caches fit for a while."""
_THEIRS = frozenset({"PROVIDER", "ENVD_URL", "ENVD_LOG_LEVEL", "ENVD_LOG_FORMAT"})
"""Settings that may well differ between a daemon and who looks at it."""


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
    host = settings.host
    if host in ("0.0.0.0", "", "localhost"):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    where = f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
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
        return Daemon(
            url,
            health.envd,
            str(health.json().get("provider", "")),
            told.get("started_at"),
            told.get("settings"),
            holder,
        )
    return None


def settings_of(settings: Settings, daemon: Daemon | None) -> Finding:
    """Those that are set, with where; and where the daemon that runs has others."""
    mine = effective(settings)
    chosen = [
        f"{name}={_shown(entry['value'])} ({entry['origin']})"
        for name, entry in mine.items()
        if entry["origin"] != "default"
    ]
    detail = f"{', '.join(chosen) or 'all as by default'}"
    if daemon is not None and daemon.settings is not None:
        others = [
            f"{name}={_shown(entry.get('value'))}"
            for name, entry in daemon.settings.items()
            if name in mine and name not in _THEIRS and entry.get("value") != mine[name]["value"]
        ]
        if others:
            detail += f"; the daemon that runs has {', '.join(others)}"
    return Finding("settings", "ok", detail)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def provider_of(settings: Settings, daemon: Daemon | None) -> tuple[str, Finding]:
    """Which provider is looked at: the one that was chosen, else that of the daemon that runs."""
    mine, what = settings.provider, "provider"
    chosen = settings.origins.get("provider", "argument") != "default"
    origin = settings.origins.get("provider", "argument")
    if daemon is None or not daemon.provider or daemon.provider == mine:
        running = " the daemon that runs has it, too" if daemon is not None and daemon.provider else ""
        by = f"{mine}, {f'by {origin}' if chosen else 'by default'};{running}" if running else f"{mine}, by {origin}"
        hint = "" if chosen or daemon is not None else "; make serve takes local where nothing is chosen"
        return mine, Finding(what, "ok", f"{by}{hint}")
    if not chosen:
        detail = f"{daemon.provider}, as the daemon that runs has it; here nothing is chosen, which is {mine}"
        return daemon.provider, Finding(what, "ok", detail)
    return mine, Finding(
        what,
        "warning",
        f"{mine}, by {origin}; the daemon that runs has {daemon.provider}",
        f"restart it to have it take {mine}, or PROVIDER={daemon.provider} envd doctor",
    )


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
    trouble = _bindable(settings.host, port)
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


def _bindable(host: str, port: int) -> OSError | None:
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


def access_of_daemon(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Who reaches the daemon, and who of them may use it. Blocks."""
    what = "access"
    try:
        access = access_of(settings, environ)
    except SettingsError as error:
        return Finding(what, "failed", error.detail.rstrip("."), error.hint)
    tokens = f"{len(access.tokens)} token{'s' * (len(access.tokens) != 1)}" if access.tokens else ""
    networks = f"no token wanted from {', '.join(map(str, access.allowed))}" if access.allowed else ""
    who = ", ".join(filter(None, (tokens, networks))) or "no token"
    if is_loopback(settings.host):
        missing = "ENVD_HOST=0.0.0.0" + ("" if access.tokens or access.allowed else " and ENVD_TOKEN")
        return Finding(what, "ok", f"ENVD_HOST={settings.host}: this host alone, {who}. For others: {missing}")
    scheme = "https" if settings.tls_cert else "http"
    reached = ", ".join(urls(settings.host, settings.port, scheme))
    if settings.insecure:
        return Finding(
            what,
            "warning",
            f"ENVD_INSECURE: whoever reaches {reached} may run programs on its desktops",
            "ENVD_TOKEN=$(openssl rand -hex 32) instead of ENVD_INSECURE=1",
        )
    return Finding(
        what, "ok", f"{reached}; {who}{'' if settings.tls_cert else '; without TLS, so for a network of yours'}"
    )


def state_of(settings: Settings, daemon: Daemon | None) -> list[Finding]:
    """The state directory, and the disk it is on. Blocks."""
    what, directory = "state directory", settings.state_dir
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
    floor = min(FLOOR, usage.total // 50)
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
        return await readiness(session, server)


def holder(settings: Settings) -> Holder | None:
    """Who listens where these settings would have a daemon listen. Blocks."""
    if not settings.port:
        return None
    try:
        address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None
    return holder_of(settings.port, str(address))
