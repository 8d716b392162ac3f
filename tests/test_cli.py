"""The command line: what it says, what it returns, and what it does not import."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import daemon, ended_job, environment, reset
from typer.testing import CliRunner

from envd import __version__
from envd.cli import app
from envd.daemon import bound

HEAVY = ["aiohttp", "anyio", "asyncio", "envd.settings", "hypercorn", "rich", "starlette", "structlog"]


def envd(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "envd", *arguments]
    env = environment(folder / "state", settings)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env, cwd=folder)


@pytest.mark.parametrize(
    ("argument", "heavy"),
    [
        pytest.param("--help", [*HEAVY, "pydantic"], id="help"),
        # To run any command at all, typer wants pydantic.
        pytest.param("version", HEAVY, id="version"),
    ],
)
def test_what_needs_nothing_imports_nothing_heavy(argument: str, heavy: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["envd", {argument!r}]
from envd.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stderr == "[]\n"


def test_help_names_every_command() -> None:
    ran = CliRunner().invoke(app, ["--help"])
    assert ran.exit_code == 0
    assert [name for name in ("serve", "watch", "logs", "prewarm", "version") if name not in ran.stdout] == []


def test_the_module_is_the_command(tmp_path: Path) -> None:
    ran = envd(tmp_path, "version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["sevre"], "sevre", id="command"),
        pytest.param(["serve", "--prot", "1"], "--prot", id="option"),
        pytest.param(["serve", "--port", "http"], "--port", id="value"),
    ],
)
def test_a_mistyped_command_line_is_explained(arguments: list[str], told: str) -> None:
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2
    assert told in ran.stderr


def test_a_port_that_is_none_is_a_setting_that_cannot_be_used(tmp_path: Path) -> None:
    ran = envd(tmp_path, "serve", "--port", "70000")
    assert ran.returncode == 78
    assert "ENVD_PORT=70000 (argument)" in ran.stderr


async def test_a_server_that_does_not_answer_is_told_in_two_lines(tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    asked = [
        asyncio.to_thread(envd, tmp_path, command, "--url", f"http://{address}") for command in ("watch", "prewarm")
    ]
    for ran in await asyncio.gather(*asked):
        assert ran.returncode == 1
        assert address in ran.stderr
        assert len(ran.stderr.splitlines()) == 2


def test_a_setting_that_cannot_be_used_stops_a_client_command(tmp_path: Path) -> None:
    ran = envd(tmp_path, "watch", ENVD_ULR="http://127.0.0.1:1")
    assert ran.returncode == 1
    assert "did you mean ENVD_URL" in ran.stderr


async def test_prewarm_waits_for_a_desktop_and_watch_tells_of_a_job(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, session):
        ran = await asyncio.to_thread(envd, tmp_path, "prewarm", ENVD_URL=process.url)
        assert (ran.returncode, ran.stderr) == (0, "")
        async with session.get(f"{process.url}/v1/queue") as answer:
            assert (await answer.json())["spares"] == 1
        job = await ended_job(session, process.url, (await reset(session, process.url))["id"])
        ran = await asyncio.to_thread(envd, tmp_path, "watch", job["id"], "--url", process.url)
        assert ran.returncode == 0
        assert job["id"] in ran.stdout
