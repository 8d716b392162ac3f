"""A task's set-up on a sim desktop: each step does what it says, and what cannot be done is never skipped."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Served, serving

from envd.drivers.sim import Behaviour
from envd.errors import TaskInvalid
from envd.tasks import setup


def step(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"type": kind, "parameters": parameters}


async def set_up(served: Served, *config: dict[str, Any]) -> dict[str, Any]:
    return await served.reset(task={"id": "t-1", "config": list(config)})


async def warnings(served: Served) -> list[str]:
    began = [event for event in served.service.events.recent() if event.data.get("state") == "began"]
    return list(began[-1].data["warnings"])


@pytest.mark.parametrize(
    ("command", "launched"),
    [
        pytest.param(["google-chrome", "--new window"], ["google-chrome", "--new window"], id="list"),
        pytest.param("vlc movie.mp4", ["vlc", "movie.mp4"], id="several words"),
        pytest.param("gimp", ["gimp"], id="one word"),
    ],
)
async def test_launch_starts_a_program(command: Any, launched: list[str]) -> None:
    async with serving() as served:
        assert (await set_up(served, step("launch", command=command)))["state"] == "succeeded"
        assert served.desktop().launched == [launched]


@pytest.mark.parametrize("kind", ["execute", "command"])
async def test_execute_runs_to_its_end_and_a_bad_return_code_is_a_warning(kind: str) -> None:
    async with serving() as served:
        config = [
            step(kind, command=["python", "-c", "import pyautogui; pyautogui.press('a')"]),
            step(kind, command="false"),
        ]
        assert (await set_up(served, *config))["state"] == "succeeded"
        assert len(served.desktop().inputs) == 1
        assert await warnings(served) == [f"config[1] {kind}: ended with 1: "]


async def test_open_opens_a_file() -> None:
    async with serving() as served:
        job = await set_up(served, step("open", path="/home/user/Desktop/README.txt"))
        assert job["state"] == "succeeded"
        assert "README.txt" in served.desktop().gui.windows


async def test_windows_are_activated_and_closed() -> None:
    async with serving() as served:
        opened = step("open", path="/home/user/Desktop/README.txt")
        closed = step("close_window", window_name="README.txt", strict=True)
        job = await set_up(served, opened, step("activate_window", window_name="README"), closed)
        assert (job["state"], await warnings(served)) == ("succeeded", [])
        assert "README.txt" not in served.desktop().gui.windows
        assert served.desktop().requests["/setup/activate_window"] == 1


async def test_a_window_that_is_not_there_is_a_warning() -> None:
    """Upstream goes on then, and there are tasks that rely on it."""
    async with serving(Behaviour(spoil="/setup/activate_window", bad=("error",))) as served:
        assert (await set_up(served, step("activate_window", window_name="none")))["state"] == "succeeded"
        [warning] = await warnings(served)
        assert warning.startswith("config[0] activate_window: ")


async def test_sleep_waits() -> None:
    async with serving() as served:
        job = await set_up(served, step("sleep", seconds=0.2))
        [seconds] = [phase["seconds"] for phase in job["phases"] if phase["name"] == "set_up"]
        assert 0.2 <= seconds < 2


@pytest.mark.parametrize("config", [None, [], {}, 0], ids=repr)
async def test_no_set_up_is_no_set_up(config: Any) -> None:
    async with serving() as served:
        assert (await served.reset(task={"config": config}))["state"] == "succeeded"


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        pytest.param(Behaviour(spoil="/setup/open_file", bad=("error",)), "guest_misbehaved", id="refuses"),
        pytest.param(Behaviour(lose="/setup/open_file"), "guest_unreachable", id="breaks off"),
        pytest.param(Behaviour(), "guest_misbehaved", id="no such file"),
    ],
)
async def test_a_step_that_fails_fails_the_reset_and_its_desktop_is_not_used_again(
    behaviour: Behaviour, cause: str
) -> None:
    async with serving([behaviour, Behaviour()]) as served:
        asked = [step("launch", command="vlc"), step("sleep", seconds=0), step("open", path="/nowhere/at.all")]
        job = await set_up(served, *asked, step("launch", command="gimp"))
        error = job["error"]
        assert (job["state"], job["episode_id"]) == ("failed", None)
        assert (error["code"], error["fault"], error["step"], error["step_type"]) == ("setup_failed", "task", 2, "open")
        assert error["cause"] == cause
        assert job["desktop_id"] not in served.sim.desktops
        _, env = await served.get("/v1/envs/0")
        assert (env["state"], env["desktop"], env["episode"]) == ("empty", None, None)
        again = await set_up(served)
        assert again["state"] == "succeeded"
        assert again["desktop_id"] != job["desktop_id"]


async def test_a_desktop_that_dies_during_set_up_fails_the_reset_as_lost() -> None:
    async with serving() as served:
        _, job = await served.post("/v1/envs/0/reset", {"task": {"config": [step("sleep", seconds=600)]}})
        sleeping = await served.in_state(job["id"], "setting_up")
        served.sim.kill(sleeping["desktop_id"])
        ended = await served.ended(job["id"])
        assert (ended["state"], ended["error"]["code"], ended["error"]["fault"]) == ("failed", "desktop_lost", "infra")


@pytest.mark.parametrize(
    ("config", "field", "says"),
    [
        pytest.param([step("download", files=[])], "config[0]", "no set-up step 'download'", id="unknown type"),
        pytest.param([step("sleep", seconds=1), step("x" * 5000)], "config[1]", "no set-up step 'xxx", id="long type"),
        pytest.param(["launch"], "config[0]", "an object with a type", id="no object"),
        pytest.param([{"parameters": {}}], "config[0]", "an object with a type", id="no type"),
        pytest.param([{"type": ["launch"]}], "config[0]", "an object with a type", id="type no text"),
        pytest.param([{"type": "launch", "parameters": [1]}], "config[0]", "parameters must be", id="parameters"),
        pytest.param([{"type": "launch"}], "config[0]", "launch needs command", id="missing"),
        pytest.param([step("launch", command=5)], "config[0]", "command must be", id="command no text"),
        pytest.param([step("execute", command=[])], "config[0]", "command must be", id="empty command"),
        pytest.param([step("execute", command=["ls", 5])], "config[0]", "command must be", id="word no text"),
        pytest.param([step("open", path="")], "config[0]", "path must be", id="empty path"),
        pytest.param([step("close_window", window_name=None)], "config[0]", "window_name must be", id="no window"),
        pytest.param([step("sleep", seconds="1")], "config[0]", "from 0 to 600", id="sleep no number"),
        pytest.param([step("sleep", seconds=-1)], "config[0]", "from 0 to 600", id="sleep backwards"),
        pytest.param([step("sleep", seconds=1e9)], "config[0]", "from 0 to 600", id="sleep for ever"),
        pytest.param([step("sleep", seconds=float("nan"))], "config[0]", "from 0 to 600", id="sleep nan"),
        pytest.param(
            [step("execute", command="x", until={"returncode": 0})], "config[0]", "until is not supported", id="until"
        ),
        pytest.param(
            [step("execute", command=["click", "{SCREEN_WIDTH_HALF}"])],
            "config[0]",
            "{SCREEN_WIDTH_HALF}",
            id="placeholder",
        ),
        pytest.param("launch", "config", "a list of set-up steps", id="no list"),
    ],
)
def test_a_task_that_cannot_be_set_up_is_refused_by_its_field(config: Any, field: str, says: str) -> None:
    with pytest.raises(TaskInvalid) as caught:
        setup.check({"config": config})
    [error] = caught.value.facts["errors"]
    assert error["field"] == field
    assert says in error["message"]
    assert len(error["message"]) < 500


def test_everything_wrong_with_a_task_is_said_at_once_but_not_endlessly() -> None:
    with pytest.raises(TaskInvalid) as caught:
        setup.check({"id": [], "instruction": 5, "config": [{}] * 1000})
    errors = caught.value.facts["errors"]
    assert [error["field"] for error in errors[:3]] == ["id", "instruction", "config[0]"]
    assert len(errors) == 100
    assert len(caught.value.detail) < 1000


async def test_a_task_that_is_refused_costs_no_desktop() -> None:
    async with serving() as served:
        status, problem = await served.post("/v1/envs/0/reset", {"task": {"config": [step("download", files=[])]}})
        assert (status, problem["code"], problem["errors"][0]["field"]) == (422, "task_invalid", "config[0]")
        assert served.sim.journal == []
        assert (await served.get("/v1/jobs"))[1] == {"jobs": []}
