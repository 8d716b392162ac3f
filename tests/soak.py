"""`make soak`: clients play while clients, daemon, machines and the engine are killed and answers are lost. At the end
every job that was accepted has exactly one end, nothing was typed twice, and nothing is left.

It stops by itself after some minutes, prints what it did and what it found, and as its last line one JSON object. Exits
1 with what is wrong, if anything is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import SIGKILL, SIGTERM
from typing import Any

from soak_clients import Clients, Ledger, compared
from soak_latency import Latency, latency
from soak_world import Census, Cutter, Eyes, Supervisor, Watcher, processes_of

BUNDLES = 200
RING = 8192
"""Events that the daemon has at hand: until there are so many its memory grows, and is meant to."""
EVENT = 8 * 1024
"""Bytes that one of them may take."""
MORE_MEMORY = 32 * 1024**2
"""Bytes by which a daemon may have grown between two moments of the same kind."""
MORE_FILES = 4
MORE_TASKS = 8
SOCKETS = 4
"""TCP sockets for each machine."""
STATE_LIMIT = 256 * 1024**2
"""Bytes that the state directory may take: the journal, and the evidence of `BUNDLES` episodes."""
SHOWN = 40
"""So much of what is wrong is printed."""


@dataclass
class Soaked:
    """`censuses` are of moments at which each env had played an episode undisturbed, with the daemon's life."""

    seconds: float
    clients: int
    seed: int
    latency: Latency
    ledger: Ledger
    kills: Counter[str]
    cut: Counter[str]
    lives: int
    watched: tuple[int, int]
    jobs: Counter[str]
    texts: tuple[int, int, int]
    """See `compared`."""
    errors: Counter[str]
    censuses: list[tuple[int, Census]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return self.ledger.wrong

    @property
    def faults(self) -> int:
        return sum(self.kills.values()) + sum(self.cut.values())

    def lines(self) -> list[str]:
        counts, told = self.ledger.counts, _told
        verdicts = {name.partition(" ")[2]: n for name, n in counts.items() if name.startswith("verdicts ")}
        actions = {name.partition(" ")[2]: n for name, n in counts.items() if name.startswith("actions ")}
        first, last = self.censuses[0][1], self.censuses[-1][1]
        seen, blind, twice = self.texts
        return [
            *self.latency.lines(),
            f"soak: {self.clients} clients, {self.seconds:.0f} s, seed {self.seed}, {self.lives} lives of the daemon",
            f"faults survived: {self.faults} (kills: {told(self.kills)}; answers lost: {told(self.cut)})",
            f"played: {counts['episodes']} episodes, {counts['steps']} steps ({told(actions)}); sent again: "
            f"{counts['retries']}, of these refused: {told(self.ledger.refusals)}; asked again later: "
            f"{counts['asked again later']}",
            f"jobs accepted: {len(self.ledger.accepted)}, by end in the journal: {told(self.jobs)}",
            f"texts compared: {seen}, typed twice: {twice}; died unseen with the engine: {blind}",
            f"verdicts: {told(verdicts)}; failures of jobs, steps and verdicts: {told(self.ledger.failures)}",
            f"events watched: {self.watched[0]} over {self.watched[1]} connections",
            f"daemon at rest, first → last of {len(self.censuses)}: "
            f"memory {first.rss / 1e6:.0f} → {last.rss / 1e6:.0f} MB, files {first.files} → {last.files}, "
            f"sockets {first.sockets} → {last.sockets}, threads {first.threads} → {last.threads}, "
            f"tasks {first.tasks} → {last.tasks}, journal {first.journal / 1e6:.1f} → {last.journal / 1e6:.1f} MB, "
            f"state {first.state / 1e6:.1f} → {last.state / 1e6:.1f} MB",
            f"errors that daemons logged: {told(self.errors)}",
            f"leaked things: {len(self.left)}",
            f"wrong: {len(self.wrong)}",
        ]

    def figures(self) -> dict[str, Any]:
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "faults": self.faults,
            "episodes": self.ledger.counts["episodes"],
            "steps": self.ledger.counts["steps"],
            "jobs": len(self.ledger.accepted),
            "texts": self.texts[0],
            "typed_twice": self.texts[2],
            "lives": self.lives,
            "kills": dict(self.kills),
            "answers_lost": dict(self.cut),
            "leaked": self.left,
            "wrong": len(self.wrong),
        }


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "none"


class Soak:
    """One run in the folder `where`."""

    def __init__(self, where: Path, seconds: float, clients: int, seed: int) -> None:
        self.random = Random(seed)
        self.seconds = seconds
        self.state_dir = where / "state"
        port = _free_port()
        self.supervisor = Supervisor(self.state_dir, port, _environment(clients))
        self.eyes = Eyes(self.state_dir)
        self.cutter = Cutter(port, lambda: self.chance, self.random)
        self.number = clients
        self.kills: Counter[str] = Counter()
        self.censuses: list[tuple[int, Census]] = []
        self.chance = 0.04
        """Of an answer to be lost."""
        self._turn = asyncio.Lock()
        """Of whoever kills, and of whoever must not be disturbed."""

    async def run(self) -> tuple[Clients, Watcher]:
        chaos, steady = 0.75 * self.seconds, 0.25 * self.seconds
        supervising = asyncio.create_task(self.supervisor.run())
        try:
            async with self.cutter:
                clients = Clients(self.number, self.cutter.url, self.eyes, self.random)
                watcher = Watcher(self.cutter.url, clients.ledger.wrong)
                watching = asyncio.create_task(watcher.run())
                async with clients:
                    try:
                        await self.supervisor.up.wait()
                        await self._disturbed(clients, chaos, with_daemon=True)
                        self.supervisor.set("ENVD_KEEP_DESKTOPS", "0")
                        await self._kill_daemon(SIGKILL)
                        await self.supervisor.up.wait()
                        await self._disturbed(clients, steady, with_daemon=False)
                    finally:
                        watching.cancel()
                        await asyncio.wait([watching])
                        clients.raise_for_broken()
                await self._end()
        finally:
            self.supervisor.over = True
            await self.eyes.close()
            supervising.cancel()
            await asyncio.wait([supervising])
        clients.ledger.wrong += self.supervisor.wrong
        return clients, watcher

    async def _disturbed(self, clients: Clients, seconds: float, *, with_daemon: bool) -> None:
        """So long, with rests in which the daemon is looked at; the first and the last are at the ends."""
        await self._rest(clients)
        stretches = max(2, round(seconds / 60))
        for number in range(stretches):
            engine = with_daemon and number in (0, stretches - 1)
            await self._stretch(clients, seconds / stretches, with_daemon=with_daemon, with_engine=engine)
            await self._rest(clients)

    async def _stretch(self, clients: Clients, seconds: float, *, with_daemon: bool, with_engine: bool) -> None:
        async def clients_die() -> None:
            await clients.kill_one()
            self.kills["client"] += 1

        async def a_machine_dies() -> None:
            self.kills["machine"] += await self.eyes.kill_one(self.random)

        async def the_engine_dies() -> None:
            await self.eyes.kill_engine()
            self.kills["engine"] += 1

        async def the_daemon_dies() -> None:
            await self._kill_daemon(SIGTERM if self.random.random() < 0.2 else SIGKILL)
            if self.random.random() < 0.3:
                # While it takes up what was left.
                await self.supervisor.next_life()
                await asyncio.sleep(self.random.uniform(0.5, 3))
            else:
                await self.supervisor.up.wait()

        often = self.number / 64
        tasks = [self._now_and_then(clients_die, 0.5 / often), self._now_and_then(a_machine_dies, 1.5 / often)]
        if with_daemon:
            tasks.append(self._now_and_then(the_daemon_dies, 1.5))
        if with_engine:
            tasks.append(self._once(the_engine_dies, self.random.uniform(0.1, 0.4) * seconds))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for task in tasks:
                    group.create_task(task)
                group.create_task(asyncio.sleep(seconds * 2))
        clients.raise_for_broken()

    async def _now_and_then(self, do: Callable[[], Awaitable[None]], mean: float) -> None:
        while True:
            await self._once(do, self.random.expovariate(1 / mean))

    async def _once(self, do: Callable[[], Awaitable[None]], after: float) -> None:
        """One at a time; and what was begun is done, also when the stretch is over."""
        await asyncio.sleep(after)
        async with self._turn:
            doing = asyncio.ensure_future(do())
            try:
                await asyncio.shield(doing)
            except asyncio.CancelledError:
                await asyncio.wait([doing])
                doing.result()
                raise

    async def _kill_daemon(self, number: signal.Signals) -> None:
        self.kills[f"daemon {number.name}"] += 1
        await self.supervisor.signal(number)
        await self.supervisor.next_life()

    async def _rest(self, clients: Clients) -> None:
        """Each env plays an episode undisturbed; then the daemon is looked at."""
        async with self._turn:
            await self.supervisor.up.wait()
            chance, self.chance = self.chance, 0.0
            await clients.rest()
            self.censuses.append((self.supervisor.lives, await self._at_rest()))
            await self._count_desktops(clients.ledger)
            self.chance = chance
            clients.go_on()

    async def _at_rest(self) -> Census:
        """Once its tasks are no more than a moment ago."""
        before = await self.supervisor.census()
        async with asyncio.timeout(30):
            while True:
                await asyncio.sleep(0.3)
                now = await self.supervisor.census()
                if now.tasks >= before.tasks and now.sockets >= before.sockets:
                    return now
                before = now

    async def _count_desktops(self, ledger: Ledger) -> None:
        """Each env has one; what is not theirs is gone, within seconds."""
        give_up = time.monotonic() + 15
        there = await self.eyes.desktops()
        while len(there) != self.number and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
            there = await self.eyes.desktops()
        if len(there) != self.number:
            ledger.wrong.append(f"{self.number} envs have {len(there)} desktops: {sorted(there)}")

    async def _end(self) -> None:
        """A clean one, after a last look at what was typed."""
        for desktop_id in await self.eyes.desktops():
            if self.eyes.death(desktop_id) is None:
                await self.eyes.look(desktop_id)
        await self.supervisor.stop()


async def soak(seconds: float, clients: int, seed: int, where: Path, quiet: float = 5.0) -> Soaked:
    """`quiet` is how long resets are measured before; the run takes that, `seconds`, and the time of its rests."""
    random = Random(seed)
    measured = await latency(where, random, quiet)
    began = time.monotonic()
    run = Soak(where, seconds, clients, seed)
    played, watcher = await run.run()
    ledger = played.ledger
    jobs = await asyncio.to_thread(_judge_journal, run.state_dir / "journal.db", ledger, watcher)
    texts = compared(ledger, run.eyes)
    _judge_growth(run.censuses, clients, ledger.wrong)
    return Soaked(
        seconds=time.monotonic() - began,
        clients=clients,
        seed=seed,
        latency=measured,
        ledger=ledger,
        kills=run.kills,
        cut=run.cutter.cut,
        lives=run.supervisor.lives,
        watched=(watcher.events, watcher.connections),
        jobs=jobs,
        texts=texts,
        errors=run.supervisor.errors,
        censuses=run.censuses,
        left=await asyncio.to_thread(_left, run.state_dir),
    )


def _judge_journal(file: Path, ledger: Ledger, watcher: Watcher) -> Counter[str]:
    """Every job that was accepted or is in the journal has one end, the same for all who were told of it."""
    with sqlite3.connect(file) as database:
        rows = {one: json.loads(document) for one, document in database.execute("SELECT id, document FROM jobs")}
        undone = [kind for kind in ("requests", "desktops") if database.execute(f"SELECT 1 FROM {kind}").fetchone()]
    database.close()
    ledger.wrong += [f"there are {kind} left in the journal" for kind in undone]
    ledger.wrong += [f"{job_id} was accepted, and is not in the journal" for job_id in ledger.accepted.keys() - rows]
    for job_id, job in rows.items():
        if job["ended_at"] is None:
            ledger.wrong.append(f"{job_id} has not ended: {job['state']}")
        if (told := ledger.ended.get(job_id, job["state"])) != job["state"]:
            ledger.wrong.append(f"{job_id} ended {told} for its client, and {job['state']} for the journal")
        if watcher.resets[job_id] != 1 or watcher.states[job_id] != job["state"]:
            ledger.wrong.append(
                f"{job_id} ended {job['state']}, with {watcher.resets[job_id]} events of its end, "
                f"the last {watcher.states.get(job_id)}"
            )
        if job["state"] not in ("succeeded", "failed"):
            ledger.wrong.append(f"{job_id} ended {job['state']}, which nobody asked for")
    return Counter(str(job["state"]) for job in rows.values())


def _judge_growth(censuses: list[tuple[int, Census]], clients: int, wrong: list[str]) -> None:
    """Between the first and the last rest of the last life; and between the first rest of all and the last."""
    last_life = [census for life, census in censuses if life == censuses[-1][0]]
    for what, first, last in (
        ("in one life", last_life[0], last_life[-1]),
        ("over all lives", censuses[0][1], censuses[-1][1]),
    ):
        room = RING * EVENT if first is censuses[0][1] else 0
        for name, more in (
            ("rss", MORE_MEMORY + room),
            ("files", MORE_FILES),
            ("threads", MORE_FILES),
            ("tasks", MORE_TASKS),
        ):
            before, after = getattr(first, name), getattr(last, name)
            if after > before + more:
                doing = Counter(last.doing) - Counter(first.doing)
                wrong.append(f"{name} grew {what}: {before} → {after}; tasks more: {dict(doing)}")
    for _, census in censuses:
        if census.sockets > SOCKETS * clients + 16:
            wrong.append(f"a daemon at rest has {census.sockets} TCP sockets")
        if census.state > STATE_LIMIT:
            wrong.append(f"the state directory has {census.state:,} bytes")


def _left(state_dir: Path) -> list[str]:
    """Processes and what they leave, once all has ended; they may take a moment."""
    give_up = time.monotonic() + 15
    while (processes := processes_of(state_dir)) and time.monotonic() < give_up:
        time.sleep(0.1)
    return [
        *(f"process {pid}" for pid in processes),
        *(f"{path.name}" for path in state_dir.glob("*.sock")),
    ]


def _environment(clients: int) -> dict[str, str]:
    return {
        "ENVD_SIM": "outlive,linger=60,boot=0.03,destroy=1",
        "ENVD_ENVS": str(clients),
        "ENVD_SCREEN": "320x240",
        "ENVD_ACTION_PAUSE": "0",
        "ENVD_SETTLE_QUIET": "0",
        "ENVD_REQUEST_RATE": "0",
        "ENVD_BUNDLES": str(BUNDLES),
        "ENVD_KEEP_DESKTOPS": "1",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def place() -> Iterator[Path]:
    """A folder on a real disk, which the journal is measured on."""
    where = Path(tempfile.mkdtemp(prefix="envd-soak-", dir="/var/tmp"))
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


async def main(given: argparse.Namespace) -> bool:
    """Whether nothing is wrong."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(SIGTERM, task.cancel)
    with place() as where:
        async with asyncio.timeout(4 * given.seconds + 600):
            soaked = await soak(given.seconds, given.clients, given.seed, where, quiet=10.0)
    lines = [*soaked.lines(), *soaked.left, *soaked.wrong[:SHOWN], json.dumps(soaked.figures())]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return not soaked.wrong and not soaked.left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="how long things go wrong, beside the rests between")
    parser.add_argument("--clients", type=int, default=64, help="one env for each")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="what goes wrong when")
    try:
        sys.exit(0 if asyncio.run(main(parser.parse_args())) else 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
