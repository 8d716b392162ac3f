"""What the daemon says of its host: measured, of this moment, and never at the price of the daemon."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
import structlog
import structlog.testing

from envd.host import SAMPLE_SECONDS, Host
from envd.telemetry.watchdog import IDLE, Watchdog, _tell


async def test_a_sample_tells_of_processors_memory_disk_and_this_process(tmp_path: Path) -> None:
    host = Host(tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        with anyio.fail_after(5):
            sample = await host.next()
        tasks.cancel_scope.cancel()
    assert host.samples == (sample,)
    assert 0 <= sample.cpu <= 1
    assert sample.cores >= 1
    assert 0 < sample.memory_available < sample.memory_total
    assert 0 < sample.process_memory < sample.memory_total
    assert sample.disk_total == shutil.disk_usage(tmp_path).total
    assert abs(time.time() - sample.at) < 5


async def test_a_loop_that_was_held_up_is_seen(tmp_path: Path) -> None:
    host = Host(tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        with anyio.fail_after(5):
            await host.next()
        await anyio.lowlevel.checkpoint()
        until = time.monotonic() + 0.7
        while time.monotonic() < until:  # what a blocking call does
            pass
        with anyio.fail_after(5 + SAMPLE_SECONDS):
            sample = await host.next()
        tasks.cancel_scope.cancel()
    assert sample.loop_lag_s >= 0.5


async def test_a_state_directory_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.host.SAMPLE_SECONDS", 0.01)
    folder = tmp_path / "state"
    host = Host(folder)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        with anyio.fail_after(5), structlog.testing.capture_logs() as logged:
            while not logged:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
        assert host.latest is None
        await anyio.Path(folder).mkdir()
        with anyio.fail_after(5):
            sample = await host.next()
        tasks.cancel_scope.cancel()
    assert sample.disk_total > 0


@pytest.mark.parametrize(
    ("file", "text"), [("stat", "cpu\n"), ("stat", "cpu x y z\n"), ("meminfo", "MemTotal: 5 kB\n"), ("self/status", "")]
)
async def test_a_kernel_that_tells_less_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str
) -> None:
    monkeypatch.setattr("envd.host.SAMPLE_SECONDS", 0.01)
    usual = {"stat": "cpu 1 2 3 4 5 6 7 8 9\n", "meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n", "self/status": ""}
    await anyio.Path(tmp_path, "self").mkdir()
    for name, words in {**usual, file: text}.items():
        await anyio.Path(tmp_path, name).write_text(words)
    host = Host(tmp_path, tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        with anyio.fail_after(5), structlog.testing.capture_logs() as logged:
            while not logged and host.latest is None:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
        await anyio.Path(tmp_path, file).write_text(usual[file])
        with anyio.fail_after(5):
            sample = await host.next()
        tasks.cancel_scope.cancel()
    assert sample.memory_available == 5 * 1024


def hold_up_the_loop(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


async def test_who_holds_up_the_loop_is_named_while_it_does_and_once_a_minute() -> None:
    with structlog.testing.capture_logs() as logged, Watchdog(patience=0.3, quiet=60):
        await anyio.sleep(0.05)
        hold_up_the_loop(1.0)
        told = [line for line in logged if line["event"] == "the event loop is held up"]
    (line,) = told
    assert line["seconds"] >= 0.3
    assert any("in hold_up_the_loop" in frame for frame in line["stack"])
    assert line["task"] == asyncio.current_task().get_name()  # type: ignore[union-attr]


async def test_the_loop_that_is_held_up_again_is_told_of_when_it_is_time() -> None:
    with structlog.testing.capture_logs() as logged, Watchdog(patience=0.3, quiet=0.9) as watchdog:
        for _ in range(3):
            watchdog.beat()
            hold_up_the_loop(0.6)
        told = [line["untold"] for line in logged if line["event"] == "the event loop is held up"]
    assert told == [0, 1]


async def test_a_loop_that_turns_is_not_spoken_of() -> None:
    with structlog.testing.capture_logs() as logged, Watchdog(patience=1.0, quiet=0) as watchdog:
        for _ in range(10):
            watchdog.beat()
            await anyio.sleep(0.05)
    assert logged == []


def test_threads_that_wait_for_something_to_do_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # In tests blockbuster is between a thread and what it waits in.
    monkeypatch.setattr("envd.telemetry.watchdog.IDLE", (*IDLE, "blockbuster.py"))
    over, begun = threading.Event(), threading.Event()

    def works() -> None:
        begun.set()
        while not over.is_set():
            hold_up_the_loop(0.01)

    threads = [threading.Thread(target=over.wait, name="idle"), threading.Thread(target=works, name="busy")]
    for thread in threads:
        thread.start()
    begun.wait(10)
    loop = asyncio.new_event_loop()
    try:
        with structlog.testing.capture_logs() as logged:
            _tell(1.0, loop, 0, 0)
    finally:
        over.set()
        loop.close()
        for thread in threads:
            thread.join(10)
    names = {name.partition(" ")[0] for name in logged[0]["threads"]}
    assert "busy" in names
    assert "idle" not in names
