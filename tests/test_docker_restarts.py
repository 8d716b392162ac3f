"""A Docker engine that is stopped, killed and started again, and one whose ports are taken. It is an engine of our own:
the one of this host is everybody's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
import pytest
from docker_engine import OwnEngine, docker, image, own_engine

from envd.drivers.base import InstanceSpec, Report
from envd.drivers.docker import DockerDriver
from envd.errors import BootFailed, DockerUnavailable, InfraError, PortConflict
from envd.settings import Settings

__all__ = ["own_engine"]
pytestmark = pytest.mark.docker


class Notes(Report):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, words: str) -> None:
        self.notes.append(words)


def spec(name: str) -> InstanceSpec:
    return InstanceSpec(name, (800, 600))


@pytest.fixture
def running(own_engine: OwnEngine) -> OwnEngine:
    """Whatever the test before did to it."""
    if own_engine.stopped:
        own_engine.start()
    return own_engine


@asynccontextmanager
async def driver(engine: OwnEngine, state_dir: Path) -> AsyncIterator[DockerDriver]:
    settings = Settings(
        provider="docker", state_dir=state_dir, docker_image=image("serves"), docker_host=engine.host, ram_size=1 << 26
    )
    async with DockerDriver(settings, "test") as opened:
        yield opened
        if engine.stopped:
            await anyio.to_thread.run_sync(engine.start)
        for left in await opened.list():
            await opened.destroy(left)
        assert docker("ps", "--all", "--quiet", host=engine.host) == ""


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_desktops_that_ended_with_their_engine_are_known_to_be_dead_and_new_ones_are_made(
    how: str, running: OwnEngine, tmp_path: Path
) -> None:
    async with driver(running, tmp_path) as opened, asyncio.timeout(60):
        await opened.create(spec("t-1"), Report())
        waiting = asyncio.create_task(opened.wait("t-1"))
        await asyncio.sleep(0)
        await anyio.to_thread.run_sync(getattr(running, how))
        with pytest.raises(DockerUnavailable) as caught:
            await opened.create(spec("t-2"), Report())
        assert caught.value.facts["cause"] == "not_running"
        with pytest.raises(InfraError):
            await opened.destroy("t-1")
        with pytest.raises(InfraError):
            await opened.list()
        await anyio.to_thread.run_sync(running.start)
        assert (await waiting).reason
        assert await opened.list() == {"t-1"}
        await opened.destroy("t-1")
        # Deaths are noticed as before.
        await opened.create(spec("t-3"), Report())
        waiting = asyncio.create_task(opened.wait("t-3"))
        await anyio.to_thread.run_sync(lambda: docker("kill", "t-3", host=running.host))
        async with asyncio.timeout(3):
            assert "signal 9" in (await waiting).reason


async def test_an_engine_that_is_away_has_killed_nobody(running: OwnEngine, tmp_path: Path) -> None:
    """An engine that was killed leaves its containers running until it comes back."""
    async with driver(running, tmp_path) as opened:
        await opened.create(spec("t-1"), Report())
        waiting = asyncio.create_task(opened.wait("t-1"))
        await anyio.to_thread.run_sync(running.kill)
        await asyncio.sleep(1.5)
        assert not waiting.done()
        assert await opened.log_tail("t-1") == ()
        await anyio.to_thread.run_sync(running.start)
        async with asyncio.timeout(20):
            await waiting


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3])
async def test_an_engine_that_stops_while_a_desktop_boots_fails_that_boot_and_leaves_nothing(
    seconds: float, running: OwnEngine, tmp_path: Path
) -> None:
    async with driver(running, tmp_path) as opened, asyncio.timeout(60):
        creating = asyncio.create_task(opened.create(spec("t-1"), Report()))
        await asyncio.sleep(seconds)
        await anyio.to_thread.run_sync(running.kill)
        with contextlib.suppress(BootFailed):
            await creating
        with pytest.raises(InfraError):
            await opened.destroy("t-1")
        await anyio.to_thread.run_sync(running.start)
        await opened.destroy("t-1")
        assert await opened.list() == frozenset()
        await opened.create(spec("t-2"), Report())


@asynccontextmanager
async def ports_taken(engine: OwnEngine, count: int) -> AsyncIterator[None]:
    """Those that the engine would choose next: it goes through its range in order."""
    docker(
        "run", "--detach", "--rm", "--name", "last", "--publish", "127.0.0.1::5000", image("serves"), host=engine.host
    )
    shown = json.loads(docker("inspect", "last", host=engine.host))[0]
    docker("rm", "--force", "--volumes", "last", host=engine.host)
    last = int(shown["NetworkSettings"]["Ports"]["5000/tcp"][0]["HostPort"])
    with contextlib.ExitStack() as held:
        for port in range(last + 1, last + 1 + count):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


async def test_a_port_that_is_taken_is_left_for_others(running: OwnEngine, tmp_path: Path) -> None:
    heard = Notes()
    async with driver(running, tmp_path) as opened, ports_taken(running, 15):
        await opened.create(spec("t-1"), heard)
        assert "A port that Docker chose is taken" in heard.notes[0]
        assert await opened.list() == {"t-1"}


async def test_ports_that_are_all_taken_are_a_port_conflict(running: OwnEngine, tmp_path: Path) -> None:
    async with driver(running, tmp_path) as opened, ports_taken(running, 300):
        with pytest.raises(PortConflict, match=r"address already in use|already allocated") as caught:
            await opened.create(spec("t-1"), Report())
        assert "ss -ltnp" in caught.value.hint
        await opened.destroy("t-1")
