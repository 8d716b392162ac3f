"""Files that tasks name by URL: a cache on disk, filled from mirrors and from the network.

A file is downloaded once, however many ask for it at once: the callers of one URL take turns, the first one downloads,
and the others find what it got, or its failure. One that is cancelled gives its turn to the next, which continues where
it was; so no download outlives its callers, and no task runs beside them. A file in the cache is taken as it is and
never asked for again; one that came from a local folder is copied anew when the folder's has changed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import anyio
import structlog
from anyio.to_thread import run_sync

from ..errors import AssetUnavailable
from ..settings import Settings
from .blobs import Blobs, Held, NoRoom
from .download import Download, Progress, SourceFailed, TooLarge
from .mirrors import parse_mirrors, same_file, without_secrets
from .parts import Part, version_in_folder

logger = structlog.get_logger(__name__)

SPARED_SECONDS = 900.0
"""At least so long after `fetch` answered a path, its file is there."""
AT_ONCE = 16
"""Downloads that may run at once, of all callers together."""
CLOSE_SECONDS = 30.0


@dataclass
class _Flight:
    """The callers of one URL that are here at the same time."""

    turn: anyio.Lock = field(default_factory=anyio.Lock)
    callers: int = 0
    watchers: list[Progress] = field(default_factory=list)
    done: Path | AssetUnavailable | None = None

    def tell(self, received: int, total: int | None) -> None:
        for watcher in self.watchers:
            watcher(received, total)


class Assets:
    """The cache under `settings.state_dir`. Several processes may use it at once (see `blobs`).

    Raises SettingsError for a mirror that is none. Nothing is opened that would have to be closed.
    """

    def __init__(self, settings: Settings, session: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._session = session
        self._mirrors = parse_mirrors(settings.asset_mirrors)
        spared = max(SPARED_SECONDS, settings.setup_timeout, settings.evaluation_timeout)
        self._blobs = Blobs(settings.state_dir / "assets", settings.asset_limit, spared)
        self._flights: dict[str, _Flight] = {}
        self._downloads = anyio.CapacityLimiter(AT_ONCE)
        self._sound: dict[str, tuple[int, int, int]] = {}
        """sha256 → stamp of the blobs whose content this process has read and found right."""
        self._known: set[str] = set()
        self._in_folders: set[Path] = set()

    async def load(self) -> None:
        """Learn what `has_now` is to answer; call it once, before that. What this object fetches later is learnt too;
        what others put into the cache or into a mirror's folder later is not."""
        self._known |= {entry.url for entry in await run_sync(self._blobs.entries)}
        folders = [mirror.base for mirror in self._mirrors if isinstance(mirror.base, Path)]
        for folder in folders:
            found = await run_sync(_files_under, folder)
            self._in_folders |= found
            if not found:
                logger.warning("asset mirror is empty", folder=str(folder))

    async def fetch(self, url: str, progress: Progress | None = None) -> Path:
        """The file of `url` on this host, read-only, its content checked; it stays for 15 minutes, or for as long as a
        set-up or an evaluation may take. `progress` is told bytes received and bytes in all (None: not known), of a
        download that another caller began as well.

        Raises AssetUnavailable; where trying again will not help, it is not `retryable`.
        """
        url = _checked(url)
        async with self._joined(url, progress) as flight, flight.turn:
            if flight.done is None:
                flight.done = await self._land(url, flight)
                del self._flights[url]  # whoever comes now begins anew
            if isinstance(flight.done, Path):
                return flight.done
            raise _copy_of(flight.done)

    async def has(self, url: str) -> bool:
        """Whether `fetch` would need no network."""
        try:
            url = _checked(url)
            if await run_sync(self._find, url, False) is not None:
                return True
            for place in self._places(url):
                if isinstance(place, Path) and await run_sync(place.is_file):
                    return True
        except (AssetUnavailable, OSError):
            return False
        return False

    def has_now(self, url: str) -> bool:
        """As `has`, as far as is known without looking: see `load`."""
        try:
            url = _checked(url)
        except AssetUnavailable:
            return False
        return url in self._known or any(place in self._in_folders for place in self._places(url))

    async def size(self) -> int:
        """Bytes that the cache takes."""
        return await run_sync(self._blobs.size)

    @asynccontextmanager
    async def _joined(self, url: str, progress: Progress | None) -> AsyncIterator[_Flight]:
        flight = self._flights.setdefault(url, _Flight())
        flight.callers += 1
        if progress is not None:
            flight.watchers.append(progress)
        try:
            yield flight
        finally:
            flight.callers -= 1
            if progress is not None:
                flight.watchers.remove(progress)
            if not flight.callers and self._flights.get(url) is flight:
                del self._flights[url]

    async def _land(self, url: str, flight: _Flight) -> Path | AssetUnavailable:
        try:
            return await self._held(url) or await self._get(url, flight)
        except AssetUnavailable as error:
            return error

    async def _held(self, url: str) -> Path | None:
        """The blob of `url`; its content is read when this process has not yet seen it as it is."""
        try:
            held = await run_sync(self._find, url)
            if held is None:
                self._known.discard(url)
                return None
            if self._sound.get(held.entry.sha256) != held.stamp:
                if not await run_sync(self._blobs.is_sound, held):
                    logger.warning("asset was damaged in the cache, fetching it again", url=without_secrets(url))
                    self._known.discard(url)
                    return None
                self._sound[held.entry.sha256] = held.stamp
        except OSError as error:
            raise self._disk_trouble(url, error) from error
        self._known.add(url)
        return held.path

    def _find(self, url: str, use: bool = True) -> Held | None:
        """Blocks. Not what a folder has by now in another version."""
        held = self._blobs.find(url, use)
        if held is not None and Path(held.entry.source).is_absolute():
            try:
                if version_in_folder(Path(held.entry.source)).etag != held.entry.etag:
                    return None
            except OSError:
                pass  # the folder is away; what was copied from it is still good
        return held

    async def _get(self, url: str, flight: _Flight) -> Path:
        tried: list[tuple[str | Path, SourceFailed]] = []
        part = Part(self._blobs.part_path(url))
        remove = False
        try:
            async with self._downloads:
                await run_sync(part.open)
                download = Download(
                    self._session, part, self._room, self._blobs.limit, self._settings.asset_timeout, flight.tell
                )
                for place in self._places(url):
                    began = time.monotonic()
                    try:
                        await self._download(download, place)
                    except SourceFailed as error:
                        tried.append((place, error))
                        continue
                    return await self._keep(part, url, began)
        except NoRoom as error:
            remove = True
            raise _no_room(url, error) from error
        except OSError as error:
            raise self._disk_trouble(url, error) from error
        finally:
            # A thread that outlived its caller's cancellation is waited for: the next caller needs the part.
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await run_sync(part.close, remove)
        raise self._unavailable(url, tried)

    async def _download(self, download: Download, place: str | Path) -> None:
        if self._settings.offline and isinstance(place, str):
            raise SourceFailed("not asked, since ENVD_OFFLINE is set")
        await download.run(place)

    async def _keep(self, part: Part, url: str, began: float) -> Path:
        held = await run_sync(part.give, self._blobs, url)
        self._sound[held.entry.sha256] = held.stamp
        self._known.add(url)
        logger.info(
            "asset fetched",
            url=without_secrets(url),
            source=without_secrets(held.entry.source),
            bytes=held.entry.size,
            sha256=held.entry.sha256,
            seconds=round(time.monotonic() - began, 3),
        )
        await self._room(0)
        return held.path

    async def _room(self, needed: int) -> None:
        removed = await run_sync(self._blobs.make_room, needed)
        if removed:
            logger.info("assets evicted", bytes=removed, limit=self._blobs.limit)
            self._known &= {entry.url for entry in await run_sync(self._blobs.entries)}

    def _places(self, url: str) -> list[str | Path]:
        """Where to look, in this order."""
        return [place for mirror in self._mirrors if (place := mirror.place_of(url)) is not None] + [url]

    def _unavailable(self, url: str, tried: list[tuple[str | Path, SourceFailed]]) -> AssetUnavailable:
        statuses = [failed.status for _, failed in tried if failed.status is not None]
        told = [{"where": without_secrets(str(place)), "why": failed.why} for place, failed in tried]
        mirrors = "".join(f"; mirror {one['where']}: {one['why']}" for one in told[:-1])
        error = AssetUnavailable(
            f"{without_secrets(url)} cannot be had: {told[-1]['why']}{mirrors}.",
            hint=self._hint(url, tried),
            url=without_secrets(url),
            http_status=statuses[-1] if statuses else None,
            tried=told,
        )
        error.retryable = any(failed.again for _, failed in tried)
        return error

    def _hint(self, url: str, tried: list[tuple[str | Path, SourceFailed]]) -> str:
        folder = next((mirror for mirror in self._mirrors if isinstance(mirror.base, Path)), None)
        by_hand = (
            f"put the file at {folder.place_of(url)}"
            if folder and folder.place_of(url)
            else ("name a folder that has it, or a mirror, in ENVD_ASSET_MIRRORS")
        )
        if any(isinstance(failed, TooLarge) for _, failed in tried):
            return "Raise ENVD_ASSET_LIMIT."
        if self._settings.offline:
            return (
                "Unset ENVD_OFFLINE, or run `envd tasks prefetch PATH…` where there is network, with this "
                f"ENVD_STATE_DIR ({self._settings.state_dir}), or {by_hand}."
            )
        if not any(failed.again for _, failed in tried):
            return f"Check the URL in the task file, or {by_hand}."
        return f"Check this host's network, or {by_hand}; `envd tasks prefetch PATH…` fetches files ahead of time."

    def _disk_trouble(self, url: str, error: OSError) -> AssetUnavailable:
        what = f"{error.filename or self._blobs.folder}: {error.strerror or error}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "Make room there." if full else "Make it readable and writable for the daemon's user."
        return _refusal(url, f"the cache cannot be used: {what}", hint)


def _checked(url: str) -> str:
    try:
        return same_file(url)
    except ValueError as error:
        raise _refusal(url, str(error), "Correct the URL in the task file.") from error


def _refusal(url: str, why: str, hint: str) -> AssetUnavailable:
    url = without_secrets(url)[:2000]
    error = AssetUnavailable(f"{url} cannot be had: {why}.", hint=hint, url=url, http_status=None, tried=[])
    error.retryable = False
    return error


def _no_room(url: str, full: NoRoom) -> AssetUnavailable:
    return AssetUnavailable(
        f"{without_secrets(url)} does not fit on the disk: {full.needed} bytes are needed in {full.folder}, "
        f"{full.free} are free.",
        hint="Make room there, or have the cache elsewhere with ENVD_STATE_DIR.",
        url=without_secrets(url),
        http_status=None,
        tried=[],
        needed_bytes=full.needed,
        free_bytes=full.free,
        directory=str(full.folder),
    )


def _copy_of(error: AssetUnavailable) -> AssetUnavailable:
    """Each caller raises its own: one exception raised in several tasks would mix up their tracebacks."""
    copy = AssetUnavailable(error.detail, hint=error.hint, **error.facts)
    copy.retryable = error.retryable
    copy.__cause__ = error.__cause__
    return copy


def _files_under(folder: Path) -> set[Path]:
    return {Path(path, name) for path, _, names in os.walk(folder) for name in names}
