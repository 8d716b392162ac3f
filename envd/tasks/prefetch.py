"""`envd tasks prefetch`: the files that tasks need, downloaded into the cache before they are needed.

May run beside a daemon that uses the same cache: files come into it by rename, and of one that both download at the
same time each has a part of its own (see `blobs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import anyio
from anyio.to_thread import run_sync
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..errors import AssetUnavailable
from ..settings import Settings
from .abilities import Abilities
from .assets import Assets
from .check import look
from .checked import Checked

AT_ONCE = 4
ASSET = "asset:"
NAME_SHOWN = 40


async def prefetch(paths: Sequence[Path], settings: Settings, console: Console | None = None) -> int:
    """Download what the tasks in `paths` need and tell about it on stderr. What was got stays when this is cancelled.

    Answers the exit code: 0 all files are there, 1 some are missing, or no task file or not all could be read.
    """
    console = console or Console(stderr=True, markup=False, highlight=False, emoji=False)
    # What a task needs does not depend on what this server can do.
    checked = await run_sync(look, paths, Abilities(), settings.body_limit)
    urls = list(
        dict.fromkeys(need.removeprefix(ASSET) for one in checked for need in one.needs if need.startswith(ASSET))
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        errand = _Errand(Assets(settings, session), settings.asset_limit, urls, console)
        try:
            with _shown(errand):
                await errand.run()
        except anyio.get_cancelled_exc_class():
            errand.say("Stopped. What was downloaded stays; the next run continues.")
            raise
    unread = [one for one in checked if not one.needs and any(problem.kind == "invalid" for problem in one.problems)]
    return _sum_up(errand, checked, unread)


class _Errand:
    """The URLs of one run, and what became of them so far."""

    def __init__(self, assets: Assets, limit: int, urls: list[str], console: Console) -> None:
        self.assets = assets
        self.limit = limit
        self.urls = urls
        self.console = console
        self.bars: Progress | None = None
        self.overall: TaskID | None = None
        self.there = 0
        self.got: dict[str, int] = {}
        """URL → bytes, of files that were downloaded."""
        self.missing: dict[str, AssetUnavailable | str] = {}

    async def run(self) -> None:
        rest = iter(self.urls)
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(self._work, rest)
        for url in self.urls:
            if url not in self.missing and not await self.assets.has(url):
                self.missing[url] = "it was removed again to make room for others; raise ENVD_ASSET_LIMIT"
                self.got.pop(url, None)

    async def _work(self, rest: Iterator[str]) -> None:
        for url in rest:
            if await self.assets.has(url):
                await self._fetch(url, quietly=True)
            elif await self.assets.size() > self.limit:
                # What is in the cache beyond its limit is in use: more of it would be removed by the next who fetches.
                self.missing[url] = f"the cache is full ({decimal(self.limit)}); raise ENVD_ASSET_LIMIT"
            else:
                await self._fetch(url)
            self._advance()

    async def _fetch(self, url: str, quietly: bool = False) -> None:
        """Also what is there: its content is checked, and it counts as used."""
        with self._bar(url, quietly) as bar:
            try:
                path = await self.assets.fetch(url, bar)
            except AssetUnavailable as error:
                self.missing[url] = error
                self.say(f"missing     {error.detail}")
                return
        if quietly and not bar.received:
            self.there += 1
            return
        self.got[url] = (await run_sync(path.stat)).st_size
        self.say(f"downloaded  {url} ({decimal(self.got[url])})")

    def say(self, line: str) -> None:
        """One line, without what would steer a terminal."""
        self.console.out("".join(letter if letter.isprintable() else "?" for letter in line), highlight=False)

    @contextmanager
    def _bar(self, url: str, quietly: bool) -> Iterator[_Bar]:
        bar = _Bar(self.bars if not quietly else None, url)
        try:
            yield bar
        finally:
            bar.close()

    def _advance(self) -> None:
        if self.bars is not None and self.overall is not None:
            done = self.there + len(self.got) + len(self.missing)
            amount = f"{done} of {len(self.urls)} files, {decimal(sum(self.got.values()))} downloaded"
            self.bars.update(self.overall, completed=done, amount=amount)


class _Bar:
    """The progress of one file; drawn only on a terminal."""

    def __init__(self, bars: Progress | None, url: str) -> None:
        self.received = 0
        self._bars = bars
        name = "".join(letter if letter.isprintable() else "?" for letter in url.rpartition("/")[2])
        self._task = bars.add_task(name[-NAME_SHOWN:], total=None, amount="") if bars else None

    def __call__(self, received: int, total: int | None) -> None:
        self.received = received
        if self._bars is not None and self._task is not None:
            amount = f"{decimal(received)} of {decimal(total)}" if total is not None else decimal(received)
            self._bars.update(self._task, completed=received, total=total, amount=amount)

    def close(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


@contextmanager
def _shown(errand: _Errand) -> Iterator[None]:
    """With bars at the end of a terminal; elsewhere lines are all there is."""
    if not errand.console.is_terminal:
        yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
    )
    with Progress(*columns, console=errand.console, transient=True) as bars:
        errand.bars, errand.overall = bars, bars.add_task("all", total=len(errand.urls), amount="")
        yield


def _sum_up(errand: _Errand, checked: list[Checked], unread: list[Checked]) -> int:
    for one in unread:
        errand.say(f"not read    {one.path}: {one.problems[0].field} {one.problems[0].message}".replace(":  ", ": "))
    if not checked:
        errand.say("No task file was found.")
    errand.say(
        f"{len(checked)} task files need {len(errand.urls)} files: {len(errand.got)} downloaded "
        f"({decimal(sum(errand.got.values()))}), {errand.there} were there, {len(errand.missing)} missing."
    )
    for url, why in errand.missing.items():
        if isinstance(why, str):
            errand.say(f"missing     {url}: {why}")
    for hint in dict.fromkeys(why.hint for why in errand.missing.values() if isinstance(why, AssetUnavailable)):
        errand.say(hint)
    return 1 if errand.missing or unread or not checked else 0
