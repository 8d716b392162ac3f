"""Whoever is the instances of an account: a sim desktop listens on each running one's private address.

    with faulty_account() as aws, guests(aws) as there:
        ...

Ports 5000 and 9222 of 127.30.x.y, in a thread of their own, so that daemons in other processes reach them too. They
open when the instance runs and are gone when it stops or ends: at once for what is called through the proxy.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aws_cloud import REGION, Account
from aws_faults import PATIENCE, FaultyAccount

from envd.drivers.base import InstanceSpec, Report
from envd.drivers.sim import SimDriver
from envd.drivers.sim.desktop import Desktop
from envd.settings import Settings

SCREEN = (1920, 1080)
LOOKS = 0.1
"""Seconds between two looks at the account, for what is called past the proxy."""


class Guests:
    """`desktops` has the sim desktop of each running instance."""

    def __init__(self, aws: FaultyAccount, driver: SimDriver) -> None:
        self._aws = aws
        self._ec2 = aws.client("ec2")
        self._driver = driver
        self._inside: dict[str, _Guest] = {}
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    @property
    def desktops(self) -> dict[str, Desktop]:
        return {instance_id: self._driver.desktops[guest.name] for instance_id, guest in self._inside.items()}

    def look_now(self) -> None:
        """From another thread: return when everything is as the account says."""
        asyncio.run_coroutine_threadsafe(self.look(), self._loop).result(PATIENCE)

    async def look(self) -> None:
        async with self._turn:
            wanted = await asyncio.to_thread(self._running)
            for instance_id in self._inside.keys() - wanted.keys():
                await self._stop(instance_id)
            for instance_id, (address, disk) in wanted.items():
                if instance_id in self._inside and self._inside[instance_id].disk != disk:
                    await self._stop(instance_id)
                if instance_id not in self._inside:
                    await self._start(instance_id, address, disk)

    def _running(self) -> dict[str, tuple[str, int]]:
        """Instance → its address, and how often its disk was replaced."""
        filters = [{"Name": "instance-state-name", "Values": ["running"]}]
        pages = self._ec2.describe_instances(Filters=filters)["Reservations"]
        return {
            one["InstanceId"]: (one["PrivateIpAddress"], self._aws.faults.replaced[one["InstanceId"]])
            for page in pages
            for one in page["Instances"]
        }

    async def _start(self, instance_id: str, address: str, disk: int) -> None:
        guest = _Guest(f"{instance_id}-{len(self._driver.journal)}", disk)
        made = (await self._driver.create(InstanceSpec(guest.name, SCREEN), Report())).endpoints
        for port, url in ((5000, made.guest), (9222, made.cdp)):
            await guest.listen(address, port, int(url.rpartition(":")[2]))
        self._inside[instance_id] = guest

    async def _stop(self, instance_id: str) -> None:
        guest = self._inside.pop(instance_id)
        await guest.close()
        await self._driver.destroy(guest.name)

    async def close(self) -> None:
        for instance_id in tuple(self._inside):
            await self._stop(instance_id)


@dataclass
class _Guest:
    """`disk` counts the disks that the instance has had."""

    name: str
    disk: int
    _servers: list[asyncio.Server] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def listen(self, address: str, port: int, inner: int) -> None:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(_between(reader, writer, inner))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        self._servers.append(await asyncio.start_server(connected, address, port))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        connections = tuple(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: int) -> None:
    """Both directions, until one ends."""
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", inner)
    except OSError:
        writer.transport.abort()
        return

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()

    try:
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
    except OSError:
        pass
    finally:
        for each in (writer, far_writer):
            each.transport.abort()


def settings_in(aws: Account) -> dict[str, Any]:
    """Of a daemon or a driver in that account, by the names of fields."""
    return {
        "provider": "aws",
        "aws_region": REGION,
        "aws_subnet_id": aws.subnets,
        "aws_security_group_id": (aws.security_group,),
        "aws_ami": aws.ami,
    }


@contextmanager
def guests(aws: FaultyAccount, **behaviour: Any) -> Iterator[Guests]:
    """`behaviour` as `Behaviour` has it, for every sim desktop."""
    ready: list[Guests] = []
    started = threading.Event()
    stop = threading.Event()

    async def serve() -> None:
        sim = ",".join(f"{key}={value}" for key, value in behaviour.items())
        settings = Settings(provider="sim", state_dir=Path(), sim=sim)
        async with AsyncExitStack() as stack:
            inside = Guests(aws, await stack.enter_async_context(SimDriver(settings, "guests")))
            stack.push_async_callback(inside.close)
            ready.append(inside)
            started.set()
            while not stop.is_set():
                await inside.look()
                await asyncio.sleep(LOOKS)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    [inside] = ready
    aws.faults.listeners.append(inside.look_now)
    try:
        yield inside
    finally:
        aws.faults.listeners.remove(inside.look_now)
        stop.set()
        thread.join(PATIENCE)
