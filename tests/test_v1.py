"""The native API: jobs, long-polls, cancelling, envs, steps."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from typing import Any

import pytest
from serving import CLICK, DONE, SCREEN, Served, eventually, raw_connection, serving

from envd.drivers.sim import Behaviour
from envd.evaluations import NO_EVALUATORS
from envd.settings import VARIABLES
from envd.tasks.grading import find_interpreter

FOR_EVER = Behaviour(boot_s=3600)
CLICKED = "pyautogui.click(10, 20)"


async def problem(served: Served, method: str, path: str, body: Any = None, **how: Any) -> dict[str, Any]:
    """The problem that a call is answered with."""
    status, answer, headers = await served.ask(method, path, body, **how)
    assert headers["Content-Type"] == "application/problem+json", answer
    assert answer["status"] == status
    return dict(answer)


# --- jobs ---------------------------------------------------------------------------------------------------------


async def test_a_reset_is_accepted_with_where_to_look_and_when() -> None:
    async with serving(FOR_EVER) as served:
        status, job, headers = await served.ask("POST", "/v1/envs/0/reset", {"task": {"id": "t-1"}})
        assert status == 202
        assert headers["Location"] == f"/v1/jobs/{job['id']}"
        assert headers["ETag"] == f'"{job["version"]}"'
        assert 1 <= int(headers["Retry-After"]) <= 30
        assert (job["kind"], job["env"], job["task_id"], job["joined"]) == ("reset", 0, "t-1", 0)
        assert job["links"] == {
            "self": f"/v1/jobs/{job['id']}",
            "events": f"/v1/jobs/{job['id']}/events",
            "cancel": f"/v1/jobs/{job['id']}/cancel",
        }
        status, there = await served.get(headers["Location"])
        assert (status, there["id"], there.keys()) == (200, job["id"], job.keys())


async def test_a_job_that_succeeded_tells_its_story() -> None:
    async with serving() as served:
        job = await served.reset(task={"id": "t-1"}, max_steps=3)
        assert (job["state"], job["error"], job["position"], job["eta_s"]) == ("succeeded", None, None, None)
        assert [phase["name"] for phase in job["phases"]] == ["queue", "create", "probe", "set_up", "observe"]
        assert all(phase["seconds"] >= 0 for phase in job["phases"])
        assert {probe["name"]: probe["passed"] for probe in job["probes"]} == {"screenshot": True, "chrome_cdp": True}
        _, env = await served.get("/v1/envs/0")
        assert (env["state"], env["desktop"]["id"]) == ("playing", job["desktop_id"])
        assert (env["episode"]["id"], env["episode"]["max_steps"]) == (job["episode_id"], 3)


async def test_an_empty_body_is_an_empty_task() -> None:
    async with serving() as served:
        status, job, _ = await served.ask("POST", "/v1/envs/0/reset")
        assert status == 202
        assert (await served.ended(job["id"]))["state"] == "succeeded"


async def test_an_identical_reset_joins_and_another_one_waits() -> None:
    async with serving(FOR_EVER) as served:
        _, first = await served.post("/v1/envs/0/reset", {"task": {"id": "a"}})
        _, same = await served.post("/v1/envs/0/reset", {"task": {"id": "a"}})
        _, other = await served.post("/v1/envs/0/reset", {"task": {"id": "b"}})
        assert (same["id"], same["joined"]) == (first["id"], 1)
        assert (other["state"], other["position"], other["ahead"]) == ("queued", 1, 1)
        _, env = await served.get("/v1/envs/0")
        assert (env["state"], env["job_id"], env["waiting_job_id"]) == ("resetting", first["id"], other["id"])


async def test_a_failed_job_is_read_with_200_and_carries_its_problem() -> None:
    async with serving(Behaviour(create_fails="no room")) as served:
        job = await served.reset()
        assert job["state"] == "failed"
        assert (job["error"]["code"], job["error"]["fault"], job["error"]["phase"]) == (
            "boot_failed",
            "infra",
            "create",
        )
        assert job["error"]["instance"] == f"/v1/jobs/{job['id']}"


async def test_jobs_are_listed_newest_first_by_env_and_by_state() -> None:
    async with serving([Behaviour(), FOR_EVER], envs=3) as served:
        done = await served.reset(0)
        _, booting = await served.post("/v1/envs/1/reset", {})
        await served.in_state(booting["id"], "booting")
        _, queued = await served.post("/v1/envs/2/reset", {})

        async def listed(query: str = "") -> list[str]:
            return [job["id"] for job in (await served.get(f"/v1/jobs{query}"))[1]["jobs"]]

        assert await listed() == [queued["id"], booting["id"], done["id"]]
        assert await listed("?env=1") == [booting["id"]]
        assert await listed("?state=queued") == [queued["id"]]
        assert await listed("?env=0&state=queued") == []
        for query in ("?state=sleeping", "?env=one", "?env=-1"):
            assert (await problem(served, "GET", f"/v1/jobs{query}"))["code"] == "invalid_request"


async def test_the_queue_shows_what_boots_and_what_waits() -> None:
    async with serving(FOR_EVER, envs=3) as served:
        ids = [(await served.post(f"/v1/envs/{env}/reset", {}))[1]["id"] for env in range(3)]
        await served.in_state(ids[0], "booting")
        _, queue = await served.get("/v1/queue")
        assert [job["id"] for job in queue["booting"]] == ids[:1]
        assert [(job["id"], job["position"], job["ahead"]) for job in queue["waiting"]] == [
            (ids[1], 1, 1),
            (ids[2], 2, 2),
        ]
        assert (queue["limit"], queue["spares"], queue["boot_width"]) == (1024, 0, 1)


async def test_a_full_queue_refuses_and_changes_nothing() -> None:
    async with serving(FOR_EVER, envs=3, queue_limit=1) as served:
        for env in (0, 1):
            _, job = await served.post(f"/v1/envs/{env}/reset", {})
            if env == 0:
                await served.in_state(job["id"], "booting")
        before = [job.id for job in served.service.queue.active()]
        full = await problem(served, "POST", "/v1/envs/2/reset", {})
        assert (full["status"], full["code"], full["fault"], full["retryable"]) == (503, "queue_full", "capacity", True)
        assert full["retry_after"] > 0
        assert [job.id for job in served.service.queue.active()] == before
        status, ready = await served.get("/readyz")
        assert (status, ready["ready"]) == (503, False)
        assert "full" in ready["reasons"][0]


async def test_a_prewarmed_desktop_serves_the_next_reset() -> None:
    async with serving() as served:
        status, job, headers = await served.ask("POST", "/v1/prewarm")
        assert (status, job["kind"], job["env"]) == (202, "prewarm", None)
        assert headers["Location"] == job["links"]["self"]
        prewarmed = await served.ended(job["id"])
        assert (prewarmed["state"], served.service.fleet.spares) == ("succeeded", 1)
        played = await served.reset()
        assert (played["reset_path"], played["desktop_id"]) == ("spare", prewarmed["desktop_id"])


# --- long-polls ---------------------------------------------------------------------------------------------------


async def booting(served: Served, env: int = 0) -> dict[str, Any]:
    """A job that boots."""
    _, job = await served.post(f"/v1/envs/{env}/reset", {})
    return await served.in_state(job["id"], "booting")


async def waiting(served: Served) -> dict[str, Any]:
    """A job that does not change until somebody does something: it waits behind one that boots for ever."""
    await booting(served, 1)
    _, job = await served.post("/v1/envs/0/reset", {})
    return dict(job)


def holding() -> int:
    """Tasks that keep a request waiting."""
    return sum(task.get_name().startswith("envd.app.bodies.hold.") for task in asyncio.all_tasks())


async def test_a_long_poll_returns_as_soon_as_the_job_changes() -> None:
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        polling = asyncio.create_task(served.get(f"/v1/jobs/{job['id']}?after={job['version']}&wait=30"))
        await asyncio.sleep(0.05)
        assert not polling.done()
        began = time.monotonic()
        await served.post(f"/v1/jobs/{job['id']}/cancel")
        status, changed = await polling
        assert (status, changed["version"] > job["version"]) == (200, True)
        assert time.monotonic() - began < 1


async def test_a_long_poll_returns_what_there_is_when_its_wait_is_over() -> None:
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        began = time.monotonic()
        path = f"/v1/jobs/{job['id']}?after={job['version']}&wait=0.2"
        status, same, headers = await served.ask("GET", path)
        assert (status, same["version"], headers["ETag"]) == (200, job["version"], f'"{job["version"]}"')
        assert 0.2 <= time.monotonic() - began < 2
        for tag in (f'"{job["version"]}"', f'W/"{job["version"]}"', f'"x", "{job["version"]}"'):
            status, nothing, headers = await served.ask("GET", path, headers={"If-None-Match": tag})
            assert (status, nothing, headers["ETag"]) == (304, b"", f'"{job["version"]}"')
        status, _ = await served.get(path, headers={"If-None-Match": '"1"'})
        assert status == 200


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("", id="no wait"),
        pytest.param("?wait=30", id="no version"),
        pytest.param("?after=0&wait=30", id="older version"),
        pytest.param("?after=99999", id="newer version, no wait"),
    ],
)
async def test_what_need_not_wait_does_not(query: str) -> None:
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        async with asyncio.timeout(2):
            assert (await served.get(f"/v1/jobs/{job['id']}{query}"))[0] == 200


async def test_an_ended_job_is_not_waited_for() -> None:
    async with serving() as served:
        job = await served.reset()
        async with asyncio.timeout(2):
            status, same = await served.get(f"/v1/jobs/{job['id']}?after={job['version']}&wait=30")
        assert (status, same) == (200, job)


@pytest.mark.parametrize("query", ["wait=-1", "wait=nan", "wait=soon", "after=-1&wait=1", "after=x&wait=1"])
async def test_a_wait_that_is_no_number_is_refused(query: str) -> None:
    async with serving() as served:
        job = await served.reset()
        refused = await problem(served, "GET", f"/v1/jobs/{job['id']}?{query}")
        assert (refused["status"], refused["code"]) == (422, "invalid_request")
        assert refused["errors"][0]["field"] == query.partition("=")[0]


async def test_a_long_wait_is_cut_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.app.v1.LONGEST_POLL", 0.1)
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        async with asyncio.timeout(3):
            status, _ = await served.get(f"/v1/jobs/{job['id']}?after={job['version']}&wait=1e9")
        assert status == 200


async def test_shutdown_wakes_a_long_poll() -> None:
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        path = f"/v1/jobs/{job['id']}?after={job['version']}&wait=30"
        polling = asyncio.create_task(problem(served, "GET", path))
        await asyncio.sleep(0.05)
        served.service.draining.set()
        async with asyncio.timeout(3):
            refused = await polling
        assert (refused["status"], refused["code"]) == (503, "draining")


async def test_a_long_poll_whose_client_left_is_not_kept() -> None:
    async with serving(FOR_EVER, envs=2) as served:
        job = await waiting(served)
        assert holding() == 0
        async with raw_connection(served.address) as (_, writer):
            path = f"/v1/jobs/{job['id']}?after={job['version']}&wait=60"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            await eventually(lambda: holding() > 0)
        await eventually(lambda: holding() == 0)


# --- cancelling ---------------------------------------------------------------------------------------------------


async def test_a_queued_job_is_cancelled_at_once() -> None:
    async with serving(FOR_EVER, envs=2) as served:
        await booting(served)
        _, queued = await served.post("/v1/envs/1/reset", {})
        status, job = await served.post(f"/v1/jobs/{queued['id']}/cancel")
        assert (status, job["state"], job["started_at"]) == (200, "cancelled", None)
        assert (await served.get("/v1/queue"))[1]["waiting"] == []


async def test_a_booting_job_is_cancelled_once_its_desktop_is_gone() -> None:
    async with serving(Behaviour(boot_s=3600, destroy_s=0.2)) as served:
        job = await booting(served)
        status, asked = await served.post(f"/v1/jobs/{job['id']}/cancel")
        assert (status, asked["state"], asked["cancel_requested"]) == (202, "booting", True)
        assert (await served.post(f"/v1/jobs/{job['id']}/cancel"))[0] == 202
        assert (await served.ended(job["id"]))["state"] == "cancelled"
        assert served.sim.desktops == {}
        assert (await served.get("/v1/envs/0"))[1]["state"] == "empty"


async def test_a_job_that_sets_up_is_cancelled_and_its_desktop_not_kept() -> None:
    async with serving() as served:
        task = {"config": [{"type": "sleep", "parameters": {"seconds": 600}}]}
        _, job = await served.post("/v1/envs/0/reset", {"task": task})
        await served.in_state(job["id"], "setting_up")
        assert (await served.post(f"/v1/jobs/{job['id']}/cancel"))[0] == 202
        assert (await served.ended(job["id"]))["state"] == "cancelled"
        assert served.sim.desktops == {}


async def test_an_ended_job_is_answered_as_it_is() -> None:
    async with serving() as served:
        job = await served.reset()
        assert await served.post(f"/v1/jobs/{job['id']}/cancel") == (200, job)
        assert (await served.get("/v1/envs/0"))[1]["state"] == "playing"


# --- envs and steps -----------------------------------------------------------------------------------------------


async def test_an_env_starts_empty() -> None:
    async with serving(envs=2) as served:
        empty = {
            "state": "empty",
            "job_id": None,
            "waiting_job_id": None,
            "desktop": None,
            "episode": None,
            "lease": None,
            "detail": "",
        }
        assert await served.get("/v1/envs") == (200, {"envs": [{"id": 0, **empty}, {"id": 1, **empty}]})
        assert await served.get("/v1/envs/1") == (200, {"id": 1, **empty})


async def test_a_prediction_is_run_and_looked_at() -> None:
    async with serving() as served:
        desktop = await served.play()
        _, env = await served.get("/v1/envs/0")
        status, result = await served.post("/v1/envs/0/step", {"prediction": CLICK})
        assert status == 200
        assert base64.b64decode(result.pop("screenshot"))[:4] == b"\x89PNG"
        assert result.pop("seconds").keys() == {"act", "observe"}
        assert result["actions"][0].pop("seconds") >= 0
        assert result == {
            "env": 0,
            "episode_id": env["episode"]["id"],
            "step": 1,
            "done": False,
            "end_reason": None,
            "format_reward": 0.0,
            "actions": [
                {
                    "action": "click(start_box='(100,100)')",
                    "outcome": "ok",
                    "via": "guest",
                    "returncode": 0,
                    "stdout": "",
                    "stderr": "",
                }
            ],
            "problem": "",
            "screenshot_via": "guest",
        }
        assert len(desktop.inputs) == 1


async def test_raw_programs_run_in_order_as_they_were_sent() -> None:
    async with serving() as served:
        desktop = await served.play()
        actions = [CLICKED, "pyautogui.write('hi')\npyautogui.press('enter')"]
        _, result = await served.post("/v1/envs/0/step", {"actions": actions, "include_screenshot": False})
        assert [action["outcome"] for action in result["actions"]] == ["ok", "ok"]
        assert [action["action"] for action in result["actions"]] == actions
        assert result["screenshot"] is None
        assert [program.endswith(action) for program, action in zip(desktop.inputs, actions, strict=True)] == [True] * 2


@pytest.mark.parametrize(
    ("word", "done", "reason"),
    [("DONE", True, "done"), ("FAIL", True, "fail"), ("WAIT", False, None), (" DONE ", True, "done")],
)
async def test_the_special_words_reach_no_guest(word: str, done: bool, reason: str | None) -> None:
    async with serving() as served:
        desktop = await served.play()
        _, result = await served.post("/v1/envs/0/step", {"actions": [word, CLICKED]})
        assert (result["done"], result["end_reason"], result["format_reward"]) == (done, reason, 0.0)
        assert result["actions"][0] | {"seconds": 0} == {
            "action": word.strip(),
            "outcome": "special",
            "via": None,
            "returncode": None,
            "stdout": "",
            "stderr": "",
            "seconds": 0,
        }
        assert len(desktop.inputs) == (0 if done else 1)


async def test_a_step_after_the_end_is_refused() -> None:
    async with serving() as served:
        await served.play()
        await served.post("/v1/envs/0/step", {"prediction": DONE})
        over = await problem(served, "POST", "/v1/envs/0/step", {"prediction": CLICK})
        assert (over["status"], over["code"], over["end_reason"]) == (409, "episode_over", "done")


async def test_an_unparsable_prediction_ends_the_episode_and_says_why() -> None:
    async with serving() as served:
        desktop = await served.play()
        _, result = await served.post("/v1/envs/0/step", {"prediction": "Action: fly(to='the moon')"})
        assert (result["done"], result["end_reason"], result["format_reward"]) == (True, "unparsable", -1.0)
        assert "fly" in result["problem"]
        assert result["actions"] == desktop.inputs == []


async def test_a_program_that_fails_in_the_guest_is_reported_and_the_episode_goes_on() -> None:
    async with serving() as served:
        await served.play()
        _, result = await served.post("/v1/envs/0/step", {"actions": ["print('so far')\n1 / 0", CLICKED]})
        broken, fine = result["actions"]
        assert (broken["outcome"], broken["returncode"], fine["outcome"]) == ("failed", 1, "ok")
        assert "ZeroDivisionError" in broken["stderr"] or "Error" in broken["stderr"]
        assert (result["done"], result["format_reward"]) == (False, 0.0)


async def test_a_program_whose_answer_is_lost_is_unknown_and_sent_once() -> None:
    async with serving(Behaviour(lose="/execute")) as served:
        desktop = await served.play()
        _, result = await served.post("/v1/envs/0/step", {"actions": [CLICKED, "pyautogui.press('a')"]})
        assert [action["outcome"] for action in result["actions"]] == ["unknown"]
        assert (result["done"], result["format_reward"]) == (False, 0.0)
        assert (len(desktop.inputs), desktop.requests["/execute"]) == (1, 1)
        assert len(desktop.gui.clicks) == 1


async def test_a_step_without_a_picture_afterwards_is_an_error_that_lists_what_ran() -> None:
    async with serving(Behaviour(spoil="/screenshot", bad=("garbage",), trouble_s=0.3)) as served:
        desktop = await served.play()
        await asyncio.sleep(0.3)
        failed = await problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]})
        assert (failed["status"], failed["code"], failed["fault"]) == (503, "guest_misbehaved", "infra")
        assert [action["outcome"] for action in failed["actions"]] == ["ok"]
        assert len(desktop.inputs) == 1
        assert (await served.get("/v1/envs/0"))[1]["episode"]["steps"] == 1


async def test_the_death_of_the_desktop_ends_a_step_within_two_seconds() -> None:
    async with serving(Behaviour(hang="/execute")) as served:
        desktop = await served.play()
        stepping = asyncio.create_task(problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]}))
        await eventually(lambda: desktop.requests["/execute"] == 1)
        died = time.monotonic()
        served.sim.kill(desktop.id, "power cut")
        lost = await stepping
        assert time.monotonic() - died < 2
        assert (lost["status"], lost["code"], lost["fault"]) == (503, "desktop_lost", "infra")
        _, env = await served.get("/v1/envs/0")
        assert (env["state"], env["detail"], env["episode"]["end_reason"]) == ("lost", "power cut", "lost")
        assert (await problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]}))["code"] == "desktop_lost"
        assert (await served.reset())["state"] == "succeeded"


async def test_one_step_at_a_time() -> None:
    async with serving(Behaviour(answer_s=0.3)) as served:
        desktop = await served.play()
        desktop.requests.clear()
        stepping = asyncio.create_task(served.post("/v1/envs/0/step", {"actions": [CLICKED]}))
        await eventually(lambda: desktop.requests["/execute"] == 1)
        busy = await problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]})
        assert (busy["status"], busy["code"], busy["retryable"]) == (409, "env_busy", True)
        assert (await stepping)[0] == 200
        assert desktop.requests["/execute"] == 1


async def test_a_reset_ends_a_step_that_runs() -> None:
    async with serving([Behaviour(hang="/execute"), Behaviour()]) as served:
        desktop = await served.play()
        stepping = asyncio.create_task(problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]}))
        await eventually(lambda: desktop.requests["/execute"] == 1)
        assert (await served.reset(task={"id": "next"}))["state"] == "succeeded"
        assert (await stepping)["code"] == "desktop_lost"
        _, result = await served.post("/v1/envs/0/step", {"actions": [CLICKED]})
        assert (result["step"], result["actions"][0]["outcome"]) == (1, "ok")


async def test_an_unknown_env_is_a_404_on_every_route() -> None:
    routes = [("POST", "reset"), ("POST", "step"), ("POST", "evaluate"), ("GET", "screenshot"), ("GET", "history")]
    envs = ["-1", "99", "abc", "1e3", "0x0", "9" * 400, "%20", "٣", "1.0", "%00"]
    async with serving() as served:
        for env in envs:
            found = [(await problem(served, "GET", f"/v1/envs/{env}"))["code"]]
            for method, route in routes:
                body = {"actions": ["WAIT"]} if route == "step" else None
                found.append((await problem(served, method, f"/v1/envs/{env}/{route}", body))["code"])
            assert found == ["unknown_env"] * 6, env


async def test_an_env_without_an_episode_has_nothing_to_show() -> None:
    async with serving() as served:
        codes = [
            (await problem(served, "POST", "/v1/envs/0/step", {"actions": ["WAIT"]}))["code"],
            (await problem(served, "POST", "/v1/envs/0/evaluate"))["code"],
            (await problem(served, "GET", "/v1/envs/0/screenshot"))["code"],
        ]
        assert codes == ["no_episode"] * 3
        assert await served.get("/v1/envs/0/history") == (200, {"history_messages": []})
        assert served.sim.journal == []


async def test_an_env_that_is_being_reset_is_busy() -> None:
    async with serving(FOR_EVER) as served:
        await booting(served)
        for method, route in (("POST", "step"), ("POST", "evaluate"), ("GET", "screenshot")):
            body = {"actions": ["WAIT"]} if route == "step" else None
            busy = await problem(served, method, f"/v1/envs/0/{route}", body)
            assert (busy["status"], busy["code"], busy["retryable"]) == (409, "env_busy", True)


async def test_a_step_is_refused_while_another_reset_of_its_env_waits() -> None:
    async with serving([Behaviour(), FOR_EVER], envs=2) as served:
        desktop = await served.play(0)
        await served.post("/v1/envs/1/reset", {})
        await served.post("/v1/envs/0/reset", {})
        busy = await problem(served, "POST", "/v1/envs/0/step", {"actions": [CLICKED]})
        assert (busy["code"], desktop.inputs) == ("env_busy", [])


async def test_evaluate_makes_no_number_up() -> None:
    async with serving() as served:
        await served.play(task={"id": "t-1"})
        status, verdict = await served.post("/v1/envs/0/evaluate", {})
        assert (status, verdict["status"], verdict["score"], verdict["mask"]) == (200, "not_evaluable", None, True)
        assert (verdict["code"], verdict["fault"]) == ("not_evaluable", "task")
        assert "t-1" in verdict["detail"]


async def test_the_screenshot_is_the_screen_as_it_is_now() -> None:
    async with serving() as served:
        await served.play()
        status, before, headers = await served.ask("GET", "/v1/envs/0/screenshot")
        assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/png", "no-store")
        _, result = await served.post("/v1/envs/0/step", {"actions": ["pyautogui.moveTo(5, 5)"]})
        _, after, _ = await served.ask("GET", "/v1/envs/0/screenshot")
        assert base64.b64decode(result["screenshot"]) == after != before


async def test_the_history_is_what_models_are_shown() -> None:
    async with serving() as served:
        await served.play()
        await served.post("/v1/envs/0/step", {"prediction": CLICK})
        _, native = await served.get("/v1/envs/0/history")
        _, legacy = await served.post("/env/history_messages")
        assert native == legacy
        assert [message["role"] for message in native["history_messages"]] == [
            "system",
            "user",
            "user",
            "assistant",
            "user",
        ]


async def test_envs_are_independent() -> None:
    async with serving(envs=2) as served:
        one, two = await served.play(0), await served.play(1)
        await asyncio.gather(*(served.post(f"/v1/envs/{env}/step", {"actions": [CLICKED]}) for env in (0, 1)))
        assert one.id != two.id
        assert (len(one.inputs), len(two.inputs)) == (1, 1)


# --- the daemon ---------------------------------------------------------------------------------------------------


async def test_livez_readyz_and_version() -> None:
    async with serving() as served:
        assert await served.get("/livez") == (200, {"live": True})
        there = await asyncio.to_thread(find_interpreter, served.settings)
        warnings = [] if there else [f"episodes cannot be judged: {NO_EVALUATORS}"]
        assert await served.get("/readyz") == (200, {"ready": True, "reasons": [], "warnings": warnings})
        _, version = await served.get("/version")
        assert (version["provider"], version["daemon_id"]) == ("sim", "test01")
        assert version["epoch"] == served.service.events.epoch
        assert version["settings"].keys() == VARIABLES.keys()
        assert version["settings"]["ENVD_SCREEN"] == {"value": list(SCREEN), "origin": "argument"}
        assert version["client_timeouts_s"] == {"reset": 1200, "step": 300, "evaluate": 300}
        await served.service.drain()
        assert (await served.get("/livez"))[0] == 200
        assert await served.get("/readyz") == (
            *(503, {"ready": False, "reasons": ["the daemon is shutting down"], "warnings": warnings}),
        )


async def test_nothing_new_is_begun_while_the_daemon_drains() -> None:
    """Also in the moment that running steps are given to finish, before the queue is closed."""
    async with serving(Behaviour(hang="/execute"), drain_seconds=0.5, envs=2) as served:
        desktop = await served.play()
        stepping = asyncio.create_task(served.post("/v1/envs/0/step", {"actions": [CLICKED]}))
        await eventually(lambda: desktop.requests["/execute"] == 1)
        draining = asyncio.create_task(served.service.drain())
        await eventually(served.service.draining.is_set)
        for path, body in (("/v1/envs/1/reset", {}), ("/v1/prewarm", None), ("/v1/envs/0/step", {"actions": ["WAIT"]})):
            assert (await problem(served, "POST", path, body))["code"] == "draining"
        await draining
        stepping.cancel()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        pytest.param("abc-1:2.3_4", True, id="plain"),
        pytest.param("x" * 64, True, id="longest"),
        pytest.param("x" * 65, False, id="too long"),
        pytest.param("a b", False, id="blank"),
        pytest.param("é", False, id="not ascii"),
        pytest.param('a"b', False, id="quote"),
        pytest.param("", False, id="empty"),
    ],
)
async def test_a_request_id_is_echoed_or_made(given: str, kept: bool) -> None:
    async with serving() as served:
        for path in ("/health", "/nowhere", "/v1/jobs/none"):
            _, _, headers = await served.ask("GET", path, headers={"X-Request-ID": given})
            assert (headers["X-Request-ID"] == given) is kept
            assert re.fullmatch(r"[\w.:-]{1,64}", headers["X-Request-ID"])
