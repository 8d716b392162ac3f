"""A whole daemon in the test's own body: the service over sim desktops, and hypercorn on a port of its own.

    async with serving(Behaviour(boot_s=1), envs=2) as served:
        job = await served.reset(0, task={"id": "t-1", "config": [], "evaluator": {"func": "infeasible"}})
        verdict = await served.evaluate(0)

Everything is real but the desktops: sockets, the queue, the probes. Leaving it drains the service, as the daemon does.
Its state is in a directory of its own, which is gone afterwards. The first picture of a screen is taken, whether it is
at rest or not: sim desktops change by input alone.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.typing import ASGIFramework

from envd.app import create_app
from envd.client.sse import Message, SseParser
from envd.daemon import bound, hypercorn_config, url_of
from envd.drivers.base import Driver
from envd.drivers.sim import Desktop, SimDriver
from envd.drivers.sim.driver import Behaviours
from envd.service import Service, open_service
from envd.settings import Settings, load

SCREEN = (320, 240)
QUICK: dict[str, Any] = {
    "provider": "sim",
    "screen": SCREEN,
    "action_pause": 0.0,
    "wait_seconds": 0.0,
    "settle_quiet": 0.0,
    "drain_seconds": 0.2,
}
CLICK = "Thought: The button.\nAction: click(start_box='(100,100)')"
DONE = "Thought: It is there.\nAction: finished(content='ok')"


@dataclass
class Served:
    """A running daemon and a client of it. `app_tasks` of hypercorn are not ours to see; `service` is."""

    url: str
    settings: Settings
    service: Service
    driver: Driver
    http: aiohttp.ClientSession

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def sim(self) -> SimDriver:
        assert isinstance(self.driver, SimDriver)
        return self.driver

    def desktop(self, env: int = 0) -> Desktop:
        """The sim desktop that `env` plays on."""
        desktop = self.service.env(env).desktop
        assert desktop is not None
        return self.sim.desktops[desktop.id]

    async def ask(self, method: str, path: str, body: Any = None, **how: Any) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or bytes), headers."""
        if body is not None:
            how["json"] = body
        async with self.http.request(method, self.url + path, **how) as response:
            is_json = response.content_type.endswith("json")
            return (
                response.status,
                await response.json(content_type=None) if is_json else await response.read(),
                (response.headers),
            )

    async def get(self, path: str, **how: Any) -> tuple[int, Any]:
        status, body, _ = await self.ask("GET", path, **how)
        return status, body

    async def post(self, path: str, body: Any = None, **how: Any) -> tuple[int, Any]:
        status, answer, _ = await self.ask("POST", path, body, **how)
        return status, answer

    async def reset(self, env: int = 0, **asked: Any) -> dict[str, Any]:
        """The job of a reset, ended."""
        status, job = await self.post(f"/v1/envs/{env}/reset", asked)
        assert status == 202, job
        return await self.ended(job["id"])

    async def ended(self, job_id: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            await self.service.queue.ended(job_id)
        return cast(dict[str, Any], (await self.get(f"/v1/jobs/{job_id}"))[1])

    async def play(self, env: int = 0, **asked: Any) -> Desktop:
        """The desktop of a fresh episode."""
        job = await self.reset(env, **asked)
        assert job["state"] == "succeeded", job
        return self.desktop(env)

    async def evaluate(self, env: int = 0) -> dict[str, Any]:
        """The verdict of the env's episode."""
        status, verdict = await self.post(f"/v1/envs/{env}/evaluate")
        assert status == 200, verdict
        return cast(dict[str, Any], verdict)

    async def in_state(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job, as soon as it is in one of `states`."""
        async with asyncio.timeout(20):
            while (job := (await self.get(f"/v1/jobs/{job_id}"))[1])["state"] not in states:
                await self.service.queue.changed(job_id, job["version"], 20)
        return cast(dict[str, Any], job)

    @asynccontextmanager
    async def stream(self, path: str, **headers: str) -> AsyncIterator[EventReader]:
        """An open event stream; `_` in a header's name stands for `-`."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.get(self.url + path, headers=given) as response:
            yield EventReader(response)


class EventReader:
    """What comes over a stream: `next` message, `rest` until it closes; `raw` is every byte so far."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.raw = b""
        self.parser = SseParser()
        self._messages: list[Message] = []

    async def next(self) -> Message:
        """Raises EOFError at the end of the stream."""
        async with asyncio.timeout(20):
            while not self._messages:
                if not await self._read():
                    raise EOFError
        return self._messages.pop(0)

    async def until(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """The messages up to the first that is wanted, itself included."""
        found = [await self.next()]
        while not wanted(found[-1]):
            found.append(await self.next())
        return found

    async def rest(self) -> list[Message]:
        async with asyncio.timeout(20):
            while await self._read():
                pass
        messages, self._messages = self._messages, []
        return messages

    async def comment(self) -> None:
        """Return once a heartbeat has come."""
        async with asyncio.timeout(20):
            while b"\n: " not in self.raw:
                assert await self._read()

    async def _read(self) -> bool:
        chunk = await self.response.content.readany()
        self.raw += chunk
        self._messages += self.parser.feed(chunk)
        return bool(chunk)


@asynccontextmanager
async def serving(
    behaviour: Behaviours | None = None, *, driver: Driver | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Run a daemon on `driver`, else on sim desktops that behave as `behaviour`. `settings` are fields of Settings.

    A failure in the block comes out as it is, not in an exception group.
    """
    closing, started = asyncio.Event(), asyncio.Event()
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="envd-") as state, bound("127.0.0.1", 0) as listener:
        loaded = load({}, env_file=None, **{"state_dir": Path(state), **QUICK, **settings})
        driver = driver or SimDriver(loaded, "test01", behaviour)
        url = url_of(listener)
        try:
            async with (
                open_service(loaded, "test01", driver) as service,
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
                asyncio.TaskGroup() as tasks,
            ):
                core = tasks.create_task(service.run(started.set))
                await started.wait()
                app = cast(ASGIFramework, create_app(service))
                config = hypercorn_config(f"fd://{listener.detach()}", service.settings)
                web = tasks.create_task(hypercorn_serve(app, config, shutdown_trigger=closing.wait))
                try:
                    yield Served(url, loaded, service, driver, http)
                except Exception as error:  # noqa: BLE001 - the test's own failure, raised again below
                    failures.append(error)
                finally:
                    await service.drain()
                    await http.close()
                    closing.set()
                    core.cancel()
                    await asyncio.wait({core, web})
        except BaseExceptionGroup as group:
            failures += group.exceptions
    if failures:
        raise failures[0]


@asynccontextmanager
async def raw_connection(
    address: tuple[str, int], receive_buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A plain TCP connection, for what no HTTP client would send."""
    plain = socket.socket()
    plain.setblocking(False)
    if receive_buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(plain, address)
    reader, writer = await asyncio.open_connection(sock=plain, limit=2**20)
    try:
        yield reader, writer
    finally:
        writer.close()


async def eventually(fact: Callable[[], bool], within: float = 10) -> None:
    """Return once `fact` holds; fails after `within` seconds. For what nothing announces."""
    end = time.monotonic() + within
    while not fact():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)
