"""The command line and servers that mean harm: whatever they answer, it is printed as words, and written where it was
said that it would be."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from aiohttp import web
from cli_process import envd
from rich.text import Text

from envd.cli import app, completion
from envd.cli.listing import PlainConsole
from envd.errors import NotFound
from envd.models import Env, EnvState, Episode, ResetPath

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31mrm\u202efdp"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@asynccontextmanager
async def answering(answers: dict[str, Any], status: int = 200, kind: str = "application/json") -> AsyncIterator[str]:
    """The URL of a server that answers these documents, by path."""

    async def answer(request: web.Request) -> web.Response:
        document = answers.get(request.path, answers.get("*"))
        if isinstance(document, bytes):
            return web.Response(body=document, content_type="application/x-tar")
        return web.json_response(document, status=status, content_type=kind)

    server = web.Application()
    server.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(server)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        pytest.param(("ls", "--episodes"), {"/v1/episodes": {"episodes": [EVIL]}}, id="episodes"),
        pytest.param(
            ("version",),
            {"/version": {"version": EVIL, "provider": EVIL, "daemon_id": EVIL, "started_at": 0}},
            id="version",
        ),
        pytest.param(("version",), {"/version": {"version": EVIL}}, id="a version that lacks the rest"),
    ],
)
async def test_what_a_server_says_does_not_steer_the_terminal(
    tmp_path: Path, arguments: tuple[str, ...], answers: dict[str, Any]
) -> None:
    async with answering(answers) as url:
        ran = await asyncio.to_thread(envd, tmp_path, *arguments, "--url", url)
    assert STEERS.findall(ran.stdout + ran.stderr) == []
    assert "Traceback" not in ran.stderr
    assert "owned" in ran.stdout or ran.returncode == 1


async def test_nor_does_the_error_that_it_answers(tmp_path: Path) -> None:
    problem = NotFound(f"There is no {EVIL}.", hint=EVIL).problem("/x").model_dump(mode="json")
    async with answering({"*": problem}, 404, "application/problem+json") as url:
        ran = await asyncio.to_thread(envd, tmp_path, "ls", "--url", url)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 2)
    assert "owned" in ran.stderr
    assert STEERS.findall(ran.stderr) == []


def test_a_console_prints_what_it_is_given_in_its_own_colours_alone() -> None:
    console = PlainConsole(file=StringIO(), force_terminal=True, color_system="standard", width=80)
    console.print(Text(EVIL, "red"))
    console.out(f"{EVIL}\nnext", highlight=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith("\x1b[31m")
    assert STEERS.findall(shown.replace("\x1b[31m", "").replace("\x1b[0m", "")) == []
    assert shown.endswith("\nnext\n")


async def test_evidence_is_saved_here_whatever_the_episode_is_called(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    facts: dict[str, Any] = {"env": 0, "desktop_id": "d", "started_at": 0, "max_steps": 1, "screen": (4, 3)}
    episode = Episode(id="../there", reset_path=ResetPath.COLD, **facts)
    env = Env(id=0, state=EnvState.PLAYING, episode=episode).model_dump(mode="json")
    async with answering({"/v1/envs/0": env, "*": b"\0" * 1024}) as url:
        ran = await asyncio.to_thread(envd, here, "bundle", "0", "--url", url)
    assert ran.returncode == 0, ran.stderr
    assert sorted(os.listdir(here)) == ["..%2Fthere.tar"]
    assert not (tmp_path / "there.tar").exists()


class Typed(typer.Context):
    """What completion knows of the command line."""

    def __init__(self, url: str) -> None:
        super().__init__(typer.main.get_command(app))
        self.params = {"url": url}


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion that waits for its server, and reads no settings of whoever runs this."""
    monkeypatch.setattr(completion, "SECONDS", 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENVD_TOKEN", "t" * 20)


@pytest.mark.usefixtures("patient")
async def test_a_shell_is_offered_nothing_that_it_would_run() -> None:
    listed = ["ep-1", "$(reboot)", "`reboot`", "a\nb", "x; y", "-rf", EVIL, ""]
    job = {"id": "job-1", "kind": "reset", "env": None, "state": EVIL, "ended_at": None}
    async with answering({"/v1/episodes": {"episodes": listed}, "/v1/jobs": {"jobs": [job]}}) as url:
        assert await asyncio.to_thread(completion.episodes, Typed(url), "") == [("ep-1", "")]
        [(job_id, words)] = await asyncio.to_thread(completion.active_jobs, Typed(url), "")
    assert job_id == "job-1"
    assert STEERS.findall(words) == []


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("answer", [[], {"envs": [{}]}, {"envs": 7}, {"envs": ["0"]}, None])
async def test_what_is_no_list_of_envs_is_nothing_to_offer(answer: Any) -> None:
    async with answering({"/v1/envs": answer}) as url:
        assert await asyncio.to_thread(completion.env_numbers, Typed(url), "") == []


@pytest.mark.usefixtures("patient")
async def test_the_token_is_not_sent_where_a_server_sends_its_callers() -> None:
    seen: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response({"envs": [{"id": 5, "state": "empty"}]})

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPFound(f"http://127.0.0.1:{port}/elsewhere")

    server = web.Application()
    server.add_routes([web.get("/v1/envs", away), web.get("/elsewhere", elsewhere)])
    runner = web.AppRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        assert await asyncio.to_thread(completion.env_numbers, Typed(f"http://127.0.0.1:{port}"), "") == []
    finally:
        await runner.cleanup()
    assert seen == []
