"""How episodes are judged: once, by the task's own evaluator or by its rules, and without a number when that failed."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from files_server import files_server
from serving import CLICK, DONE, Served, eventually, serving
from test_grading import descendants

from envd.drivers.sim import Behaviour, Desktop
from envd.drivers.sim.behaviour import FOREVER, Fault
from envd.errors import Draining, SettingsError
from envd.settings import load
from envd.tasks.grading import find_interpreter

pytestmark = pytest.mark.asyncio(loop_scope="module")

Task = dict[str, Any]
OUT = "/home/user/out.txt"
FAIL = "Thought: It cannot be done.\nAction: call_user()"
TOUCH = {"type": "execute", "parameters": {"command": ["touch", "/home/user/post"]}}
INFEASIBLE: Task = {"func": "infeasible", "postconfig": [TOUCH]}
LOOP = b"while True:\n    pass\n"


def command(**more: Any) -> Task:
    """Whether the desktop's file says that it is done, by a command in it."""
    result = {"type": "vm_command_line", "command": ["cat", OUT]}
    return {"func": "exact_match", "result": result, "expected": {"type": "rule", "rules": {"expected": "done"}}} | more


def file(**more: Any) -> Task:
    result = {"type": "vm_file", "path": OUT, "dest": "out.txt"}
    rules = {"expected": ["done"]}
    return {"func": "file_contains", "result": result, "expected": {"type": "rule", "rules": rules}} | more


def looping() -> Task:
    """The metric runs what the model wrote, which does not end."""
    result = {"type": "vm_file", "path": OUT, "dest": "out.py"}
    return {"func": "check_python_file_by_test_suite", "result": result, "expected": result}


@pytest.fixture(scope="module")
def evaluators() -> None:
    if find_interpreter(load({}, env_file=None, provider="sim")) is None:
        pytest.skip("the evaluators' interpreter is not there: run `make evaluators`")


async def host(settings: dict[str, Any], ready: asyncio.Future[Served], over: asyncio.Event) -> None:
    async with serving(envs=2, **settings) as served:
        await served.service.evaluators.warm()
        ready.set_result(served)
        await over.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judge(evaluators: None) -> AsyncIterator[Served]:
    """One daemon with warm evaluators for this file: they take seconds to start."""
    ready: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()
    # In a task of its own: what is opened in a task is to be closed in it, and a fixture has one for each.
    running = asyncio.create_task(host({"settle_quiet": 0.01}, ready, over))
    running.add_done_callback(lambda _: ready.cancel())
    try:
        yield await ready
    finally:
        over.set()
        await running


async def plays(served: Served, evaluator: Task | None, env: int = 0, out: bytes | None = None) -> Desktop:
    """A fresh episode, on whose desktop the file is, unless it is None."""
    desktop = await served.play(env, task={"id": "t", **({"evaluator": evaluator} if evaluator else {})})
    if out is not None:
        desktop.files[OUT] = out
    return desktop


def calls(desktop: Desktop, words: str) -> int:
    return sum(words in f"{call.route} {call.said}" for call in desktop.calls)


def no_number(verdict: dict[str, Any]) -> tuple[Any, ...]:
    assert (verdict["score"], verdict["mask"]) == (None, True), verdict
    return verdict["status"], verdict["code"], verdict["fault"]


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluator", "content", "score"),
    [
        pytest.param(command(), b"done", 1.0, id="command done"),
        pytest.param(command(), b"no", 0.0, id="command not done"),
        pytest.param(command(), None, 0.0, id="command without its file"),
        pytest.param(file(), b"done", 1.0, id="file done"),
        pytest.param(file(), b"no", 0.0, id="file not done"),
        pytest.param(file(), b"", 0.0, id="an empty file"),
        pytest.param(file(), None, 0.0, id="no file"),
    ],
)
async def test_the_tasks_own_evaluator_scores(
    judge: Served, evaluator: Task, content: bytes | None, score: float
) -> None:
    await plays(judge, evaluator, out=content)
    verdict = await judge.evaluate()
    assert (verdict["status"], verdict["score"], verdict["mask"]) == ("scored", score, False), verdict
    assert (verdict["raw"], verdict["fault"], verdict["code"]) == ([score], None, None)
    assert verdict["provenance"]["evaluator_version"].startswith("desktop-env")


@asynccontextmanager
async def without_evaluators(tmp_path: Path) -> AsyncIterator[Served]:
    """A daemon whose evaluators are gone since it was started: it would not start without those it is told to use."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o700)
    async with serving(evaluators=python) as served:
        python.unlink()
        yield served


@pytest.mark.parametrize(
    ("evaluator", "said", "score"),
    [
        pytest.param(INFEASIBLE, FAIL, 1.0, id="giving up does an infeasible task"),
        pytest.param(INFEASIBLE, DONE, 0.0, id="finishing one does not"),
        pytest.param(INFEASIBLE, CLICK, 0.0, id="nor does going on"),
        pytest.param(command(postconfig=[TOUCH]), FAIL, 0.0, id="giving up does no other task"),
    ],
)
async def test_giving_up_is_judged_without_the_desktop(
    tmp_path: Path, evaluator: Task, said: str, score: float
) -> None:
    async with without_evaluators(tmp_path) as served:
        desktop = await plays(served, evaluator, out=b"done")
        await served.post("/v1/envs/0/step", {"prediction": said})
        verdict = await served.evaluate()
        assert (verdict["status"], verdict["score"], verdict["raw"]) == ("scored", score, [score])
        assert calls(desktop, "touch") == 0


async def test_a_task_without_an_evaluator_has_no_number() -> None:
    async with serving() as served:
        await plays(served, None)
        assert no_number(await served.evaluate()) == ("not_evaluable", "not_evaluable", "task")


async def test_without_evaluators_the_verdict_says_how_to_get_them(tmp_path: Path) -> None:
    async with without_evaluators(tmp_path) as served:
        await plays(served, command())
        verdict = await served.evaluate()
        assert no_number(verdict) == ("not_evaluable", "evaluators_missing", "infra")
        assert "make evaluators" in verdict["hint"]
        status, problem = await served.post("/env/evaluate", {"slot_id": 0})
        assert (status, problem["code"], problem["fault"]) == (500, "evaluators_missing", "infra")


@pytest.mark.parametrize(
    ("evaluator", "warned"),
    [
        pytest.param(command(), True, id="an evaluator"),
        pytest.param(INFEASIBLE, False, id="an infeasible task"),
        pytest.param(None, False, id="no evaluator"),
    ],
)
async def test_without_evaluators_a_reset_warns_and_succeeds(
    tmp_path: Path, evaluator: Task | None, warned: bool
) -> None:
    async with without_evaluators(tmp_path) as served:
        job = await served.reset(task={"id": "t", **({"evaluator": evaluator} if evaluator else {})})
        assert job["state"] == "succeeded"
        said = [words for words in job["warnings"] if "the episode cannot be judged" in words]
        assert len(said) == warned
        assert all("make evaluators" in words for words in said)


async def test_readyz_says_that_episodes_cannot_be_judged_until_they_can(tmp_path: Path) -> None:
    async with without_evaluators(tmp_path) as served:
        status, said = await served.get("/readyz")
        assert (status, said["ready"], len(said["warnings"])) == (200, True, 1)
        assert re.match("episodes cannot be judged: .*`make evaluators`", said["warnings"][0])
        (tmp_path / "python").touch(0o700)
        assert (await served.get("/readyz"))[1]["warnings"] == []


@pytest.mark.parametrize("path", ["/v1/envs/0/evaluate", "/env/evaluate"])
@pytest.mark.parametrize("evaluator", [pytest.param(None, id="no evaluator"), pytest.param(command(), id="none here")])
async def test_every_verdict_ends_the_episode_and_frees_its_env(
    tmp_path: Path, evaluator: Task | None, path: str
) -> None:
    async with without_evaluators(tmp_path) as served:
        await plays(served, evaluator)
        body = {"slot_id": 0} if path == "/env/evaluate" else None
        status, first = await served.post(path, body)
        assert (status, first["code"]) == (
            200 if body is None else 500,
            "evaluators_missing" if evaluator else "not_evaluable",
        )
        episode = served.service.env(0).episode
        assert episode is not None
        assert (episode.done, episode.end_reason) == (True, "evaluated")
        status, refused = await served.post("/v1/envs/0/step", {"prediction": CLICK})
        assert (status, refused["code"], refused["end_reason"]) == (409, "episode_over", "evaluated")
        _, again = await served.post(path, body)
        told = [answer.get("verdict", answer)["evaluated_at"] for answer in (first, again)]
        assert told == [(await served.evaluate())["evaluated_at"]] * 2
        status, lease = await served.post("/v1/leases", {"owner": "ann"})
        assert (status, lease["envs"]) == (201, [0])


async def stepping(served: Served, seconds: float) -> asyncio.Task[tuple[int, Any]]:
    """A step that has begun, and takes so long."""
    body = {"actions": ["pyautogui.moveTo(5, 5)"], "pause_s": seconds}
    step = asyncio.create_task(served.post("/v1/envs/0/step", body))
    await eventually(lambda: calls(served.desktop(), "/execute") > 0)
    return step


async def test_a_verdict_without_an_evaluator_waits_for_the_step_that_runs() -> None:
    async with serving() as served:
        await plays(served, None)
        step = await stepping(served, 0.3)
        verdict = await served.evaluate()
        status, result = await step
        assert (status, result["done"]) == (200, False)
        assert (verdict["provenance"]["steps"], verdict["provenance"]["end_reason"]) == (1, "evaluated")


async def test_a_verdict_that_waited_for_a_step_for_too_long_ends_the_episode_too() -> None:
    async with serving(evaluation_timeout=0.2) as served:
        await plays(served, INFEASIBLE)
        step = await stepping(served, 0.8)
        assert no_number(await served.evaluate()) == ("expired", "evaluation_expired", "infra")
        status, result = await step
        assert (status, result["done"], result["end_reason"]) == (200, True, "evaluated")
        episode = served.service.env(0).episode
        assert episode is not None
        assert (episode.done, episode.end_reason) == (True, "evaluated")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        pytest.param(DONE, "ended: done, and it has its verdict", id="ended before"),
        pytest.param(CLICK, "ended: evaluated", id="ended by it"),
    ],
)
async def test_a_step_after_the_verdict_is_not_told_to_evaluate(said: str, words: str) -> None:
    async with serving() as served:
        await plays(served, INFEASIBLE)
        await served.post("/v1/envs/0/step", {"prediction": said})
        if said is DONE:
            _, before = await served.post("/v1/envs/0/step", {"actions": ["WAIT"]})
            assert before["hint"] == "Evaluate it or reset the env."
        await served.evaluate()
        _, after = await served.post("/v1/envs/0/step", {"actions": ["WAIT"]})
        assert words in after["detail"]
        assert "Evaluate it" not in after["hint"]
        assert after["hint"].startswith("Reset the env")


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        pytest.param("evaluators", "/nonexistent/python", "ENVD_EVALUATORS.* is no program", id="no interpreter"),
        pytest.param("evaluators", sys.executable, "without desktop-env", id="an interpreter without evaluators"),
        pytest.param("google_account", "/etc/hostname", "ENVD_GOOGLE_ACCOUNT.*cannot be used", id="no JSON"),
        pytest.param("proxy_file", "/nonexistent", "ENVD_PROXY_FILE.*cannot be used", id="no file"),
    ],
)
async def test_what_is_set_and_cannot_be_used_stops_the_start(setting: str, value: str, words: str) -> None:
    chosen: dict[str, Any] = {setting: Path(value)}
    with pytest.raises(SettingsError, match=words):
        async with serving(**chosen):
            pass


# -- once ---------------------------------------------------------------------------------------------------------


async def test_two_that_race_and_five_retries_have_one_post_configuration_and_one_verdict(judge: Served) -> None:
    desktop = await plays(judge, command(postconfig=[TOUCH]), out=b"done")
    url = f"{judge.url}/v1/envs/0/evaluate"

    async def ask(patience: float | None = None) -> bytes:
        async with judge.http.post(url, timeout=aiohttp.ClientTimeout(total=patience)) as response:
            return await response.read()

    patience = (0.02, None, None, 0.05, None, 0.1)
    answers = await asyncio.gather(*(ask(seconds) for seconds in patience), return_exceptions=True)
    heard = [answer for answer in answers if isinstance(answer, bytes)] + [await ask(), await ask()]
    assert len(heard) >= 5
    assert len(set(heard)) == 1
    assert calls(desktop, "touch") == calls(desktop, "cat") == 1


async def test_the_caller_who_began_it_may_leave(judge: Served) -> None:
    desktop = await plays(judge, command(postconfig=[TOUCH]), out=b"done")
    with pytest.raises(TimeoutError):
        await judge.post("/v1/envs/0/evaluate", timeout=aiohttp.ClientTimeout(total=0.01))
    assert (await judge.evaluate())["score"] == 1.0
    assert calls(desktop, "touch") == 1


async def test_a_verdict_outlives_many_others_on_other_envs(judge: Served) -> None:
    desktop = await plays(judge, command(postconfig=[TOUCH]), out=b"done")
    first = await judge.evaluate()
    for _ in range(6):
        await plays(judge, INFEASIBLE, env=1)
        await judge.evaluate(1)
    assert await judge.evaluate() == first
    assert calls(desktop, "touch") == 1


async def test_verdict_and_bundle_are_there_after_the_env_was_reset(judge: Served) -> None:
    await plays(judge, command(), out=b"done")
    verdict = await judge.evaluate()
    await plays(judge, command())
    assert (await judge.get(f"/v1/episodes/{verdict['episode_id']}/verdict"))[1] == verdict
    status, raw = await judge.get(verdict["links"]["bundle"])
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        names = archive.getnames()
    assert {"task.json", "verdict.json", "evaluation.json", "episode.json"} <= {Path(name).name for name in names}


async def test_the_verdict_is_told_once(judge: Served) -> None:
    await plays(judge, command(), out=b"done")
    verdict = await judge.evaluate()
    await judge.evaluate()
    told = [event for event in judge.service.events.recent() if event.kind == "verdict"]
    (mine,) = [event for event in told if event.data["episode_id"] == verdict["episode_id"]]
    assert (mine.env, mine.data["status"], mine.data["score"], mine.data["mask"]) == (0, "scored", 1.0, False)


async def test_nothing_is_played_after_the_evaluation(judge: Served) -> None:
    await plays(judge, command(), out=b"done")
    verdict = await judge.evaluate()
    assert verdict["provenance"]["end_reason"] == "evaluated"
    status, problem = await judge.post("/v1/envs/0/step", {"prediction": CLICK})
    assert (status, problem["code"], problem["end_reason"]) == (409, "episode_over", "evaluated")


async def test_an_evaluation_waits_for_the_step_that_runs(judge: Served) -> None:
    desktop = await plays(judge, command(postconfig=[TOUCH]), out=b"done")
    desktop.behaviour = Behaviour(answer_s=0.2)
    desktop.calls.clear()
    running = asyncio.create_task(judge.post("/v1/envs/0/step", {"actions": ["pyautogui.press('a')"]}))
    await eventually(lambda: calls(desktop, "/execute") == 1)
    verdict = await judge.evaluate()
    assert (await running)[0] == 200
    assert (verdict["score"], verdict["provenance"]["steps"]) == (1.0, 1)
    order = [call.route for call in desktop.calls if not call.route.startswith("/json")]
    assert order[:3] == ["/execute", "/screenshot", "/execute"]


# -- no number ----------------------------------------------------------------------------------------------------


async def evaluating(served: Served, desktop: Desktop) -> asyncio.Task[dict[str, Any]]:
    """An evaluation whose getter waits for the desktop."""
    desktop.behaviour = Behaviour(on={"/execute cat": Fault("stall", times=FOREVER)})
    task = asyncio.create_task(served.evaluate())
    await eventually(lambda: calls(desktop, "/execute cat") == 1)
    return task


async def test_a_reset_cancels_the_evaluation(judge: Served) -> None:
    running = await evaluating(judge, await plays(judge, command()))
    assert (await judge.reset(task={"evaluator": INFEASIBLE}))["state"] == "succeeded"
    assert no_number(await running) == ("cancelled", "evaluation_cancelled", "client")
    assert (await judge.evaluate())["score"] == 0.0


async def test_a_desktop_that_dies_is_lost(judge: Served) -> None:
    desktop = await plays(judge, command())
    running = await evaluating(judge, desktop)
    judge.sim.kill(desktop.id)
    verdict = await running
    assert no_number(verdict) == ("infra_error", "desktop_lost", "infra")
    assert await judge.evaluate() == verdict


@pytest.mark.parametrize(
    "position", [pytest.param(-1, id="worker"), pytest.param(-2, id="keeper"), pytest.param(-3, id="zygote")]
)
async def test_kill_9_of_the_evaluator_is_its_error_with_a_bundle_and_the_next_one_works(
    judge: Served, position: int
) -> None:
    running = await evaluating(judge, await plays(judge, command()))
    os.kill((await chain(judge))[position], signal.SIGKILL)
    verdict = await running
    assert no_number(verdict) == ("evaluator_error", "evaluator_error", "infra")
    status, raw = await judge.get(verdict["links"]["bundle"])
    assert status == 200
    assert b'"evaluator_error"' in raw
    await plays(judge, command(), out=b"done")
    assert (await judge.evaluate())["score"] == 1.0


async def test_kill_9_in_the_metric_is_the_evaluators_error(judge: Served) -> None:
    await plays(judge, looping(), out=LOOP)
    zygote = (await chain(judge))[-1]
    running = asyncio.create_task(judge.evaluate())
    os.kill(await looping_process(judge, zygote), signal.SIGKILL)
    verdict = await running
    assert no_number(verdict) == ("evaluator_error", "evaluator_error", "infra")
    assert verdict["metrics"][0]["result"] == {"$file": "out.py"}


async def chain(served: Served) -> list[int]:
    """The evaluator's processes, each the parent of the next: zygote, keeper, worker, and the metric's if one runs."""
    root = (await served.service.evaluators.graders.warm()).process.pid
    tree = await descendants(root)
    pids = [pid for pid in tree if pid not in tree.values()][-1:] or [root]
    while pids[0] != root:
        pids.insert(0, tree[pids[0]])
    return pids


async def looping_process(served: Served, zygote: int) -> int:
    """The metric's process, as soon as it has used so much of the processor as only a loop does."""
    async with asyncio.timeout(20):
        while True:
            last = (await chain(served))[-1]
            if last != zygote:
                stat = await asyncio.to_thread(Path(f"/proc/{last}/stat").read_text)
                if int(stat.rpartition(")")[2].split()[11]) > 0.3 * os.sysconf("SC_CLK_TCK"):
                    return last
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("evaluators")
async def test_a_metric_that_loops_ends_at_the_deadline() -> None:
    async with serving(evaluation_timeout=5) as served:
        await served.service.evaluators.warm()
        await plays(served, looping(), out=LOOP)
        verdict = await served.evaluate()
        assert no_number(verdict) == ("expired", "evaluation_expired", "infra")
        assert verdict["seconds"]["total"] < 6
        assert await asyncio.to_thread(os.listdir, served.service.evaluators.graders.directory) == []


async def test_a_post_configuration_that_asks_for_what_is_not_there_is_the_tasks_fault(judge: Served) -> None:
    opens = {"type": "open", "parameters": {"path": "/home/user/nowhere.odt"}}
    desktop = await plays(judge, command(postconfig=[TOUCH, opens, TOUCH]), out=b"done")
    verdict = await judge.evaluate()
    assert no_number(verdict) == ("task_error", "setup_failed", "task")
    assert [record["outcome"] for record in verdict["postconfig"]] == ["ok", "failed"]
    assert (calls(desktop, "touch"), calls(desktop, "cat")) == (1, 0)


async def test_a_file_that_cannot_be_had_is_named_by_its_url(judge: Served) -> None:
    async with files_server() as files:
        gold = {"type": "cloud_file", "path": files.url("/gold.txt"), "dest": "gold.txt"}
        await plays(judge, file(func="compare_text_file", expected=gold), out=b"done")
        verdict = await judge.evaluate()
        assert no_number(verdict) == ("infra_error", "asset_unavailable", "infra")
        assert files.url("/gold.txt") in verdict["detail"]
        assert "404" in verdict["detail"]


async def test_chrome_is_started_for_a_getter_that_needs_it(judge: Served) -> None:
    tabs = {"func": "is_expected_tabs", "result": {"type": "open_tabs_info"}}
    rules = {"type": "url", "urls": ["https://a.example/"]}
    desktop = await plays(judge, tabs | {"expected": {"type": "rule", "rules": rules}})
    judge.sim.stop_chrome(desktop.id)
    verdict = await judge.evaluate()
    assert any("google-chrome" in command for command in desktop.launched)
    # A sim desktop's Chrome does not speak all of what the getter's library asks for.
    assert no_number(verdict)[1:] == ("guest_misbehaved", "infra")
    assert "started again" in " ".join(verdict["warnings"])


async def test_without_an_episode_there_is_nothing_to_judge() -> None:
    async with serving() as served:
        assert (await served.post("/v1/envs/0/evaluate"))[1]["code"] == "no_episode"
        status, problem = await served.get("/v1/episodes/ep-none/verdict")
        assert (status, problem["code"]) == (404, "not_found")


# -- the wire of existing trainers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "number"), [(b"done", b"1.0"), (b"no", b"0.0")])
async def test_a_score_is_a_bare_number_for_old_clients(judge: Served, content: bytes, number: bytes) -> None:
    await plays(judge, command(), out=content)
    async with judge.http.post(f"{judge.url}/env/evaluate", json={}) as response:
        assert (response.status, await response.read()) == (200, number)


async def test_a_failure_is_a_problem_for_old_clients_and_asking_again_changes_nothing(judge: Served) -> None:
    desktop = await plays(judge, command())
    desktop.behaviour = Behaviour(on={"/execute cat": Fault("error", times=FOREVER)})
    for _ in range(2):
        status, problem, headers = await judge.ask("POST", "/env/evaluate", {})
        assert (status, problem["code"], problem["fault"]) == (503, "guest_misbehaved", "infra")
        assert (problem["verdict"]["score"], problem["verdict"]["mask"]) == (None, True)
        assert headers["Content-Type"] == "application/problem+json"
    assert calls(desktop, "cat") == 1


# -- limits of an episode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "said", "reward"),
    [
        pytest.param("plain", CLICK, 0.0, id="plain, it parses"),
        pytest.param("plain", "Click on it, please.", -1.0, id="plain, it does not"),
        pytest.param("shaped", CLICK, 0.2, id="shaped, it acts and goes on"),
        pytest.param("shaped", DONE, 0.2, id="shaped, it finishes"),
        pytest.param("shaped", "Click on it, please.", -1.0, id="shaped, it does not parse"),
    ],
)
async def test_the_reward_for_the_format(style: str, said: str, reward: float) -> None:
    async with serving(format_reward=style) as served:
        await served.play()
        _, result = await served.post("/v1/envs/0/step", {"prediction": said})
        assert result["format_reward"] == pytest.approx(reward)
        assert (result["end_reason"] == "unparsable") == (reward == -1.0)


@pytest.mark.parametrize("trouble", [Behaviour(lose="/execute"), Behaviour(spoil="/execute", bad=("error",))])
async def test_what_fails_in_the_desktop_does_not_change_the_reward(trouble: Behaviour) -> None:
    async with serving() as served:
        (await served.play()).behaviour = trouble
        assert (await served.post("/v1/envs/0/step", {"prediction": CLICK}))[1]["format_reward"] == 0.0


@pytest.mark.parametrize(("counts", "steps"), [("actions", 2), ("predictions", 4)])
async def test_what_the_limit_counts(counts: str, steps: int) -> None:
    async with serving() as served:
        job = await served.reset(max_steps=4, counts=counts)
        assert job["state"] == "succeeded"
        ends: list[str | None] = []
        while not ends or ends[-1] is None:
            _, result = await served.post("/v1/envs/0/step", {"actions": ["pyautogui.press('a')"] * 2})
            ends.append(result["end_reason"])
        assert ends == [None] * (steps - 1) + ["max_steps"]
        episode = (await served.get("/v1/envs/0"))[1]["episode"]
        assert (episode["max_steps"], episode["counts"]) == (4, counts)


async def test_no_step_begins_after_the_deadline_and_what_was_done_is_still_judged() -> None:
    async with serving() as served:
        await served.reset(task={"evaluator": INFEASIBLE}, episode_timeout_s=0.05)
        await asyncio.sleep(0.06)
        status, problem = await served.post("/v1/envs/0/step", {"prediction": FAIL})
        assert (status, problem["code"], problem["end_reason"]) == (409, "episode_over", "deadline")
        verdict = await served.evaluate()
        assert (verdict["score"], verdict["provenance"]["end_reason"]) == (0.0, "deadline")


async def test_another_screen_is_refused_before_a_desktop_is_spent() -> None:
    async with serving() as served:
        status, problem = await served.post("/v1/envs/0/reset", {"screen": [1920, 1080]})
        assert (status, problem["errors"][0]["field"]) == (422, "screen")
        assert not served.sim.journal
        job = await served.reset(screen=[320, 240])
        assert (job["state"], (await served.get("/v1/envs/0"))[1]["episode"]["screen"]) == ("succeeded", [320, 240])


# -- the end of the daemon ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("evaluators")
async def test_a_drain_ends_what_is_judged_in_time_and_its_callers_are_told() -> None:
    async with serving(drain_seconds=0.1) as served:
        desktop = await plays(served, command())
        desktop.behaviour = Behaviour(on={"/execute cat": Fault("stall", times=FOREVER)})
        asking = asyncio.create_task(served.service.evaluate(0))
        await eventually(lambda: calls(desktop, "/execute cat") == 1)
        zygote = (await served.service.evaluators.graders.warm()).process.pid
        began = asyncio.get_running_loop().time()
    with pytest.raises(Draining):
        await asking
    assert asyncio.get_running_loop().time() - began < 5
    assert not await asyncio.to_thread(Path(f"/proc/{zygote}").exists)
    assert not await descendants(zygote)


# -- set-ups that are tried again ---------------------------------------------------------------------------------

WRITE = {"type": "execute", "parameters": {"command": ["touch", OUT]}}
STUMBLES = Behaviour(on={"/execute touch": Fault("reset", times=FOREVER)})
STICKS = Behaviour(on={"/execute touch": Fault("stall", times=FOREVER)})
SETS_UP: Task = {"id": "t", "config": [WRITE], "evaluator": INFEASIBLE}


@asynccontextmanager
async def stumbling(*behaviours: Behaviour, **settings: Any) -> AsyncIterator[Served]:
    async with serving(behaviours, **settings) as served:
        yield served


def made(served: Served) -> list[str]:
    return [entry.id for entry in served.sim.journal if entry.verb == "create-begin"]


async def test_a_set_up_that_a_machine_failed_is_tried_on_a_fresh_desktop() -> None:
    async with stumbling(STUMBLES, Behaviour()) as served:
        job = await served.reset(task=SETS_UP)
        assert (job["state"], job["attempts"], len(job["setup"])) == ("succeeded", 2, 1)
        first, second = made(served)
        assert (job["desktop_id"], list(served.sim.desktops)) == (second, [second])
        assert any(entry.verb == "destroy-end" and entry.id == first for entry in served.sim.journal)
        assert (await served.evaluate())["provenance"]["attempts"] == 2


@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_a_set_up_is_not_tried_more_often_than_it_may_be(attempts: int) -> None:
    async with stumbling(STUMBLES, setup_attempts=attempts) as served:
        job = await served.reset(task=SETS_UP)
        assert (job["state"], job["attempts"], len(made(served))) == ("failed", attempts, attempts)
        assert (job["error"]["code"], job["error"]["fault"], job["error"]["step"]) == ("setup_failed", "infra", 0)
        assert served.service.env(0).state == "empty"
        assert not served.sim.desktops


async def test_a_task_that_is_wrong_is_tried_once_and_the_next_reset_has_a_clean_desktop() -> None:
    opens = {"type": "open", "parameters": {"path": "/nowhere"}}
    async with serving(setup_attempts=3) as served:
        job = await served.reset(task={"config": [WRITE, WRITE, opens, WRITE]})
        assert (job["state"], job["attempts"], len(made(served))) == ("failed", 1, 1)
        assert (job["error"]["code"], job["error"]["fault"], job["error"]["step"]) == ("setup_failed", "task", 2)
        assert (await served.get("/v1/envs/0"))[1]["episode"] is None
        desktop = await served.play(task={"id": "next"})
        assert OUT not in desktop.files


@pytest.mark.parametrize("when", ["in the second try", "between the tries"])
async def test_a_cancel_after_the_first_try_leaves_an_empty_env_that_can_be_reset(when: str) -> None:
    slow = Behaviour(boot_s=0.3, on=STICKS.on)
    async with stumbling(STUMBLES, slow, Behaviour()) as served:
        _, job = await served.post("/v1/envs/0/reset", {"task": SETS_UP})
        await eventually(lambda: len(made(served)) == 2)
        if when == "in the second try":
            await served.in_state(job["id"], "setting_up")
        await served.post(f"/v1/jobs/{job['id']}/cancel")
        assert (await served.ended(job["id"]))["state"] == "cancelled"
        assert (served.service.env(0).state, served.sim.desktops) == ("empty", {})
        assert (await served.reset(task=SETS_UP))["state"] == "succeeded"


async def test_a_newer_reset_ends_the_tries_of_an_older_one() -> None:
    slow = Behaviour(on=STUMBLES.on, answer_s=0.1)
    async with stumbling(slow, Behaviour()) as served:
        _, older = await served.post("/v1/envs/0/reset", {"task": SETS_UP})
        await served.in_state(older["id"], "setting_up")
        newer = await served.reset(task=SETS_UP | {"id": "newer"})
        older = await served.ended(older["id"])
        assert (older["state"], older["attempts"], newer["state"], len(made(served))) == ("failed", 1, "succeeded", 2)
        env = served.service.env(0)
        assert (env.state, env.desktop.id if env.desktop else None) == ("playing", newer["desktop_id"])
