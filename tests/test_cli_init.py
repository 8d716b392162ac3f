"""`envd init`: the file that it writes starts a daemon, and nobody's file is lost to it."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import aiohttp
import pytest
from cli_process import envd, on_terminal
from daemon_process import daemon
from dotenv import dotenv_values

from envd.cli.init import Answers, Choice, merged, networks, proposed, settings_of
from envd.errors import SettingsError

UNSET = {"PROVIDER": ""}
"""What the tests' own environment would say instead of the file."""
FOUND = [Choice("local", False, "no bubblewrap"), Choice("docker", True, image="envd/desktop"), Choice("sim", True)]


def kept(folder: Path) -> dict[str, str | None]:
    return dict(dotenv_values(folder / ".env"))


async def test_the_file_starts_a_daemon_that_wants_the_token_which_was_made(tmp_path: Path) -> None:
    ran = envd(tmp_path, "init", "--yes", "--provider", "sim", "--reach", "token", "--envs", "3", **UNSET)
    assert (ran.returncode, ran.stderr) == (0, "")
    token = kept(tmp_path)["ENVD_TOKEN"]
    assert token is not None
    assert len(token) == 64
    assert token not in ran.stdout
    assert "envd serve" in ran.stdout
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    async with daemon(tmp_path / "state", env=UNSET) as (process, session):
        assert process.url.startswith("http://0.0.0.0:")
        async with session.get(f"{process.url}/v1/envs") as answer:
            assert answer.status == 401
        async with session.get(f"{process.url}/v1/envs", headers={"Authorization": f"Bearer {token}"}) as answer:
            assert (answer.status, len((await answer.json())["envs"])) == (200, 3)
        async with session.get(f"{process.url}/version", headers={"Authorization": f"Bearer {token}"}) as answer:
            assert (await answer.json())["provider"] == "sim"


@pytest.mark.parametrize(
    "line",
    [
        "ENVD_TOKEN='#0123456789abcdef'",
        """ENVD_TOKEN="'0123456789abcdef'" # quotes and all""",
        "export ENVD_TOKEN = 0123456789abcdef  # ours",
        r"ENVD_TOKEN='a\\b0123456789abcdef'",
        "ENVD_TOKEN='${HOME}0123456789abcdef'",
    ],
)
def test_a_token_that_trainers_have_stays_what_it_is_however_it_is_written(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f"{line}\n")
    before = dotenv_values(tmp_path / ".env", interpolate=False)
    ran = envd(tmp_path, "init", "--yes", "--force", "--provider", "sim", "--envs", "2", **UNSET)
    assert (ran.returncode, ran.stderr) == (0, "")
    after = dotenv_values(tmp_path / ".env", interpolate=False)
    assert after["ENVD_TOKEN"] == before["ENVD_TOKEN"]
    assert after["ENVD_ENVS"] == "2"
    assert line in (tmp_path / ".env").read_text().splitlines()


async def test_a_network_that_is_named_needs_no_token(tmp_path: Path) -> None:
    ran = envd(tmp_path, "init", "--yes", "--provider", "sim", "--network", "127.0.0.0/8", **UNSET)
    assert ran.returncode == 0
    assert "ENVD_TOKEN" not in kept(tmp_path)
    async with daemon(tmp_path / "state", env=UNSET) as (process, session):
        await _answers(session, process.url.replace("0.0.0.0", "127.0.0.1"))


async def _answers(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(f"{url}/v1/envs") as answer:
        assert answer.status == 200


def test_the_questions_are_asked_on_a_terminal_and_return_takes_what_is_proposed(tmp_path: Path) -> None:
    answers = (("makes the desktops", "sim"), ("may reach", "tok"), ("played on at once", ""))
    code, shown = on_terminal(tmp_path, "init", answers=answers, **UNSET)
    assert code == 0
    said = kept(tmp_path)
    assert (said["PROVIDER"], said["ENVD_ENVS"], said["ENVD_HOST"]) == ("sim", "1", "0.0.0.0")
    assert "bubblewrap" in shown, "each choice is explained"


def test_an_answer_that_is_none_is_asked_for_again(tmp_path: Path) -> None:
    answers = (
        ("makes the desktops", "vmware"),
        ("one of", "sim"),
        ("may reach", ""),
        ("at once", "0"),
        ("1 to 4096", "2"),
    )
    code, _ = on_terminal(tmp_path, "init", answers=answers, **UNSET)
    assert (code, kept(tmp_path)["ENVD_ENVS"]) == (0, "2")


def test_a_file_that_is_there_is_changed_after_a_yes_alone_and_keeps_its_other_lines(tmp_path: Path) -> None:
    before = "# mine\nENVD_MAX_STEPS=30\nPROVIDER=sim\n\nWANDB_KEY=secret\nENVD_ENVS=2\n"
    (tmp_path / ".env").write_text(before)
    refused = envd(tmp_path, "init", "--yes", "--envs", "5", **UNSET)
    assert (refused.returncode, (tmp_path / ".env").read_text()) == (1, before)
    assert "--force" in refused.stderr
    answers = (("Who makes", ""), ("may reach", ""), ("Write that?", "n"))
    code, shown = on_terminal(tmp_path, "init", "--envs", "5", answers=answers, **UNSET)
    assert (code, (tmp_path / ".env").read_text()) == (1, before)
    assert "ENVD_ENVS=5" in shown
    ran = envd(tmp_path, "init", "--yes", "--force", "--envs", "5", **UNSET)
    assert ran.returncode == 0
    assert (tmp_path / ".env").read_text() == before.replace("ENVD_ENVS=2", "ENVD_ENVS=5")


def test_a_token_that_trainers_have_stays(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PROVIDER=sim\nENVD_TOKEN=kept-by-trainers\nENVD_HOST=0.0.0.0\n")
    ran = envd(tmp_path, "init", "--yes", "--force", "--json", **UNSET)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["settings"]["ENVD_TOKEN"] == "…"
    assert kept(tmp_path)["ENVD_TOKEN"] == "kept-by-trainers"
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_asked_for_what_the_file_says_already_nothing_is_written(tmp_path: Path) -> None:
    assert envd(tmp_path, "init", "--yes", "--provider", "sim", **UNSET).returncode == 0
    before = (tmp_path / ".env").stat()
    again = envd(tmp_path, "init", "--yes", "--json", **UNSET)
    assert (again.returncode, json.loads(again.stdout)["written"]) == (0, False)
    assert (tmp_path / ".env").stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        pytest.param(
            "ENVD_MAX_STEP=3\n", ("--yes", "--force"), "ENVD_MAX_STEPS", id="a line that no daemon starts with"
        ),
        pytest.param("", ("--yes", "--provider", "vmware"), "There is no provider vmware", id="no such provider"),
        pytest.param("", ("--yes", "--network", "office"), "10.100.4.0/24", id="no network"),
        pytest.param("", (), "Nobody can be asked", id="no terminal"),
    ],
)
def test_what_cannot_be_written_is_told_and_the_file_left_alone(
    tmp_path: Path, content: str, arguments: tuple[str, ...], told: str
) -> None:
    if content:
        (tmp_path / ".env").write_text(content)
    ran = envd(tmp_path, "init", *arguments, **UNSET)
    assert ran.returncode == 1
    assert told in ran.stderr
    assert len(ran.stderr.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ([".env"] if content else [])
    assert not content or (tmp_path / ".env").read_text() == content


def test_what_the_environment_says_instead_is_told(tmp_path: Path) -> None:
    ran = envd(tmp_path, "init", "--yes", "--provider", "docker")  # the tests' environment has PROVIDER=sim
    assert ran.returncode == 0
    assert "PROVIDER is set in the environment too" in ran.stdout


def test_what_works_here_is_proposed_first() -> None:
    assert proposed({}, FOUND) == Answers("docker", "host", 1, image="envd/desktop")
    assert proposed({"PROVIDER": "local", "ENVD_ENVS": "4"}, FOUND).provider == "local"
    assert proposed({"ENVD_TOKEN_FILE": "tokens"}, FOUND).reach == "token"


def test_a_file_of_tokens_needs_no_other_token() -> None:
    said = settings_of(Answers("sim", "token", 1), {"ENVD_TOKEN_FILE": "tokens"})
    assert said == {"PROVIDER": "sim", "ENVD_ENVS": "1", "ENVD_HOST": "0.0.0.0"}


def test_for_this_host_alone_what_opened_it_is_taken_out() -> None:
    text = "export ENVD_HOST=0.0.0.0\nENVD_ALLOW=10.0.0.0/8\nPROVIDER=sim\n"
    assert merged(text, settings_of(Answers("sim", "host", 1), {})) == "PROVIDER=sim\nENVD_ENVS=1\n"


def test_networks_are_written_as_the_daemon_reads_them() -> None:
    assert networks(" 10.0.0.7/24, 192.168.1.5 ") == "10.0.0.0/24,192.168.1.5/32"
    with pytest.raises(SettingsError):
        networks(" , ")


async def test_a_daemon_that_runs_already_is_told_since_the_new_one_would_be_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state") as (process, _):
        ran = await asyncio.to_thread(envd, tmp_path, "init", "--yes", "--provider", "sim", **UNSET)
        assert ran.returncode == 0
        assert f"(process {process.pid}), and keeps its settings" in ran.stdout
        port = process.url.rpartition(":")[2]
        other = {"ENVD_STATE_DIR": str(tmp_path / "other"), "ENVD_PORT": port}
        ran = await asyncio.to_thread(envd, tmp_path, "init", "--yes", **UNSET, **other)
        assert f"Something listens on port {port} now" in ran.stdout
    ran = envd(tmp_path, "init", "--yes", ENVD_PORT="0", **UNSET)
    assert "now" not in ran.stdout
