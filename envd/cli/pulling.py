"""`envd images pull`: an image from its registry, with a bar for each layer on a terminal and lines elsewhere."""

from __future__ import annotations

import re
import time
from contextlib import aclosing, nullcontext

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..drivers.docker.engine import Engine
from ..drivers.docker.images import Pulling, find
from ..drivers.docker.images import pull as pull_image
from ..settings import Settings
from .listing import console
from .watch import clean

LINE_EVERY = 5.0
"""Seconds between two lines about how far it is, where there are no bars."""
ALL = "all"


async def pull(settings: Settings, image: str | None = None, output: Console | None = None) -> int:
    """Of `image`, else of ENVD_DOCKER_IMAGE. 0 when it is here.

    Raises DockerUnavailable, ImageMissing (also for ours, which no registry has), NoSpace, InfraError. What was
    downloaded of a pull that ends early the engine keeps for the next.
    """
    name = image or settings.docker_image
    output = output or console()
    async with Engine(settings.docker_host) as engine:
        progress = _Bars(output) if output.is_terminal else _Lines(output)
        with progress if isinstance(progress, _Bars) else nullcontext():
            async with aclosing(pull_image(engine, name)) as news:
                async for pulling in news:
                    progress.tell(pulling)
        found = await find(engine, name)
    output.out(f"{found.name} is here: {decimal(found.size)} unpacked, {found.digest or found.id}", highlight=False)
    return 0


class _Lines:
    """A line for each layer that is done, and now and then how far all of it is."""

    def __init__(self, output: Console) -> None:
        self._output = output
        self._told = time.monotonic()

    def tell(self, pulling: Pulling) -> None:
        if re.fullmatch(r"\w+ (Pull complete|Already exists)|(Status|Digest): .*", pulling.words):
            self._output.out(clean(pulling.words), highlight=False)
        elif time.monotonic() - self._told > LINE_EVERY:
            self._told = time.monotonic()
            self._output.out(f"{decimal(pulling.done)} of {decimal(pulling.total)}", highlight=False)


class _Bars(Progress):
    """A bar for each layer that is under way, and one for all. Layers tell their sizes one after the other, so that
    grows while it fills."""

    def __init__(self, output: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
        )
        super().__init__(*columns, console=output, transient=True)
        self._bars: dict[str, TaskID] = {}

    def tell(self, pulling: Pulling) -> None:
        for layer, (done, total) in pulling.layers.items():
            if done < total or layer in self._bars:
                self._show(layer, done, total)
        self._show(ALL, pulling.done, pulling.total)
        self.update(self._bars[ALL], description=clean(pulling.words)[:40])

    def _show(self, name: str, done: int, total: int) -> None:
        if name not in self._bars:
            self._bars[name] = self.add_task(clean(name), total=None, amount="")
        self.update(
            self._bars[name],
            completed=done,
            total=total or None,
            amount=f"{decimal(done)} of {decimal(total)}",
            visible=name == ALL or done < total,
        )
