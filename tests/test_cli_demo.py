"""`envd demo`: where it plays, what it shows and keeps, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_process import envd
from daemon_process import daemon, descendants, environment

from envd import Client
from envd.settings import load
from envd.tasks.grading import find_interpreter

QUICK = {"ENVD_SCREEN": "640x480", "ENVD_ACTION_PAUSE": "0"}
NOBODY = "http://127.0.0.1:1"
CAN_JUDGE = find_interpreter(load({}, env_file=None, provider="sim")) is not None
"""Whether there are evaluators."""


def temporary(folder: Path) -> Path:
    """Where its temporary files go, so that what it leaves is seen."""
    made = folder / "tmp"
    made.mkdir(exist_ok=True)
    return made


async def played(folder: Path, *arguments: str, **settings: str) -> tuple[int, dict[str, Any]]:
    made = temporary(folder)
    words = ("demo", "--pause", "0", "--json", "-o", "frames", *arguments)
    ran = await asyncio.to_thread(envd, folder, *words, TMPDIR=str(made), **settings)
    assert ran.stderr == ""
    told: dict[str, Any] = json.loads(ran.stdout)
    return ran.returncode, told


def says_how_it_ended(code: int, verdict: dict[str, Any]) -> bool:
    """A score where there are evaluators, and elsewhere none with a reason."""
    if CAN_JUDGE:
        return (code, verdict["status"], verdict["score"]) == (0, "scored", 1.0)
    return (code, verdict["status"], verdict["score"]) == (0, "not_evaluable", None) and verdict["detail"]


async def test_without_a_server_it_plays_on_a_daemon_of_its_own_and_leaves_its_frames_alone(tmp_path: Path) -> None:
    code, told = await played(tmp_path, "--provider", "sim", ENVD_URL=NOBODY)
    assert says_how_it_ended(code, told["verdict"])
    assert (told["own_daemon"], told["provider"]) == (True, "sim")
    assert [Path(frame).name for frame in told["frames"]] == [
        "0-observation.png",
        *(f"{number}-step-{number}.png" for number in range(1, 5)),
    ]
    outcomes = {action["outcome"] for step in told["steps"] for action in step["actions"]}
    assert outcomes == {"ok", "special"}
    assert {path.name for path in (tmp_path / "frames").iterdir()} == {
        *(Path(frame).name for frame in told["frames"]),
        "evidence.tar",
    }
    assert list(temporary(tmp_path).iterdir()) == []
    assert not (tmp_path / "state").exists(), "it used the state directory of the settings"


@pytest.mark.local
async def test_on_local_desktops_a_terminal_is_typed_into(tmp_path: Path) -> None:
    code, told = await played(tmp_path, "--provider", "local")
    assert says_how_it_ended(code, told["verdict"])
    outcomes = {action["outcome"] for step in told["steps"] for action in step["actions"]}
    assert outcomes == {"ok", "special"}
    assert list(temporary(tmp_path).iterdir()) == []


async def test_it_plays_on_the_server_that_runs_and_gives_the_env_back(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _), Client(process.url) as client:
        code, told = await played(tmp_path, ENVD_URL=process.url)
        assert says_how_it_ended(code, told["verdict"])
        assert (told["own_daemon"], told["url"]) == (False, process.url)
        assert {lease.state for lease in await client.leases()} <= {"ended"}
        assert (await client.env_state(0)).lease is None
        assert (tmp_path / "frames" / "evidence.tar").exists()


async def test_without_evaluators_it_is_played_well_and_says_what_would_judge_it(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    async with daemon(tmp_path / "state", env={**QUICK, "ENVD_EVALUATORS": str(interpreter)}) as (process, _):
        interpreter.unlink()
        arguments = ("demo", "--pause", "0", "-o", "frames")
        ran = await asyncio.to_thread(envd, tmp_path, *arguments, ENVD_URL=process.url)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "no score" in ran.stdout
        assert "make evaluators" in ran.stdout.splitlines()[-1]
        looked = await asyncio.to_thread(envd, tmp_path, "doctor", "--url", process.url)
        assert looked.returncode == 0
        assert "→ make evaluators, there" in looked.stdout


async def test_where_every_env_is_used_it_disturbs_nobody(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _), Client(process.url) as client:
        async with client.lease(1):
            arguments = ("demo", "--pause", "0", "-o", "frames")
            # Its own daemon cannot make local desktops either, where the programs for them are not found.
            ran = await asyncio.to_thread(
                envd, tmp_path, *arguments, ENVD_URL=process.url, TMPDIR=str(temporary(tmp_path)), PATH="/nonexistent"
            )
            assert await client.jobs() == []
        assert ran.returncode == 0
        assert "has no env that nobody uses (env 0 is leased by" in ran.stdout.splitlines()[0]
        assert "envd step ENV DONE" in ran.stdout.splitlines()[1]
        assert ("make evaluators" in ran.stdout.splitlines()[-1]) is not CAN_JUDGE
        assert "local desktops cannot be had here" in ran.stdout
        assert "sim desktops; a daemon of its own" in ran.stdout


def test_a_server_that_was_named_and_does_not_answer_is_an_error(tmp_path: Path) -> None:
    ran = envd(tmp_path, "demo", "--url", NOBODY, TMPDIR=str(temporary(tmp_path)))
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 2


@asynccontextmanager
async def playing(folder: Path, *arguments: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One that has begun its steps, with a minute between two of them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "envd", "demo", "--pause", "1", "-o", "frames", *arguments),
        env=environment(folder / "state", {"TMPDIR": str(temporary(folder)), "PYTHONUNBUFFERED": "1", **settings}),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            while b"step 1" not in await process.stdout.readline():
                pass
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, id="ctrl-c"), pytest.param(signal.SIGTERM, 143, id="sigterm")]
)
async def test_ended_in_the_middle_it_takes_its_daemon_with_it(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    async with playing(tmp_path, "--provider", "sim") as process:
        below = await asyncio.to_thread(descendants, process.pid)
        assert below
        process.send_signal(number)
        async with asyncio.timeout(30):
            _, said = await process.communicate()
        assert (process.returncode, said) == (code, b"")
        assert [pid for pid in below if _lives(pid)] == []
        assert list(temporary(tmp_path).iterdir()) == []


async def test_killed_in_the_middle_its_daemon_ends_all_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    async with playing(tmp_path, "--provider", "sim") as process:
        below = await asyncio.to_thread(descendants, process.pid)
        process.kill()
        async with asyncio.timeout(30):
            while any(_lives(pid) for pid in below):  # noqa: ASYNC110 - of processes that are no children of ours
                await asyncio.sleep(0.05)
    assert list(temporary(tmp_path).iterdir()) == []


def _lives(pid: int) -> bool:
    """Who has ended and was not waited for yet is no process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_ended_in_the_middle_it_gives_the_env_back(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _), Client(process.url) as client:
        async with playing(tmp_path, ENVD_URL=process.url) as running:
            assert (await client.env_state(0)).lease is not None
            running.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                await running.communicate()
            assert running.returncode == 130
        assert (await client.env_state(0)).lease is None
