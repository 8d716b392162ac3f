"""Envs and episodes below HTTP: what a reset, a step and a death may do to each other."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image
from serving import CLICK, DONE, Served, eventually, serving

from envd import episodes
from envd.drivers.sim import Behaviour
from envd.errors import DesktopLost, EnvBusy, EnvdError, EpisodeOver, NoEpisode, UnknownEnv
from envd.guest import Guest
from envd.models import EndReason, StepRequest

CLICKED = StepRequest(actions=["pyautogui.click(10, 20)"])


def episode_events(served: Served) -> list[tuple[str, Any]]:
    events = served.service.events.recent()
    return [(event.data["state"], event.data.get("end_reason")) for event in events if event.kind == "episode"]


@pytest.mark.parametrize("env", [-1, 2, 10**30])
async def test_an_env_that_does_not_exist_is_unknown(env: int) -> None:
    async with serving(envs=2) as served:
        envs = served.service.envs
        for look in (envs.env, envs.dialogue, envs.played):
            with pytest.raises(UnknownEnv):
                look(env)
        with pytest.raises(UnknownEnv):
            await envs.step(env, CLICKED)


async def test_an_episode_begins_and_ends_once() -> None:
    async with serving() as served:
        await served.play()
        await served.service.step(0, StepRequest(prediction=DONE))
        with pytest.raises(EpisodeOver):
            await served.service.step(0, CLICKED)
        await served.play()
        served.sim.kill(served.desktop().id)
        await eventually(lambda: served.service.env(0).state == "lost")
        await served.play()
        await served.play()
        assert episode_events(served) == [
            ("began", None),
            ("ended", EndReason.DONE),
            ("began", None),
            ("ended", EndReason.LOST),
            ("began", None),
            ("ended", EndReason.REPLACED),
            ("began", None),
        ]


async def test_actions_are_counted_and_steps_too() -> None:
    async with serving(max_steps=5) as served:
        await served.play()
        await served.service.step(0, StepRequest(actions=["pyautogui.press('a')", "WAIT"]))
        await served.service.step(0, CLICKED)
        episode = served.service.env(0).episode
        assert episode is not None
        assert (episode.steps, episode.actions, episode.done) == (2, 3, False)
        result = await served.service.step(0, StepRequest(actions=["pyautogui.press('a')"] * 9))
        assert (len(result.actions), result.done, result.end_reason) == (2, True, EndReason.MAX_STEPS)
        assert len(served.desktop().inputs) == 4


async def test_the_pause_follows_each_action() -> None:
    async with serving() as served:
        await served.play()
        result = await served.service.step(0, StepRequest(actions=["pyautogui.press('a')"] * 2, pause_s=0.1))
        assert 0.2 <= result.seconds["act"] < 2
        result = await served.service.step(0, StepRequest(actions=["pyautogui.press('a')"] * 2))
        assert result.seconds["act"] < 0.2


async def test_a_click_is_scaled_to_the_screen_that_was_seen() -> None:
    async with serving(screen=(1920, 1080)) as served:
        desktop = await served.play()
        await served.service.step(0, StepRequest(prediction="Action: click(start_box='(100,200)')"))
        [click] = desktop.gui.clicks
        assert click.at == pytest.approx((99.379, 197.802), abs=1)


async def test_output_is_cut_and_its_end_kept() -> None:
    async with serving() as served:
        await served.play()
        result = await served.service.step(0, StepRequest(actions=[f"print('{'a' * 3000}', '{'b' * 3000}')"]))
        assert result.actions[0].stdout == "a" * 998 + " " + "b" * 3000 + "\n"
        [event] = [event for event in served.service.events.recent() if event.kind == "step"]
        assert len(event.encoded) < 4000


async def test_a_lost_answer_ends_the_step_but_not_the_episode() -> None:
    async with serving(Behaviour(lose="/execute")) as served:
        desktop = await served.play()
        await served.service.step(0, StepRequest(prediction=CLICK))
        desktop.behaviour = Behaviour()
        result = await served.service.step(0, StepRequest(prediction=CLICK))
        assert (result.step, result.actions[0].outcome) == (2, "ok")
        assert len(desktop.inputs) == 2


async def test_a_step_that_a_reset_overtakes_touches_nothing_of_the_new_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reset has taken the episode away, but the step is cancelled only when the desktop's removal begins."""
    async with serving() as served:
        await served.play()
        envs, job = served.service.envs, served.service.queue.get(next(iter(served.service.store.jobs())).id)
        execute = Guest.execute

        async def execute_and_lose_the_episode(self: Guest, *words: Any, **how: Any) -> Any:
            done = await execute(self, *words, **how)
            envs.vacate(0, job)
            return done

        monkeypatch.setattr(Guest, "execute", execute_and_lose_the_episode)
        with pytest.raises(DesktopLost):
            await envs.step(0, CLICKED)
        assert (served.service.env(0).state, served.service.env(0).episode) == ("resetting", None)
        with pytest.raises(EnvBusy):
            await envs.step(0, CLICKED)


async def test_a_step_that_the_death_overtakes_does_not_change_how_the_episode_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as served:
        desktop = await served.play()
        screenshot = Guest.screenshot

        async def die_and_look(self: Guest, *words: Any, **how: Any) -> bytes:
            picture = await screenshot(self, *words, **how)
            served.sim.kill(desktop.id)
            await eventually(lambda: served.service.env(0).state == "lost")
            return picture

        monkeypatch.setattr(Guest, "screenshot", die_and_look)
        with pytest.raises(DesktopLost):
            await served.service.step(0, CLICKED)
        episode = served.service.env(0).episode
        assert episode is not None
        assert (episode.done, episode.end_reason) == (True, EndReason.LOST)


async def test_a_screenshot_that_hangs_ends_with_the_desktop() -> None:
    async with serving() as served:
        desktop = await served.play()
        desktop.behaviour = Behaviour(hang="/screenshot")
        desktop.requests.clear()
        looking = asyncio.create_task(served.service.envs.screenshot(0))
        await eventually(lambda: desktop.requests["/screenshot"] == 1)
        served.sim.kill(desktop.id)
        async with asyncio.timeout(2):
            with pytest.raises(DesktopLost):
                await looking


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_the_bomb_is_one() -> None:
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb()))


async def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        await served.play()

        async def hostile(self: Guest, timeout: float = 30) -> bytes:
            return bomb()

        monkeypatch.setattr(Guest, "screenshot", hostile)
        status, problem = await served.post("/v1/envs/0/step", {"actions": ["WAIT"]})
        assert (status, problem["code"]) == (503, "guest_misbehaved")


async def test_a_mistake_in_a_set_up_fails_its_job_and_gives_the_desktop_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*arguments: Any) -> None:
        raise RuntimeError("our mistake")

    async with serving() as served:
        monkeypatch.setattr(episodes, "run_steps", broken)
        job = await served.reset()
        assert (job["state"], job["error"]["code"]) == ("failed", "internal_error")
        await eventually(lambda: not served.sim.desktops)
        monkeypatch.undo()
        assert (await served.reset())["state"] == "succeeded"


async def test_a_failed_reset_leaves_an_empty_env_that_says_so() -> None:
    async with serving([Behaviour(), Behaviour(create_fails="no room")]) as served:
        await served.play()
        job = await served.reset()
        env = served.service.env(0)
        assert (env.state, env.episode, env.desktop) == ("empty", None, None)
        assert job["id"] in env.detail
        with pytest.raises(NoEpisode):
            await served.service.step(0, CLICKED)
        await eventually(lambda: not served.sim.desktops)


async def test_stampede_of_steps_runs_exactly_one_at_a_time() -> None:
    async with serving(Behaviour(answer_s=0.02)) as served:
        desktop = await served.play()
        results = await asyncio.gather(*(served.service.step(0, CLICKED) for _ in range(50)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, EnvdError)]
        assert {type(error) for error in refused} == {EnvBusy}
        assert len(desktop.inputs) == 50 - len(refused) == 1


async def test_resets_and_steps_in_a_jumble_leave_nothing_odd_behind() -> None:
    """Four clients that know nothing of each other, on one env."""
    known = (EnvBusy, NoEpisode, DesktopLost, EpisodeOver)
    async with serving() as served:

        async def client(number: int) -> list[object]:
            odd: list[object] = []
            for turn in range(6):
                if (turn + number) % 3 == 0:
                    job = await served.reset(task={"id": f"{number}-{turn}"})
                    odd += [job] if job["state"] not in ("succeeded", "superseded") else []
                try:
                    await served.service.step(0, CLICKED)
                except known:
                    pass
            return odd

        async with asyncio.timeout(60):
            assert await asyncio.gather(*(client(number) for number in range(4))) == [[]] * 4
        env = served.service.env(0)
        assert (env.state, env.job_id, env.waiting_job_id) == ("playing", None, None)
        assert env.desktop is not None
        await eventually(lambda: list(served.sim.desktops) == [env.desktop.id if env.desktop else ""])
