"""What drivers, guests and callers do at the worst moment: every job still ends once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import eventually
from test_queue import FOR_EVER, ended, in_state, removals, reset, task

from envd.boot import fleet as fleet_module
from envd.drivers.base import Death, InstanceSpec, Made, Report, Traits
from envd.drivers.sim import Behaviour, SimDriver, boots_in_flight_max
from envd.models import DesktopState, EnvState, Job, JobState
from envd.service import Service, open_service
from envd.settings import Settings

SLOW = Behaviour(boot_s=0.05, cdp_s=0.05)
LONG = reset({"id": "long", "config": [{"type": "sleep", "parameters": {"seconds": 600}}]})
Odd = Callable[[], BaseException]


def sim_settings(tmp_path: Path, **settings: Any) -> Settings:
    return Settings(**{"provider": "sim", "state_dir": tmp_path, "screen": (320, 240), **settings})


@pytest.fixture(autouse=True)
def quick_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "FIRST_PAUSE", 0.05)


@asynccontextmanager
async def running(
    tmp_path: Path, *behaviours: Behaviour, driver: SimDriver | None = None, leaves: bool = False, **settings: Any
) -> AsyncIterator[tuple[Service, SimDriver]]:
    """A service over `driver`, else over sim desktops that behave as listed. In the end nothing is left, unless it
    `leaves` something."""
    chosen = sim_settings(tmp_path, **settings)
    driver = driver or SimDriver(chosen, "test", behaviours or None)
    async with open_service(chosen, "test", driver) as service, asyncio.TaskGroup() as group:
        started = asyncio.Event()
        core = group.create_task(service.run(started.set))
        await started.wait()
        async with asyncio.timeout(30):
            yield service, driver
        core.cancel()
        await asyncio.wait({core})
        assert leaves or (driver.desktops, service.fleet.desktops()) == ({}, ())


def most_alive(driver: SimDriver) -> int:
    """The most instances that existed at once."""
    alive: set[str] = set()
    most = 0
    for entry in driver.journal:
        if entry.verb == "create-begin":
            alive.add(entry.id)
        elif entry.verb == "destroy-end":
            alive.discard(entry.id)
        most = max(most, len(alive))
    return most


def facts(job: Job) -> dict[str, Any]:
    assert job.error is not None
    return job.error.model_extra or {}


async def still_works(service: Service, driver: SimDriver, env: int = 0) -> None:
    """The next reset gives an episode, one boot at a time, and no desktop is left over."""
    end = await ended(service, service.queue.submit(env, task("afterwards")))
    assert end.state is JobState.SUCCEEDED, end
    await removals(service)
    assert set(driver.desktops) == {env.desktop.id for env in service.all_envs() if env.desktop}
    assert boots_in_flight_max(driver.journal) == 1


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: OSError(28, "No space left on device"), id="OSError"),
        pytest.param(lambda: TimeoutError("the provider's API took too long"), id="TimeoutError"),
        pytest.param(lambda: ExceptionGroup("several", [OSError("one"), ValueError("two")]), id="ExceptionGroup"),
        pytest.param(lambda: asyncio.CancelledError("a task of the driver's was cancelled"), id="CancelledError"),
    ],
)
@pytest.mark.parametrize("slow_removal", [pytest.param(2, id="slow removal"), pytest.param(0, id="quick removal")])
async def test_whatever_create_raises_is_a_failed_boot_that_holds_the_slot_until_it_is_gone(
    tmp_path: Path, odd: Odd, slow_removal: int
) -> None:
    class Broken(SimDriver):
        async def create(self, spec: InstanceSpec, report: Report) -> Made:
            made = await super().create(spec, report)
            if len(self.journal) == 2:
                raise odd()
            return made

    driver = Broken(sim_settings(tmp_path), "test", [Behaviour(destroy_fails=slow_removal), SLOW])
    async with running(tmp_path, driver=driver, envs=2) as (service, _):
        first, second = service.queue.submit(0, task("a")), service.queue.submit(1, task("b"))
        end = await ended(service, first)
        assert end.error is not None
        assert (end.state, end.error.code, facts(end)["phase"]) == (JobState.FAILED, "boot_failed", "create")
        assert (await ended(service, second)).state is JobState.SUCCEEDED
        begun = [entry[1] for entry in driver.journal]
        assert begun.index("destroy-end") < begun.index("create-begin", 1)
        await still_works(service, driver)


async def test_a_driver_that_hangs_where_its_log_is_does_not_hold_up_the_job_for_long(tmp_path: Path) -> None:
    class Mute(SimDriver):
        async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
            await asyncio.sleep(3600)
            return ()

    driver = Mute(sim_settings(tmp_path), "test", [Behaviour(create_fails="no room"), SLOW])
    async with running(tmp_path, driver=driver) as (service, _):
        began = asyncio.get_running_loop().time()
        end = await ended(service, service.queue.submit(0, task("a")))
        assert (end.state, facts(end)["log"]) == (JobState.FAILED, [])
        assert asyncio.get_running_loop().time() - began < 4
        await still_works(service, driver)


async def test_a_log_that_cannot_be_read_changes_nothing_about_the_failure(tmp_path: Path) -> None:
    class Forgetful(SimDriver):
        async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
            raise OSError(5, "Input/output error")

    driver = Forgetful(sim_settings(tmp_path), "test", [Behaviour(create_fails="no room"), SLOW])
    async with running(tmp_path, driver=driver) as (service, _):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.error is not None
        assert (end.error.code, facts(end)["log"]) == ("boot_failed", [])
        await still_works(service, driver)


async def test_the_log_of_a_failed_boot_is_read_before_its_instance_is_removed(tmp_path: Path) -> None:
    class Slow(SimDriver):
        async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
            await asyncio.sleep(0.05)
            return await super().log_tail(instance_id, lines)

    driver = Slow(sim_settings(tmp_path), "test", [Behaviour(create_fails="no room"), SLOW])
    async with running(tmp_path, driver=driver) as (service, _):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert facts(end)["log"] == ["died: no room"]


async def test_an_instance_whose_watch_keeps_failing_boots_and_its_death_is_still_seen(tmp_path: Path) -> None:
    class Blind(SimDriver):
        asked = 0

        async def wait(self, instance_id: str) -> Death:
            self.asked += 1
            if self.asked == 2:
                raise asyncio.CancelledError("a task of the driver's was cancelled")
            if self.asked % 2:
                raise ConnectionResetError("the provider's API is away")
            return await super().wait(instance_id)

    driver = Blind(sim_settings(tmp_path), "test", SLOW)
    async with running(tmp_path, driver=driver) as (service, _):
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        (desktop,) = service.fleet.desktops()
        driver.kill(desktop.id, "pulled the plug")
        await eventually(lambda: service.env(0).state is EnvState.LOST)
        await still_works(service, driver)


async def test_a_driver_that_declares_a_living_instance_dead_fails_that_boot_alone(tmp_path: Path) -> None:
    class Liar(SimDriver):
        lies = 1

        async def wait(self, instance_id: str) -> Death:
            if self.lies:
                self.lies -= 1
                return Death("so I was told", 137)
            return await super().wait(instance_id)

    driver = Liar(sim_settings(tmp_path), "test", SLOW)
    async with running(tmp_path, driver=driver) as (service, _):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.error is not None
        assert (end.error.code, facts(end)["exit_code"]) == ("instance_died", 137)
        await still_works(service, driver)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: OSError(16, "Device or resource busy"), id="OSError"),
        pytest.param(lambda: TimeoutError(), id="TimeoutError"),
        pytest.param(lambda: asyncio.CancelledError(), id="CancelledError"),
    ],
)
async def test_a_removal_is_never_given_up_whatever_destroy_raises(tmp_path: Path, odd: Odd) -> None:
    class Stubborn(SimDriver):
        refusals = 2

        async def destroy(self, instance_id: str) -> None:
            if self.refusals:
                self.refusals -= 1
                raise odd()
            await super().destroy(instance_id)

    driver = Stubborn(sim_settings(tmp_path), "test", [FOR_EVER, SLOW])
    async with running(tmp_path, driver=driver) as (service, _):
        job = await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        await eventually(lambda: bool(driver.desktops))
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        assert driver.desktops == {}
        await still_works(service, driver)


async def test_what_an_earlier_life_left_is_removed_however_often_that_fails_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "SWEEP", 0.1)
    driver = SimDriver(sim_settings(tmp_path), "test", [Behaviour(destroy_fails=2), SLOW])
    await driver.create(InstanceSpec("envd-test-left", (320, 240)), Report())
    async with running(tmp_path, driver=driver) as (service, _):
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        await service.fleet.gone("envd-test-left")
        assert set(driver.desktops) == {desktop.id for desktop in service.fleet.desktops()}
        assert len(driver.desktops) == 1


async def test_a_create_that_ignores_cancellation_keeps_the_slot_and_leaves_nothing(tmp_path: Path) -> None:
    class Deaf(SimDriver):
        async def create(self, spec: InstanceSpec, report: Report) -> Made:
            making = asyncio.ensure_future(super().create(spec, report))
            while not making.done():
                try:
                    await asyncio.wait({making})
                except asyncio.CancelledError:
                    continue
            return making.result()

    driver = Deaf(sim_settings(tmp_path), "test", [Behaviour(create_s=0.2), SLOW])
    async with running(tmp_path, driver=driver, envs=2) as (service, _):
        first = await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        await eventually(lambda: bool(driver.desktops))
        service.queue.cancel(first.id)
        second = service.queue.submit(1, task("b"))
        assert service.queue.cancel(first.id).cancel_requested
        assert (await ended(service, first)).state is JobState.CANCELLED
        assert (await ended(service, second)).state is JobState.SUCCEEDED
        await still_works(service, driver)


@pytest.mark.parametrize("phase", ["create", "probe"])
async def test_a_boot_that_takes_too_long_says_in_which_phase(tmp_path: Path, phase: str) -> None:
    slow = Behaviour(create_s=3600) if phase == "create" else Behaviour(refuse=True)
    async with running(tmp_path, slow, SLOW, ready_timeout=0.6) as (service, driver):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.error is not None
        assert (end.error.code, facts(end)["phase"]) == ("boot_timeout", phase)
        await still_works(service, driver)


async def test_a_cancel_while_a_failed_boot_is_cleared_away_hands_its_failure_to_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(create_fails="no room", destroy_fails=2), SLOW, envs=2) as (service, driver):
        first, second = service.queue.submit(0, task("a")), service.queue.submit(1, task("b"))
        await eventually(lambda: any(desktop.state is DesktopState.REMOVING for desktop in service.fleet.desktops()))
        service.queue.cancel(first.id)
        assert service.queue.get(second.id).state is JobState.QUEUED
        assert (await ended(service, first)).state is JobState.CANCELLED
        assert (await ended(service, second)).state is JobState.SUCCEEDED
        await still_works(service, driver)


async def test_an_heir_of_the_same_env_and_an_heir_that_is_cancelled_too(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW, envs=2) as (service, driver):
        first = service.queue.submit(0, task("a"))
        await eventually(lambda: bool(driver.desktops))
        same_env, other_env = service.queue.submit(0, task("b")), service.queue.submit(1, task("c"))
        for job in (first, same_env):
            assert service.queue.cancel(job.id).state is JobState.CANCELLED
            assert service.queue.cancel(job.id).state is JobState.CANCELLED
        assert (await ended(service, other_env)).state is JobState.SUCCEEDED
        assert [entry.verb for entry in driver.journal].count("create-begin") == 1
        assert service.env(0).state is EnvState.EMPTY
        await still_works(service, driver)


async def test_a_cancelled_prewarm_ends_cancelled_or_leaves_its_boot_to_a_reset(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW) as (service, driver):
        alone = await in_state(service, service.queue.submit_prewarm(), JobState.BOOTING)
        service.queue.cancel(alone.id)
        assert (await ended(service, alone)).state is JobState.CANCELLED
        assert service.fleet.spares == 0
        warm = service.queue.submit_prewarm()
        await eventually(lambda: bool(driver.desktops))
        reset = service.queue.submit(0, task("a"))
        assert service.queue.cancel(warm.id).state is JobState.CANCELLED
        end = await ended(service, reset)
        assert (end.state, end.reset_path) == (JobState.SUCCEEDED, "cold")
        await still_works(service, driver)


async def test_a_reset_that_a_cancel_overtakes_before_it_begins_leaves_the_episode_alone(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW) as (service, driver):
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        before = service.env(0)
        job = service.queue.submit(0, task("b"))
        await in_state(service, job, JobState.BOOTING)
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        assert service.env(0).episode == before.episode
        assert len(driver.journal) == 3


async def test_a_desktop_that_dies_at_the_last_moment_of_its_set_up_fails_the_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as (service, driver):
        look = service.envs.at_rest

        async def look_and_die(guest: Any, **how: Any) -> Any:
            seen = await look(guest, **how)
            (desktop,) = service.fleet.desktops()
            driver.kill(desktop.id, "pulled the plug")
            await service.fleet.lost(desktop.id)
            return seen

        monkeypatch.setattr(service.envs, "at_rest", look_and_die)
        end = await ended(service, service.queue.submit(0, task("a")))
        monkeypatch.undo()
        assert end.error is not None
        assert (end.state, end.error.code) == (JobState.FAILED, "desktop_lost")
        assert service.env(0).state is EnvState.EMPTY
        await still_works(service, driver)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: ZeroDivisionError(), id="mistake"),
        pytest.param(lambda: asyncio.CancelledError("leaked by a library"), id="leaked cancellation"),
    ],
)
async def test_a_set_up_that_breaks_ends_its_job_and_gives_the_desktop_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: Odd
) -> None:
    async with running(tmp_path) as (service, driver):

        async def broken(guest: Any, **how: Any) -> Any:
            raise odd()

        monkeypatch.setattr(service.envs, "at_rest", broken)
        end = await ended(service, service.queue.submit(0, task("a")))
        monkeypatch.undo()
        assert end.error is not None
        assert (end.state, end.error.code) == (JobState.FAILED, "internal_error")
        await still_works(service, driver)


async def test_a_provider_without_room_for_two_boots_only_when_the_old_desktop_is_gone(tmp_path: Path) -> None:
    class Cramped(SimDriver):
        traits = Traits(make_before_break=False, probe_interval_s=0.01)

    driver = Cramped(sim_settings(tmp_path), "test", [Behaviour(destroy_fails=1), SLOW])
    async with running(tmp_path, driver=driver, envs=2) as (service, _):
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        cancelled = await in_state(service, service.queue.submit(0, task("b")), JobState.BOOTING)
        await eventually(lambda: service.env(0).state is EnvState.RESETTING)
        service.queue.cancel(cancelled.id)
        assert (await ended(service, cancelled)).state is JobState.CANCELLED
        assert (await ended(service, service.queue.submit(0, task("c")))).state is JobState.SUCCEEDED
        assert most_alive(driver) == 1
        await still_works(service, driver)


async def test_a_wide_provider_boots_several_at_once_and_never_more_than_its_width(tmp_path: Path) -> None:
    class Wide(SimDriver):
        traits = Traits(boot_width=4, probe_interval_s=0.01)

    driver = Wide(sim_settings(tmp_path), "test", Behaviour(boot_s=0.1, cdp_s=0.1))
    async with running(tmp_path, driver=driver, envs=12) as (service, _):
        jobs = [service.queue.submit(env, task("a")) for env in range(12)]
        assert {(await ended(service, job)).state for job in jobs} == {JobState.SUCCEEDED}
        assert boots_in_flight_max(driver.journal) == 4


async def test_the_daemon_ends_whatever_it_is_in_the_middle_of_and_leaves_nothing(tmp_path: Path) -> None:
    """Cancelled after one turn of the loop, after two, and so on: at every await there is."""
    for turns in (*range(60), *range(60, 400, 20)):
        async with running(tmp_path, envs=2, prewarm=True) as (service, _):
            service.queue.submit(0, task("a"))
            service.queue.cancel(service.queue.submit(1, LONG).id)
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_a_drain_does_not_wait_for_a_removal_that_hangs(tmp_path: Path) -> None:
    driver = SimDriver(sim_settings(tmp_path), "test", Behaviour(boot_s=3600, destroy_s=3600))
    loop = asyncio.get_running_loop()
    async with running(tmp_path, driver=driver, leaves=True) as (service, _):
        await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        await eventually(lambda: bool(driver.desktops))
        began = loop.time()
        await service.drain()
    assert loop.time() - began < 5
    assert len(service.fleet.desktops()) == 1


async def test_a_queue_of_a_thousand_is_closed_and_forgotten_without_stopping_the_loop(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, envs=1000) as (service, _):
        jobs = [service.queue.submit(env, task("a")) for env in range(1000)]
        await in_state(service, jobs[0], JobState.BOOTING)
        before = service.events.last
        service.queue.close()
        await service.queue.idle()
        assert service.events.last - before < 2100
        assert {service.queue.get(job.id).state for job in jobs} == {JobState.CANCELLED}
        assert service.queue.active() == service.queue.waiting() == service.queue.booting() == ()


async def test_resets_leave_no_task_and_no_open_file_behind(tmp_path: Path) -> None:
    async with running(tmp_path, envs=2) as (service, driver):

        async def open_things() -> tuple[int, int]:
            await asyncio.gather(*(ended(service, service.queue.submit(env, task("a"))) for env in range(2)))
            await removals(service)
            await asyncio.sleep(0.1)  # for the desktops' own ends of the connections that the probes made
            return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

        await open_things()
        tasks, files = await open_things()
        for _ in range(5):
            now = await open_things()
        assert now[0] <= tasks + 2
        assert now[1] <= files + 4
        assert len(driver.desktops) == 2
