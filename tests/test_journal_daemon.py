"""The daemon on a journal that is in trouble: a full disk, a spoilt file, a file of a newer envd."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemon_process import daemon, ended_job, reset, start

from envd.journal import FILE

ENV = {"ENVD_ENVS": "2", "ENVD_SCREEN": "320x240", "ENVD_SETTLE_QUIET": "0", "ENVD_ACTION_PAUSE": "0"}
OUTLIVES = {**ENV, "ENVD_SIM": "outlive,linger=10"}


async def post(session: aiohttp.ClientSession, url: str, body: Any = None) -> tuple[int, Any]:
    async with session.post(url, json=body or {}) as answer:
        return answer.status, await answer.json()


async def until_ready(session: aiohttp.ClientSession, url: str, wanted: bool) -> list[str]:
    """What /readyz gives as reasons, once it says `wanted`."""
    async with asyncio.timeout(20):
        while True:
            async with session.get(f"{url}/readyz") as answer:
                told = await answer.json()
            if told["ready"] is wanted:
                reasons: list[str] = told["reasons"]
                return reasons
            await asyncio.sleep(0.1)


def fill(path: Path) -> None:
    """Until the disk takes no more."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_on_a_full_disk_no_new_work_is_taken_and_what_runs_goes_on(small_disk: Path) -> None:
    state = small_disk / "state"
    async with daemon(state, env=ENV) as (process, session):
        url = process.url
        await ended_job(session, url, (await reset(session, url))["id"])
        filler = small_disk / "filler"
        fill(filler)
        reasons = await until_ready(session, url, False)
        assert any("disk" in reason or "journal" in reason for reason in reasons), reasons
        status, problem = await post(session, f"{url}/v1/envs/1/reset")
        assert (status, problem["code"]) == (503, "disk_low")
        status, result = await post(session, f"{url}/v1/envs/0/step", {"actions": ["pyautogui.write('a')"]})
        assert (status, result["actions"][0]["outcome"]) == (200, "ok")
        filler.unlink()
        assert await until_ready(session, url, True) == []
        assert (await post(session, f"{url}/v1/envs/1/reset"))[0] == 202


async def test_a_spoilt_journal_is_set_aside_and_its_desktops_are_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with daemon(state, env=OUTLIVES) as (process, session):
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
    (state / FILE).write_bytes(os.urandom(100_000))
    for beside in ("-wal", "-shm"):
        (state / f"{FILE}{beside}").unlink(missing_ok=True)
    async with daemon(state, env=OUTLIVES) as (process, session):
        assert "set aside" in process.text
        assert len([path for path in state.iterdir() if "broken" in path.name]) >= 1
        async with session.get(f"{process.url}/v1/jobs/{job['id']}") as answer:
            assert answer.status == 404
        async with session.get(f"{process.url}/v1/envs/0") as answer:
            assert (await answer.json())["state"] == "empty"
        assert f"'desktop_id': '{job['desktop_id']}'" in str(process.records())
        assert any("Removing a desktop of an earlier life" in line for line in process.log)


async def test_a_journal_of_a_newer_envd_stops_the_start(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with daemon(state, env=ENV):
        pass
    with sqlite3.connect(state / FILE) as database:
        database.execute("PRAGMA user_version = 999")
    database.close()
    refused = await start(state, env=ENV)
    assert await refused.ended(30) == 78
    assert "newer envd" in refused.text
