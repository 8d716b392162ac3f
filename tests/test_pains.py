"""The twenty worst pains of those who use desktop servers, each provoked as its user meets it. The name of a test has
the pain's id; what it asserts is the answer that ends the pain.

| pain | how it is met | where it is answered |
|---|---|---|
| REW-1 | rewards are 0.0 as machines fail | a verdict without a number; an error on the old route and in the client |
| BOOT-1 | not ready within the timeout, nothing else | phases, probes, notes, log and a diagnosis in the job's error |
| CONC-1 | two trainers get each other's answers | envs of their own; 409 in the middle of a call; leases |
| EVAL-1 | set-up failed, and the episode is played | `setup_failed` with the step; no observation, no dirty desktop |
| KVM-1 | no /dev/kvm, and it is slow | `envd doctor` opens it: what is missing, its fix, what to expect |
| NET-1 | connection refused, or a timeout | `envd doctor --url` and the client tell the two apart; the start line |
| COST-1 | after a day nothing is free | leases end when nobody uses them; `/v1/leases` has owner and time |
| DISK-1 | the disk fills with what desktops leave | volumes go with their container; `disk_low` where it is full |
| TRN-1 | timeouts that do not know of each other | `X-Request-Deadline`; `client_timeouts_s` in `/version` |
| EVAL-5 | the evaluator raises, and that is a 0 | `evaluator_error` with the traceback and what the getters gave |
| CONC-2 | resets tear down each other's boots | the same reset joins, another supersedes, other envs are left alone |
| TRN-3 | retry or give up? the message is searched | `code`, `fault`, `retryable`, `hint`; `/errors` lists them |
| CONC-3 | the whole server stands still while one boots | `/livez` and the other envs answer meanwhile |
| BOOT-2 | the timeout is raised by hand, in vain | unknown names stop the start; the limit and an ETA are told |
| OBS-2 | health is green and nothing works | `/readyz` has the reasons and boots that failed; `envd doctor --full` |
| AWS-1 | InvalidAMIID.NotFound | `ami_unavailable` with id and region, in the preflight and in the job |
| BOOT-3 | "running", and the control API answers 502 | no desktop before its probes passed; each with its last answer |
| CDP-1 | connect_over_cdp: ECONNRESET, ECONNREFUSED | they are started; what is missing of the way is told |
| BOOT-6 | a reset hangs, its client leaves | a job; who leaves cancels nothing; who asks again joins it |
| REW-3 | one failed reset kills the training job | a typed error for that env alone; a masked episode in `envd.gym` |
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import numpy as np
import pytest
from aws_faults import FaultyAccount
from daemon_process import DaemonProcess, daemon, ended_job, reset, start
from docker_engine import docker, image, nothing_left, tiny_images
from test_journal_daemon import fill, small_disk, until_ready

from envd.client import BlockingRemoteEnvWorker, Client, RemoteEnvWorker, transport
from envd.doctor.kvm import Host, kvm_of
from envd.drivers.aws.check import check
from envd.errors import (
    BootTimeout,
    DesktopLost,
    EnvdError,
    EvaluatorError,
    Fault,
    Leased,
    LeaseUnavailable,
    ServerUnreachable,
    SetupFailed,
    StartError,
    StillBooting,
    error_classes,
)
from envd.gym import DesktopVectorEnv
from envd.models import EnvState, Job, JobState, VerdictStatus
from envd.settings import load
from envd.tasks.grading import find_interpreter
from envd.vm.kvm import look

__all__ = ["nothing_left", "small_disk", "tiny_images"]

SETTINGS = {
    "ENVD_SCREEN": "320x240",
    "ENVD_ACTION_PAUSE": "0",
    "ENVD_WAIT_SECONDS": "0",
    "ENVD_SETTLE_QUIET": "0",
    "ENVD_LOG_FORMAT": "json",
}
MORTAL = """
import envd.service
from envd.drivers.sim import Behaviour, Fault, SimDriver
from envd.drivers.sim.behaviour import FOREVER

behaviours = {behaviours}
envd.service.make_driver = lambda settings, daemon_id: SimDriver(settings, daemon_id, behaviours)
"""
"""A prelude: sim desktops with faults that ENVD_SIM has no spelling for."""
DIE = "Thought: ...\nAction: type(content='please die')"
DIES = 'Behaviour(on={"/execute please die": Fault("die")})'
CLICK = "Thought: The button.\nAction: click(start_box='(100,100)')"
GIVE_UP = "Thought: It cannot be done.\nAction: call_user()"
TASK = {"id": "t-1", "instruction": "Sort the seas by height.", "config": [], "evaluator": {"func": "infeasible"}}


def task(*config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return TASK | {"config": list(config)} | more


def faulty(behaviours: str) -> str:
    return MORTAL.format(behaviours=behaviours)


@asynccontextmanager
async def serving(
    tmp_path: Path, *arguments: str, prelude: str = "", **settings: str
) -> AsyncIterator[tuple[Client, DaemonProcess]]:
    """A daemon of its own in a process, and a client of it."""
    async with (
        daemon(tmp_path / "state", *arguments, prelude=prelude, env=SETTINGS | settings) as (process, _),
        Client(process.url, patience=5) as client,
    ):
        yield client, process


async def ask(url: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON, as any HTTP client gets them."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session, session.request(method, url, json=body, headers=given) as answer:
        return answer.status, await answer.json(content_type=None)


async def failed_job(client: Client, **how: Any) -> Job:
    """The job of a reset that fails."""
    job = await client.submit_reset(**how)
    with pytest.raises(EnvdError):
        await client.wait(job.id, timeout=60)
    return await client.job(job.id)


# REW-1: run looks healthy, rewards are 0.0; the policy learns nothing or learns to avoid effort


async def test_rew_1_a_desktop_that_dies_leaves_no_number_anywhere(tmp_path: Path) -> None:
    async with serving(tmp_path, prelude=faulty(DIES)) as (client, served):
        await client.reset(TASK)
        with pytest.raises(DesktopLost):
            await client.step(prediction=DIE)
        verdict = await client.evaluate()
        assert (verdict.score, verdict.mask, verdict.fault) == (None, True, Fault.INFRA)
        assert (verdict.status, verdict.code) == (VerdictStatus.INFRA_ERROR, "desktop_lost")
        status, answer = await ask(f"{served.url}/env/evaluate", "POST", {"slot_id": 0})
        assert (status, answer["code"], answer["verdict"]["score"]) == (503, "desktop_lost", None)
        async with RemoteEnvWorker(0, served.url) as worker:
            with pytest.raises(DesktopLost):
                await worker.evaluate()


async def test_rew_1_a_model_that_fails_is_scored_and_not_masked(tmp_path: Path) -> None:
    """The other side: what is the model's doing stays a number."""
    async with serving(tmp_path) as (client, _):
        await client.reset(TASK)
        await client.step(prediction="I would rather not.")
        verdict = await client.evaluate()
        assert (verdict.status, verdict.score, verdict.mask) == (VerdictStatus.SCORED, 0.0, False)


# BOOT-1: TimeoutError: VM failed to become ready within timeout period


async def test_boot_1_a_boot_that_is_not_ready_in_time_says_how_far_it_came(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="refuse", DOCKER_VM_READY_TIMEOUT="1") as (client, _):
        with pytest.raises(BootTimeout, match="Not ready after 1 s, in phase probe") as failed:
            await client.reset(TASK)
    error = failed.value
    assert error.facts["phase"] == "probe"
    assert set(error.facts["phases"]) == {"create", "probe"}
    assert "refused the connection" in error.facts["probes"]["screenshot"]
    assert error.facts["log"][0].startswith("guest on port")
    assert "Nothing in the guest answered yet" in error.hint
    assert "DOCKER_VM_READY_TIMEOUT (it is 1 s)" in error.hint


@pytest.mark.parametrize(
    ("sim", "says"),
    [
        pytest.param("flaky=forever,bad=flat", "not with a usable desktop: the screen is one flat colour", id="black"),
        pytest.param(
            "flaky=forever,bad=size", "not with a usable desktop: the screen is 160x120, not 320x240", id="size"
        ),
        pytest.param("cdp_no_page=1", "Chrome's DevTools .* are not: .* shows no page", id="no page"),
        pytest.param("never", "Nothing in the guest answered yet", id="silent"),
    ],
)
async def test_boot_1_every_cause_has_a_diagnosis_of_its_own(tmp_path: Path, sim: str, says: str) -> None:
    async with serving(tmp_path, ENVD_SIM=sim, DOCKER_VM_READY_TIMEOUT="1") as (client, _):
        with pytest.raises(BootTimeout, match=says):
            await client.reset(TASK)


# CONC-1: two trainers talk to the server and everything turns to nonsense


async def test_conc_1_eight_trainers_at_once_see_their_own_desktops_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_ENVS="8") as (client, _):

        async def play(number: int) -> tuple[str, list[str], float | None]:
            env = client.env(number)
            await env.reset(TASK | {"instruction": f"Type {number}."})
            for word in ("a", "b", "c"):
                await env.act(f"pyautogui.write('{word}{number}')")
            parts = [part for message in await env.history() for part in message["content"]]
            said = " ".join(part["text"] for part in parts if part["type"] == "text")
            await env.step(GIVE_UP if number % 2 else CLICK)
            return said, re.findall(r"write\('(..)'\)", said), (await env.evaluate()).score

        for number, (said, typed, score) in enumerate(await asyncio.gather(*map(play, range(8)))):
            assert f"Type {number}." in said
            assert typed == [f"a{number}", f"b{number}", f"c{number}"]
            assert score == number % 2


async def test_conc_1_of_two_calls_on_one_env_one_is_done_and_the_other_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="pace=1") as (client, served):
        await client.reset(TASK)
        sleeps = {"actions": ["import time; time.sleep(1)"]}
        both = await asyncio.gather(*(ask(f"{served.url}/v1/envs/0/step", "POST", sleeps) for _ in range(2)))
        (done, result), (refused, told) = sorted(both, key=lambda answer: answer[0])
        assert (done, result["step"], result["actions"][0]["outcome"]) == (200, 1, "ok")
        assert (refused, told["code"], told["retryable"]) == (409, "env_busy", True)
        assert "Env 0 is in the middle of" in told["detail"]
        episode = (await client.env_state()).episode
        assert episode is not None
        assert episode.steps == 1


async def test_conc_1_a_leased_env_says_who_has_it_and_until_when(tmp_path: Path) -> None:
    async with serving(tmp_path) as (client, _), client.lease(owner="ann") as [env]:
        await env.reset(TASK)
        with pytest.raises(Leased, match="Env 0 is leased to ann") as refused:
            await client.reset(TASK)
        assert refused.value.facts["holder"] == "ann"
        assert refused.value.facts["expires_at"] > time.time()


# EVAL-1: "Environment setup complete" after five failed attempts


async def test_eval_1_a_set_up_that_fails_is_a_failed_reset_with_the_step_that_did(tmp_path: Path) -> None:
    ok = {"type": "execute", "parameters": {"command": ["touch", "/home/user/a"]}}
    broken = {"type": "open", "parameters": {"path": "/nowhere.ods"}}
    async with serving(tmp_path) as (client, served):
        with pytest.raises(
            SetupFailed, match=r"Set-up step 1 \(open\) failed: .*File not found: /nowhere.ods"
        ) as failed:
            await client.reset(task(ok, broken, ok))
        facts = failed.value.facts
        assert (facts["step"], facts["step_type"]) == (1, "open")
        assert [record["outcome"] for record in facts["records"]] == ["ok", "failed"]
        assert (failed.value.fault, failed.value.retryable) == (Fault.TASK, False)
        assert (await client.env_state()).state is EnvState.EMPTY
        status, told = await ask(f"{served.url}/env/reset", "POST", {"task_config": task(ok, broken), "slot_id": 0})
        assert (status, told["code"]) == (500, "setup_failed")
        assert "obs_messages" not in told


async def test_eval_1_a_set_up_is_tried_again_on_a_fresh_desktop_alone(tmp_path: Path) -> None:
    """The first desktop dies in the middle of its set-up; the second does not have what was done to it."""
    behaviours = '[Behaviour(on={"/execute touch": Fault("die")}), Behaviour()]'
    touch = {"type": "execute", "parameters": {"command": ["touch", "/home/user/a"]}}
    async with serving(tmp_path, prelude=faulty(behaviours)) as (client, _):
        job = await client.reset(task(touch))
        assert job.attempts == 2
        assert [record.outcome for record in job.setup] == ["ok"]


# COST-1: after about a day every request says CAPACITY_REACHED; only a restart helps


async def test_cost_1_a_trainer_that_died_is_found_out_and_its_envs_are_free_again(tmp_path: Path) -> None:
    hasty = "import envd.models; envd.models.LeaseRequest.model_fields['ttl_s'].metadata.clear(); "
    hasty += "envd.models.LeaseRequest.model_rebuild(force=True)"
    async with serving(tmp_path, prelude=hasty, ENVD_ENVS="2") as (client, served):
        status, dead = await ask(f"{served.url}/v1/leases", "POST", {"count": 2, "ttl_s": 1, "owner": "dead"})
        assert (status, dead["state"]) == (201, "held")
        status, _ = await ask(f"{served.url}/v1/envs/0/reset", "POST", {"task": TASK}, X_Lease=dead["id"])
        assert status == 202
        _, told = await ask(f"{served.url}/v1/leases")
        [seen] = told["leases"]
        assert (seen["owner"], seen["envs"], seen["state"]) == ("dead", [0, 1], "held")
        assert seen["created_at"] <= time.time() <= seen["expires_at"] + 1
        with pytest.raises(LeaseUnavailable, match="2 envs were not free at once"):
            async with client.lease(2, wait_s=0.1):
                pass
        async with client.lease(2, owner="alive", wait_s=30) as envs:
            await envs[0].reset(TASK)
        _, ended = await ask(f"{served.url}/v1/leases/{dead['id']}")
        assert ended["end_reason"] == "expired"


async def test_cost_1_a_hundred_episodes_that_nobody_closed_take_no_room(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_ENVS="2") as (_, served):
        for number in range(100):
            # A client of its own each time, which leaves without a word.
            async with aiohttp.ClientSession() as session:
                job = await reset(session, served.url, number % 2)
                if number % 10 == 0:
                    assert (await ended_job(session, served.url, job["id"]))["state"] == "succeeded"
        async with Client(served.url) as client:
            await client.reset(TASK, timeout=30)
            assert (await client.ready()).ready


# DISK-1: disk fills by terabytes within an hour of benchmarking


@pytest.mark.docker
@pytest.mark.usefixtures("tiny_images", "nothing_left")
async def test_disk_1_resets_leave_no_volume_behind(tmp_path: Path) -> None:
    def volumes() -> set[str]:
        return set(docker("volume", "ls", "--quiet").split())

    before = volumes()
    settings = {"PROVIDER": "docker", "ENVD_DOCKER_IMAGE": image("serves"), "RAM_SIZE": "64M", "ENVD_SCREEN": "800x600"}
    async with serving(tmp_path, **settings) as (client, served):
        for _ in range(3):
            await client.reset({})
        made = await anyio.to_thread.run_sync(volumes)
        assert 1 <= len(made - before) <= 2  # of the desktop that is there, and one that is being removed
        served.signal()
        assert await served.ended(30) == 0
    assert await anyio.to_thread.run_sync(volumes) <= before


async def test_disk_1_on_a_full_disk_no_new_work_is_taken_until_there_is_room(small_disk: Path) -> None:
    async with serving(small_disk, ENVD_ENVS="2") as (client, served):
        await client.reset(TASK)
        fill(small_disk / "filler")
        async with aiohttp.ClientSession() as session:
            [reason] = await until_ready(session, served.url, False)
            status, told = await ask(f"{served.url}/v1/envs/1/reset", "POST", {"task": TASK})
            assert (status, told["code"], told["fault"], told["retryable"]) == (503, "disk_low", "capacity", True)
            assert reason in told["detail"] or "disk" in told["detail"]
            (small_disk / "filler").unlink()
            await until_ready(session, served.url, True)
        await client.reset(TASK, env=1)


# TRN-1: requests time out at one layer while another still works


async def test_trn_1_the_callers_deadline_is_kept_and_the_work_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=3") as (client, served):
        began = time.monotonic()
        body = {"task_config": TASK, "slot_id": 0}
        status, told = await ask(f"{served.url}/env/reset", "POST", body, X_Request_Deadline="1.5")
        assert time.monotonic() - began < 1.5
        assert (status, told["code"], told["retryable"]) == (503, "still_booting", True)
        assert (await client.wait(told["job"]["id"], timeout=30)).state is JobState.SUCCEEDED


async def test_trn_1_the_server_says_how_long_its_clients_should_wait(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_LEGACY_WAIT="700") as (client, _):
        told = (await client.version())["client_timeouts_s"]
        assert told == {"reset": 750.0, "step": 300, "evaluate": 300}


# EVAL-5: evaluator raises; no result file, or 0


async def test_eval_5_an_evaluator_that_raises_leaves_its_traceback_and_no_number(tmp_path: Path) -> None:
    settings = load({}, env_file=None, provider="sim")
    interpreter = await anyio.to_thread.run_sync(find_interpreter, settings)
    if interpreter is None:
        pytest.skip("the evaluators' interpreter is not there: run `make evaluators`")
    command = {"type": "vm_command_line", "command": ["cat", "/home/user/nothing"]}
    raises = {"func": "exact_match", "result": command, "expected": {"type": "rule", "rules": {}}}
    async with serving(tmp_path, ENVD_EVALUATORS=str(interpreter)) as (client, served):
        await client.reset(TASK | {"evaluator": raises})
        verdict = await client.evaluate()
        assert (verdict.status, verdict.score, verdict.mask) == (VerdictStatus.EVALUATOR_ERROR, None, True)
        assert verdict.detail == "The metric exact_match raised KeyError: 'expected'"
        [metric] = verdict.metrics
        assert metric.traceback.endswith("KeyError: 'expected'\n")
        assert metric.result == ""
        async with RemoteEnvWorker(0, served.url) as worker:
            with pytest.raises(EvaluatorError):
                await worker.evaluate()
        await client.bundle(verdict.episode_id, tmp_path / "evidence.tar")
        assert (tmp_path / "evidence.tar").stat().st_size > 0


# CONC-2: VM never finishes booting; containers come and go


async def test_conc_2_the_same_reset_joins_and_another_takes_its_place_and_other_envs_are_left_alone(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=1", ENVD_ENVS="2") as (client, _):
        other = await client.submit_reset(TASK, env=1)
        first = await client.submit_reset(TASK)
        joined = await asyncio.gather(*(client.submit_reset(TASK) for _ in range(10)))
        assert {job.id for job in joined} == {first.id}
        newer = await client.submit_reset(TASK | {"id": "t-2"})
        assert newer.id != first.id
        old = await failed_job_of(client, first.id)
        assert (old.state, old.superseded_by) == (JobState.SUPERSEDED, newer.id)
        done = await client.wait(newer.id, timeout=60)
        assert done.task_id == "t-2"
        assert (await client.wait(other.id, timeout=60)).restarts == 0
        booted = {job.desktop_id for job in await client.jobs() if job.desktop_id}
        assert len(booted) == 2  # ten resets of env 0 were one boot


async def failed_job_of(client: Client, job_id: str) -> Job:
    with pytest.raises(EnvdError):
        await client.wait(job_id, timeout=60)
    return await client.job(job_id)


# TRN-3: client cannot tell retry from give up; matches on error strings


async def test_trn_3_every_failure_says_whose_it_is_and_whether_to_try_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, served):
        asked: list[tuple[str, str, Any, int, str, str]] = [
            ("GET", "/v1/envs/9", None, 404, "unknown_env", "client"),
            ("POST", "/v1/envs/0/step", {"actions": ["WAIT"]}, 409, "no_episode", "client"),
            ("POST", "/v1/envs/0/step", {"action": "WAIT"}, 422, "invalid_request", "client"),
            ("POST", "/v1/envs/0/reset", {"task": {"config": [{"type": "dance"}]}}, 422, "task_invalid", "task"),
            ("POST", "/env/evaluate", {"slot_id": 0}, 409, "no_episode", "client"),
            ("GET", "/v1/jobs/job-nothing", None, 404, "unknown_job", "client"),
        ]
        for method, path, body, status, code, fault in asked:
            answered, told = await ask(f"{served.url}{path}", method, body)
            assert (answered, told["code"], told["fault"], told["retryable"]) == (status, code, fault, False), path
            assert told["type"] == f"/errors#{code}"
            assert told["detail"].endswith((".", "?")) or told["detail"]
            assert {"title", "hint", "instance"} <= told.keys()
        async with aiohttp.ClientSession() as session, session.get(f"{served.url}/errors") as answer:
            page = await answer.text()
        anchors = set(re.findall(r"""id=["']([a-z_]+)["']""", page))
        assert {code for code, error in error_classes().items() if error not in (EnvdError, StartError)} <= anchors


async def test_trn_3_the_client_raises_a_class_for_each_code(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=30", ENVD_QUEUE_LIMIT="1", ENVD_ENVS="3") as (client, served):
        for number in (0, 1):
            await client.submit_reset(TASK, env=number)
        status, told = await ask(f"{served.url}/v1/envs/2/reset", "POST", {"task": TASK})
        assert (status, told["code"], told["fault"], told["retryable"]) == (503, "queue_full", "capacity", True)
        assert told["retry_after"] > 0
        with pytest.raises(error_classes()["queue_full"]):
            await client.submit_reset(TASK, env=2, timeout=0.5)


# CONC-3: whole server freezes (health too) while one VM boots


async def test_conc_3_while_one_desktop_boots_the_server_answers_and_the_others_play(tmp_path: Path) -> None:
    behaviours = "[Behaviour(), Behaviour(create_s=30)]"
    async with serving(tmp_path, prelude=faulty(behaviours), ENVD_ENVS="2") as (client, served):
        await client.reset(TASK)
        hung = await client.submit_reset(TASK, env=1)
        async for event in client.watch(hung.id):
            if event.job is not None and event.job.state is JobState.BOOTING:
                break
        times = []
        async with aiohttp.ClientSession() as session:
            for _ in range(50):
                began = time.monotonic()
                async with session.get(f"{served.url}/livez") as answer:
                    assert answer.status == 200
                times.append(time.monotonic() - began)
        assert sorted(times)[25] < 0.05
        assert (await client.env(0).act("pyautogui.write('a')")).actions[0].outcome == "ok"
        assert (await client.job(hung.id)).state is JobState.BOOTING


# BOOT-2: user keeps raising a timeout by hand


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ENVD_READY_TIMEOUT", "7200", "ENVD_READY_TIMEOUT .*no such setting"),
        ("ENVD_MAX_STEP", "50", "no such setting, did you mean ENVD_MAX_STEPS"),
        ("DOCKER_VM_READY_TIMEOUT", "2h", "DOCKER_VM_READY_TIMEOUT=2h .*valid number"),
        ("PROVIDER", "awz", "no such provider, did you mean aws"),
    ],
)
async def test_boot_2_a_setting_that_nobody_reads_stops_the_start(
    tmp_path: Path, name: str, value: str, says: str
) -> None:
    refused = await start(tmp_path / "state", env={name: value})
    assert await refused.ended(30) == 78
    assert re.search(says, refused.text)


async def test_boot_2_the_limit_is_the_one_that_was_set_and_a_boot_is_told_how_long_it_takes(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=0.5", DOCKER_VM_READY_TIMEOUT="7200") as (client, _):
        told = (await client.version())["settings"]["DOCKER_VM_READY_TIMEOUT"]
        assert told == {"value": 7200.0, "origin": "environment"}
        assert (await client.submit_reset(TASK)).eta_s is None
        first = await client.reset(TASK)
        assert first.state is JobState.SUCCEEDED
        later = await client.submit_reset(TASK | {"id": "t-2"})
        assert later.eta_s is not None
        assert 0.3 < later.eta_s < 10
        words = [event.data.get("message", "") async for event in client.watch(later.id)]
        assert not [word for word in words if "Traceback" in word]


# OBS-2: health is green, nothing works


async def test_obs_2_boots_that_fail_are_told_where_readiness_is(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="dying") as (client, served):
        assert await client.ready() == await client.ready()
        for _ in range(2):
            await failed_job(client, task=TASK)
        told = await client.ready()
        assert told.ready
        assert re.fullmatch(
            r"the last 2 boots failed, \d s ago with instance_died; /v1/jobs\?state=failed tells why", told.warnings[0]
        )
        _, found = await ask(f"{served.url}/v1/jobs?state=failed")
        assert {job["error"]["code"] for job in found["jobs"]} == {"instance_died"}


async def test_obs_2_a_boot_that_succeeds_ends_the_doubt(tmp_path: Path) -> None:
    behaviours = '[Behaviour(dies_after_s=0.1, dies_when="booting"), Behaviour()]'
    async with serving(tmp_path, prelude=faulty(behaviours)) as (client, _):
        await failed_job(client, task=TASK)
        assert "the last boot failed" in str((await client.ready()).warnings)
        await client.reset(TASK)
        assert "failed" not in str((await client.ready()).warnings)


async def test_obs_2_a_server_that_takes_no_work_is_not_ready_and_says_why(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=30", ENVD_QUEUE_LIMIT="1", ENVD_ENVS="2") as (client, served):
        for number in (0, 1):
            await client.submit_reset(TASK, env=number)
        status, told = await ask(f"{served.url}/readyz")
        assert (status, told["ready"], told["reasons"]) == (503, False, ["the queue is full: 1 jobs wait"])
        assert (await ask(f"{served.url}/livez"))[0] == 200


# BOOT-3: "running", noVNC works, yet the control API answers 502


async def test_boot_3_no_desktop_is_handed_out_before_every_probe_has_passed(tmp_path: Path) -> None:
    """A guest that answers 500 six times, and then does what it should."""
    async with serving(tmp_path, ENVD_SIM="flaky=6,bad=error") as (client, _):
        results = []
        job = await client.submit_reset(TASK)
        async for event in client.watch(job.id):
            if event.kind == "probe" and event.job is not None:
                results += [(probe.name, probe.result, probe.detail) for probe in event.job.probes]
        assert any(name == "screenshot" and "answered 500" in detail for name, _, detail in results)
        done = await client.job(job.id)
        assert done.state is JobState.SUCCEEDED
        assert {probe.name: probe.passed for probe in done.probes} == {"screenshot": True, "chrome_cdp": True}
        assert all(probe.attempts > 6 for probe in done.probes)
        assert (await client.screenshot()).startswith(b"\x89PNG")


async def test_boot_3_a_guest_that_never_answers_well_is_never_an_observation(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="flaky=forever,bad=error", DOCKER_VM_READY_TIMEOUT="1") as (client, _):
        job = await failed_job(client, task=TASK)
        assert {probe.name: probe.passed for probe in job.probes} == {"screenshot": False, "chrome_cdp": False}
        assert all("answered 500" in probe.detail for probe in job.probes)
        assert (await client.env_state()).state is EnvState.EMPTY


# CDP-1: BrowserType.connect_over_cdp: read ECONNRESET / ECONNREFUSED


async def test_cdp_1_chrome_and_its_bridge_are_started_where_nothing_listens(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="cdp=launch", ENVD_CHROME_GRACE="0.1") as (client, _):
        job = await client.submit_reset(TASK)
        words = [str(event.data.get("message", "")) async for event in client.watch(job.id)]
        assert any("starting Chrome and the socat bridge in the guest" in word for word in words)
        assert (await client.job(job.id)).state is JobState.SUCCEEDED


async def test_cdp_1_a_chrome_that_cannot_be_had_is_named_with_what_was_tried(tmp_path: Path) -> None:
    behaviours = 'Behaviour(on={"/json/version": Fault("reset", times=FOREVER)})'
    settings = {"DOCKER_VM_READY_TIMEOUT": "2", "ENVD_CHROME_GRACE": "0.1"}
    async with serving(tmp_path, prelude=faulty(behaviours), **settings) as (client, _):
        with pytest.raises(BootTimeout, match="still waiting for chrome_cdp") as failed:
            await client.reset(TASK)
    assert "The desktop is there and Chrome's DevTools (port 9222 of the guest) are not" in failed.value.hint
    assert "reset by peer" in failed.value.facts["probes"]["chrome_cdp"]
    assert any("starting Chrome and the socat bridge" in note for note in failed.value.facts["notes"])


async def test_cdp_1_a_chrome_that_is_lost_later_fails_the_step_of_the_set_up_that_needs_it(tmp_path: Path) -> None:
    behaviours = 'Behaviour(on={"/devtools/browser": Fault("reset", call=2, times=FOREVER)})'
    tabs = {"type": "chrome_open_tabs", "parameters": {"urls_to_open": ["http://127.0.0.1:1/"]}}
    async with serving(tmp_path, prelude=faulty(behaviours)) as (client, _):
        job = await failed_job(client, task=task(tabs))
        assert job.error is not None
        assert (job.error.code, job.error.fault, job.error.retryable) == ("setup_failed", Fault.INFRA, True)
        assert "/devtools/browser" in job.error.detail
        assert job.attempts == 2  # a fresh desktop was tried before it was given up


# BOOT-6: reset hangs, client gives up, server goes on and fights the next reset


async def test_boot_6_who_hangs_up_and_asks_again_waits_for_the_same_boot(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=2") as (client, served):
        body = {"task_config": TASK, "slot_id": 0}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await ask(f"{served.url}/env/reset", "POST", body)
        [job] = await client.jobs()
        assert job.state is JobState.BOOTING
        status, told = await ask(f"{served.url}/env/reset", "POST", body)
        assert status == 200
        assert told["obs_messages"]
        [job] = await client.jobs()
        assert (job.state, job.joined) == (JobState.SUCCEEDED, 1)


async def test_boot_6_a_native_reset_is_answered_at_once_with_where_to_look(tmp_path: Path) -> None:
    async with serving(tmp_path, ENVD_SIM="boot=1") as (client, served):
        began = time.monotonic()
        status, job = await ask(f"{served.url}/v1/envs/0/reset", "POST", {"task": TASK})
        assert (status, time.monotonic() - began < 1) == (202, True)
        assert job["links"]["events"] == f"/v1/jobs/{job['id']}/events"
        with pytest.raises(StillBooting, match="It goes on"):
            await client.wait(job["id"], timeout=0.2)
        cancelled = await client.cancel(job["id"])
        assert cancelled.cancel_requested or cancelled.state is JobState.CANCELLED


# REW-3: one failed reset kills the whole training job


async def test_rew_3_one_env_that_cannot_be_reset_leaves_the_others_their_scores(tmp_path: Path) -> None:
    behaviours = '[Behaviour(), Behaviour(dies_after_s=0.05, dies_when="booting"), Behaviour()]'
    async with serving(tmp_path, prelude=faulty(behaviours), ENVD_ENVS="3") as (client, _):

        async def play(number: int) -> float | None:
            env = client.env(number)
            await env.reset(TASK)
            await env.step(GIVE_UP)
            return (await env.evaluate()).score

        played = await asyncio.gather(*map(play, range(3)), return_exceptions=True)
        failures = [one for one in played if isinstance(one, BaseException)]
        assert [one for one in played if not isinstance(one, BaseException)] == [1.0, 1.0]
        [failure] = failures
        assert isinstance(failure, EnvdError)
        assert (failure.code, failure.fault, failure.retryable) == ("instance_died", Fault.INFRA, True)
        assert await play(played.index(failure)) == 1.0  # the same again, on a fresh desktop


async def test_rew_3_a_batch_in_gymnasium_has_all_its_rows_and_the_failed_one_is_masked(tmp_path: Path) -> None:
    def batch(url: str) -> tuple[Any, Any, Any]:
        envs = DesktopVectorEnv(3, url, tasks=TASK, wait_s=30)
        envs.reset()
        _, rewards, _, _, infos = envs.step((GIVE_UP, DIE, GIVE_UP))
        _, _, _, _, after = envs.step((CLICK, CLICK, CLICK))
        envs.close()
        return rewards, infos["mask"], after["mask"]

    async with serving(tmp_path, prelude=faulty(DIES), ENVD_ENVS="3") as (_, served):
        rewards, mask, after = await anyio.to_thread.run_sync(batch, served.url)
    assert mask.tolist() == [False, True, False]
    assert np.isnan(rewards).tolist() == [False, True, False]
    assert rewards[~mask].tolist() == [1.0, 1.0]
    assert not after.any()


# AWS-1: InvalidAMIID.NotFound, later AuthFailure: Not authorized for images


@pytest.fixture
def aws(account: FaultyAccount) -> Iterator[FaultyAccount]:
    yield account
    account.settled()


def on_aws(aws: FaultyAccount, **more: str) -> dict[str, str]:
    return {
        **aws.environ,
        "PROVIDER": "aws",
        "AWS_REGION": "us-east-1",
        "AWS_SUBNET_ID": ",".join(aws.subnets),
        "AWS_SECURITY_GROUP_ID": aws.security_group,
        "ENVD_AWS_AMI": aws.ami,
        "ENVD_PREWARM": "0",
        "ENVD_SCREEN": "1920x1080",
        **more,
    }


async def test_aws_1_an_image_that_is_not_there_is_said_before_anything_is_launched(aws: FaultyAccount) -> None:
    settings = load(on_aws(aws, ENVD_AWS_AMI="ami-0123456789abcdef0"), env_file=None)
    found = {one.what: one for one in await check(settings)}
    finding = found["image ami-0123456789abcdef0"]
    assert finding.verdict == "failed"
    assert "us-east-1" in f"{finding.detail} {finding.fix}"


async def test_aws_1_a_daemon_that_could_launch_nothing_does_not_start(aws: FaultyAccount, tmp_path: Path) -> None:
    refused = await start(tmp_path / "state", env=SETTINGS | on_aws(aws, ENVD_AWS_AMI="ami-0123456789abcdef0"))
    assert await refused.ended(60) == 78
    assert "The image ami-0123456789abcdef0 cannot be used in us-east-1" in refused.text
    assert "Copy one there (`aws ec2 copy-image`) and set ENVD_AWS_AMI" in refused.text


@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        pytest.param(
            "InvalidAMIID.NotFound",
            "The image id '[{ami}]' does not exist",
            "cannot be used in us-east-1",
            id="expired",
        ),
        pytest.param(
            "AuthFailure", "Not authorized for images: [{ami}]", "is not shared with this account", id="unshared"
        ),
    ],
)
async def test_aws_1_an_image_that_is_withdrawn_later_is_named_by_the_reset(
    aws: FaultyAccount, tmp_path: Path, code: str, message: str, says: str
) -> None:
    async with serving(tmp_path, **on_aws(aws)) as (client, _):
        aws.fail("ec2:RunInstances", code, message.format(ami=aws.ami), times=None)
        job = await failed_job(client, task=TASK)
    assert job.error is not None
    assert (job.error.code, job.error.fault, job.error.retryable) == ("ami_unavailable", Fault.INFRA, False)
    assert f"The image {aws.ami} {says}" in job.error.detail
    assert "ENVD_AWS_AMI" in job.error.hint


# NET-1: connection refused or timeout from the cluster; training silently records zeros


async def test_net_1_a_port_that_nobody_listens_on_is_told_from_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(
            ServerUnreachable, match=f"Nothing listens on 127.0.0.1:{port}: connection refused"
        ) as refused:
            await client.reset(TASK)
        assert "Is envd running?" in refused.value.hint
        assert "bound to 127.0.0.1 is reached from its own machine only" in refused.value.hint
    monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.3)
    with dropping() as silent:
        async with Client(f"http://127.0.0.1:{silent}", patience=0.5) as client:
            with pytest.raises(ServerUnreachable, match=r"No connection to .* in time") as dropped:
                await client.reset(TASK)
            assert "firewall or a security group" in dropped.value.hint


@contextmanager
def dropping() -> Iterator[int]:
    """A port where packets that would open a connection are dropped, as a closed security group does: its queue of
    connections is full, and nobody takes any."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(8):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            waiting.append(one)
        try:
            yield listener.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


def test_net_1_no_worker_turns_a_server_that_is_not_there_into_a_reward() -> None:
    with BlockingRemoteEnvWorker(0, "http://127.0.0.1:9", patience=0) as worker:
        for call in (lambda: worker.reset(TASK), lambda: worker.step(CLICK), worker.evaluate):
            with pytest.raises(ServerUnreachable, match="Nothing listens"):
                call()


async def doctor(*arguments: str, **settings: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code of `envd doctor`, and what it found, by what it is about."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ENVD_")} | settings
    command = [sys.executable, "-m", "envd", "doctor", "--json", *arguments]
    ran = await anyio.run_process(command, check=False, env=environ, cwd="/")
    return ran.returncode, {one["what"]: one for one in json.loads(ran.stdout)["findings"]}


async def test_net_1_the_doctor_looks_from_where_the_trainer_is(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        code, found = await doctor("--url", f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert code == 1
    [refused] = [one for one in found.values() if one["verdict"] == "failed"]
    with dropping() as port:
        code, found = await doctor("--url", f"http://127.0.0.1:{port}")
    assert code == 1
    [dropped] = [one for one in found.values() if one["verdict"] == "failed"]
    assert refused["what"] == dropped["what"]
    assert "nothing listens" in refused["detail"]
    assert "firewall" in f"{dropped['detail']} {dropped['fix']}"
    async with serving(tmp_path) as (_, process):
        code, found = await doctor("--url", process.url)
        assert code == 0, found
        assert {"name", "connection", "service", "version", "access", "clock", "round trip"} <= found.keys(), (
            found.keys()
        )


async def test_net_1_the_start_says_where_it_is_reached_and_what_others_need(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, process):
        [closed] = [one for one in process.records() if one["event"] == "only this host reaches the daemon"]
        assert closed["fix"] == "ENVD_HOST=0.0.0.0 ENVD_TOKEN=$(openssl rand -hex 32)"
    running = await start(tmp_path / "open", "--host", "0.0.0.0", env=SETTINGS | {"ENVD_TOKEN": "t" * 40})
    try:
        await running.listening()
        [line] = [one for one in running.records() if one["event"] == "envd is listening"]
        reached = [url for url in line["urls"] if "127.0.0.1" not in url]
        assert reached
        for url in reached:
            assert (await ask(f"{url}/livez"))[0] == 200
    finally:
        await running.kill()


# KVM-1: error gathering device information … "/dev/kvm": no such file or directory, or a VM ten times slower


@pytest.mark.parametrize(
    ("host", "says", "fix"),
    [
        pytest.param(
            Host("kvm_intel", False, ""), "module kvm_intel is not loaded", "sudo modprobe kvm_intel", id="module"
        ),
        pytest.param(Host("", False, ""), "switched off in the firmware", "--firmware-setup", id="CPU flag"),
        pytest.param(Host("", True, ""), "nested virtualization is off", "nested virtualization on", id="nested"),
        pytest.param(Host("kvm_amd", False, "Docker"), "in this container", "docker run --device", id="container"),
    ],
)
def test_kvm_1_what_is_missing_is_told_apart_and_has_its_fix(tmp_path: Path, host: Host, says: str, fix: str) -> None:
    device = tmp_path / "kvm"
    seen = look(device)
    assert seen is not None
    found = kvm_of(seen, host, device)
    assert (found.verdict, found.what) == ("warning", "KVM")
    assert says in found.detail
    assert "virtual machines are emulated" in found.detail
    assert "20 to 40 minutes" in found.detail  # what to expect until then
    assert fix in found.fix


async def test_kvm_1_the_doctor_looks_at_this_hosts_device_and_is_never_silent_about_it() -> None:
    _, found = await doctor(PROVIDER="qemu")
    kvm = found["KVM"]
    assert kvm["verdict"] in ("ok", "warning", "unknown")
    assert "/dev/kvm" in kvm["detail"]
    assert kvm["verdict"] == "ok" or kvm["fix"]


# OBS-2, from outside: what a constant health check cannot see


async def test_obs_2_the_doctor_has_a_desktop_uses_it_and_says_what_failed(tmp_path: Path) -> None:
    behaviours = "[Behaviour(dies_after_s=0.05, dies_when='booting'), Behaviour()]"
    async with serving(tmp_path, prelude=faulty(behaviours)) as (_, process):
        code, found = await doctor("--url", process.url, "--full")
        assert code == 1
        [failed] = [one for one in found.values() if one["verdict"] == "failed"]
        assert "instance_died" in failed["detail"]
        code, found = await doctor("--url", process.url, "--full")
        assert code == 0, found
        assert {found[what]["verdict"] for what in ("reset", "step", "picture")} == {"ok"}
