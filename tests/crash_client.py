"""A client that behaves well, and whoever restarts the daemon that it talks to.

Every call has a key and is sent again until it is answered, by whichever life of the daemon; the watcher comes back
with the id of the last event that it saw.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from signal import SIGKILL, SIGTERM
from typing import Any

import aiohttp
from daemon_process import DaemonProcess

START_LIMIT = 20.0
"""Seconds from the begin of a process until it serves. One takes 0.3 on an idle machine."""
Begin = Callable[[int], Awaitable[DaemonProcess]]


@dataclass
class Seen:
    """An event, as the watcher was told it."""

    id: str
    kind: str
    data: dict[str, Any]


@dataclass
class Life:
    process: DaemonProcess
    began: float = field(default_factory=time.monotonic)
    served: float | None = None
    """After so many seconds."""
    code: int | None = None


class Client:
    """Made by `client`. `begin` is given the number of the life, from 0."""

    def __init__(self, begin: Begin, session: aiohttp.ClientSession) -> None:
        self._begin = begin
        self._session = session
        self._serving = asyncio.Event()
        self._url = ""
        self.lives: list[Life] = []
        self.seen: list[Seen] = []
        self.opened = asyncio.Event()
        """The watcher has been connected once."""

    @property
    def killed(self) -> int:
        """How many lives ended by a SIGKILL."""
        return sum(1 for life in self.lives if life.code == -SIGKILL)

    async def live(self) -> None:
        """One life after the other, until one ends by itself."""
        while not self.lives or self.lives[-1].code == -SIGKILL:
            assert len(self.lives) < 5, "it dies again and again"
            life = Life(await self._begin(len(self.lives)))
            self.lives.append(life)
            try:
                await life.process.listening()
            except EOFError:
                pass  # it was killed first
            else:
                life.served = time.monotonic() - life.began
                self._url = life.process.url
                self._serving.set()
            life.code = await life.process.process.wait()
            self._serving.clear()

    async def watch(self) -> None:
        """Until the daemon has ended for good."""
        while True:
            await self._serving.wait()
            headers = {"Last-Event-ID": self.seen[-1].id} if self.seen else {}
            try:
                async with self._session.get(f"{self._url}/v1/events", headers=headers) as answer:
                    self.opened.set()
                    async for event in _events(answer.content):
                        if event.kind not in ("snapshot", "server-shutdown"):
                            self.seen.append(event)
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.01)

    async def saw(self, wanted: Callable[[Seen], bool]) -> Seen:
        """The first event of that kind, as soon as it was told."""
        while not (found := [one for one in self.seen if wanted(one)]):  # noqa: ASYNC110 - told by another process
            await asyncio.sleep(0.01)
        return found[0]

    async def post(self, path: str, body: Any = None, key: str = "") -> Any:
        return await self._call("POST", path, {"json": body or {}}, {"Idempotency-Key": key} if key else {})

    async def get(self, path: str, **query: str) -> Any:
        return await self._call("GET", path, {"params": query}, {})

    async def _call(self, method: str, path: str, about: dict[str, Any], headers: Mapping[str, str]) -> Any:
        """The answer. Raises AssertionError for one that says it will never be better."""
        while True:
            await self._serving.wait()
            try:
                async with self._session.request(method, f"{self._url}{path}", headers=headers, **about) as answer:
                    said = await answer.json()
                    if answer.status < 300:
                        return said
                    assert answer.status == 503, (method, path, said)
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.01)

    async def job(self, job_id: str) -> dict[str, Any]:
        """Once it has ended."""
        after = 0
        while True:
            job: dict[str, Any] = await self.get(f"/v1/jobs/{job_id}", wait="20", after=str(after))
            if job["ended_at"] is not None:
                return job
            after = job["version"]

    def stop(self) -> None:
        """Have the life that there is end as it should."""
        self.lives[-1].process.process.send_signal(SIGTERM)

    async def stopped(self, living: asyncio.Task[None]) -> None:
        """Return once one has ended as it should: if it was killed over that, the next is stopped."""
        while not living.done():
            life = self.lives[-1]
            if self._serving.is_set():
                self.stop()
                ended = asyncio.create_task(life.process.process.wait())
                await asyncio.wait([ended, living], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.01)
        await living

    # What was seen

    def of(self, kind: str, **data: Any) -> list[Seen]:
        """Events of that kind with these data."""
        return [one for one in self.seen if one.kind == kind and data.items() <= one.data["data"].items()]

    def ends(self) -> Counter[str]:
        """By job: how often its end was told."""
        ends = [one.data["job"] for one in self.seen if one.kind == "state"]
        return Counter(job["id"] for job in ends if job["ended_at"] is not None)

    def check_stream(self) -> None:
        """Its ids have neither a gap nor a double, and no other beginning."""
        told = [one.id.rpartition("-") for one in self.seen]
        assert [one.kind for one in self.seen if one.kind == "gap"] == []
        assert len({epoch for epoch, _, _ in told}) == 1
        numbers = [int(number) for _, _, number in told]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    def check_lives(self) -> None:
        for life in self.lives:
            assert life.served is None or life.served < START_LIMIT
            assert [line for line in _records(life) if line.get("level") in ("error", "critical")] == []


@asynccontextmanager
async def client(begin: Begin) -> AsyncIterator[tuple[Client, asyncio.Task[None]]]:
    """A client and the lives of its daemon, which are over after the block at the latest."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        made = Client(begin, session)
        living, watching = asyncio.create_task(made.live()), asyncio.create_task(made.watch())
        try:
            yield made, living
        finally:
            for task in (living, watching):
                task.cancel()
            await asyncio.wait([living, watching])
            for life in made.lives:
                await life.process.kill()


async def _events(lines: asyncio.StreamReader | aiohttp.StreamReader) -> AsyncIterator[Seen]:
    about: dict[str, str] = {}
    async for line in lines:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            about[name] = about.get(name, "") + value if name == "data" else value
        elif "event" in about:
            yield Seen(about.get("id", ""), about["event"], json.loads(about["data"]))
            about = {}


def _records(life: Life) -> list[dict[str, Any]]:
    """Its log. The last line of one that was killed may be half of one."""
    records = []
    for line in life.process.log:
        try:
            records.append(json.loads(line))
        except ValueError:
            assert line is life.process.log[-1] or life.code not in (0, -SIGKILL), line
    return records


def told_by(client: Client) -> str:
    """What changed in all lives, in short, for a test that failed."""
    told = []
    for number, life in enumerate(client.lives):
        told.append(f"--- life {number} ({life.code})")
        for record in _records(life):
            if record["event"] not in ("request", "audit"):
                about = {name: record[name] for name in ("level", "job_id", "desktop_id", "state") if name in record}
                told.append(f"{record['event']}  {' '.join(map(str, about.values()))}"[:200])
    return "\n".join(told)
