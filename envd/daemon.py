"""The supervisor: lock, bind, recover, then the HTTP server and the boot queue as siblings, and the way out.

The order is the point. Nothing is touched before the state directory is locked and the socket is bound, so a second
daemon leaves the first one's desktops alone. If either sibling ends by itself the process ends non-zero: HTTP
without a queue would be a zombie. On the way out the app's own streams are ended *before* hypercorn is told: on
Python 3.12 and later it waits for open connections for ever (traps.md, finding 1).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import structlog
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from .app import create_app
from .errors import AddressInUse, SettingsError, StateDirLocked
from .service import Service, open_service
from .settings import Settings, effective

logger = structlog.get_logger(__name__)

KEEP_ALIVE = 75.0
"""Seconds an idle connection is kept: longer than clients keep theirs (aiohttp: 15), so that a POST never meets a
closing one."""


async def serve(settings: Settings) -> None:
    """Run until a signal, then return. Raises StartError when it cannot start, anything else when one half died."""
    with locked(settings.state_dir) as daemon_id, bound(settings.host, settings.port) as listener:
        async with open_service(settings, daemon_id) as service:
            await _supervise(service, listener)


async def _supervise(service: Service, listener: socket.socket) -> None:
    stop = asyncio.Event()
    closing = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as siblings:
            started = asyncio.Event()
            core = siblings.create_task(service.run(started.set), name="boot queue")
            await _first(started, core)
            url = url_of(listener)
            # The descriptor is hypercorn's from here on; it closes it first of all when it shuts down.
            config = hypercorn_config(f"fd://{listener.detach()}")
            # Starlette and hypercorn each have their own types for one and the same ASGI.
            app = cast(ASGIFramework, create_app(service))
            http = siblings.create_task(hypercorn_serve(app, config, shutdown_trigger=closing.wait), name="http server")
            announce(service, url)
            await _first(stop, core, http)
            logger.info("shutting down")
            await service.drain()
            closing.set()
            core.cancel()
            await asyncio.wait({core, http})
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    logger.info("stopped")


async def _first(event: asyncio.Event, *siblings: asyncio.Task[None]) -> None:
    """Wait for `event`; a sibling that ends before it is an error even if it ended quietly."""
    waiter = asyncio.create_task(event.wait(), name="event")
    try:
        await asyncio.wait({waiter, *siblings}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
    for task in siblings:
        if task.done() and not event.is_set():
            task.result()
            raise RuntimeError(f"the {task.get_name()} ended by itself")


def hypercorn_config(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.graceful_timeout = 1.0
    config.shutdown_timeout = 5.0
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = 1_000_000
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    return config


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(service: Service, url: str) -> None:
    """One line with where it listens, and each setting that is not the default."""
    settings = service.settings
    chosen = {name: entry["value"] for name, entry in effective(settings).items() if entry["origin"] != "default"}
    logger.info(
        "envd is listening",
        url=url,
        provider=service.driver.name,
        envs=len(service.envs),
        state_dir=str(settings.state_dir),
        settings=chosen,
    )
    if not _is_loopback(settings.host):
        logger.warning(
            "anyone who can reach this address can use the desktops: there is no access control yet", url=url
        )


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


@contextmanager
def locked(state_dir: Path) -> Iterator[str]:
    """Hold the state directory for this process; yields the daemon's id, which is kept in it.

    Raises StateDirLocked when another daemon holds it, SettingsError when it cannot be used.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"The state directory {state_dir} cannot be used: {error.strerror}.", hint="Set ENVD_STATE_DIR."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise StateDirLocked(
            f"Another envd (process {holder}) uses {state_dir}.",
            hint="Stop it, or give this one an ENVD_STATE_DIR of its own.",
        ) from error
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield _daemon_id(state_dir)
    finally:
        os.close(handle)


def _daemon_id(state_dir: Path) -> str:
    """Six hex digits, made once for this state directory: they mark the instances that are ours."""
    path = state_dir / "daemon-id"
    if not path.exists():
        path.write_text(secrets.token_hex(3))
    return path.read_text().strip()


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
        try:
            listener.bind(address)
        except PermissionError as error:
            raise SettingsError(f"No permission to listen on {host}:{port}.", hint="Use a port above 1023.") from error
        except OSError as error:
            if error.errno == 98:
                raise AddressInUse(
                    f"Something already listens on {host}:{port}.",
                    hint=f"See what with `ss -ltnp 'sport = :{port}'`, or choose another port with --port.",
                ) from error
            raise SettingsError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
        listener.listen(1024)
        listener.setblocking(False)
        yield listener
    finally:
        listener.close()
