"""How long `POST /v1/envs/{n}/reset` takes until its 202, with the journal on disk and nothing but that going on."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench_figures import percentile
from daemon_process import daemon

CLIENTS = 100
AIM = 20.0
"""Milliseconds that 99 of 100 resets should stay below."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds. `paced`: a hundred clients, each with a connection of its own that stays open, each sending when it
    likes, about once a second. `burst`: all hundred at the same moment; the last of them waits for the other ones.
    `processor` is what the daemon takes of a processor for one reset, which hardly depends on what else the machine
    does; `load` is the machine's load meanwhile."""

    paced: list[float]
    burst: list[float]
    processor: float
    load: float

    def lines(self) -> list[str]:
        machine = f"{os.cpu_count()} cores, load {self.load:.1f}"
        return [
            f"POST reset → 202, {what}: p50 {statistics.median(took):.1f} ms, p99 {percentile(took, 99):.1f} ms "
            f"(aim: below {AIM:g}; {len(took)} resets, each {self.processor:.1f} ms of a processor; {machine})"
            for what, took in (("100 clients at their own pace", self.paced), ("100 at once", self.burst))
        ]


async def latency(folder: Path, random: Random, seconds: float, bursts: int = 3) -> Latency:
    """Of a daemon of its own, whose boots never end, so that each job waits."""
    resets = round(CLIENTS * (seconds * 1.5 + bursts + 1))
    env = {
        "ENVD_SIM": "boot=3600",
        "ENVD_ENVS": str(min(4096, resets)),
        "ENVD_QUEUE_LIMIT": str(2 * resets),
        "ENVD_REQUEST_RATE": "0",
        "ENVD_LOG_FORMAT": "json",
    }
    async with daemon(folder / "quiet", env=env) as (process, _):
        host, port = process.url.removeprefix("http://").split(":")
        lines = [_Line(*await asyncio.open_connection(host, int(port))) for _ in range(CLIENTS)]
        envs = iter(range(min(4096, resets)))
        for line in lines:
            await line.reset(next(envs))
        before, until = await asyncio.to_thread(_processor, process.pid), time.monotonic() + seconds

        async def at_its_own_pace(line: _Line) -> list[float]:
            took: list[float] = []
            while True:
                await asyncio.sleep(random.uniform(0, 2))
                if time.monotonic() > until:
                    return took
                took.append(await line.reset(next(envs)))

        paced = [one for took in await asyncio.gather(*map(at_its_own_pace, lines)) for one in took]
        load = os.getloadavg()[0]
        burst: list[float] = []
        for _ in range(bursts):
            burst += await asyncio.gather(*(line.reset(next(envs)) for line in lines))
            await asyncio.sleep(0.2)
        spent = await asyncio.to_thread(_processor, process.pid) - before
        for line in lines:
            line.close()
    return Latency(paced, burst, spent / (len(paced) + len(burst)), load)


def _processor(pid: int) -> float:
    """Milliseconds of a processor that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


class _Line:
    """A connection that is kept, with as little of a client as there can be: what is measured is the daemon."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def reset(self, env: int) -> float:
        """Milliseconds until the answer was there. Raises ValueError for any but 202."""
        name = f"quiet-{env}"
        task = {"id": name, "instruction": f"Wait in line as {name}.", "config": []}
        body = json.dumps({"task": task}).encode()
        head = f"POST /v1/envs/{env}/reset HTTP/1.1\r\nHost: 127.0.0.1\r\nIdempotency-Key: {name}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if b" 202 " not in answer.partition(b"\r\n")[0]:
            raise ValueError(f"a reset was answered {answer!r}")
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self._reader.readexactly(int(length.partition(b":")[2]))
        return (time.perf_counter() - began) * 1000

    def close(self) -> None:
        self._writer.close()
