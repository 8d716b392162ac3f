"""The set-up step that puts a desktop's traffic behind a proxy of the daemon's owner (ENVD_PROXY_FILE)."""

from __future__ import annotations

import json
import random
import shlex
import time
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import anyio
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ...errors import GuestMisbehaved, MissingRequirement
from ..task import Parameters
from .chrome import PROXY
from .context import Context, Run

CONFIGURATION = "/tmp/tinyproxy.conf"
LISTEN_SECONDS = 10.0
PAUSE = 0.2
HINT = "Set ENVD_PROXY_FILE to a JSON list of {host, port, username, password, protocol}."

INSTALL = """
command -v tinyproxy >/dev/null && exit 0
printf '%s\\n' "$0" | sudo -S sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y tinyproxy' >&2
"""
EXPORT = """
for name in http_proxy https_proxy HTTP_PROXY HTTPS_PROXY; do echo "export $name=$0" >> ~/.bashrc; done
"""
LISTENS = 'exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$0"'


class Upstream(BaseModel):
    """One proxy that the owner has. What would not be a single word of tinyproxy's configuration is refused."""

    host: str = Field(pattern=r"^[A-Za-z0-9.-]{1,253}$")
    port: int = Field(ge=1, le=65535)
    username: str = Field(default="", pattern=r"^[^\s@\"#]*$")
    password: str = Field(default="", pattern=r"^[^\s@\"#]*$", repr=False)
    protocol: Literal["http", "socks4", "socks5"] = "http"

    def line(self) -> str:
        """tinyproxy.conf(5)."""
        login = f"{self.username}:{self.password}@" if self.username else ""
        return f"Upstream {self.protocol} {login}{self.host}:{self.port}"


async def proxy(context: Context, parameters: Parameters, *, address: str = PROXY) -> str:
    """A tinyproxy in the guest, at `address`, that hands everything on to one of the owner's proxies; chosen at
    random, so that many desktops share them out. Shells and a Chrome that later steps start use it.
    Its password lies in the guest then, where the agent can read it.

    `client_password` is for the guest's sudo. Raises MissingRequirement without a configured proxy.
    """
    upstream = random.choice(await _owned(context))
    port = urlsplit(address).port
    password = str(parameters.get("client_password") or context.settings.client_password)
    await _sh(context, INSTALL, password, doing="install tinyproxy")
    async with anyio.TemporaryDirectory() as folder:
        file = Path(folder, "tinyproxy.conf")
        await anyio.Path(file).write_text(f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\n{upstream.line()}\n")
        await context.guest.upload(CONFIGURATION, file)
    await _sh(context, EXPORT, address, doing="write the shell's proxy")
    await context.guest.launch(["tinyproxy", "-c", CONFIGURATION, "-d"])
    await _listening(context, str(port))
    context.proxied = True
    return ""


async def _owned(context: Context) -> list[Upstream]:
    """The owner's proxies, at least one. Raises MissingRequirement."""
    file = context.settings.proxy_file
    if file is None:
        raise _missing("The task needs a proxy, and none is configured.")
    try:
        proxies = TypeAdapter(list[Upstream]).validate_python(json.loads(await anyio.Path(file).read_bytes()))
    except ValidationError as error:
        at = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _missing(f"{file} cannot be used: {at}: {error.errors()[0]['msg']}.") from None  # it quotes passwords
    except (OSError, ValueError) as error:
        raise _missing(f"{file} cannot be read: {error}.") from error
    if not proxies:
        raise _missing(f"{file} lists no proxy.")
    return proxies


def _missing(detail: str) -> MissingRequirement:
    return MissingRequirement(detail, hint=HINT, errors=[{"field": "proxy", "message": detail}])


async def _sh(context: Context, script: str, argument: str, *, doing: str) -> None:
    done = await context.guest.execute(["sh", "-c", script, argument])
    if done.returncode:
        said = (done.stderr or done.stdout).replace(argument, "…").strip()[-300:]
        raise GuestMisbehaved(f"The guest could not {doing}: it ended with {done.returncode}: {said}")


async def _listening(context: Context, port: str) -> None:
    deadline = time.monotonic() + LISTEN_SECONDS
    while (await context.guest.execute(["bash", "-c", LISTENS, port])).returncode:
        if time.monotonic() > deadline:
            command = shlex.join(["tinyproxy", "-c", CONFIGURATION, "-d"])
            raise GuestMisbehaved(f"`{command}` does not listen on port {port} after {LISTEN_SECONDS:g} s.")
        await anyio.sleep(PAUSE)


STEPS: dict[str, Run] = {"proxy": proxy}
