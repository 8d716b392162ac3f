"""`envd gc`: what a dead daemon left is removed after a yes, and nothing else ever is."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from cli_process import envd, on_terminal
from daemon_process import daemon, ended_job, reset

from envd.daemon import daemon_id, locked
from envd.drivers.sim import SimHost

SETTINGS = {"ENVD_SCREEN": "320x240", "ENVD_SETTLE_QUIET": "0"}


def left_behind(folder: Path) -> Path:
    """The files of a local desktop that nobody has any more."""
    state_dir = folder / "state"
    made = state_dir / "local" / "desktops" / "envd-abc123-0000000000" / "home"
    made.mkdir(parents=True)
    (made / "file").write_bytes(b"x" * 10_000)
    daemon_id(state_dir)
    return made.parent


def told(ran: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert (ran.returncode, ran.stderr) == (code, "")
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def test_it_shows_first_and_removes_after_a_yes(tmp_path: Path) -> None:
    desktop = left_behind(tmp_path)
    dry = envd(tmp_path, "gc", "--dry-run")
    assert (dry.returncode, desktop.exists()) == (0, True)
    assert desktop.name in dry.stdout
    assert "1 desktop would be removed" in dry.stdout
    unasked = envd(tmp_path, "gc")
    assert (unasked.returncode, desktop.exists()) == (1, True)
    assert "--yes" in unasked.stderr
    code, _ = on_terminal(tmp_path, "gc", answers=[("Remove them?", "n")])
    assert (code, desktop.exists()) == (1, True)
    code, shown = on_terminal(tmp_path, "gc", answers=[("Remove them?", "y")])
    assert (code, desktop.exists()) == (0, False)
    assert f"{desktop.name} removed" in shown
    assert told(envd(tmp_path, "gc", "--json"))["left"] == []


def test_while_the_daemon_runs_nothing_is_touched(tmp_path: Path) -> None:
    desktop = left_behind(tmp_path)
    with locked(tmp_path / "state"):
        document = told(envd(tmp_path, "gc", "--yes", "--json"))
        said = envd(tmp_path, "gc", "--yes")
    assert (document["daemon_runs"], document["removed"]) == (True, [])
    assert "It sweeps by itself" in said.stdout
    assert desktop.exists()


def test_where_no_daemon_ever_was_nothing_is_made_up(tmp_path: Path) -> None:
    ran = envd(tmp_path, "gc", "--yes")
    assert ran.returncode == 0
    assert "No daemon ever ran" in ran.stdout
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("provider", ["local", "qemu"])
def test_what_is_named_unlike_a_desktop_is_not_ours_to_remove(tmp_path: Path, provider: str) -> None:
    state_dir = tmp_path / "state"
    other = state_dir / provider / "desktops" / "My Notes"
    other.mkdir(parents=True)
    link = other.parent / "envd-abc123-1111111111"
    link.symlink_to(tmp_path)
    daemon_id(state_dir)
    assert told(envd(tmp_path, "gc", "--yes", "--json"))["left"] == []
    assert other.exists()
    assert link.is_symlink()


def test_an_engine_that_does_not_answer_is_told_and_the_rest_removed(tmp_path: Path) -> None:
    desktop = left_behind(tmp_path)
    nobody = {"PROVIDER": "docker", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}
    document = told(envd(tmp_path, "gc", "--yes", "--json", **nobody), code=1)
    assert (document["removed"], desktop.exists()) == ([desktop.name], False)
    assert [words for words in document["unseen"] if words.startswith("containers. ")] == document["unseen"] != []


async def test_desktops_that_outlived_a_killed_daemon_are_removed(tmp_path: Path) -> None:
    env = SETTINGS | {"ENVD_SIM": "outlive"}
    async with daemon(tmp_path / "state", env=env) as (process, session):
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
        assert job["state"] == "succeeded"
        process.signal(SIGKILL)
        await process.process.wait()
        looked = told(await asyncio.to_thread(envd, tmp_path, "gc", "--dry-run", "--json"))
        assert [(one["provider"], one["desktop"]) for one in looked["left"]] == [("sim", job["desktop_id"])]
        done = told(await asyncio.to_thread(envd, tmp_path, "gc", "--yes", "--json"))
        assert (done["removed"], done["kept"]) == ([job["desktop_id"]], {})
        async with SimHost(tmp_path / "state") as host:
            assert await host.ask("list") == []


@pytest.mark.docker
async def test_containers_of_a_killed_daemon_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    env = SETTINGS | {"PROVIDER": "docker", "ENVD_DOCKER_IMAGE": "envd/desktop"}
    other = await asyncio.to_thread(_container, "io.envd.daemon=ffffff")
    try:
        async with daemon(tmp_path / "state", env=env) as (process, session):
            job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
            assert job["state"] == "succeeded"
            process.signal(SIGKILL)
            await process.process.wait()
            done = told(await asyncio.to_thread(envd, tmp_path, "gc", "--yes", "--json", PROVIDER="docker"))
            assert (done["removed"], done["kept"]) == ([job["desktop_id"]], {})
            left = await asyncio.to_thread(
                _docker, "ps", "-aq", "--filter", f"label=io.envd.desktop={job['desktop_id']}"
            )
            assert left == ""
            assert await asyncio.to_thread(_docker, "ps", "-aq", "--no-trunc", "--filter", f"id={other}") == other
    finally:
        await asyncio.to_thread(_docker, "rm", "-fv", other)


def _container(label: str) -> str:
    return _docker("create", "--label", label, "--label", "io.envd.desktop=theirs", "envd/desktop", "true")


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
