"""What the daemon says of its host: measured, of this moment, and never at the price of the daemon."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
import structlog
import structlog.testing

from envd.host import SAMPLE_SECONDS, Host


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
