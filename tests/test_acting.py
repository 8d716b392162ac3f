"""Steps past the guest and through it, told and done once; and desktops that stand still while nobody needs them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from serving import CLICK, QUICK, Served, eventually, serving
from sim_console import ConsoleDriver, SimConsole

from envd.actions.gestures import Move, Press
from envd.drivers.sim import Behaviour
from envd.models import DesktopState
from envd.settings import Settings

TASK: dict[str, Any] = {"id": "t", "instruction": "t", "config": [], "evaluator": {"func": "infeasible"}}
UNICODE = "Action: type(content='naïve')"


@asynccontextmanager
async def consoles(
    behaviour: Behaviour | None = None, *, how: dict[str, bool] | None = None, **settings: Any
) -> AsyncIterator[tuple[Served, ConsoleDriver]]:
    driver = ConsoleDriver(Settings(**{**QUICK, **settings}), "test01", behaviour or Behaviour(), **(how or {}))
    async with serving(driver=driver, **settings) as served:
        yield served, driver


async def played(served: Served, driver: ConsoleDriver) -> SimConsole:
    """The console of a fresh episode's desktop."""
    desktop = await served.play(task=TASK)
    return driver.consoles[desktop.id]


async def step(served: Served, prediction: str) -> dict[str, Any]:
    status, result = await served.post("/v1/envs/0/step", {"prediction": prediction})
    assert status == 200, result
    return result  # type: ignore[no-any-return]  # JSON


async def test_a_click_is_done_at_the_console_and_the_guest_is_not_asked() -> None:
    async with consoles() as (served, driver):
        console = await played(served, driver)
        asked = console.desktop.requests["/screenshot"], console.desktop.requests["/execute"]
        result = await step(served, CLICK)
        assert [action["via"] for action in result["actions"]] == ["host"]
        assert (result["actions"][0]["outcome"], result["actions"][0]["returncode"]) == ("ok", 0)
        assert result["screenshot_via"] == "host"
        assert base64.b64decode(result["screenshot"]) == await console.desktop.screenshot()
        [(move, press, release)] = console.performed
        assert isinstance(move, Move)
        assert (press, release) == (Press("left", down=True), Press("left", down=False))
        assert (console.desktop.requests["/screenshot"], console.desktop.requests["/execute"]) == asked


async def test_what_no_keyboard_types_goes_through_the_guest() -> None:
    async with consoles() as (served, driver):
        console = await played(served, driver)
        result = await step(served, UNICODE)
        assert [action["via"] for action in result["actions"]] == ["guest"]
        assert result["screenshot_via"] == "host"
        assert console.performed == []
        assert console.desktop.requests["/execute"] == 1


@pytest.mark.parametrize(
    ("how", "via", "screenshot_via"),
    [
        pytest.param({"pictures": False}, "host", "guest", id="pictures"),
        pytest.param({"input": False}, "guest", "host", id="input"),
    ],
)
async def test_what_was_not_seen_to_work_is_not_relied_on(how: dict[str, bool], via: str, screenshot_via: str) -> None:
    async with consoles(how=how) as (served, driver):
        await played(served, driver)
        result = await step(served, CLICK)
        assert (result["actions"][0]["via"], result["screenshot_via"]) == (via, screenshot_via)


async def test_without_a_console_all_goes_through_the_guest() -> None:
    async with serving() as served:
        await served.play(task=TASK)
        result = await step(served, CLICK)
        assert (result["actions"][0]["via"], result["screenshot_via"]) == ("guest", "guest")


@pytest.mark.parametrize(
    ("sent", "outcome"), [pytest.param(True, "unknown", id="sent"), pytest.param(False, "failed", id="not sent")]
)
async def test_input_that_breaks_off_is_told_and_not_tried_another_way(sent: bool, outcome: str) -> None:
    async with consoles() as (served, driver):
        console = await played(served, driver)
        console.broken = sent
        result = await step(served, CLICK)
        [action] = result["actions"]
        assert (action["outcome"], action["via"], action["returncode"]) == (outcome, "host", None)
        assert action["stderr"] == "QEMU hung up."
        assert console.desktop.requests["/execute"] == 0


async def test_a_guest_whose_server_hangs_can_still_be_seen_and_used() -> None:
    async with consoles() as (served, driver):
        console = await played(served, driver)
        console.desktop.behaviour = Behaviour(never=True)
        async with asyncio.timeout(5):
            status, picture = await served.get("/v1/envs/0/screenshot")
            assert (status, picture) == (200, await console.desktop.screenshot())
            assert (await step(served, CLICK))["actions"][0]["outcome"] == "ok"


async def test_between_calls_a_desktop_stands_still_and_nothing_asks_its_guest() -> None:
    async with consoles(pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        await asyncio.sleep(0.7)  # three looks of the monitor
        result = await step(served, UNICODE)
        assert result["actions"][0]["outcome"] == "ok"
        await eventually(lambda: console.still_since is not None)
        assert len(console.pauses) == 1
        verdict = await served.evaluate()
        assert verdict["status"] == "scored", verdict
        assert console.disturbed() == []
        desktop = served.service.env(0).desktop
        assert desktop is not None
        assert desktop.chrome_cdp


async def test_a_desktop_that_stands_still_is_seen_without_waking_it() -> None:
    async with consoles(pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        assert (await served.get("/v1/envs/0/screenshot"))[0] == 200
        assert console.pauses == []


async def test_the_guest_is_woken_for_a_picture_that_only_it_can_take() -> None:
    async with consoles(how={"pictures": False}, pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        assert (await served.get("/v1/envs/0/screenshot"))[0] == 200
        assert len(console.pauses) == 1
        assert console.disturbed() == []


async def test_the_death_of_a_desktop_that_stands_still_is_noticed() -> None:
    async with consoles(pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        driver.kill(console.desktop.id)
        await eventually(lambda: served.service.env(0).state == "lost", within=2)


async def test_a_desktop_that_cannot_be_resumed_fails_the_step_and_nothing_is_lost_by_it() -> None:
    async with consoles(pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        console.fails = "resume"
        status, problem = await served.post("/v1/envs/0/step", {"prediction": CLICK})
        assert (status, problem["detail"]) == (503, "QEMU hung up.")
        assert console.performed == []
        console.fails = ""
        assert (await step(served, CLICK))["step"] == 1


async def test_a_desktop_that_cannot_be_paused_goes_on() -> None:
    async with consoles(pause_idle=True) as (served, driver):
        console = await played(served, driver)
        await eventually(lambda: console.still_since is not None)
        console.fails = "pause"
        for _ in range(2):
            assert (await step(served, CLICK))["actions"][0]["outcome"] == "ok"
        assert console.still_since is None


async def test_a_spare_stands_still_while_it_waits_and_is_woken_for_its_episode() -> None:
    async with consoles(pause_idle=True, prewarm="on") as (served, driver):
        await eventually(lambda: bool(served.service.fleet.spares))
        [desktop_id] = [one.id for one in served.service.fleet.desktops() if one.state is DesktopState.READY]
        await eventually(lambda: desktop_id in driver.consoles and driver.consoles[desktop_id].still_since is not None)
        await asyncio.sleep(0.5)
        console = await played(served, driver)
        assert console.desktop.id == desktop_id
        await eventually(lambda: console.still_since is not None)
        assert console.pauses
        assert console.disturbed() == []


async def test_desktops_run_on_unless_it_is_wanted_otherwise() -> None:
    async with consoles() as (served, driver):
        console = await played(served, driver)
        await step(served, CLICK)
        await asyncio.sleep(0.1)
        assert console.still_since is None
        assert console.pauses == []
