"""Evidence: what an episode leaves behind, one folder (a bundle) per episode in `<state_dir>/episodes/<episode id>/`.

The layout is public; `Bundles.archive` answers the same as a tar file, under a folder named for the episode.

    episode.json       `format` (1); whatever the episode told of itself: env, task, desktop, screen, …; `began_at` and
                       `closed_at` (Unix seconds; null while it goes on, and for ever if the daemon ended first);
                       `steps`, `last_action`, `end_reason`; `bytes` in all; `dropped` (kind → how many did not fit
                       ENVD_BUNDLE_LIMIT or came faster than the disk takes them); `incomplete` (writes that failed)
    task.json          the task as it was sent; {CLIENT_PASSWORD} and its like are not filled in
    setup.json         list of SetupRecord, of the last desktop the set-up was tried on
    steps.jsonl        a StepResult per line without the picture, and `at`, `said` (the prediction, or the actions) and
                       `frame` (the file that shows the screen after the step; null if there is none)
    frames/0000.png    pictures as they were sent (.png, .jpg, or .bin for neither); 0 is the first observation, then
                       the number of the step
    final.png          the screen that was judged
    guest.log          last lines of the guest and of its instance
    evaluation.json    the evaluator's report: what each getter gave, what each metric returned, tracebacks
    values/            the evaluator's working directory: what evaluation.json calls {"$file": NAME} is cache/NAME in
                       it, what it calls {"$saved": NAME} (a large value, as JSON) is NAME
    files/             anything else, by name
    verdict.json       the Verdict

A file is replaced whole or grows by whole lines, so a bundle can be read at any moment, also after the daemon was
killed: only the last line of a file that grows may then be cut short. A password other than the one that everybody
knows is put back to {CLIENT_PASSWORD} wherever text would repeat it.

Gathering evidence neither fails nor delays an episode: writes wait in a queue per bundle, which a task drains through
a thread; one that cannot be done is noted in the bundle and logged once.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup
from pydantic import ValidationError

from .bundle_files import Folder, Write, find_frame, list_bundles, read_steps, remove_bundle, remove_leftovers, tar
from .errors import NotFound
from .models import SetupRecord, StepResult, Verdict
from .settings import Settings

logger = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

CLOSING = 3.0
"""Seconds that the end of the daemon waits for what is not written yet."""
THREADS = 4
"""That all bundles together use, so that a disk which hangs takes none of the daemon's other threads with it."""
BATCH = 32
"""Writes that one trip to a thread does."""
WAITING_LIMIT = 128 * 1024**2
"""Bytes of pictures that may wait for the disk, of all bundles together; the next are dropped."""
EPISODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Bundles:
    """All bundles of a state directory. `open` it, `begin` one per episode, read them whenever."""

    def __init__(self, settings: Settings, tasks: TaskGroup, played: Iterable[str] = ()) -> None:
        self._settings = settings
        self._played = set(played)
        self._root = settings.state_dir / "episodes"
        self._tasks = tasks
        self._threads = anyio.CapacityLimiter(THREADS)
        self._open: dict[str, Bundle] = {}
        self._reading: Counter[str] = Counter()
        self._going: set[str] = set()
        self._waiting = 0
        self._sweeping = self._sweep_again = False
        self.ended = False

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, played: Iterable[str] = ()) -> AsyncIterator[Bundles]:
        """Clear old bundles away, then take new ones until the block ends; what waits then is written, for `CLOSING`
        seconds at most. Bundles of episodes that are `played` still stay until they are taken up by `resume`."""
        # By hand: as a `with` it would hand on the block's own exceptions in a group.
        tasks = anyio.create_task_group()
        await tasks.__aenter__()
        bundles = cls(settings, tasks, played)
        try:
            await bundles._in_thread(remove_leftovers, bundles._root)
            await bundles._sweep()
            yield bundles
        finally:
            await bundles._finish()
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)

    async def begin(self, episode_id: str, *, task: Mapping[str, Any], about: Mapping[str, Any]) -> Bundle:
        """A new bundle; `about` goes into its episode.json. `close` it at the end."""
        assert EPISODE_ID.fullmatch(episode_id), episode_id
        bundle = Bundle(self, episode_id, Folder(self._root / episode_id, self._settings))
        await bundle.about({**about, "began_at": time.time(), "closed_at": None})
        bundle.put(0, Folder.document, "task.json", task)
        return bundle

    async def resume(self, episode_id: str) -> Bundle | None:
        """The bundle of an episode that goes on; None when it is not there, or cannot be read."""
        folder = Folder(self._root / episode_id, self._settings)
        try:
            await self._in_thread(folder.resume)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("evidence cannot be read", episode_id=episode_id, error=str(error)[:500])
            return None
        finally:
            self._played.discard(episode_id)
        # It may be long until something is written.
        bundle = self._open[episode_id] = Bundle(self, episode_id, folder)
        return bundle

    async def frame(self, episode_id: str, number: int) -> bytes | None:
        """The picture that step `number` answered, 0 for the first observation; None when it is not kept."""
        assert EPISODE_ID.fullmatch(episode_id), episode_id
        if bundle := self._open.get(episode_id):
            await bundle.flushed()
        return await self._in_thread(find_frame, self._root / episode_id, number)

    async def recorded_frame(self, episode_id: str, number: int) -> bytes | None:
        """As `frame`, for an id that anybody may have made up. Raises NotFound when there is no such bundle."""
        await self._require(episode_id)
        return await self.frame(episode_id, number)

    async def steps(self, episode_id: str, after: int, most: int) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
        """episode.json, at most `most` lines of steps.jsonl that follow step `after`, and whether there are more.
        Raises NotFound."""
        if bundle := self._open.get(episode_id):
            await bundle.flushed()
        await self._require(episode_id)
        return await self._in_thread(read_steps, self._root / episode_id, after, most)

    async def ids(self) -> list[str]:
        """Episodes that have a bundle, the one that was written to last first."""
        return [name for _, name in await self._in_thread(list_bundles, self._root)]

    async def get_verdict(self, episode_id: str) -> Verdict | None:
        """The verdict as it was kept; None when there is none, or no such bundle."""
        if not EPISODE_ID.fullmatch(episode_id):
            return None
        if bundle := self._open.get(episode_id):
            await bundle.flushed()
        path = self._root / episode_id / "verdict.json"
        try:
            return Verdict.model_validate_json(await self._in_thread(path.read_bytes))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("a verdict cannot be read", file=str(path), error=str(error)[:500])
            return None

    async def archive(self, episode_id: str) -> AsyncIterator[bytes]:
        """The bundle as an uncompressed tar (pictures do not shrink), made while it is read: `async for` over what
        this returns. Raises NotFound at once.

        A bundle is not cleared away while it is read, and may be read while it is written.
        """
        if bundle := self._open.get(episode_id):
            await bundle.flushed()
        await self._require(episode_id)
        return self._stream(episode_id)

    async def _stream(self, episode_id: str) -> AsyncIterator[bytes]:
        self._reading[episode_id] += 1
        try:
            await self._require(episode_id)
            pieces = tar(self._root / episode_id)
            while piece := await self._in_thread(next, pieces, b""):
                yield piece
        finally:
            self._reading[episode_id] -= 1
            self._reading = +self._reading

    async def _require(self, episode_id: str) -> None:
        there = EPISODE_ID.fullmatch(episode_id) is not None and episode_id not in self._going
        if not there or not await self._in_thread(_is_folder, self._root / episode_id):
            raise NotFound(
                f"There is no bundle of an episode {episode_id[:80]!r}: it never was, or it has been cleared away.",
                hint=f"The newest {self._settings.bundles} are kept, for {self._settings.bundle_days:g} days "
                "(ENVD_BUNDLES, ENVD_BUNDLE_DAYS).",
            )

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Abandoned when cancelled: a disk that hangs must not hold up whoever gave up waiting for it.
        return await anyio.to_thread.run_sync(
            partial(work, *args, **kwargs), limiter=self._threads, abandon_on_cancel=True
        )

    # -- called by Bundle ---------------------------------------------------------------------------------------

    def has_room(self, size: int) -> bool:
        return self._waiting + size <= WAITING_LIMIT

    def waits(self, bundle: Bundle, size: int, idle: bool) -> None:
        """A write of `bundle` waits; nothing of it waited before if it was `idle`."""
        self._open[bundle.id] = bundle
        self._waiting += size
        if idle and not self.ended:
            self._tasks.start_soon(bundle.drain)

    async def write(self, bundle: Bundle, writes: list[Write], size: int) -> None:
        try:
            await self._in_thread(bundle.folder.run, writes)
        finally:
            self._waiting -= size

    def written(self, bundle: Bundle) -> None:
        """Nothing waits of a bundle that is closed."""
        self._open.pop(bundle.id, None)
        self._sweep_again = True
        if not self._sweeping:
            self._sweeping = True
            self._tasks.start_soon(self._sweep)

    # -- keeping house ------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Until no bundle was closed meanwhile."""
        self._sweeping, again = True, True
        try:
            while again:
                self._sweep_again = False
                await self._sweep_once()
                again = self._sweep_again
        except OSError as error:
            logger.warning("old bundles cannot be cleared away", folder=str(self._root), error=str(error))
        finally:
            self._sweeping = False

    async def _sweep_once(self) -> None:
        found = await self._in_thread(list_bundles, self._root)
        oldest = time.time() - self._settings.bundle_days * 86_400
        for rank, (written_at, name) in enumerate(found):
            over = rank >= self._settings.bundles or written_at < oldest
            if not over or name in self._open or name in self._reading or name in self._played:
                continue
            self._going.add(name)
            try:
                await self._in_thread(remove_bundle, self._root, name)
            finally:
                self._going.discard(name)

    async def _finish(self) -> None:
        with anyio.move_on_after(CLOSING, shield=True):
            for bundle in tuple(self._open.values()):
                await bundle.flushed()
        self.ended = True
        if late := [bundle.id for bundle in self._open.values() if bundle.waiting]:
            logger.error("evidence could not be written in time", episodes=late)


class Bundle:
    """One episode's evidence while it is gathered. Made by `Bundles.begin`; `close` it when no more will come.

    Writes are done in the order in which they were asked for, and but for `file` and `grading` after the call that
    asked has returned: what is handed over must not be changed afterwards. None raises because of the disk.
    """

    def __init__(self, bundles: Bundles, episode_id: str, folder: Folder) -> None:
        self.id = episode_id
        self.folder = folder
        self._bundles = bundles
        self._queue: deque[tuple[int, Write]] = deque()
        self._given = self._done = 0
        self._moved = anyio.Event()
        self._closed = False

    async def about(self, facts: Mapping[str, Any]) -> None:
        """Put `facts` into episode.json, in place of those of the same name."""
        self.put(0, Folder.about, facts)

    async def setup(self, records: Sequence[SetupRecord]) -> None:
        """The steps of the set-up, in place of those of an earlier try."""
        self.put(0, Folder.document, "setup.json", tuple(records))

    async def frame(self, number: int, picture: bytes) -> None:
        """The picture that step `number` answered, 0 for the first observation. Comes before that step's `step`."""
        if self._bundles.has_room(len(picture)):
            self.put(len(picture), Folder.frame, number, picture)
        else:
            self.put(0, Folder.drop, "frames")

    async def step(self, result: StepResult | Mapping[str, Any], said: str) -> None:
        """A line of steps.jsonl. A step that failed half-way has no StepResult, but a mapping with what is known:
        `step` and `actions` at least."""
        self.put(0, Folder.step, result, said, time.time())

    async def final(self, picture: bytes) -> None:
        self.put(len(picture), Folder.final, picture)

    async def guest_log(self, lines: Iterable[str]) -> None:
        """Add `lines`."""
        self.put(0, Folder.log, tuple(lines))

    async def file(self, name: str, content: Path | bytes) -> None:
        """A file of any kind, by a name of ours. Returns when it is written: a Path may then go away."""
        assert FILE_NAME.fullmatch(name), name
        self.put(0, Folder.file, f"files/{name}", content)
        await self.flushed()

    async def grading(self, report: Mapping[str, Any], folder: Path) -> None:
        """The evaluator's report without its unset fields, and the files of its working directory.

        Returns when they are copied: the folder may then go away. Links in it are not followed.
        """
        self.put(0, Folder.document, "evaluation.json", report)
        self.put(0, Folder.files, folder, "values")
        await self.flushed()

    async def verdict(self, verdict: Verdict) -> None:
        """Await `flushed` before somebody is told of it."""
        self.put(0, Folder.document, "verdict.json", verdict, keep=True)

    async def flushed(self) -> None:
        """Return when everything that was asked for before is written, or has failed."""
        given = self._given
        while self._done < given and not self._bundles.ended:
            await self._moved.wait()

    def close(self, **facts: Any) -> None:
        """No more will come: once the rest is written, the bundle may be cleared away when its time has come.

        `facts` are as in `about`. A write that comes nevertheless is done if the bundle is still there.
        """
        self._closed = True
        self.put(0, Folder.about, {**facts, "closed_at": time.time()})

    def put(self, size: int, write: Callable[Concatenate[Folder, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have `write` done after all that wait. `size` is what it holds in memory until then, in bytes."""
        self._given += 1
        self._queue.append((size, partial(write, self.folder, *args, **kwargs)))
        self._bundles.waits(self, size, idle=self.waiting == 1)

    @property
    def waiting(self) -> int:
        """Writes that are not done."""
        return self._given - self._done

    async def drain(self) -> None:
        """Write until nothing waits. Runs while something does, once per bundle."""
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            await self._bundles.write(self, [write for _, write in batch], sum(size for size, _ in batch))
            self._done += len(batch)
            self._moved.set()
            self._moved = anyio.Event()
        if self._closed:
            self._bundles.written(self)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
