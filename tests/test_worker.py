import asyncio
import base64
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_server import (
    NO_SCORE,
    PNG,
    FakeServer,
    Fault,
    answering,
    draining,
    reset_connection,
    saying,
    serving,
    verdict,
    wire_image,
)
from serving import serving as daemon

from envd.client import BlockingRemoteEnvWorker, RemoteEnvWorker
from envd.drivers.sim import Behaviour
from envd.errors import (
    BootFailed,
    BootTimeout,
    EnvdError,
    GuestMisbehaved,
    GuestUnreachable,
    InfraError,
    NotEvaluable,
    ServerUnreachable,
    StillBooting,
)
from envd.models import JobState

INTERNAL_IMAGE = {
    "type": "image",
    "image": "data:image/jpeg;base64," + base64.b64encode(PNG).decode(),
    "min_pixels": 3136,
    "max_pixels": 2116800,
}
CLICK = "Thought: t\nAction: click(start_box='(1,2)')"
FINISHED = "Thought: t\nAction: finished(content='')"


async def test_an_episode_has_the_shapes_that_trainers_know() -> None:
    async with serving() as server, RemoteEnvWorker(7, server.url, 0) as worker:
        first = await worker.reset({"id": "t"})
        assert (worker.is_init(), worker.is_done()) == (True, False)
        assert (first["env_idx"], first["is_done"], first["format_reward"]) == (7, False, 0.0)
        assert first["obs_messages"] is not None
        assert [m["role"] for m in first["obs_messages"]] == ["system", "user", "user"]
        assert first["obs_messages"][2]["content"] == [INTERNAL_IMAGE]
        second = await worker.step(CLICK)
        assert (worker.is_init(), worker.is_done()) == (False, False)
        assert second["obs_messages"] is not None
        assert [m["role"] for m in second["obs_messages"][-2:]] == ["assistant", "user"]
        last = await worker.step(FINISHED)
        assert last == {"env_idx": 7, "obs_messages": None, "is_done": True, "format_reward": 0.0}
        assert worker.is_done()
        assert await worker.evaluate() == 1.0
    assert [seen[2]["body"] for seen in server.seen] == [
        {"task_config": {"id": "t"}, "slot_id": 0},
        {"prediction": CLICK, "slot_id": 0},
        {"prediction": FINISHED, "slot_id": 0},
        {"slot_id": 0},
    ]


async def test_history_is_whole_after_the_last_step_and_asked_for_only_then() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        assert await worker.get_history_messages() == []
        await worker.reset({})
        assert len(await worker.get_history_messages()) == 3
        assert server.count("POST", "/env/history_messages") == 0
        await worker.step(FINISHED)
        history = await worker.get_history_messages()
        assert (len(history), history[-1]["content"][0]["text"]) == (4, FINISHED)
        await worker.get_history_messages()
        assert server.count("POST", "/env/history_messages") == 1


async def test_history_images_are_decoded_by_their_bytes_not_by_their_label() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        await worker.reset({})
        await worker.step(CLICK)
        images = await worker.get_history_images()
        assert [(image.format, image.size, image.getpixel((0, 0))) for image in images] == [
            ("PNG", (4, 3), (10, 20, 30))
        ] * 2


async def test_a_screenshot_that_is_none_is_an_error() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        await worker.reset({})
        server.history[2]["content"][0]["b64"] = base64.b64encode(PNG[:40]).decode()
        await worker.step(CLICK)
        with pytest.raises(GuestMisbehaved, match="screenshot"):
            await worker.get_history_images()


async def test_the_slot_is_the_workers_number_unless_said_otherwise() -> None:
    async with (
        serving() as server,
        RemoteEnvWorker(3, server.url) as worker,
        RemoteEnvWorker(3, server.url, slot_id=1) as other,
    ):
        await worker.reset({})
        await other.reset({})
    assert [seen[2]["body"]["slot_id"] for seen in server.seen] == [3, 1]


async def test_a_trainers_keyword_call_is_accepted() -> None:
    async with serving() as server:
        worker = RemoteEnvWorker(worker_idx=0, max_steps=16, config=None, remote_server_url=server.url, slot_id=None)
        assert (await worker.reset({}))["obs_messages"]
        await worker.aclose()


async def test_pixels_that_an_old_server_leaves_out_get_the_protocols_defaults() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        bare = {"type": "image", "b64": wire_image()["b64"]}
        body = {"obs_messages": [{"role": "user", "content": [bare]}], "is_done": False, "format_reward": 0.0}
        server.break_next("POST", "/env/reset", saying(200, json.dumps(body), "application/json"))
        assert (await worker.reset({}))["obs_messages"] == [{"role": "user", "content": [INTERNAL_IMAGE]}]


async def test_large_observations_are_decoded_all_the_same() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        await worker.reset({})
        server.history[1]["content"][0]["text"] = "x" * 1_000_000
        messages = (await worker.step(CLICK))["obs_messages"]
        assert messages is not None
        assert len(messages[1]["content"][0]["text"]) == 1_000_000


# Booting


def still_booting(server: FakeServer) -> EnvdError:
    job = server.new_job(state=JobState.BOOTING)
    return StillBooting("Not yet.", retry_after=600, job=job.model_dump(mode="json"))


async def test_a_reset_that_is_still_booting_waits_on_its_job_and_fetches_the_observation() -> None:
    async with serving() as server, RemoteEnvWorker(5, server.url, 0) as worker, asyncio.TaskGroup() as group:
        server.history = [{"role": "user", "content": [wire_image()]}]
        server.break_next("POST", "/env/reset", answering(still_booting(server)))
        reset = group.create_task(worker.reset({}))
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.SUCCEEDED)
        assert await reset == {
            "env_idx": 5,
            "obs_messages": [{"role": "user", "content": [INTERNAL_IMAGE]}],
            "is_done": False,
            "format_reward": 0.0,
        }
        assert server.count("POST", "/env/reset") == 1


async def test_a_job_that_fails_after_the_wait_ran_out_raises_its_error() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/reset", answering(still_booting(server)))
        reset = asyncio.create_task(worker.reset({}))
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.FAILED, error=BootTimeout("Too slow.").problem())
        with pytest.raises(BootTimeout):
            await reset
        assert worker.is_done()


async def test_a_reset_is_given_up_at_its_own_deadline() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url, reset_timeout=0.4) as worker:
        server.break_next("POST", "/env/reset", answering(still_booting(server)))
        with pytest.raises(StillBooting, match="goes on"):
            await worker.reset({})


async def test_a_boot_that_failed_is_not_begun_again_behind_the_callers_back() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/reset", answering(BootFailed("No disk.", retry_after=0.01)))
        with pytest.raises(BootFailed, match="No disk"):
            await worker.reset({})
        assert server.count("POST", "/env/reset") == 1


async def test_an_old_servers_reset_without_an_observation_is_a_failed_boot() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        nulls = json.dumps({"env_idx": 0, "obs_messages": None, "is_done": True, "format_reward": 0.0})
        server.break_next("POST", "/env/reset", saying(200, nulls, "application/json"))
        with pytest.raises(BootFailed, match="without an observation"):
            await worker.reset({})


# The real daemon, over sim desktops


async def test_an_episode_against_the_daemon() -> None:
    async with daemon() as served, RemoteEnvWorker(0, served.url) as worker:
        first = (await worker.reset({"id": "t", "instruction": "Click."}))["obs_messages"]
        second = (await worker.step(CLICK))["obs_messages"]
        last = await worker.step(FINISHED)
        assert (len(first or ()), len(second or ())) == (3, 5)
        assert (last["obs_messages"], last["is_done"], last["format_reward"]) == (None, True, 0.0)
        assert [image.size for image in await worker.get_history_images()] == [served.settings.screen] * 2
        with pytest.raises(NotEvaluable):
            await worker.evaluate()


async def test_a_reset_that_outlasts_the_daemons_wait_is_waited_for_over_its_job() -> None:
    async with (
        daemon(Behaviour(boot_s=0.6), legacy_wait=0.1) as served,
        RemoteEnvWorker(0, served.url) as worker,
    ):
        messages = (await worker.reset({}))["obs_messages"]
        assert messages is not None
        assert [message["role"] for message in messages] == ["system", "user", "user"]


async def test_a_boot_that_fails_in_the_daemon_raises_its_error() -> None:
    async with daemon(Behaviour(fail=1.0)) as served, RemoteEnvWorker(0, served.url) as worker:
        with pytest.raises(BootFailed):
            await worker.reset({})


# Failures are not numbers


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        pytest.param(0, 0.0, id="a bare number"),
        pytest.param(0.5, 0.5, id="a bare fraction"),
        pytest.param({"score": 1}, 1.0, id="an object"),
    ],
)
async def test_a_score_is_read_in_every_dialect(answer: Any, score: float) -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.score = answer
        assert await worker.evaluate() == score


@pytest.mark.parametrize("answer", [None, True, "1.0", {"score": None}, {}, [], {"detail": "x"}])
async def test_what_is_no_score_is_an_error(answer: Any) -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.score = answer
        with pytest.raises(InfraError, match="where a score was due"):
            await worker.evaluate()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(answering(NotEvaluable("No evaluator.")), NotEvaluable, id="problem"),
        pytest.param(saying(503, '{"detail": "setup_controller"}', "application/json"), InfraError, id="old server"),
        pytest.param(saying(200, "NaN", "application/json"), InfraError, id="not a number"),
    ],
)
async def test_no_failure_of_evaluate_is_a_number_nor_asked_about_again(fault: Fault, error: type[EnvdError]) -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/evaluate", fault)
        with pytest.raises(error):
            await worker.evaluate()
        assert server.count("POST", "/env/evaluate") == 1


async def test_a_verdict_without_a_score_raises_at_once_and_is_there_to_read() -> None:
    told = verdict(**NO_SCORE).model_dump(mode="json", exclude={"metrics", "postconfig"})
    error = GuestUnreachable("The guest went away.", verdict=told)
    error.retryable = False
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/evaluate", answering(error))
        with pytest.raises(GuestUnreachable) as raised:
            await worker.evaluate()
        assert server.count("POST", "/env/evaluate") == 1
    assert raised.value.facts["verdict"]["status"] == "infra_error"
    assert not raised.value.retryable


@pytest.mark.parametrize("fault", [reset_connection, draining, saying(502, "bad gateway")])
async def test_a_score_whose_answer_was_lost_is_asked_for_again(fault: Fault) -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/evaluate", fault, fault)
        assert await worker.evaluate() == 1.0
        assert server.count("POST", "/env/evaluate") == 3


async def test_a_score_that_stays_lost_is_an_error_at_the_deadline() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url, evaluate_timeout=0.5) as worker:
        server.break_next("POST", "/env/evaluate", *[reset_connection] * 100)
        with pytest.raises(ServerUnreachable):
            await worker.evaluate()


async def test_a_lost_step_raises_and_is_sent_once() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        await worker.reset({})
        server.break_next("POST", "/env/step", reset_connection)
        with pytest.raises(ServerUnreachable) as raised:
            await worker.step(CLICK)
        assert (raised.value.facts["outcome"], server.count("POST", "/env/step")) == ("unknown", 1)


async def test_a_lost_reset_says_how_to_join_it() -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/reset", reset_connection)
        with pytest.raises(ServerUnreachable, match="joins"):
            await worker.reset({})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param([], id="no object"),
        pytest.param({}, id="empty"),
        pytest.param({"is_done": False, "obs_messages": 5}, id="no list"),
        pytest.param({"is_done": False, "obs_messages": [{"role": "user"}]}, id="no content"),
        pytest.param({"is_done": False, "obs_messages": [], "format_reward": "x"}, id="no reward"),
        pytest.param(
            {"is_done": False, "obs_messages": [{"role": "u", "content": [{"type": "image", "b64": 5}]}]}, id="no image"
        ),
    ],
)
async def test_an_answer_that_is_no_observation_is_an_error(body: Any) -> None:
    async with serving() as server, RemoteEnvWorker(0, server.url) as worker:
        server.break_next("POST", "/env/step", saying(200, json.dumps(body), "application/json"))
        with pytest.raises(InfraError):
            await worker.step(CLICK)


async def test_silent_errors_gives_the_old_values(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server, RemoteEnvWorker(2, server.url, silent_errors=True) as worker:
        for path in ("/env/reset", "/env/step", "/env/evaluate"):
            server.break_next("POST", path, answering(BootFailed("No disk.")))
        assert await worker.reset({}) == {
            "env_idx": 2,
            "obs_messages": None,
            "is_done": True,
            "format_reward": 0.0,
        }
        assert await worker.step(CLICK) == {
            "env_idx": 2,
            "obs_messages": None,
            "is_done": True,
            "format_reward": -1.0,
        }
        assert await worker.evaluate() == 0.0
        assert worker.is_done()
    assert [record.levelname for record in caplog.records if record.name == "envd.client.worker"] == ["WARNING"] * 3


# The blocking face


@contextmanager
def served() -> Generator[FakeServer, None, None]:
    """A server whose loop is in another thread, as it is for a blocking caller."""
    ready, stop, found = threading.Event(), asyncio.Event(), []

    async def run() -> None:
        async with serving() as server:
            found.append((server, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield found[0][0]
    finally:
        found[0][1].call_soon_threadsafe(stop.set)
        thread.join(10)


def test_the_blocking_face_plays_an_episode() -> None:
    with served() as server, BlockingRemoteEnvWorker(4, server.url, slot_id=0) as worker:
        assert worker.reset({})["env_idx"] == 4
        assert worker.is_init()
        assert worker.step(FINISHED)["is_done"]
        assert (worker.is_init(), worker.is_done(), worker.evaluate()) == (False, True, 1.0)
        assert len(worker.get_history_messages()) == 4
        assert len(worker.get_history_images()) == 1
        server.break_next("POST", "/env/evaluate", answering(NotEvaluable("No evaluator.")))
        with pytest.raises(NotEvaluable):
            worker.evaluate()
        worker.close()


def test_the_class_of_the_blocking_face_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(BlockingRemoteEnvWorker)) is BlockingRemoteEnvWorker


def test_a_blocking_worker_that_is_never_closed_does_not_keep_the_process() -> None:
    program = (
        "from envd.client import BlockingRemoteEnvWorker as W; w = W(0, 'http://127.0.0.1:9'); w.is_done(); print('ok')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")


def test_the_client_needs_no_trainer_and_no_picture_library_until_it_looks_at_one() -> None:
    program = (
        "import sys, envd.client; print([m for m in ('torch', 'transformers', 'PIL', 'starlette') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "[]\n"
