"""`envd tasks prefetch`: the files that tasks need, downloaded into the cache before they are needed.

May run beside a daemon that uses the same cache: files come into it by rename, and of one that both download at the
same time each has a part of its own (see `blobs`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

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
from .mirrors import without_secrets
from .unreachable import Unreachable

AT_ONCE = 4
ASSET = "asset:"
NAME_SHOWN = 40
RAISE_LIMIT = "Raise ENVD_ASSET_LIMIT."
MIRROR = "name a folder that has the files, or a mirror, in ENVD_ASSET_MIRRORS"


async def prefetch(paths: Sequence[Path], settings: Settings, console: Console | None = None) -> int:
    """Download what the tasks in `paths` need and tell about it on stderr. What was got stays when this is cancelled.

    Answers the exit code: 0 all files are there, 1 some are missing or a task file could not be read, 2 there is no
    task file.
    """
    console = console or Console(stderr=True, markup=False, highlight=False, emoji=False)
    # What a task needs does not depend on what this server can do.
    checked = await run_sync(look, paths, Abilities(), settings.body_limit)
    unread = [one for one in checked if not one.needs and any(problem.kind == "invalid" for problem in one.problems)]
    if not await run_sync(lambda: any(os.path.exists(one.path) for one in checked)):
        _say_unread(console, unread)
        _say(console, "No task files found.")
        return 2
    urls = list(
        dict.fromkeys(need.removeprefix(ASSET) for one in checked for need in one.needs if need.startswith(ASSET))
    )
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, middlewares=(Unreachable(),)) as session:
        errand = _Errand(Assets(settings, session), settings, urls, console)
        try:
            with _shown(errand):
                await errand.run()
        except anyio.get_cancelled_exc_class():
            _say(console, "Stopped. What was downloaded stays; the next run continues.")
            raise
    _say_unread(console, unread)
    _sum_up(errand, len(checked) - len(unread))
    return 1 if errand.missing or unread else 0


class _Errand:
    """The URLs of one run, and what became of them so far."""

    def __init__(self, assets: Assets, settings: Settings, urls: list[str], console: Console) -> None:
        self.assets = assets
        self.settings = settings
        self.urls = urls
        self.console = console
        self.bars: Progress | None = None
        self.overall: TaskID | None = None
        self.there = 0
        self.got: dict[str, int] = {}
        """URL → bytes, of files that were downloaded."""
        self.missing: dict[str, _Missing] = {}

    async def run(self) -> None:
        rest = iter(self.urls)
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(self._work, rest)
        for url in self.urls:
            if url not in self.missing and not await self.assets.has(url):
                self.got.pop(url, None)
                self._miss(url, _Missing("it was removed again to make room for others", RAISE_LIMIT))

    async def _work(self, rest: Iterator[str]) -> None:
        for url in rest:
            if await self.assets.has(url):
                await self._fetch(url, quietly=True)
            elif await self.assets.size() > self.settings.asset_limit:
                # What is in the cache beyond its limit is in use: more of it would be removed by the next who fetches.
                self._miss(url, _Missing(f"the cache is full ({decimal(self.settings.asset_limit)})", RAISE_LIMIT))
            else:
                await self._fetch(url)
            self._advance()

    async def _fetch(self, url: str, quietly: bool = False) -> None:
        """Also what is there: its content is checked, and it counts as used."""
        with self._bar(url, quietly) as bar:
            try:
                path = await self.assets.fetch(url, bar)
            except AssetUnavailable as error:
                return self._miss(url, _missing(error, self.settings.offline), error.detail)
        if quietly and not bar.received:
            self.there += 1
            return None
        self.got[url] = (await run_sync(path.stat)).st_size
        return self._tell(f"downloaded  {url} ({decimal(self.got[url])})")

    def _miss(self, url: str, why: _Missing, detail: str = "") -> None:
        self.missing[url] = why
        self._tell(f"missing     {detail or f'{without_secrets(url)}: {why.reason}'}")

    def _tell(self, line: str) -> None:
        count = len(str(len(self.urls)))
        _say(self.console, f"{self.done:{count}}/{len(self.urls)}  {line}")

    @property
    def done(self) -> int:
        return self.there + len(self.got) + len(self.missing)

    @contextmanager
    def _bar(self, url: str, quietly: bool) -> Iterator[_Bar]:
        bar = _Bar(self.bars if not quietly else None, url)
        try:
            yield bar
        finally:
            bar.close()

    def _advance(self) -> None:
        if self.bars is not None and self.overall is not None:
            amount = f"{self.done} of {_counted(len(self.urls), 'file')}, {decimal(sum(self.got.values()))} downloaded"
            self.bars.update(self.overall, completed=self.done, amount=amount)


@dataclass(frozen=True)
class _Missing:
    """Why a file is not there, and what to do about it; both are the same for all files that share them."""

    reason: str
    hint: str


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


def _missing(error: AssetUnavailable, offline: bool) -> _Missing:
    """For a person who is just prefetching, and has many files to look at."""
    tried: list[dict[str, str]] = error.facts["tried"]
    if not tried or error.hint == RAISE_LIMIT:
        return _Missing(error.detail.partition(" cannot be had: ")[2].rstrip(".") or error.detail, error.hint)
    reason = tried[-1]["why"]  # of where the file is from; the mirrors were before
    if offline:
        return _Missing(reason, f"Unset ENVD_OFFLINE, or {MIRROR}.")
    if error.retryable:
        return _Missing(reason, f"Check this host's network, or {MIRROR}.")
    return _Missing(reason, f"Check the URL in the task file, or {MIRROR}.")


def _sum_up(errand: _Errand, tasks: int) -> None:
    console = errand.console
    _say(
        console,
        f"{_counted(tasks, 'task file')} need{'s' * (tasks == 1)} {_counted(len(errand.urls), 'file')}: "
        f"{len(errand.got)} downloaded ({decimal(sum(errand.got.values()))}), "
        f"{errand.there} already there, {len(errand.missing)} missing.",
    )
    reasons = Counter((_host(url), why.reason) for url, why in errand.missing.items())
    for (host, reason), count in reasons.most_common():
        _say(console, f"host {host}: {_counted(count, 'file')}: {reason}")
    for hint in dict.fromkeys(why.hint for why in errand.missing.values()):
        _say(console, hint)


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return url


def _say_unread(console: Console, unread: list[Checked]) -> None:
    for one in unread:
        _say(console, f"not read    {one.path}: {one.problems[0].field} {one.problems[0].message}".replace(":  ", ": "))


def _say(console: Console, line: str) -> None:
    """One line, without what would steer a terminal."""
    console.out("".join(letter if letter.isprintable() else "?" for letter in line), highlight=False)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
