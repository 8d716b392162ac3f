"""`python -m envd.agent --host HOST --port PORT`: serve the desktop that DISPLAY names, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys

_CLOSE_SECONDS = 2
_CERTIFICATES = {"SSL_CERT_FILE": "/dev/null", "SSL_CERT_DIR": "/dev/null"}


def main() -> None:
    # Nothing that is made while everything is imported is garbage; looking for some costs a tenth of the start.
    gc.disable()
    parser = argparse.ArgumentParser(prog="python -m envd.agent", description="OSWorld-compatible guest server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000, help="0 lets the kernel choose; the port is printed")
    parser.add_argument("--fd", type=int, help="serve on this inherited socket, which listens already, instead")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(options.host, options.port, options.fd))


async def _serve(host: str, port: int, fd: int | None) -> None:
    _import_aiohttp()
    from aiohttp import web

    from envd.agent.app import AGENT, create_app, runner_of

    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    app = create_app()
    runner = runner_of(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port) if fd is None else web.SockSite(runner, socket.socket(fileno=fd))
        await site.start()
    except OSError as error:
        app[AGENT].kill()
        sys.exit(f"cannot listen on {host}:{port}: {error.strerror}; is another agent running there?")
    sys.stdout.write(f"envd-agent listening on http://{host}:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    gc.enable()
    gc.freeze()
    await ended.wait()
    app[AGENT].kill()
    # No waiting for handlers, threads or clients: a desktop is being taken down, and nothing here needs saving.
    os._exit(0)


def _import_aiohttp() -> None:
    """Import aiohttp without the 0.1 s in which it reads every certificate of the system.

    It makes its default TLS context when it is imported. We have one use for TLS, which makes its own (`files.py`).
    """
    before = {name: os.environ.get(name) for name in _CERTIFICATES}
    os.environ.update(_CERTIFICATES)
    try:
        import aiohttp.web  # noqa: F401 - imported for its effect
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main()
