"""The Docker engine of this host: one client for short calls, one more for each stream, and every refusal as a typed
error.

What of aiodocker 0.27 this is built around: a timeout given as an int is ignored, and some calls have none at all, so
`asking` holds the clock; a stream that is left early keeps its connection until its client is closed; a connection kept
across a restart of the engine fails the next call, so none is kept (a connection to the socket costs 0.1 ms).
"""

from __future__ import annotations

import getpass
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio
import anyio.to_thread
from aiodocker import Docker
from aiodocker.exceptions import DockerError

from ...errors import (
    BootFailed,
    DiskUnusable,
    DockerUnavailable,
    ImageMissing,
    MissingDependency,
    NoSpace,
    PortConflict,
    SettingsError,
    StartError,
)

OLDEST_API = (1, 40)
"""Docker 19.03, of 2019."""
ANSWER = 20.0
"""Seconds in which the engine answers what costs it nothing, also on a host whose processors are all busy."""
CONNECTION_FAILED = 900
"""aiodocker's status of an engine that was not reached."""

_PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin"
"""Where dockerd would be: not always on an ordinary user's PATH."""

_HINTS = {
    "not_installed": "On Debian `deploy/docker-engine.sh` installs and starts it; for other systems see "
    "docs.docker.com/engine/install. Without Docker, PROVIDER=qemu runs the same virtual machines.",
    "not_running": "Start it: `sudo systemctl start docker`, or `deploy/docker-engine.sh` where there is no systemd. "
    "If its socket is somewhere else, set DOCKER_HOST.",
    "no_permission": "Let this user use it, `sudo usermod -aG docker {user}`, and log in again.",
    "no_answer": "It hangs or is overloaded: `journalctl -u docker` has its log.",
}


@dataclass(frozen=True, slots=True)
class About:
    """What an engine says of itself. `root` is the directory of its host that holds containers and images."""

    version: str
    api: str
    root: Path
    cpus: int
    rootless: bool
    remapped: bool
    """Users in containers are mapped to others of this host."""


class Engine:
    """Open with `async with`, which raises DockerUnavailable when the engine cannot be used."""

    about: About

    def __init__(self, host: str) -> None:
        """`host` is unix:///path/of/the.sock. Raises SettingsError for any other kind."""
        scheme, _, path = host.partition("://")
        if scheme != "unix" or not path.startswith("/"):
            raise SettingsError(
                f"DOCKER_HOST={host}: this is not the socket of an engine of this host.",
                hint="Give it as unix:///var/run/docker.sock: desktops answer on the engine's own 127.0.0.1, and their "
                "disks are files of its host. For another machine, run envd there.",
            )
        self.socket = Path(path)
        self._api = "auto"
        self._client: Docker | None = None

    async def __aenter__(self) -> Self:
        self._client = self._connect()
        try:
            async with self.asking("tell its version") as docker:
                version, info = await docker.version(), await docker.system.info()
        except BaseException:
            await self._close()
            raise
        self._api = docker.api_version
        options = info.get("SecurityOptions") or []
        self.about = About(
            version=str(version.get("Version")),
            api=str(version.get("ApiVersion")),
            root=Path(info.get("DockerRootDir") or "/var/lib/docker"),
            cpus=int(info.get("NCPU") or 1),
            rootless=any("name=rootless" in option for option in options),
            remapped=any("name=userns" in option for option in options),
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    @asynccontextmanager
    async def asking(self, what: str, within: float | None = None) -> AsyncIterator[Docker]:
        """A client for one call, or a few, that take no longer than `within` seconds together (`ANSWER`).

        Raises BootFailed for what the engine refuses, as DockerUnavailable, ImageMissing, PortConflict, NoSpace or
        DiskUnusable where it is one of these. `what` completes "The Docker engine was to …".
        """
        assert self._client is not None
        within = ANSWER if within is None else within
        try:
            with anyio.fail_after(within):
                yield self._client
        except DockerError as error:
            raise await self._explained(what, error) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _unavailable("not_running", self.socket, f"it hung up when it was to {what}") from error
        except TimeoutError as error:
            raise _unavailable("no_answer", self.socket, f"it was to {what} and did not within {within:g} s") from error

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Docker]:
        """A client for one answer that goes on and on. Its connection ends with it."""
        client = self._connect()
        try:
            yield client
        finally:
            with anyio.CancelScope(shield=True):
                await _close(client)

    def _connect(self) -> Docker:
        connector = aiohttp.UnixConnector(str(self.socket), limit=0, force_close=True)
        # The url is explicit, or ~/.docker/config.json would choose; given a connector, it is only part of addresses.
        timeout = aiohttp.ClientTimeout(sock_connect=ANSWER)
        return Docker(url="unix://localhost", connector=connector, timeout=timeout, api_version=self._api)

    async def _close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            with anyio.CancelScope(shield=True):
                await _close(client)

    async def _explained(self, what: str, error: DockerError) -> BootFailed:
        if error.status != CONNECTION_FAILED:
            return refusal(what, error.message, error.status)
        cause = getattr(error.__context__, "os_error", None)
        if isinstance(cause, PermissionError):
            return _unavailable("no_permission", self.socket, "this user may not connect to it")
        if isinstance(cause, FileNotFoundError) and not await anyio.to_thread.run_sync(_installed):
            return _unavailable("not_installed", self.socket, "there is no such socket, and no program dockerd")
        return _unavailable("not_running", self.socket, f"{cause or 'it hung up'}")


def refusal(what: str, message: str, status: int = 0) -> BootFailed:
    """What the engine answered, by the words it uses (engines 20.10 to 28)."""
    message = message.strip()[:1000]
    lower = message.lower()
    if "no such image" in lower:
        return ImageMissing(f"The Docker engine was to {what}: {message}.", image="")
    if "port is already allocated" in lower or "address already in use" in lower:
        return PortConflict(
            f"The Docker engine was to {what}: {message}.",
            hint="Something on this host takes ports of the range that Docker chooses from "
            "(/proc/sys/net/ipv4/ip_local_port_range); `ss -ltnp` shows what.",
        )
    if "no space left on device" in lower or "disk quota exceeded" in lower:
        return NoSpace(
            f"The Docker engine was to {what}: {message}.",
            hint="`docker system df` shows what takes space there.",
            needed_bytes=None,
            free_bytes=0,
            where="",
        )
    if "bind source path does not exist" in lower:
        path = message.rpartition(":")[2].strip()
        return DiskUnusable(
            f"The Docker engine does not see {path}.",
            hint="If envd itself runs in a container, the path must be the same on the engine's host.",
            disk=path,
            cause="absent",
        )
    return BootFailed(f"The Docker engine was to {what} and refused ({status}): {message}.", http_status=status)


def is_absent(error: BootFailed) -> bool:
    """Whether the engine answered that there is no such container."""
    return error.facts.get("http_status") == 404


def start_error(error: BootFailed) -> StartError:
    """The same, as what keeps the daemon from starting."""
    kind = MissingDependency if error.facts.get("cause") == "not_installed" else StartError
    return kind(error.detail, hint=error.hint, **error.facts)


def api_version(about: About) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in about.api.split("."))


def _unavailable(cause: str, socket: Path, why: str) -> DockerUnavailable:
    words = {
        "not_installed": "Docker is not installed",
        "not_running": "The Docker engine does not run",
        "no_permission": "The Docker engine may not be used",
        "no_answer": "The Docker engine does not answer",
    }
    hint = _HINTS[cause].format(user=_user())
    return DockerUnavailable(f"{words[cause]}: {socket}: {why}.", hint=hint, cause=cause)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "$USER"


def _installed() -> bool:
    return any(shutil.which(name, path=_PROGRAMS) for name in ("dockerd", "docker"))


async def _close(client: Docker) -> None:
    connector: Any = client.connector  # it is ours, since we gave it, and closing is ours too
    await client.close()
    await connector.close()
