"""`envd.gym` against real daemons: what Gymnasium asks of an env, and what becomes of one when things break."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import gymnasium
import numpy as np
import pytest
import requests
from anyio.from_thread import BlockingPortal, start_blocking_portal
from daemon_process import DaemonProcess, daemon, start
from gymnasium.error import ClosedEnvironmentError
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image

import envd.gym
from envd.errors import (
    DesktopLost,
    EpisodeOver,
    GuestMisbehaved,
    InvalidRequest,
    LeaseOver,
    LeaseUnavailable,
    NotEvaluable,
    RequestError,
    ServerUnreachable,
    SettingsError,
    TaskInvalid,
)
from envd.gym import DesktopEnv, DesktopLease, DesktopVectorEnv
from envd.gym.acts import KEYS, KINDS, program
from envd.gym.playing import Player, _pixels
from envd.models import VerdictStatus

SETTINGS = {"ENVD_SCREEN": "320x240", "ENVD_ACTION_PAUSE": "0", "ENVD_WAIT_SECONDS": "0", "ENVD_SETTLE_QUIET": "0"}
MORTAL = """
import envd.service
from envd.drivers.sim import Behaviour, Fault, SimDriver

DEADLY = Behaviour(on={"/execute please die": Fault("die")})
envd.service.make_driver = lambda settings, daemon_id: SimDriver(settings, daemon_id, DEADLY)
"""
"""A prelude: a desktop on which `DIE` is typed is gone."""
TASK = {"id": "t-1", "instruction": "Sort the seas by height.", "config": [], "evaluator": {"func": "infeasible"}}
OTHER = TASK | {"id": "t-2", "instruction": "Zähle bis drei. 数到三。"}
BARE = {"id": "t-3", "instruction": "Whatever."}
LOOK = "Thought: I look.\nAction: wait()"
CLICK = "Thought: The button.\nAction: click(start_box='(100,100)')"
DIE = "Thought: ...\nAction: type(content='please die')"
DONE = "Thought: It is there.\nAction: finished(content='ok')"
GIVE_UP = "Thought: It cannot be done.\nAction: call_user()"


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def running(
    portal: BlockingPortal, state: Path, *, prelude: str = "", **settings: str
) -> AbstractContextManager[tuple[DaemonProcess, Any]]:
    return portal.wrap_async_context_manager(daemon(state, prelude=prelude, env=SETTINGS | settings))


@pytest.fixture(scope="module")
def url(portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a daemon with four envs, none of which anybody has."""
    state = tmp_path_factory.mktemp("gym") / "state"
    with running(portal, state, prelude=MORTAL, ENVD_ENVS="4") as (process, _):
        yield process.url


@pytest.fixture(autouse=True)
def no_lease_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "url" in request.fixturenames:
        assert held(request.getfixturevalue("url")) == []


def held(url: str) -> list[str]:
    """The owners of the leases that are held."""
    return [lease["owner"] for lease in leases(url) if lease["state"] == "held"]


def leases(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests.get(f"{url}/v1/leases", timeout=10).json()["leases"]
    return found


@contextmanager
def playing(url: str, **how: Any) -> Iterator[DesktopEnv]:
    env = DesktopEnv(url, **{"tasks": TASK, "wait_s": 20, **how})
    try:
        yield env
    finally:
        env.close()


@contextmanager
def vector(num_envs: int, url: str, **how: Any) -> Iterator[DesktopVectorEnv]:
    envs = DesktopVectorEnv(num_envs, url, **{"tasks": TASK, "wait_s": 20, **how})
    try:
        yield envs
    finally:
        envs.close()


# What Gymnasium asks


@pytest.mark.parametrize("actions", ["prediction", "program", "gesture"])
def test_gymnasiums_own_check_passes(url: str, actions: str) -> None:
    env = gymnasium.make(envd.gym.ID, url=url, tasks=TASK, actions=actions, wait_s=20, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_the_example_in_the_documentation_runs(url: str) -> None:
    assert envd.gym.__doc__ is not None
    lines = [line for line in envd.gym.__doc__.splitlines() if line.startswith("    ") or not line]
    code = textwrap.dedent("\n".join(line for line in lines if "pip install" not in line))
    names: dict[str, Any] = {"URL": url}
    exec(code, names)
    assert names["info"]["verdict"].score == 1.0
    assert names["keep"].tolist() == [True, True]


def test_a_sample_of_every_kind_is_an_action_that_ends_nothing(url: str) -> None:
    for actions in ("prediction", "program", "gesture"):
        with playing(url, actions=actions, max_steps=100) as env:
            env.reset(seed=3)
            env.action_space.seed(3)
            for _ in range(10):
                action = env.action_space.sample()
                assert action in env.action_space
                _, reward, terminated, truncated, info = env.step(action)
                assert (reward, terminated, truncated, info["problem"]) == (0.0, False, False, ""), action
                assert all(done["outcome"] in ("ok", "special") for done in info["action_results"]), action


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("move", "pyautogui.moveTo(160, 239)"),
        ("click", "pyautogui.click(160, 239)"),
        ("double_click", "pyautogui.doubleClick(160, 239)"),
        ("right_click", "pyautogui.rightClick(160, 239)"),
        ("drag", "pyautogui.moveTo(160, 239)\npyautogui.dragTo(0, 60, duration=0.5)"),
        ("scroll", "pyautogui.moveTo(160, 239)\npyautogui.scroll(-5)"),
        ("type", 'pyautogui.write("it\'s")'),
        ("press", "pyautogui.hotkey('ctrl', 'a')"),
        ("wait", "WAIT"),
        ("done", "DONE"),
        ("fail", "FAIL"),
    ],
)
def test_a_gesture_is_a_program(kind: str, text: str) -> None:
    gesture = {
        "kind": KINDS.index(kind),
        "at": np.array([0.5, 1.0], np.float32),
        "to": np.array([0.0, 0.25], np.float32),
        "turn": np.array([-0.5], np.float32),
        "text": "it's",
        "key": KEYS.index("ctrl+a"),
    }
    assert program(gesture, (320, 240)) == text


# An episode


def test_an_episode_ends_with_the_score_of_its_task_and_nothing_before_is_rewarded(url: str) -> None:
    with playing(url) as env:
        seen, info = env.reset()
        assert seen in env.observation_space
        assert (seen["instruction"], seen["screenshot"].shape) == (TASK["instruction"], (240, 320, 3))
        assert (info["mask"], info["task_id"], info["reset_path"]) == (False, "t-1", "cold")
        then, reward, terminated, truncated, told = env.step(CLICK)
        assert (reward, terminated, truncated, told["step"]) == (0.0, False, False, 1)
        assert told["episode_id"] == info["episode_id"]
        assert [one["outcome"] for one in told["action_results"]] == ["ok"]
        assert not np.array_equal(then["screenshot"], seen["screenshot"])
        _, reward, terminated, truncated, told = env.step(GIVE_UP)
        assert (reward, terminated, truncated, told["end_reason"]) == (1.0, True, False, "fail")
        assert (told["verdict"].status, told["mask"]) == (VerdictStatus.SCORED, False)
        assert {"act", "evaluate"} <= told["seconds"].keys()
        assert [message["role"] for message in env.history()][-2:] == ["user", "assistant"]
        with pytest.raises(EpisodeOver, match="reset"):
            env.step(CLICK)
        assert env.reset()[1]["episode_id"] != info["episode_id"]


@pytest.mark.parametrize(
    ("said", "how", "ends", "reason"),
    [
        pytest.param(DONE, {}, (0.0, True, False), "done", id="done"),
        pytest.param("I would rather not.", {}, (0.0, True, False), "unparsable", id="unparsable"),
        pytest.param(LOOK, {"max_steps": 1}, (0.0, False, True), "max_steps", id="max_steps"),
    ],
)
def test_what_the_model_does_terminates_and_what_limits_it_truncates(
    url: str, said: str, how: dict[str, Any], ends: tuple[float, bool, bool], reason: str
) -> None:
    with playing(url) as env:
        env.reset(options=how)
        _, reward, terminated, truncated, info = env.step(said)
        assert (reward, terminated, truncated) == ends
        assert info["end_reason"] == reason
        assert info["verdict"].score == 0.0


def test_a_step_that_comes_after_the_episodes_time_truncates_and_is_judged(url: str) -> None:
    with playing(url, episode_timeout_s=0.3) as env:
        env.reset()
        time.sleep(0.35)  # the fact is the time itself
        _, reward, terminated, truncated, info = env.step(CLICK)
        assert (reward, terminated, truncated, info["end_reason"]) == (0.0, False, True, "deadline")
        assert info["action_results"] == []


def test_without_a_score_there_is_no_number(url: str) -> None:
    with playing(url, tasks=BARE) as env:
        env.reset()
        with pytest.raises(NotEvaluable, match="has no evaluator") as failed:
            env.step(DONE)
        assert failed.value.facts["verdict"].mask is True
        assert not failed.value.retryable
        env.reset()
    with playing(url, tasks=BARE, on_failure="mask") as env:
        env.reset()
        _, reward, terminated, truncated, info = env.step(DONE)
        assert math.isnan(reward)
        assert (terminated, truncated, info["mask"], info["error"].code) == (False, True, True, "not_evaluable")
        assert info["verdict"].score is None


def test_a_desktop_that_dies_raises_or_masks_and_the_next_reset_has_another(url: str) -> None:
    with playing(url) as env:
        env.reset()
        with pytest.raises(DesktopLost):
            env.step(DIE)
        assert env.reset()[1]["mask"] is False
        assert env.step(CLICK)[1] == 0.0
    with playing(url, on_failure="mask") as env:
        seen, _ = env.reset()
        last, reward, terminated, truncated, info = env.step(DIE)
        assert math.isnan(reward)
        assert (terminated, truncated, info["mask"], info["error"].fault) == (False, True, True, "infra")
        assert np.array_equal(last["screenshot"], seen["screenshot"])
        with pytest.raises(EpisodeOver):
            env.step(CLICK)


def test_tasks_are_drawn_by_the_seed_and_an_option_is_for_one_episode(url: str) -> None:
    with playing(url, tasks=[TASK, OTHER]) as env:

        def drawn(**how: Any) -> str:
            return str(env.reset(**how)[1]["task_id"])

        first = [drawn(seed=5), *(drawn() for _ in range(5))]
        assert set(first) == {"t-1", "t-2"}
        assert [drawn(seed=5), *(drawn() for _ in range(5))] == first
        seen, info = env.reset(options={"task": BARE})
        assert (seen["instruction"], info["task_id"]) == ("Whatever.", "t-3")
        assert drawn() in {"t-1", "t-2"}
        with pytest.raises(InvalidRequest, match="did you mean max_steps"):
            env.reset(options={"max_step": 3})
        with pytest.raises(InvalidRequest, match="max_steps"):
            env.reset(options={"max_steps": 0})


def test_another_screen_than_the_servers_is_refused_at_the_reset(url: str) -> None:
    with playing(url, screen=(640, 480)) as env, pytest.raises(RequestError, match="640"):
        env.reset()


@pytest.mark.parametrize(
    ("actions", "action"),
    [("prediction", 3), ("program", None), ("gesture", "click"), ("gesture", {"kind": 99}), ("gesture", {})],
)
def test_what_is_no_action_is_the_callers_mistake_and_the_episode_goes_on(url: str, actions: str, action: Any) -> None:
    with playing(url, actions=actions, on_failure="raise") as env:
        env.reset()
        with pytest.raises(InvalidRequest):
            env.step(action)
        env.step(env.action_space.sample())


@pytest.mark.parametrize(
    "how",
    [{"actions": "words"}, {"on_failure": "ignore"}, {"tasks": ["t-1"]}, {"render_mode": "human"}],
    ids=lambda how: next(iter(how)),
)
def test_an_argument_that_cannot_be_used_says_so_and_takes_nothing(url: str, how: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        DesktopEnv(url, **how)


def test_a_frame_is_what_was_seen_last(url: str) -> None:
    with playing(url, render_mode="rgb_array") as env:
        seen, _ = env.reset()
        frame = env.render()
        assert frame is not None
        assert np.array_equal(frame, seen["screenshot"])
        seen = env.step(CLICK)[0]
        frame = env.render()
        assert frame is not None
        assert np.array_equal(frame, seen["screenshot"])
    with playing(url) as env:
        assert env.render() is None


def test_closing_gives_the_lease_back_and_may_be_done_again(url: str) -> None:
    env = DesktopEnv(url, owner="ann")
    assert held(url) == ["ann"]
    env.close()
    assert held(url) == []
    env.close()
    with pytest.raises(ClosedEnvironmentError):
        env.reset()
    with pytest.raises(ClosedEnvironmentError):
        env.step(CLICK)


# Several


def test_a_vector_resets_steps_and_judges_all_and_resets_in_the_step_after_an_end(url: str) -> None:
    envs = gymnasium.make_vec(envd.gym.ID, num_envs=3, url=url, tasks=[TASK], wait_s=20, owner="ann")
    assert isinstance(envs, DesktopVectorEnv)
    assert held(url) == ["ann"]
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    seen, infos = envs.reset(seed=1)
    assert seen in envs.observation_space
    assert len(set(infos["episode_id"])) == 3
    assert infos["mask"].tolist() == [False, False, False]
    _, rewards, terminations, truncations, infos = envs.step((GIVE_UP, CLICK, DONE))
    assert rewards.tolist() == [1.0, 0.0, 0.0]
    assert (terminations.tolist(), truncations.tolist()) == ([True, False, True], [False, False, False])
    assert infos["end_reason"].tolist() == ["fail", "", "done"]
    began = infos["episode_id"].tolist()
    _, rewards, terminations, _, infos = envs.step((GIVE_UP, GIVE_UP, GIVE_UP))
    assert (rewards.tolist(), terminations.tolist()) == ([0.0, 1.0, 0.0], [False, True, False])
    then = infos["episode_id"].tolist()
    assert [one == two for one, two in zip(began, then, strict=True)] == [False, True, False]
    envs.close()
    envs.close()


def test_one_desktop_that_dies_is_masked_and_reset_and_the_others_go_on(url: str) -> None:
    with vector(3, url) as envs:
        envs.reset()
        _, rewards, terminations, truncations, infos = envs.step((CLICK, DIE, GIVE_UP))
        assert rewards[[0, 2]].tolist() == [0.0, 1.0]
        assert math.isnan(rewards[1])
        assert (terminations.tolist(), truncations.tolist()) == ([False, False, True], [False, True, False])
        assert infos["mask"].tolist() == [False, True, False]
        assert isinstance(infos["error"][1], DesktopLost)
        _, rewards, _, truncations, infos = envs.step((GIVE_UP, CLICK, CLICK))
        assert (rewards.tolist(), any(truncations), any(infos["mask"])) == ([1.0, 0.0, 0.0], False, False)


def test_a_reset_that_fails_for_one_env_is_masked_and_tried_again(url: str) -> None:
    broken = TASK | {"config": [{"type": "download", "parameters": {"files": [{"url": "x", "path": "/x"}]}}]}
    with vector(2, url) as envs:
        _, infos = envs.reset(options={"tasks": [TASK, broken]})
        assert infos["mask"].tolist() == [False, True]
        _, rewards, _, truncations, infos = envs.step((CLICK, CLICK))
        assert (rewards.tolist(), any(truncations), any(infos["mask"])) == ([0.0, 0.0], False, False)
        with pytest.raises(TaskInvalid, match="url"):
            envs.reset(options={"task": broken})


def test_with_same_step_the_last_observation_is_in_the_infos(url: str) -> None:
    with vector(2, url, autoreset_mode="SameStep") as envs:
        _, first = envs.reset()
        seen, rewards, terminations, _, infos = envs.step((GIVE_UP, CLICK))
        assert (rewards.tolist(), terminations.tolist()) == ([1.0, 0.0], [True, False])
        assert infos["final_info"]["end_reason"].tolist() == ["fail", None]
        assert infos["final_obs"][0]["screenshot"].shape == (240, 320, 3)
        assert infos["final_obs"][1] is None
        assert infos["episode_id"][0] != first["episode_id"][0]
        assert seen["screenshot"].shape == (2, 240, 320, 3)
        assert envs.step((CLICK, GIVE_UP))[1].tolist() == [0.0, 1.0]


def test_without_autoreset_the_mask_says_who_is_reset(url: str) -> None:
    with vector(2, url, autoreset_mode=AutoresetMode.DISABLED) as envs:
        _, first = envs.reset()
        _, _, terminations, truncations, _ = envs.step((GIVE_UP, CLICK))
        with pytest.raises(EpisodeOver, match="env 0"):
            envs.step((CLICK, CLICK))
        _, infos = envs.reset(options={"reset_mask": terminations | truncations})
        assert infos["_episode_id"].tolist() == [True, False]
        _, _, _, _, infos = envs.step((CLICK, CLICK))
        assert (infos["episode_id"] == first["episode_id"]).tolist() == [False, True]
        for mask in (np.array([True]), np.array([False, False]), "all"):
            with pytest.raises(InvalidRequest, match="reset_mask"):
                envs.reset(options={"reset_mask": mask})


def test_a_group_plays_the_same_task_and_each_env_may_have_its_own(url: str) -> None:
    with vector(2, url, tasks=[TASK, OTHER]) as envs:
        assert envs.reset(options={"task": BARE})[1]["task_id"].tolist() == ["t-3", "t-3"]
        seen, infos = envs.reset(options={"tasks": [OTHER, TASK]})
        assert infos["task_id"].tolist() == ["t-2", "t-1"]
        assert seen["instruction"] == (OTHER["instruction"], TASK["instruction"])
        drawn = envs.reset(seed=[5, 6])[1]["task_id"].tolist()
        assert envs.reset(seed=[5, 6])[1]["task_id"].tolist() == drawn
        with pytest.raises(InvalidRequest, match="3 actions for 2 envs"):
            envs.step((CLICK, CLICK, CLICK))
        with pytest.raises(InvalidRequest, match="1 tasks for 2 envs"):
            envs.reset(options={"tasks": [TASK]})


def test_a_vector_of_gestures_takes_its_own_samples(url: str) -> None:
    with vector(2, url, actions="gesture", render_mode="rgb_array") as envs:
        envs.reset()
        action = envs.action_space.sample()
        action["kind"][:] = KINDS.index("click")
        assert envs.step(action)[1].tolist() == [0.0, 0.0]
        frames = envs.render()
        assert frames is not None
        assert [frame.shape for frame in frames] == [(240, 320, 3)] * 2


def test_a_vector_has_all_its_envs_or_none(url: str) -> None:
    with vector(3, url, owner="ann"):
        with pytest.raises(LeaseUnavailable, match="2 envs were not free"):
            DesktopVectorEnv(2, url, wait_s=0.2, owner="bob")
        assert held(url) == ["ann"]


def test_a_vector_that_waits_says_for_what(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.gym.holding.NOTICE", 0.3)
    with (
        vector(3, url, owner="ann"),
        pytest.warns(UserWarning, match=r"2 envs are waited for, number 1 in line: env \d is leased to ann; .*wait_s"),
        pytest.raises(LeaseUnavailable, match=r"2 envs were not free.* within 1 s: env \d is leased to ann"),
    ):
        DesktopVectorEnv(2, url, wait_s=1, owner="bob")


def test_gymnasiums_own_vector_shares_a_lease(url: str) -> None:
    with DesktopLease(2, url, wait_s=20, owner="ann") as lease:
        assert deepcopy(lease) is lease
        how: dict[str, Any] = {"lease": lease, "tasks": TASK, "on_failure": "mask"}
        envs = gymnasium.make_vec(envd.gym.ID, num_envs=2, vectorization_mode="sync", **how)
        assert isinstance(envs, SyncVectorEnv)
        assert held(url) == ["ann"]
        _, infos = envs.reset(seed=1)
        assert sorted(infos["env"].tolist()) == [0, 1]
        _, rewards, terminations, _, _ = envs.step((GIVE_UP, CLICK))
        assert (rewards.tolist(), terminations.tolist()) == ([1.0, 0.0], [True, False])
        with pytest.raises(RequestError, match="All 2 envs of this lease are in use"):
            DesktopEnv(lease=lease)
        envs.close()
        one = DesktopEnv(lease=lease)
        one.close()
        assert held(url) == ["ann"]
    with pytest.raises(ClosedEnvironmentError):
        DesktopEnv(lease=lease)


# When things break


def release(env: DesktopEnv | DesktopVectorEnv, url: str) -> None:
    """End the lease behind the env's back."""
    lease_id = env._lease.env(0).client.http._says["X-Lease"]  # type: ignore[attr-defined]
    assert requests.delete(f"{url}/v1/leases/{lease_id}", timeout=10).ok


def test_a_lease_that_is_lost_ends_the_episode_and_the_next_reset_has_another(url: str) -> None:
    with playing(url) as env:
        env.reset()
        release(env, url)
        with pytest.raises(LeaseOver):
            env.step(CLICK)
        env.reset()
        assert env.step(GIVE_UP)[1] == 1.0
    with vector(2, url) as envs:
        envs.reset()
        release(envs, url)
        _, rewards, _, truncations, infos = envs.step((CLICK, CLICK))
        assert np.isnan(rewards).all()
        assert (all(truncations), all(infos["mask"])) == (True, True)
        _, rewards, _, truncations, infos = envs.step((CLICK, CLICK))
        assert (rewards.tolist(), any(truncations), any(infos["mask"])) == ([0.0, 0.0], False, False)


def test_an_episode_goes_on_over_a_crash_of_the_daemon(portal: BlockingPortal, tmp_path: Path) -> None:
    settings = SETTINGS | {"ENVD_SIM": "outlive,linger=10", "ENVD_ENVS": "2"}
    with running(portal, tmp_path / "state", **settings) as (process, _):
        port = process.url.rpartition(":")[2]
        with vector(2, process.url) as envs:
            _, first = envs.reset()
            process.signal(SIGKILL)
            portal.call(process.ended)
            again = portal.start_task_soon(started_again, tmp_path / "state", port, settings)
            _, rewards, _, _, infos = envs.step((CLICK, GIVE_UP))
            assert rewards.tolist() == [0.0, 1.0]
            assert (infos["episode_id"] == first["episode_id"]).all()
            assert not infos["mask"].any()
        portal.call(again.result().kill)


async def started_again(state: Path, port: str, settings: dict[str, str]) -> DaemonProcess:
    process = await start(state, "--port", port, env=settings)
    await process.listening()
    return process


def test_a_server_that_stays_away_is_an_error_and_no_reward(portal: BlockingPortal, tmp_path: Path) -> None:
    with (
        running(portal, tmp_path / "state", ENVD_ENVS="2") as (process, _),
        DesktopLease(2, process.url, patience=0.3) as lease,
    ):
        envs = DesktopVectorEnv(2, lease=lease, tasks=TASK)
        envs.reset()
        process.signal(SIGKILL)
        portal.call(process.ended)
        _, rewards, _, _, infos = envs.step((CLICK, CLICK))
        assert np.isnan(rewards).all()
        assert infos["mask"].all()
        with pytest.raises(ServerUnreachable):
            envs.step((CLICK, CLICK))
        envs.close()


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ServerUnreachable, match="Nothing listens"):
        DesktopEnv("http://127.0.0.1:9")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_an_env_that_is_never_closed_keeps_neither_its_process_nor_its_lease(url: str) -> None:
    ended = run(f"import envd.gym; env = envd.gym.DesktopEnv({url!r}); env.reset(); print('ok')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ok\n", "")
    assert held(url) == []


def test_who_waits_for_a_lease_can_be_interrupted(url: str) -> None:
    with vector(4, url, owner="ann"):
        code = f"import envd.gym; print('waits', flush=True); envd.gym.DesktopEnv({url!r}, owner='bob')"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
            while "bob" not in [lease["owner"] for lease in leases(url)]:
                assert waiting.poll() is None
                time.sleep(0.02)
            waiting.send_signal(SIGINT)
            _, told = waiting.communicate(timeout=20)
        assert b"KeyboardInterrupt" in told
        assert held(url) == ["ann"]


def test_without_the_extra_the_import_says_which_and_the_rest_of_envd_needs_none() -> None:
    ended = run("import sys; sys.modules['gymnasium'] = None; import envd.client, envd.gym")
    assert (
        "envd.gym needs the package gymnasium, which is not installed. pip install 'envd-server[gym]'" in ended.stderr
    )
    ended = run("import sys, envd, envd.client; print([m for m in ('gymnasium', 'numpy') if m in sys.modules])")
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000)])
def test_a_picture_that_says_it_is_huge_is_not_unpacked(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    Image.new("1", size).save(written, "PNG")
    monkeypatch.setattr(Image.Image, "convert", pytest.fail)
    with pytest.raises(GuestMisbehaved):
        _pixels(written.getvalue(), (320, 240))


async def test_an_end_that_this_version_does_not_know_is_an_error_of_ours() -> None:
    class Handle:
        number = 0
        client = None

        async def step(self, *_: Any, **__: Any) -> None:
            raise EpisodeOver("It is over.", end_reason="abducted")

    player = Player((320, 240), None, None)
    handle: Any = Handle()
    handle.client = handle
    player._handle, player._over = handle, False
    with pytest.raises(EpisodeOver):
        await player.step(programs=["DONE"])
