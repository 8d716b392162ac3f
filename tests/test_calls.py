"""Calls that change something: once for each idempotency key, in their order, answered within their caller's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from serving import Served, serving

from envd.drivers.sim import Behaviour
from envd.errors import InfraError

FOR_EVER = Behaviour(never=True)


def write(text: str, **more: Any) -> dict[str, Any]:
    return {"actions": [f"pyautogui.write({text!r})"], **more}


async def step(
    served: Served, body: dict[str, Any], key: str = "", deadline: str = "", env: int = 0
) -> tuple[int, dict[str, Any]]:
    headers = {"Idempotency-Key": key} if key else {}
    headers |= {"X-Request-Deadline": deadline} if deadline else {}
    status, answer = await served.post(f"/v1/envs/{env}/step", body, headers=headers)
    return status, answer


async def test_a_keyed_step_that_comes_many_times_at_once_is_done_once() -> None:
    async with serving() as served:
        desktop = await served.play()
        answers = await asyncio.gather(*(step(served, write("a"), key="k-1") for _ in range(20)))
        assert {status for status, _ in answers} == {200}
        assert all(answer == answers[0][1] for _, answer in answers)
        assert desktop.gui.typed == "a"


async def test_a_key_belongs_to_one_request() -> None:
    async with serving(envs=2) as served:
        await served.play()
        assert (await step(served, write("a"), key="k-1"))[0] == 200
        for other in (step(served, write("b"), key="k-1"), step(served, write("a"), key="k-1", env=1)):
            status, problem = await other
            assert (status, problem["code"]) == (422, "idempotency_key_reused")


async def test_a_call_that_was_refused_may_be_sent_again_under_its_key() -> None:
    async with serving() as served:
        assert (await step(served, write("a"), key="k-1"))[1]["code"] == "no_episode"
        await served.play()
        assert (await step(served, write("a"), key="k-1"))[0] == 200


@pytest.mark.parametrize("key", ["", '""', "two words", 'a"b', "x" * 256, "ü"])
async def test_a_key_that_cannot_be_one_is_told(key: str) -> None:
    async with serving() as served:
        status, problem = await served.post(
            "/v1/envs/0/reset", {}, headers={"Idempotency-Key": key.encode().decode("latin-1")}
        )
        assert (status, problem.get("code")) == ((202, None) if key == "" else (422, "invalid_request"))


async def test_steps_may_say_their_number() -> None:
    async with serving() as served:
        desktop = await served.play()
        first = await step(served, write("a", step=1))
        assert first[0] == 200
        assert await step(served, write("a", step=1)) == first
        status, problem = await step(served, write("b", step=1))
        assert (status, problem["code"], problem["expected"]) == (409, "step_repeated", 2)
        status, problem = await step(served, write("c", step=3))
        assert (status, problem["code"], problem["expected"]) == (409, "step_gap", 2)
        assert (await step(served, write("b", step=2)))[0] == 200
        assert desktop.gui.typed == "ab"


async def test_the_last_step_of_an_episode_is_answered_again() -> None:
    async with serving() as served:
        await served.play(max_steps=1)
        last = await step(served, write("a", step=1), key="k")
        assert last[1]["done"]
        assert await step(served, write("a", step=1), key="k") == last
        assert (await step(served, write("a", step=1)))[1] == last[1]
        assert (await step(served, write("b")))[1]["code"] == "episode_over"


async def test_a_legacy_step_is_answered_again_with_the_messages_of_then() -> None:
    async with serving() as served:
        await served.play()
        words = {"slot_id": 0, "prediction": "Thought: x\nAction: wait()"}
        headers = {"Idempotency-Key": "k-1"}
        first = await served.post("/env/step", words, headers=headers)
        await served.post("/env/step", words)
        assert await served.post("/env/step", words, headers=headers) == first
        assert len(first[1]["obs_messages"]) == 5


async def test_a_step_whose_caller_has_no_more_time_goes_on() -> None:
    async with serving() as served:
        desktop = await served.play()
        began = time.monotonic()
        body = write("a", pause_s=1.0)
        status, problem = await step(served, body, key="k-1", deadline="0.4")
        assert (status, problem["code"]) == (503, "deadline_passed")
        assert time.monotonic() - began < 0.9
        status, result = await step(served, body, key="k-1")
        assert (status, result["step"], desktop.gui.typed) == (200, 1, "a")


async def test_a_legacy_reset_is_answered_within_its_callers_time() -> None:
    async with serving(FOR_EVER) as served:
        began = time.monotonic()
        status, problem = await served.post("/env/reset", {"task_config": {}}, headers={"X-Request-Deadline": "0.5"})
        assert (status, problem["code"]) == (503, "still_booting")
        assert time.monotonic() - began < 0.5 + 0.3


async def test_who_would_rather_wait_is_answered_with_the_job_as_it_ended() -> None:
    async with serving() as served:
        status, job, headers = await served.ask("POST", "/v1/envs/0/reset", {}, headers={"Prefer": "wait=20"})
        assert (status, job["state"], headers["Preference-Applied"]) == (202, "succeeded", "wait")


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "1e3", ""])
async def test_a_deadline_that_is_no_number_is_told(given: str) -> None:
    async with serving() as served:
        status, problem = await served.post("/v1/envs/0/reset", {}, headers={"X-Request-Deadline": given})
        assert (status, problem["code"]) == (422, "invalid_request")
        assert problem["errors"][0]["field"] == "X-Request-Deadline"


async def test_a_verdict_asked_for_under_a_key_outlives_the_episode() -> None:
    async with serving() as served:
        await served.play(task={"id": "t", "config": [], "evaluator": {"func": "infeasible"}})
        headers = {"Idempotency-Key": "v-1"}
        verdict = await served.post("/v1/envs/0/evaluate", headers=headers)
        await served.play()
        assert await served.post("/v1/envs/0/evaluate", headers=headers) == verdict


async def test_jobs_of_one_client_are_limited() -> None:
    async with serving(FOR_EVER, envs=4, client_jobs=2) as served:
        for env in range(3):  # one boots
            assert (await served.post(f"/v1/envs/{env}/reset", {}))[0] == 202
            await asyncio.sleep(0)
        status, problem, headers = await served.ask("POST", "/v1/envs/3/reset", {})
        assert (status, problem["code"], problem["setting"]) == (429, "too_many_requests", "ENVD_CLIENT_JOBS")
        assert int(headers["Retry-After"]) >= 1
        # One that changes its mind takes no more room.
        assert (await served.post("/v1/envs/2/reset", {"task": {"id": "other"}}))[0] == 202


async def test_a_step_that_could_not_begin_is_done_when_it_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        desktop = await served.play()
        awake = served.service.fleet.awake

        @asynccontextmanager
        async def asleep(desktop_id: str) -> AsyncIterator[None]:
            if desktop_id == served.service.env(0).desktop.id:  # type: ignore[union-attr]  # it has one
                raise InfraError("It cannot be woken.")
            yield

        monkeypatch.setattr(served.service.fleet, "awake", asleep)
        assert (await step(served, write("a", step=1), key="k-1"))[0] == 503
        monkeypatch.setattr(served.service.fleet, "awake", awake)
        status, result = await step(served, write("a", step=1), key="k-1")
        assert (status, result["step"], desktop.gui.typed) == (200, 1, "a")
