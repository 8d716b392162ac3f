"""The supervisor: lock, bind, recover, then the HTTP server and the boot queue as siblings, and the way out.

The order is the point. Nothing is touched before the state directory is locked and the socket is bound, so a second
daemon leaves the first one's desktops alone. If either sibling ends by itself the process ends non-zero: HTTP
without a queue would be a zombie. On the way out the app's own streams are ended *before* hypercorn is told: on
Python 3.12 and later it waits for open connections for ever.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import resource
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import structlog
from anyio.to_thread import run_sync
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from . import __version__, last_start, log
from .access import Access, is_loopback
from .app import create_app
from .errors import AddressInUse, SettingsError, StateDirLocked
from .last_start import LastStart
from .network import Holder, holder_of, urls
from .service import Service, open_service
from .settings import Settings, effective
from .systemd import Notifier

logger = structlog.get_logger(__name__)

KEEP_ALIVE = 20.0
"""Seconds an idle connection is kept: longer than clients keep theirs (aiohttp: 15), so that a POST never meets a
closing one."""


BACKLOG = 1024
"""Connections that the kernel holds until they are accepted: a cluster's trainers all come at once."""
HANG_UP = 1.0
"""Seconds after the drain until connections are cut that are open still: hypercorn would wait for a reader that does
not read, or for the rest of a request, as long as they please."""
LAST = 30.0
"""Seconds that the end of the daemon takes at most once nothing is played any more."""
OPEN_FILES = 65_536


async def serve(settings: Settings) -> None:
    """Run until a signal, then return. Raises StartError when it cannot start, anything else when one half died."""
    allow_open_files(OPEN_FILES)
    with locked(settings.state_dir), bound(settings.host, settings.port) as listener:
        async with open_service(settings, daemon_id(settings.state_dir)) as service:
            await run_sync(leave_word, settings, url_of(listener, "https" if settings.tls_cert else "http"))
            await _supervise(service, listener)


def leave_word(settings: Settings, url: str) -> None:
    """Of this start, for `envd doctor` once the daemon is gone. It is no reason not to start. Blocks."""
    try:
        last_start.write(
            settings.state_dir, LastStart(settings.provider, __version__, url, os.getpid(), round(time.time(), 3))
        )
    except OSError as error:
        logger.warning("who runs here could not be written down", file=last_start.FILE, error=str(error))


async def _supervise(service: Service, listener: socket.socket) -> None:
    stop, started, closing, at_once = asyncio.Event(), asyncio.Event(), asyncio.Event(), anyio.Event()
    _hear_signals(stop, at_once)
    # Not by a signal: the first one that comes after it is the first.
    service.on_drain = stop.set
    manager = Notifier(os.environ)
    fed = asyncio.create_task(manager.feed(lambda: not started.is_set() or service.queue.pulse.alive), name="watchdog")
    core = asyncio.create_task(service.run(started.set), name="boot queue")
    halves = [core]
    port = listener.getsockname()[1]
    try:
        if await _first(started, stop, halves) is started:
            halves.append(_serve_http(service, listener, closing))
            count = len(service.envs)
            manager.tell(READY="1", STATUS=f"serving {count} env{'s' * (count != 1)} on port {port}")
            await _first(stop, stop, halves)
        logger.info("shutting down")
        left = max(0.0, (service.drain_until or time.monotonic()) - time.monotonic()) or service.settings.drain_limit
        # What is played may go on for so long; else the manager kills us before.
        manager.tell(STOPPING="1", STATUS="shutting down", EXTEND_TIMEOUT_USEC=str(int((left + LAST) * 1e6)))
        await service.drain(at_once)
    finally:
        # Also when a half died: nothing that is open may hold the other one up.
        service.draining.set()
        service.events.close()
        closing.set()
        core.cancel()
        fed.cancel()
        await asyncio.wait(halves, timeout=HANG_UP)
        hang_up({port})
        await asyncio.wait([*halves, fed])
    for half in halves:
        if not half.cancelled():
            half.result()
    logger.info("stopped")


def _hear_signals(stop: asyncio.Event, at_once: anyio.Event) -> None:
    """The first one ends the daemon, a second one the waiting that this begins with. Heard until the loop is closed, so
    that none cuts short how it cleans up behind itself."""
    loop = asyncio.get_running_loop()

    heard = False

    def hear() -> None:
        nonlocal heard
        if heard:
            at_once.set()
        heard = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Under nohup a hangup is to be ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, hear)


def _serve_http(service: Service, listener: socket.socket, closing: asyncio.Event) -> asyncio.Task[None]:
    settings = service.settings
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    url = url_of(listener, scheme)
    # The descriptor is hypercorn's from here on; it closes it first of all when it shuts down.
    config = hypercorn_config(f"fd://{listener.detach()}", settings)
    # Starlette and hypercorn each have their own types for one and the same ASGI.
    app = cast(ASGIFramework, create_app(service))
    serving = hypercorn_serve(app, config, shutdown_trigger=closing.wait)
    http = asyncio.create_task(serving, name="http server")
    announce(service, url, urls(host, port, scheme))
    return http


def hang_up(ports: set[int]) -> None:
    """Cut every TCP connection that this process has accepted on one of `ports`, whatever state it is in.

    The kernel does it: neither hypercorn nor asyncio gives its connections away before Python 3.13.
    """
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] in ports:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The listing's own descriptor, or a connection that is gone already.
            continue


async def _first(wanted: asyncio.Event, stop: asyncio.Event, halves: list[asyncio.Task[None]]) -> asyncio.Event:
    """Wait for `wanted` or `stop`, and say which; a half that ends before them is an error even if it ended
    quietly."""
    waiters = [asyncio.create_task(event.wait()) for event in (wanted, stop)]
    try:
        await asyncio.wait({*waiters, *halves}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()
    for half in halves:
        if half.done():
            half.result()
            raise RuntimeError(f"the {half.get_name()} ended by itself")
    return stop if stop.is_set() else wanted


def hypercorn_config(bind: str, settings: Settings) -> Config:
    config = Config()
    config.bind = [bind]
    if settings.tls_cert is not None and settings.tls_key is not None:
        config.certfile, config.keyfile = str(settings.tls_cert), str(settings.tls_key)
        # Its HTTP/2 holds no sender back.
        config.alpn_protocols = ["http/1.1"]
    config.backlog = BACKLOG
    # Not its own way to cut connections, which is to cancel their tasks, but `hang_up`.
    config.graceful_timeout = 2 * HANG_UP
    config.shutdown_timeout = 5.0
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = 1_000_000
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    return config


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(service: Service, url: str, reached_at: Sequence[str]) -> None:
    """One line with where it listens, every URL at which that is, and each setting that is not the default; and what
    is missing for other hosts to come, where they cannot. On a terminal the URLs are told once more, to be read."""
    settings = service.settings
    chosen = {name: entry["value"] for name, entry in effective(settings).items() if entry["origin"] != "default"}
    logger.info(
        "envd is listening",
        url=url,
        urls=list(reached_at),
        dashboard=f"{reached_at[0]}/",
        provider=service.driver.name,
        envs=len(service.envs),
        state_dir=str(settings.state_dir),
        settings=chosen,
    )
    closed = not reached_by_others(url)
    if log.for_people(settings.log_format):
        logger.info(welcome(reached_at, for_others(service.access) if closed else ""))
    elif closed:
        logger.info("only this host reaches the daemon", fix=for_others(service.access))
    if settings.insecure:
        logger.warning("ENVD_INSECURE: whoever reaches this address can use the desktops", url=url)


def reached_by_others(url: str) -> bool:
    """Whether what listens at `url` is reached from other hosts, as far as this one decides it."""
    return not is_loopback(urlsplit(url).hostname or "")


def for_others(access: Access) -> str:
    """What a daemon on the loopback is to be started with for other hosts to reach it, as settings."""
    told = access.tokens or access.allowed or access.open
    return f"ENVD_HOST=0.0.0.0{'' if told else ' ENVD_TOKEN=$(openssl rand -hex 32)'}"


def welcome(reached_at: Sequence[str], missing: str) -> str:
    """What a person reads at the start. `missing` is what `for_others` says, where others cannot come."""
    lines = ["envd is ready to be used:"]
    lines += [f"    {url}/{'' if reached_by_others(url) else '   from this host'}" for url in reached_at]
    lines.append("The dashboard is there in a browser, and trainers take the same URL.")
    if missing:
        lines.append(f"Only this host reaches it. For others start it with {missing}")
    lines.append(f"When something is wrong: {command_here()} doctor")
    return "\n".join(lines)


def command_here() -> str:
    """How a person in this folder calls the command that belongs to this interpreter."""
    if os.environ.get("VIRTUAL_ENV") == sys.prefix or sys.prefix == sys.base_prefix:
        return "envd"
    within = sys.prefix.removeprefix(f"{os.getcwd()}/")
    return f"{within}/bin/envd"


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Hold the state directory for this process; the kernel lets go of it whatever becomes of the process.

    Raises StateDirLocked when another daemon holds it, SettingsError when it cannot be used.
    """
    with _usable(state_dir):
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _usable(state_dir):
            _take(handle, state_dir)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _take(handle: int, state_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        raise StateDirLocked(
            f"Another envd (process {holder}) uses {state_dir}.",
            hint="Stop it, or give this one an ENVD_STATE_DIR of its own.",
        ) from error


def daemon_id(state_dir: Path) -> str:
    """Six hex digits, made once for this state directory: they mark the instances that are ours.

    Never anything else, whatever the file holds: with less in it, instances of others would look like ours.
    """
    path = state_dir / "daemon-id"
    with _usable(state_dir):
        kept = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
        if re.fullmatch(r"[0-9a-f]{6}", kept):
            return kept
        if path.exists():
            logger.warning("the daemon's id was not readable; a new one was made", file=str(path))
        made = secrets.token_hex(3)
        fresh = path.with_suffix(".new")
        fresh.write_text(f"{made}\n")
        fresh.replace(path)
    return made


@contextmanager
def _usable(state_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"The state directory {state_dir} cannot be used: {error.strerror}.", hint="Set ENVD_STATE_DIR."
        ) from error


def allow_open_files(wanted: int) -> None:
    """Raise the soft limit of open files as far as the hard one lets us: every watcher is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def address_in_use(host: str, port: int, holder: Holder | None) -> AddressInUse:
    """The error that names who listens there, as far as that is seen."""
    another = "choose another port with ENVD_PORT or --port"
    if holder is None or holder.pid is None:
        return AddressInUse(
            f"Something already listens on {host}:{port}.",
            hint=f"`sudo ss -ltnp 'sport = :{port}'` says what; or {another}.",
        )
    facts: dict[str, Any] = {"pid": holder.pid, "command": holder.command, "is_envd": holder.is_envd}
    if holder.is_envd:
        return AddressInUse(
            f"Another envd already listens on {host}:{port}: {holder}.",
            hint=f"Use that one, or stop it (kill {holder.pid}), or {another}.",
            **facts,
        )
    return AddressInUse(
        f"Another program already listens on {host}:{port}: {holder}.",
        hint=f"Stop it (kill {holder.pid}), or {another}.",
        **facts,
    )


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises AddressInUse, or SettingsError for an address this machine does not have."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise SettingsError(f"ENVD_HOST={host} cannot be resolved: {error.strerror}.") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections have this of the listener: who looks on at a desktop and is gone without a word is noticed.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        try:
            listener.bind(address)
            # Two that bind at the same moment both may; only one of them may listen.
            listener.listen(BACKLOG)
        except PermissionError as error:
            raise SettingsError(f"No permission to listen on {host}:{port}.", hint="Use a port above 1023.") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise address_in_use(host, port, holder_of(port, str(address[0]))) from error
            raise SettingsError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
        listener.setblocking(False)
        yield listener
    finally:
        listener.close()
