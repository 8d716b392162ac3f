"""What the service manager is told, and the unit that it runs the daemon by."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from daemon_process import daemon

from envd.systemd import Notifier, Pulse

UNIT = Path(__file__).parent.parent / "deploy" / "envd.service"
PROVIDERS = UNIT.parent / "unit.d"
EXPOSURE = 20
"""Tenths of systemd's points: 10 is a service without any protection."""
EXPOSURES = {"without-docker": EXPOSURE, "local": 30, "qemu": 30}
"""The same with what a provider needs."""
STUCK = """
from envd.boot.queue import BootQueue
import anyio

async def run(self, started):
    started.set()
    self.pulse._patience = 0.5
    await anyio.sleep_forever()

BootQueue.run = run
"""
"""A prelude: the queue's consumer hangs, and the loop goes on."""


@contextmanager
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that a service manager listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        yield listener


def heard_until(listener: socket.socket, wanted: str) -> list[str]:
    """The messages up to one with `wanted` in it."""
    heard: list[str] = []
    while not heard or wanted not in heard[-1]:
        heard.append(listener.recv(4096).decode())
    return heard


async def test_the_daemon_says_when_it_is_ready_that_it_lives_and_that_it_ends(tmp_path: Path) -> None:
    with manager(tmp_path) as listener:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
        async with daemon(tmp_path / "state", env=env) as (process, _):
            heard = await anyio.to_thread.run_sync(heard_until, listener, "READY=1")
            assert "STATUS=serving 1 env " in heard[-1]
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    await anyio.to_thread.run_sync(heard_until, listener, "WATCHDOG=1")
                group.cancel_scope.cancel()
            os.kill(process.pid, signal.SIGTERM)
            await anyio.to_thread.run_sync(heard_until, listener, "STOPPING=1")


async def test_the_watchdog_is_not_fed_while_the_consumer_hangs(tmp_path: Path) -> None:
    with manager(tmp_path) as listener:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
        async with daemon(tmp_path / "state", env=env, prelude=STUCK):
            await anyio.to_thread.run_sync(heard_until, listener, "READY=1")
            listener.settimeout(3)

            def silence() -> bool:
                try:
                    while True:
                        listener.recv(4096)
                except TimeoutError:
                    return True

            with anyio.fail_after(20):
                assert await anyio.to_thread.run_sync(silence)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_is_fed_only_where_this_process_is_watched(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environ).watchdog == seconds


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell(READY="1")
    Notifier({}).tell(READY="1")


def test_a_manager_in_the_abstract_namespace_is_reached() -> None:
    name = f"envd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).tell(READY="1", STATUS="well")
        assert listener.recv(100) == b"READY=1\nSTATUS=well"


def test_a_pulse_that_stopped_is_seen() -> None:
    assert Pulse(60).alive
    assert not Pulse(0).alive


systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")


def placed(folder: Path, drop_in: str) -> Path:
    """The unit as it is installed for a provider, with a program that is there."""
    unit, program = folder / UNIT.name, folder / "envd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", UNIT.read_text()))
    if drop_in:
        beside = folder / f"{UNIT.name}.d"
        beside.mkdir()
        (beside / "provider.conf").write_text((PROVIDERS / f"{drop_in}.conf").read_text())
    return unit


@systemd
@pytest.mark.parametrize("drop_in", ["", *EXPOSURES])
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path, drop_in: str) -> None:
    unit = placed(tmp_path, drop_in)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line or "provider.conf" in line]
    assert (done.returncode, ours) == (0, [])


@systemd
@pytest.mark.parametrize("drop_in", ["", *EXPOSURES])
def test_the_unit_exposes_little(tmp_path: Path, drop_in: str) -> None:
    most = EXPOSURES.get(drop_in, EXPOSURE)
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", str(placed(tmp_path, drop_in))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


def test_every_drop_in_is_looked_at() -> None:
    assert {path.stem for path in PROVIDERS.iterdir()} == set(EXPOSURES)
