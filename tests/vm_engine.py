"""Virtual machines for tests: engines over real QEMU processes, all of one template, which is made by whoever comes
first and thrown away with the test run. TEST_TEMPLATES names a folder that keeps it for the next one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from envd.drivers.base import InstanceSpec, Made, Report
from envd.drivers.qemu.cell import ProcessCell
from envd.drivers.qemu.host import find_qemu
from envd.errors import EnvdError
from envd.guest import Cdp, Guest
from envd.models import Endpoints
from envd.settings import Settings, load
from envd.vm.engine import Engine

SCREEN = (1920, 1080)
MACHINE = {"ram_size": 2 * 1024**3, "cpu_cores": 2}


@cache
def shared() -> Path:
    """A folder on memory-backed storage, whose `templates` all tests of this run use."""
    if kept := os.environ.get("TEST_TEMPLATES"):
        path = Path(kept)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path
    path = Path(tempfile.mkdtemp(prefix="envd-tests-", dir="/dev/shm"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def vm_settings(state_dir: Path, **changes: Any) -> Settings:
    values = {"template_dir": shared() / "templates", **MACHINE, **changes}
    return load({"HOME": os.environ["HOME"]}, env_file=None, provider="qemu", state_dir=state_dir, **values)


@asynccontextmanager
async def engine(state_dir: Path, **changes: Any) -> AsyncIterator[Engine]:
    """Whatever it still has ends with it."""
    settings = vm_settings(state_dir, **changes)
    directory = settings.state_dir / "qemu"
    directory.mkdir(parents=True, exist_ok=True)
    qemu = await find_qemu()
    made_of = {"name": "qemu", "directory": directory, "image": qemu.name, "qemu": qemu.version}
    async with (
        ProcessCell.open(directory, qemu.version) as cell,
        Engine(settings, cell, **made_of) as opened,  # type: ignore[arg-type]  # of several types
    ):
        try:
            yield opened
        finally:
            with anyio.move_on_after(30, shield=True):
                for desktop_id in await opened.list():
                    await opened.destroy(desktop_id)


class Told(Report):
    """Keeps what it is told. `phases` and `notes` are in their order; `reached` is set by the phase `until`."""

    def __init__(self, until: str = "") -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.doing: list[str] = []
        self.reached = anyio.Event()
        self._until = until

    def progress(self, words: str) -> None:
        self.doing.append(words)

    def phase(self, name: str) -> None:
        self.phases.append(name)
        if name == self._until:
            self.reached.set()

    def note(self, words: str) -> None:
        self.notes.append(words)

    async def ready(self, endpoints: Endpoints) -> None:
        await both_answer(endpoints, picture=True)


async def both_answer(endpoints: Endpoints, *, picture: bool = False) -> None:
    """Return once the guest's server and Chromium answer; with `picture` the server must have shown the screen."""
    async with aiohttp.ClientSession() as session:
        guest, cdp = Guest(session, endpoints.guest), Cdp(session, endpoints.cdp)
        while True:
            try:
                await (guest.screenshot(timeout=60) if picture else guest.execute(["true"], timeout=5))
                await cdp.version(timeout=5)
                return
            except EnvdError:
                await anyio.sleep(0.3)


async def run_in(made: Made, command: str) -> str:
    """What a shell command prints in the guest."""
    async with aiohttp.ClientSession() as session:
        done = await Guest(session, made.endpoints.guest).execute(command, shell=True, timeout=60)
    assert done.returncode == 0, done
    return done.stdout.strip()


def spec(name: str) -> InstanceSpec:
    return InstanceSpec(name, SCREEN)
