"""Images: what one is, is it here, and pulling one, which a person or the start asks for, never a reset."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import aiohttp
import anyio
from aiodocker.exceptions import DockerError

from ...errors import BootFailed, ImageMissing, InfraError, NoSpace
from .engine import Engine, is_absent, refusal
from .recipes import KIND

PUBLISHED = "happysixd/osworld-docker"
"""OSWorld's own image, which needs a disk mounted at /System.qcow2."""
OURS = "envd/"
"""Names that begin so are those of `make images`."""
STALLED = 180.0
"""Seconds without news after which a pull has failed."""

Kind = Literal["desktop", "qemu", "foreign"]


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here. `id` is sha256:…; `size` in bytes; `created` in Unix seconds."""

    name: str
    id: str
    kind: Kind
    size: int
    created: float
    digest: str = ""
    """Of the registry that it was pulled from."""

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:19] or self.id[:19]}"


@dataclass(frozen=True, slots=True)
class Pulling:
    """How far a pull is. `layers`: id → bytes that are here and in all, of those whose size is known so far; `words`
    is the engine's last line."""

    layers: Mapping[str, tuple[int, int]]
    words: str

    @property
    def done(self) -> int:
        return sum(done for done, _ in self.layers.values())

    @property
    def total(self) -> int:
        return sum(total for _, total in self.layers.values())


async def find(engine: Engine, name: str) -> Image:
    """Raises ImageMissing, with how to get it, and BootFailed."""
    try:
        async with engine.asking("look at an image") as docker:
            shown = await docker.images.inspect(name)
    except BootFailed as error:
        if isinstance(error, ImageMissing) or is_absent(error):
            raise missing(name) from error
        raise
    label = ((shown.get("Config") or {}).get("Labels") or {}).get(KIND)
    return Image(
        name,
        shown["Id"],
        kind=label if label in ("desktop", "qemu") else "foreign",
        size=shown.get("Size", 0),
        created=datetime.fromisoformat(shown["Created"]).timestamp(),
        digest=(shown.get("RepoDigests") or [""])[0].rpartition("@")[2],
    )


async def pull(engine: Engine, name: str) -> AsyncGenerator[Pulling, None]:
    """Pull it, telling how far it is. Raises ImageMissing, NoSpace, DockerUnavailable, or InfraError when it stalls.
    Use with `contextlib.aclosing`, or the pull goes on after its reader has left.

    Never one of ours: what a registry has under such a name is somebody else's.
    """
    if name.startswith(OURS):
        raise ImageMissing(
            f"{name} is built on this host; no registry has it.",
            hint="`make images` builds it, and brings it up to date.",
            image=name,
        )
    layers: dict[str, tuple[int, int]] = {}
    try:
        async with engine.stream() as docker, aclosing(docker.images.pull(name, stream=True)) as news:  # type: ignore[type-var]  # a generator
            while (item := await _next(news, name)) is not None:
                detail = item.get("progressDetail") or {}
                if item.get("id") and detail.get("total") and item.get("status") == "Downloading":
                    layers[item["id"]] = (int(detail.get("current", 0)), int(detail["total"]))
                elif item.get("status") in ("Download complete", "Pull complete") and item.get("id") in layers:
                    layers[item["id"]] = (layers[item["id"]][1],) * 2
                words = " ".join(filter(None, (item.get("id"), item.get("status"))))
                yield Pulling(dict(layers), words)
    except DockerError as error:
        raise _not_pulled(name, error) from error
    except aiohttp.ClientError as error:
        raise InfraError(f"The Docker engine hung up while it pulled {name}: {error}.") from error


def missing(name: str) -> ImageMissing:
    """How one gets it: ours are built, others pulled."""
    ours = name.startswith(OURS)
    how = "`make images` builds it." if ours else f"`envd images pull {name}` gets it; ENVD_PULL=missing does at start."
    if not ours:
        how += " Our own, built from Debian packages by `make images`, is ENVD_DOCKER_IMAGE=envd/desktop."
    return ImageMissing(f"The image {name} is not on this host.", hint=how, image=name)


async def _next(news: AsyncIterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    try:
        with anyio.fail_after(STALLED):
            return await anext(news, None)
    except TimeoutError as error:
        raise InfraError(f"Pulling {name} made no progress for {STALLED:g} s.", hint="Look at the network.") from error


def _not_pulled(name: str, error: DockerError) -> BootFailed:
    refused = refusal(f"pull {name}", error.message, error.status)
    if isinstance(refused, NoSpace):
        return refused
    lower = error.message.lower()
    if any(word in lower for word in ("denied", "not found", "manifest unknown", "does not exist", "unauthorized")):
        hint = "The registry has none of that name, or wants a login: `docker login`, then `docker pull` once."
    else:
        hint = "Can this host reach the registry? `docker load` takes an image from a file instead."
    return ImageMissing(f"{name} cannot be pulled: {error.message.strip()[:500]}.", hint=hint, image=name)
