"""The wire of existing trainers, seen by clients that were written from its description alone.

`Trainer` knows nothing of envd: `requests`, a new connection for each call, and what is published of
the dialects A, B and C.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from typing import Any

import pytest
import requests
from PIL import Image
from serving import CLICK, DONE, SCREEN, Served, eventually, serving

from envd.drivers.sim import Behaviour
from envd.models import JobState
from envd.vm.kvm import Kvm, KvmState

TASK = {
    "id": "t-1",
    "task_id": "t-1",
    "domain": "os",
    "instruction": "Open the {file}.",
    "config": [],
    "snapshot": "os",
}
NOISE = {"noise_probability": 0.25}
FOR_EVER = Behaviour(boot_s=3600)


class Trainer:
    """The calls of one client. `dialect` is A, B or C; only C speaks of slots."""

    def __init__(self, url: str, dialect: str, slot: int = 0) -> None:
        self._url = url
        self._dialect = dialect
        self._slot = {"slot_id": slot} if dialect == "C" else {}

    async def reset(self, task: dict[str, Any], timeout: float = 1200) -> requests.Response:
        extra = {"enable_noise": False, "noise_meta": {}} if self._dialect == "C" else {}
        return await self._post("/env/reset", {"task_config": {**task, **extra}, **self._slot}, timeout)

    async def step(self, prediction: str) -> requests.Response:
        noise = NOISE if self._dialect == "C" else {}
        return await self._post("/env/step", {"prediction": prediction, **self._slot, **noise}, 300)

    async def evaluate(self) -> requests.Response:
        return await self._post("/env/evaluate", {"A": None, "B": {}, "C": self._slot}[self._dialect], 300)

    async def history(self) -> requests.Response:
        body = self._slot if self._dialect == "C" else None
        return await self._post("/env/history_messages", body, 60)

    async def _post(self, path: str, body: Any, timeout: float) -> requests.Response:
        return await asyncio.to_thread(requests.post, self._url + path, json=body, timeout=timeout)


def image_of(message: dict[str, Any]) -> tuple[int, int]:
    """The size of the picture in a wire message that must have one image part and nothing else."""
    assert message["role"] == "user"
    [part] = message["content"]
    assert part | {"b64": ""} == {"type": "image", "b64": "", "min_pixels": 3136, "max_pixels": 2116800}
    with Image.open(io.BytesIO(base64.b64decode(part["b64"], validate=True))) as image:
        assert image.format == "PNG"
        return image.size


def text_of(message: dict[str, Any]) -> str:
    [part] = message["content"]
    assert part.keys() == {"type", "text"}
    assert part["type"] == "text"
    return str(part["text"])


def roles(messages: list[dict[str, Any]]) -> str:
    """`sui` is system, user's text, user's image; `a` is assistant."""
    return "".join("i" if message["content"][0]["type"] == "image" else message["role"][0] for message in messages)


def parted(response: requests.Response) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """A step's answer without its messages, and the messages."""
    response.raise_for_status()
    answer = response.json()
    return answer, answer.pop("obs_messages")


@pytest.mark.parametrize(("dialect", "slot"), [("A", 0), ("B", 0), ("C", 0), ("C", 2)])
async def test_a_client_of_each_dialect_resets_steps_and_reads_the_history(dialect: str, slot: int) -> None:
    async with serving(envs=3) as served:
        trainer = Trainer(served.url, dialect, slot)
        answer, messages = parted(await trainer.reset(TASK))
        assert answer == {"env_idx": slot, "is_done": False, "format_reward": 0.0}
        assert messages is not None
        assert roles(messages) == "sui"
        assert text_of(messages[0]) == "Your are a helpful assistant."
        assert "Open the {file}." in text_of(messages[1])
        assert image_of(messages[2]) == SCREEN
        seen = messages
        for number in range(1, 6):
            answer, messages = parted(await trainer.step(CLICK))
            assert answer == {"env_idx": slot, "is_done": False, "format_reward": 0.0}
            assert messages is not None
            assert roles(messages) == "sui" + "ai" * number
            assert messages[: len(seen)] == seen
            assert text_of(messages[-2]) == CLICK.replace("(100,100)", "<|box_start|>(100,100)<|box_end|>")
            assert image_of(messages[-1]) == SCREEN
            seen = messages
        history = await trainer.history()
        assert history.json() == {"history_messages": seen}
        assert len(served.desktop(slot).inputs) == 5


async def test_c_gets_the_history_under_three_names() -> None:
    async with serving(envs=2) as served:
        _, messages = parted(await Trainer(served.url, "C", 1).reset(TASK))
        response = await asyncio.to_thread(requests.get, f"{served.url}/env/history_messages?slot_id=1", timeout=10)
        assert response.json() == {"history_messages": messages, "messages": messages, "history": messages}
        _, empty = await served.get("/env/history_messages")
        assert empty == {"history_messages": [], "messages": [], "history": []}


async def test_a_number_is_sent_as_json_and_types_are_exact() -> None:
    async with serving() as served:
        answer = (await Trainer(served.url, "A").reset(TASK)).json()
        assert [type(answer[name]) for name in ("env_idx", "is_done", "format_reward")] == [int, bool, float]
        assert list(answer) == ["env_idx", "obs_messages", "is_done", "format_reward"]


@pytest.mark.parametrize(
    ("prediction", "format_reward"),
    [
        pytest.param(DONE, 0.0, id="finished"),
        pytest.param("Thought: no\nAction: call_user()", 0.0, id="call_user"),
        pytest.param("Action: error_env()", 0.0, id="error_env"),
        pytest.param("I would rather not.", -1.0, id="unparsable"),
        pytest.param("", -1.0, id="nothing"),
        pytest.param("Action: click(", -1.0, id="cut off"),
    ],
)
async def test_a_step_that_ends_the_episode_has_no_messages(prediction: str, format_reward: float) -> None:
    async with serving() as served:
        trainer = Trainer(served.url, "A")
        await trainer.reset(TASK)
        over = {"env_idx": 0, "obs_messages": None, "is_done": True, "format_reward": format_reward}
        answer = (await trainer.step(prediction)).json()
        assert bool(answer.pop("problem", "")) is (format_reward < 0)
        assert answer == over
        assert (await trainer.step(CLICK)).json() == over | {"format_reward": 0.0}
        assert served.desktop().inputs == []
        history = (await trainer.history()).json()["history_messages"]
        assert roles(history) == "suia"
        assert text_of(history[-1]) == prediction


async def test_the_sixteenth_action_ends_the_episode_whatever_the_predictions() -> None:
    both = f"{CLICK}\n\nhotkey(key='ctrl c')"
    async with serving() as served:
        trainer = Trainer(served.url, "A")
        await trainer.reset(TASK)
        for _ in range(7):
            assert not (await trainer.step(both)).json()["is_done"]
        assert not (await trainer.step("Action: wait()")).json()["is_done"]
        answer = (await trainer.step(both)).json()
        assert answer == {"env_idx": 0, "obs_messages": None, "is_done": True, "format_reward": 0.0}
        assert len(served.desktop().inputs) == 15
        assert served.service.env(0).model_dump()["episode"]["end_reason"] == "max_steps"


async def test_one_image_a_step_even_for_several_actions() -> None:
    async with serving() as served:
        trainer = Trainer(served.url, "B")
        await trainer.reset(TASK)
        _, messages = parted(await trainer.step(f"{CLICK}\n\n{CLICK.partition('Action: ')[2]}"))
        assert roles(messages or []) == "suiai"
        assert len(served.desktop().inputs) == 2


async def test_the_same_task_again_is_a_new_episode_on_a_clean_desktop() -> None:
    async with serving() as served:
        trainer = Trainer(served.url, "B")
        await trainer.reset(TASK)
        first = served.desktop().id
        await trainer.step(CLICK)
        _, messages = parted(await trainer.reset(TASK))
        assert roles(messages or []) == "sui"
        assert served.desktop().id != first
        await eventually(lambda: first not in served.sim.desktops)


async def test_a_task_without_an_instruction_has_an_empty_one() -> None:
    async with serving() as served:
        _, messages = parted(await Trainer(served.url, "A").reset({}))
        assert messages is not None
        assert text_of(messages[1]).endswith("## The job\n\n")


# --- failures: never a 200 with nulls, never a number -------------------------------------------------------------


def problem_of(response: requests.Response) -> dict[str, Any]:
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == response.status_code
    assert "obs_messages" not in problem
    return problem


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        pytest.param(Behaviour(create_fails="no room"), "boot_failed", id="create fails"),
        pytest.param(Behaviour(dies_after_s=0.05, dies_when="booting"), "instance_died", id="dies"),
        pytest.param(Behaviour(never=True), "boot_timeout", id="never ready"),
        pytest.param(Behaviour(spoil="/execute"), "setup_failed", id="set-up fails"),
    ],
)
async def test_a_reset_that_fails_is_a_503_with_its_job(behaviour: Behaviour, code: str) -> None:
    async with serving(behaviour, ready_timeout=1) as served:
        task = TASK | {"config": [{"type": "execute", "parameters": {"command": ["true"]}}]}
        response = await Trainer(served.url, "A").reset(task)
        problem = problem_of(response)
        assert (response.status_code, problem["code"], problem["job"]["state"]) == (503, code, "failed")
        assert (int(response.headers.get("Retry-After", 0)) >= 1) is problem["retryable"]
        _, job = await served.get(problem["job"]["links"]["self"])
        assert job["error"]["code"] == code
        assert (await served.get("/v1/envs/0"))[1]["state"] == "empty"


async def test_a_reset_that_still_boots_when_the_wait_is_over_is_a_503_and_goes_on() -> None:
    async with serving([Behaviour(), Behaviour(boot_s=0.5)], legacy_wait=0.15) as served:
        trainer = Trainer(served.url, "C")
        (await trainer.reset(TASK)).raise_for_status()
        response = await trainer.reset(TASK | {"id": "second"})
        problem = problem_of(response)
        assert (response.status_code, problem["code"], problem["retryable"]) == (503, "still_booting", True)
        assert (problem["job"]["state"], problem["job"]["task_id"]) == ("booting", "second")
        assert problem["eta_s"] == problem["job"]["eta_s"]
        assert problem["eta_s"] >= 0
        assert int(response.headers["Retry-After"]) >= 1
        job = await served.ended(problem["job"]["id"])
        assert job["state"] == "succeeded"


async def test_the_same_reset_sent_again_waits_for_the_same_job() -> None:
    async with serving(Behaviour(boot_s=0.4), legacy_wait=0.15) as served:
        trainer = Trainer(served.url, "C")
        first = problem_of(await trainer.reset(TASK))["job"]["id"]
        while (response := await trainer.reset(TASK)).status_code == 503:
            assert problem_of(response)["job"]["id"] == first
        response.raise_for_status()
        assert [job.id for job in served.service.store.jobs()] == [first]
        assert {entry.id for entry in served.sim.journal} == {served.desktop().id}


@pytest.mark.parametrize("between", ["nothing", "a step", "another reset"])
async def test_a_reset_that_ended_while_its_caller_was_away_is_answered_when_it_is_sent_again(between: str) -> None:
    async with serving(Behaviour(boot_s=0.3), legacy_wait=0.1) as served:
        trainer = Trainer(served.url, "C")
        first = problem_of(await trainer.reset(TASK))["job"]["id"]
        await served.service.queue.ended(first)
        if between == "a step":
            await served.post("/v1/envs/0/step", {"actions": ["pyautogui.click(1, 2)"], "pause_s": 0})
        elif between == "another reset":
            _, other = await served.post("/v1/envs/0/reset", {"task": {"id": "other"}})
            await served.service.queue.ended(other["id"])
        response = await trainer.reset(TASK)
        if between == "nothing":
            assert response.status_code == 200
            assert served.service.env(0).episode is not None
            # Once it was told, the same reset is another one.
            assert problem_of(await trainer.reset(TASK))["job"]["id"] != first
        else:
            assert problem_of(response)["job"]["id"] != first


async def test_a_reset_that_another_one_replaces_is_a_409() -> None:
    async with serving(FOR_EVER) as served:
        trainer = Trainer(served.url, "A")
        _, running = await served.post("/v1/envs/0/reset", {})
        replaced = asyncio.create_task(trainer.reset(TASK))
        await eventually(lambda: len(served.service.queue.waiting()) == 1)
        _, other = await served.post("/v1/envs/0/reset", {"task": {"id": "other"}})
        problem = problem_of(await replaced)
        assert (problem["status"], problem["code"], problem["job"]["state"]) == (409, "job_superseded", "superseded")
        assert {running["id"], other["id"]} == {job.id for job in served.service.queue.active()}


async def test_a_reset_that_is_cancelled_is_a_409() -> None:
    async with serving(FOR_EVER) as served:
        waiting = asyncio.create_task(Trainer(served.url, "A").reset(TASK))
        await eventually(lambda: len(served.service.queue.booting()) == 1)
        [job] = served.service.queue.booting()
        await served.post(f"/v1/jobs/{job.id}/cancel")
        problem = problem_of(await waiting)
        assert (problem["status"], problem["code"], problem["job"]["state"]) == (409, "job_cancelled", "cancelled")


async def test_a_reset_that_expires_in_the_queue_is_a_503() -> None:
    async with serving(FOR_EVER, envs=2, queue_timeout=0.1) as served:
        await served.post("/v1/envs/1/reset", {"queue_timeout_s": 60})
        problem = problem_of(await Trainer(served.url, "A").reset(TASK))
        assert (problem["status"], problem["code"], problem["fault"]) == (503, "job_expired", "capacity")


async def test_shutdown_answers_a_reset_that_waits() -> None:
    async with serving(FOR_EVER) as served:
        waiting = asyncio.create_task(Trainer(served.url, "A").reset(TASK))
        await eventually(lambda: len(served.service.queue.booting()) == 1)
        await served.service.drain()
        problem = problem_of(await waiting)
        assert (problem["status"], problem["code"]) == (503, "draining")
        refused = problem_of(await Trainer(served.url, "A").reset(TASK))
        assert (refused["status"], refused["code"]) == (503, "draining")


async def test_a_client_that_hangs_up_cancels_nothing_and_is_not_waited_for() -> None:
    async with serving(Behaviour(boot_s=0.3)) as served:
        with pytest.raises(requests.ReadTimeout):
            await Trainer(served.url, "A").reset(TASK, timeout=0.1)
        [job] = served.service.queue.booting()
        assert (await served.ended(job.id))["state"] == "succeeded"


async def test_a_reset_never_answers_with_a_later_episode() -> None:
    """Two callers joined one reset; before the second one is answered the first has reset again."""
    async with serving() as served:
        ended = served.service.queue.ended

        async def ended_and_reset_again(job_id: str) -> Any:
            job = await ended(job_id)
            served.service.queue.ended = ended  # type: ignore[method-assign]  # once
            await served.play(task={"id": "later"})
            return job

        served.service.queue.ended = ended_and_reset_again  # type: ignore[method-assign]  # the gap, made wide
        problem = problem_of(await Trainer(served.url, "A").reset(TASK))
        assert (problem["status"], problem["code"], problem["job"]["state"]) == (409, "job_superseded", "succeeded")


@pytest.mark.parametrize("dialect", ["A", "B", "C"])
async def test_evaluate_is_no_number_for_what_has_no_evaluator_and_no_desktop(dialect: str) -> None:
    async with serving() as served:
        trainer = Trainer(served.url, dialect)
        before = problem_of(await trainer.evaluate())
        assert (before["status"], before["code"]) == (409, "no_episode")
        await trainer.reset({"id": "t-1"})
        await trainer.step(DONE)
        for _ in range(2):
            problem = problem_of(await trainer.evaluate())
            assert (problem["status"], problem["code"], problem["fault"]) == (500, "not_evaluable", "task")
            assert (problem["verdict"]["status"], problem["verdict"]["score"]) == ("not_evaluable", None)
        await trainer.reset({"id": "t-2", "evaluator": {"func": "infeasible"}})
        served.sim.kill(served.desktop().id)
        await eventually(lambda: served.service.env(0).state == "lost")
        lost = problem_of(await trainer.evaluate())
        assert (lost["status"], lost["code"], lost["fault"]) == (503, "desktop_lost", "infra")


async def test_a_step_whose_desktop_died_is_a_503_and_no_reward() -> None:
    async with serving(Behaviour(hang="/execute")) as served:
        trainer = Trainer(served.url, "A")
        await trainer.reset(TASK)
        stepping = asyncio.create_task(trainer.step(CLICK))
        desktop = served.desktop()
        await eventually(lambda: desktop.requests["/execute"] == 1)
        served.sim.kill(desktop.id)
        problem = problem_of(await stepping)
        assert (problem["status"], problem["code"], problem["retryable"]) == (503, "desktop_lost", True)
        assert "format_reward" not in problem


@pytest.mark.parametrize("state", ["empty", "resetting"])
async def test_a_step_without_an_episode_is_a_409(state: str) -> None:
    async with serving(FOR_EVER) as served:
        if state == "resetting":
            _, job = await served.post("/v1/envs/0/reset", {})
            await served.in_state(job["id"], JobState.BOOTING)
        problem = problem_of(await Trainer(served.url, "A").step(CLICK))
        assert problem["status"] == 409
        assert problem["code"] == {"empty": "no_episode", "resetting": "env_busy"}[state]


async def test_the_history_before_a_reset_is_empty() -> None:
    async with serving() as served:
        assert (await Trainer(served.url, "A").history()).json() == {"history_messages": []}


async def health(served: Served) -> dict[str, Any]:
    status, body = await served.get("/health")
    assert status == 200
    return {**body, "kvm_device": None}


async def test_health_has_the_fields_of_every_dialect() -> None:
    async with serving(envs=2) as served:
        await served.play(1)
        assert await health(served) == {
            "status": "ok",
            "provider": "sim",
            "observation_type": "screenshot",
            "screenshot_source": "guest",
            "kvm_available": False,
            "kvm_device": None,
            "env_status": "not_initialized",
            "message": "ready",
            "pool_size": 2,
            "slot_statuses": {"0": "not_initialized", "1": "initialized"},
        }
        await served.play(0)
        assert (await health(served))["env_status"] == "initialized"


@pytest.mark.parametrize("state", list(KvmState))
async def test_health_says_that_there_is_kvm_where_a_guest_was_seen_to_execute(state: KvmState) -> None:
    async with serving() as served:
        served.service.kvm = Kvm(state, "as it was when the provider was opened")
        assert (await health(served))["kvm_available"] is (state is KvmState.WORKS)


async def test_a_client_that_connects_anew_for_each_call_leaves_no_socket_behind() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async with serving() as served:
        trainer = Trainer(served.url, "A")
        await trainer.reset(TASK)
        before = open_files()
        for _ in range(20):
            (await trainer.step("Action: wait()")).raise_for_status()
            await asyncio.to_thread(requests.get, f"{served.url}/health", timeout=10)
        await eventually(lambda: open_files() <= before + 2)
