"""An episode by hand: `reset`, `step`, `screenshot`, `evaluate`, `bundle`, `ls`, `cancel`, `drain`, and what a shell is
offered behind them; against a real daemon with sim desktops."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cli_process import envd, on_terminal
from daemon_process import DaemonProcess, daemon, environment

from envd.cli.completion import SECONDS
from envd.cli.listing import PlainConsole
from envd.cli.play import tell_verdict
from envd.models import MetricRecord, Provenance, ResetPath, Verdict, VerdictStatus

TOKEN = "t0ken-of-the-tests"
TASK = {"id": "give-up", "instruction": "Do what cannot be done.", "config": [], "evaluator": {"func": "infeasible"}}
QUICK = {"ENVD_ENVS": "2", "ENVD_ACTION_PAUSE": "0", "ENVD_SETTLE_QUIET": "0", "ENVD_SCREEN": "640x480"}
SLOW = QUICK | {"ENVD_SIM": "boot=60"}
NOBODY = "http://127.0.0.1:1"


def dotenv(folder: Path, process: DaemonProcess, **more: str) -> None:
    """What a person has in the folder from which the daemon is used."""
    said = {"ENVD_URL": process.url, "ENVD_TOKEN": TOKEN, **more}
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in said.items()))


async def run(folder: Path, *arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(envd, folder, *arguments, stdin=stdin, **settings)


async def document(folder: Path, *arguments: str, **settings: str) -> dict[str, Any]:
    """What it prints with --json, having ended with 0."""
    ran = await run(folder, *arguments, "--json", **settings)
    assert (ran.returncode, ran.stderr) == (0, "")
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


async def wire(session: aiohttp.ClientSession, process: DaemonProcess, path: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with session.get(process.url + path, headers=headers) as answer:
        assert answer.status == 200
        told: dict[str, Any] = await answer.json()
    return told


async def test_an_episode_is_played_by_hand_with_the_server_and_token_of_the_env_file(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    async with daemon(tmp_path / "state", env=QUICK | {"ENVD_TOKEN": TOKEN}) as (process, session):
        dotenv(tmp_path, process)
        began = await run(tmp_path, "reset", "1", "task.json", "--max-steps", "9")
        assert (began.returncode, began.stderr) == (0, "")
        assert "succeeded after" in began.stdout
        assert await document(tmp_path, "ls") == {"envs": (await wire(session, process, "/v1/envs"))["envs"]}
        table = (await run(tmp_path, "ls")).stdout
        assert "give-up" in table
        assert "playing" in table
        assert "0 of 9 actions, step 0" in table

        stepped = await run(tmp_path, "step", "1", "pyautogui.click(3, 4)", "FAIL", "-s", "after.png")
        assert stepped.returncode == 0
        assert "ok 0." in stepped.stdout
        assert "after.png: 640x480" in stepped.stdout
        shot = await document(tmp_path, "screenshot", "1")
        assert (shot["file"], shot["width"], shot["height"]) == ("env-1.png", 640, 480)
        assert (tmp_path / "env-1.png").stat().st_size == shot["bytes"]

        judged = await run(tmp_path, "evaluate", "1")
        assert (judged.returncode, judged.stdout.splitlines()[0]) == (0, "score 1")
        assert (await document(tmp_path, "evaluate", "1"))["score"] == 1.0
        saved = await document(tmp_path, "bundle", "1")
        with tarfile.open(tmp_path / saved["file"]) as archive:
            assert any(name.endswith("verdict.json") for name in archive.getnames())
        assert await document(tmp_path, "ls", "--episodes") == {"episodes": [saved["episode_id"]]}
        _, line = (await run(tmp_path, "ls")).stdout.splitlines()[1:3]
        assert line.split()[:3] == ["1", "over", "give-up"]
        assert "2 of 9 actions, step 1, fail; score 1" in line
        names, line = (await run(tmp_path, "ls", "--episodes")).stdout.splitlines()
        assert names.split() == ["episode", "env", "task", "began", "played", "verdict"]
        assert line.split()[:3] == [saved["episode_id"], "1", "give-up"]
        assert "1 step, fail" in line
        assert line.endswith("score 1")
        jobs = await document(tmp_path, "ls", "--jobs")
        assert [(job["env"], job["state"]) for job in jobs["jobs"]] == [(1, "succeeded")]


@pytest.mark.parametrize("command", [("prewarm",), ("ls",), ("watch", "job-0"), ("version", "--url", "{url}")])
async def test_every_client_command_sends_the_token_of_the_env_file(tmp_path: Path, command: tuple[str, ...]) -> None:
    async with daemon(tmp_path / "state", env=QUICK | {"ENVD_TOKEN": TOKEN}) as (process, _):
        dotenv(tmp_path, process)
        words = [word.format(url=process.url) for word in command]
        ran = await run(tmp_path, *words)
        assert "no job job-0" in ran.stderr if command[0] == "watch" else ran.returncode == 0
        refused = await run(tmp_path, *words, ENVD_TOKEN="another")
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 2


async def test_what_has_no_score_is_told_without_a_number_and_ends_with_3(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        assert (await run(tmp_path, "reset", "0", ENVD_URL=process.url)).returncode == 0
        judged = await run(tmp_path, "evaluate", "0", ENVD_URL=process.url)
        assert judged.returncode == 3
        assert judged.stdout.startswith("no score not_evaluable, fault task")
        told = await run(tmp_path, "evaluate", "0", "--json", ENVD_URL=process.url)
        assert (told.returncode, json.loads(told.stdout)["score"]) == (3, None)


async def test_programs_and_predictions_come_from_stdin_and_what_failed_ends_with_3(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        at = {"ENVD_URL": process.url}
        assert (await run(tmp_path, "reset", "0", **at)).returncode == 0
        piped = await run(
            tmp_path, "step", "0", "--json", stdin="pyautogui.write('a')\npyautogui.press('enter')\n", **at
        )
        assert piped.returncode == 0
        assert [action["outcome"] for action in json.loads(piped.stdout)["actions"]] == ["ok"]
        said = "Thought: there.\nAction: click(start_box='(100,100)')"
        assert (await run(tmp_path, "step", "0", "-p", "-", stdin=said, **at)).returncode == 0
        failed = await run(tmp_path, "step", "0", "pyautogui.no_such_thing()", **at)
        assert failed.returncode == 3
        assert "no_such_thing" in failed.stdout
        unparsable = await run(tmp_path, "step", "0", "-p", "I do not know.", **at)
        assert unparsable.returncode == 3
        assert "does not parse" in unparsable.stdout


async def test_a_picture_goes_into_a_pipe_whole(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        assert (await run(tmp_path, "reset", "0", ENVD_URL=process.url)).returncode == 0

        def piped() -> bytes:
            command = [sys.executable, "-m", "envd", "screenshot", "0", "-o", "-"]
            env = environment(tmp_path / "state", {"ENVD_URL": process.url})
            return subprocess.run(command, capture_output=True, check=True, timeout=60, env=env, cwd=tmp_path).stdout

        picture = await asyncio.to_thread(piped)
        assert picture.startswith(b"\x89PNG")
        assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
        code, shown = await asyncio.to_thread(on_terminal, tmp_path, "screenshot", "0", "-o", "-", ENVD_URL=process.url)
        assert code == 1
        assert "nothing to print on a terminal" in shown


async def test_a_reset_that_is_not_waited_for_is_listed_and_cancelled(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=SLOW) as (process, _):
        at = {"ENVD_URL": process.url}
        job = await document(tmp_path, "reset", "0", "--no-wait", **at)
        table = (await run(tmp_path, "ls", "--jobs", **at)).stdout
        assert job["id"] in table
        assert "booting" in table
        ended = await run(tmp_path, "cancel", job["id"], **at)
        assert (ended.returncode, ended.stdout) == (0, f"{job['id']} ended: cancelled\n")
        assert (await run(tmp_path, "cancel", job["id"], **at)).returncode == 0
        failed = await run(tmp_path, "watch", job["id"], **at)
        assert failed.returncode == 1


async def test_a_reset_on_a_terminal_shows_the_boot_and_ends_with_the_jobs_code(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        code, shown = await asyncio.to_thread(on_terminal, tmp_path, "reset", "0", ENVD_URL=process.url)
        assert code == 0
        assert "chrome_cdp" in shown
        assert "succeeded" in shown


async def test_a_reset_that_fails_ends_with_1(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK | {"ENVD_SIM": "fail=1"}) as (process, _):
        failed = await run(tmp_path, "reset", "0", ENVD_URL=process.url)
        assert failed.returncode == 1
        assert "failed after" in failed.stdout
        told = await run(tmp_path, "reset", "0", "--json", ENVD_URL=process.url)
        assert (told.returncode, json.loads(told.stdout)["state"]) == (1, "failed")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "No such file", id="no file"),
        pytest.param("{", "cannot be read as a task", id="no JSON"),
        pytest.param("[]", "holds no task but a JSON list", id="a list"),
    ],
)
def test_a_file_that_holds_no_task_is_told_before_anything_is_asked(
    tmp_path: Path, content: str | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "task.json").write_text(content)
    ran = envd(tmp_path, "reset", "0", "task.json", ENVD_URL=NOBODY)
    assert ran.returncode == 1
    assert told in ran.stderr
    assert len(ran.stderr.splitlines()) == 2


async def test_a_leased_env_is_played_under_its_lease(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, session):
        at = {"ENVD_URL": process.url}
        async with session.post(f"{process.url}/v1/leases", json={"count": 1, "owner": "alice"}) as answer:
            lease = await answer.json()
        [env] = map(str, lease["envs"])
        refused = await run(tmp_path, "reset", env, **at)
        assert refused.returncode == 1
        assert "alice" in refused.stderr
        assert (await run(tmp_path, "reset", env, "--lease", lease["id"], **at)).returncode == 0
        assert (await run(tmp_path, "step", env, "WAIT", **at)).returncode == 1
        (tmp_path / ".env").write_text(f"ENVD_LEASE={lease['id']}\n")
        assert (await run(tmp_path, "step", env, "WAIT", **at)).returncode == 0
        listed = await document(tmp_path, "ls", "--leases", **at)
        assert [(one["owner"], one["state"]) for one in listed["leases"]] == [("alice", "held")]
        assert "alice" in (await run(tmp_path, "ls", **at)).stdout


async def test_a_drain_that_is_waited_for_ends_when_the_daemon_has(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        at = {"ENVD_URL": process.url}
        assert await document(tmp_path, "drain", "--status", **at) == {"draining": False, "left_s": None, "envs": []}
        assert (await run(tmp_path, "reset", "0", **at)).returncode == 0
        told = await document(tmp_path, "drain", "--limit", "600", **at)
        assert (told["draining"], told["envs"]) == (True, [0])
        ran = await run(tmp_path, "drain", "--limit", "0", "--wait", **at)
        assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "The daemon has ended.")
        assert await process.ended() == 0


def offered(folder: Path, typed: str, **settings: str) -> list[str]:
    """What bash is offered at the end of what was typed."""
    words = typed.split(" ")
    shell = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_ENVD_COMPLETE": "complete_bash"}
    ran = envd(folder, **settings, **shell)
    assert ran.stderr == ""
    return ran.stdout.split()


async def test_a_shell_is_offered_envs_jobs_episodes_and_task_files(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{}")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "other.txt").touch()
    async with daemon(tmp_path / "state", env=SLOW | {"ENVD_TOKEN": TOKEN}) as (process, _):
        dotenv(tmp_path, process)
        job = await document(tmp_path, "reset", "1", "--no-wait")

        async def ask(typed: str) -> list[str]:
            return await asyncio.to_thread(offered, tmp_path, typed)

        async with asyncio.timeout(60):
            # On a busy host the daemon may take longer to answer than whoever presses Tab waits.
            while await ask("envd screenshot ") != ["0", "1"]:
                pass
            while await ask("envd cancel ") != [job["id"]]:
                pass
            while await ask("envd watch job-") != [job["id"]]:
                pass
        assert await ask("envd reset 0 t") == ["task.json", "tasks/"]
        assert await ask("envd bundle ") == []
        assert "reset" in await ask("envd re")


def test_a_server_that_is_not_there_offers_nothing_and_holds_nobody_up(tmp_path: Path) -> None:
    began = time.monotonic()
    assert offered(tmp_path, "envd screenshot ", ENVD_URL="http://192.0.2.1:9") == []
    took = time.monotonic() - began
    began = time.monotonic()
    assert "serve" in offered(tmp_path, "envd s")
    start = time.monotonic() - began
    assert took - start < SECONDS + 1.0


async def test_in_a_folder_that_says_the_port_clients_and_doctor_talk_to_it(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        (tmp_path / ".env").write_text(f"ENVD_PORT={process.url.rpartition(':')[2]}\n")
        assert len((await document(tmp_path, "ls"))["envs"]) == 2
        assert (await document(tmp_path, "doctor", "--full"))["ok"]


async def test_a_step_without_anything_to_do_says_how_one_is_given(tmp_path: Path) -> None:
    for stdin in ("", " \n"):
        ran = await run(tmp_path, "step", "0", stdin=stdin, ENVD_URL=NOBODY)
        assert ran.returncode == 1
        assert ran.stderr.startswith("There is nothing to do")
        assert 'envd step 0 "pyautogui.click' in ran.stderr


async def test_evidence_takes_the_place_of_a_file_that_was_named_only_when_told_so(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        assert (await run(tmp_path, "reset", "0", ENVD_URL=process.url)).returncode == 0
        (tmp_path / "mine").write_text("mine")
        refused = await run(tmp_path, "bundle", "0", "-o", "mine", ENVD_URL=process.url)
        assert (refused.returncode, (tmp_path / "mine").read_text()) == (1, "mine")
        assert "--force" in refused.stderr
        assert (await run(tmp_path, "bundle", "0", "-o", "mine", "--force", ENVD_URL=process.url)).returncode == 0
        assert tarfile.is_tarfile(tmp_path / "mine")
        for _ in range(2):  # of the same episode, under its own name
            assert (await run(tmp_path, "bundle", "0", ENVD_URL=process.url)).returncode == 0


async def test_to_cancel_what_has_ended_is_no_failure(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        job = (await document(tmp_path, "reset", "0", ENVD_URL=process.url))["id"]
        ran = await run(tmp_path, "cancel", job, ENVD_URL=process.url)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{job} had ended already: succeeded\n", "")


async def test_the_log_of_an_env_that_is_none_is_not_empty_but_an_error(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        ran = await run(tmp_path, "logs", "--env", "9", ENVD_URL=process.url)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "9" in ran.stderr
        assert len(ran.stderr.splitlines()) == 2


async def test_episodes_that_were_not_judged_say_so_and_the_newest_come_first(tmp_path: Path) -> None:
    async with daemon(tmp_path / "state", env=QUICK) as (process, _):
        at = {"ENVD_URL": process.url}
        for _ in range(2):
            assert (await run(tmp_path, "reset", "0", **at)).returncode == 0
        _, newest, older = (await run(tmp_path, "ls", "--episodes", **at)).stdout.splitlines()
        for line in (newest, older):
            assert "0 steps" in line
            assert line.endswith("not judged")
        told = (await run(tmp_path, "ls", "--episodes", "--limit", "1", **at)).stdout.splitlines()
        assert told[1] == newest
        assert told[-1].startswith("1 older")


def test_a_score_comes_with_what_was_seen_and_what_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    metric = MetricRecord(index=0, func="exact_match", result="helo\n", expected={"expected": "x" * 500}, value=0.0)
    provenance = Provenance(
        server_version="1",
        provider="sim",
        image="",
        task_hash="",
        screen=(1, 1),
        steps=1,
        actions=1,
        end_reason=None,
        reset_path=ResetPath.COLD,
    )
    verdict = Verdict(
        episode_id="ep-1",
        env=0,
        status=VerdictStatus.SCORED,
        score=0.0,
        mask=False,
        metrics=(metric,),
        provenance=provenance,
        evaluated_at=0,
    )
    tell_verdict(verdict, PlainConsole(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["score 0", "    exact_match: 0.0", '        seen:     "helo\\n"']
    assert lines[3].startswith('        expected: {"expected": "xxx')
    assert len(lines[3]) < 200
