"""The boot queue against the sim driver: one boot at a time, joining, superseding, cancelling, inheriting, expiring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from envd.boot.queue import Beginning, Reset
from envd.drivers.sim import Behaviour, SimDriver, boots_in_flight_max
from envd.errors import Draining, QueueFull, UnknownJob
from envd.models import DesktopState, Job, JobKind, JobState, ResetPath
from envd.service import Service, open_service
from envd.settings import Settings
from envd.tasks.abilities import Abilities
from envd.tasks.schema import parse

SLOW = Behaviour(boot_s=0.2, cdp_s=0.2)
FOR_EVER = Behaviour(boot_s=3600, cdp_s=3600)


def reset(raw: dict[str, Any], **how: Any) -> Reset:
    return Reset(task=parse(raw, Abilities()), **how)


def task(name: str) -> Reset:
    return reset({"id": name, "instruction": name})


@asynccontextmanager
async def running(tmp_path: Path, *behaviours: Behaviour, **settings: Any) -> AsyncIterator[tuple[Service, SimDriver]]:
    """A service over a sim driver whose instances behave as listed, the last one for all that follow."""
    chosen = Settings(**{"provider": "sim", "state_dir": tmp_path, "settle_seconds": 0, **settings})
    driver = SimDriver(chosen, "test", behaviour=list(behaviours) or None)
    async with open_service(chosen, "test", driver) as service, asyncio.TaskGroup() as group:
        started = asyncio.Event()
        core = group.create_task(service.run(started.set))
        await started.wait()
        async with asyncio.timeout(30):
            yield service, driver
        core.cancel()
    assert driver.desktops == {}


async def ended(service: Service, job: Job) -> Job:
    async with asyncio.timeout(20):
        return await service.queue.ended(job.id)


async def removals(service: Service) -> None:
    """Return when every desktop that is being removed is gone."""
    async with asyncio.timeout(10):
        for desktop in service.fleet.desktops():
            if desktop.state is DesktopState.REMOVING:
                await service.fleet.gone(desktop.id)


async def in_state(service: Service, job: Job, state: JobState) -> Job:
    async with asyncio.timeout(20):
        while job.state is not state:
            assert not job.state.terminal, job
            job = await service.queue.changed(job.id, job.version, 20)
    return job


async def test_a_reset_goes_through_its_states_and_gives_an_episode(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW) as (service, _):
        job = service.queue.submit(0, task("a"))
        job = await ended(service, job)
        assert (job.state, job.error, job.reset_path) == (JobState.SUCCEEDED, None, ResetPath.COLD)
        assert [phase.name for phase in job.phases] == ["queue", "create", "probe", "set_up", "observe"]
        assert all(phase.seconds is not None for phase in job.phases)
        assert {probe.name: probe.passed for probe in job.probes} == {"screenshot": True, "chrome_cdp": True}
        env = service.env(0)
        assert env.episode is not None
        assert env.episode.id == job.episode_id


async def test_invariant_1_only_one_boot_is_in_flight_however_many_reset(tmp_path: Path) -> None:
    async with running(tmp_path, envs=8) as (service, driver):
        jobs = [service.queue.submit(number % 8, task(f"task {number}")) for number in range(100)]
        ends = [await ended(service, job) for job in jobs]
        assert boots_in_flight_max(driver.journal) == 1
        assert {end.state for end in ends} == {JobState.SUCCEEDED, JobState.SUPERSEDED}
        assert all(env.state == "playing" for env in service.all_envs())
        await removals(service)
        assert {env.desktop.id for env in service.all_envs() if env.desktop} == set(driver.desktops)


async def test_an_identical_reset_joins_the_one_that_waits_and_the_one_that_runs(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW) as (service, driver):
        first = service.queue.submit(0, task("a"))
        assert service.queue.submit(0, task("a")).id == first.id
        await in_state(service, first, JobState.BOOTING)
        assert service.queue.submit(0, task("a")).id == first.id
        end = await ended(service, first)
        assert (end.joined, end.state) == (2, JobState.SUCCEEDED)
        assert len([entry for entry in driver.journal if entry[1] == "create-begin"]) == 1


async def test_another_reset_replaces_the_one_that_waits_but_never_the_one_that_runs(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW) as (service, _):
        first = service.queue.submit(0, task("a"))
        await in_state(service, first, JobState.BOOTING)
        second = service.queue.submit(0, task("b"))
        third = service.queue.submit(0, task("c"))
        assert [(await ended(service, job)).state for job in (first, second, third)] == [
            JobState.SUCCEEDED,
            JobState.SUPERSEDED,
            JobState.SUCCEEDED,
        ]
        episode = service.env(0).episode
        assert episode is not None
        assert episode.task_id == "c"


async def test_who_replaces_a_waiting_reset_keeps_its_place_in_line(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW, envs=3) as (service, _):
        await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        service.queue.submit(1, task("b"))
        last = service.queue.submit(2, task("c"))
        changed = service.queue.submit(1, task("b2"))
        assert [(job.id, job.position, job.ahead) for job in service.queue.waiting()] == [
            (changed.id, 1, 1),
            (last.id, 2, 2),
        ]


async def test_position_and_eta_are_told_and_learned_from_earlier_boots(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW, envs=3) as (service, _):
        assert service.queue.submit(0, task("a")).eta_s is None
        await ended(service, service.queue.submit(0, task("a")))
        boot = service.queue.estimates.boot(ResetPath.COLD)
        assert boot is not None
        await in_state(service, service.queue.submit(0, task("b")), JobState.BOOTING)
        near, far = service.queue.submit(1, task("c")), service.queue.submit(2, task("d"))
        near, far = service.queue.get(near.id), service.queue.get(far.id)
        assert near.eta_s is not None
        assert far.eta_s is not None
        assert far.eta_s - near.eta_s == pytest.approx(boot, abs=0.15)


async def test_cancelling_a_waiting_job_ends_it_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW, envs=2) as (service, driver):
        first = service.queue.submit(0, task("a"))
        await in_state(service, first, JobState.BOOTING)
        waiting = service.queue.submit(1, task("b"))
        assert service.queue.cancel(waiting.id).state is JobState.CANCELLED
        assert (await ended(service, first)).state is JobState.SUCCEEDED
        assert len(driver.desktops) == 1


async def test_cancelling_a_boot_ends_only_when_its_instance_is_confirmed_gone(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(boot_s=3600, cdp_s=3600, destroy_fails=2)) as (service, driver):
        job = await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        service.queue.cancel(job.id)
        assert not service.queue.get(job.id).state.terminal
        assert service.queue.get(job.id).cancel_requested
        end = await ended(service, job)
        assert end.state is JobState.CANCELLED
        assert driver.desktops == {}
        assert service.queue.cancel(job.id) == end


async def test_cancelling_during_set_up_gives_the_desktop_back_and_ends(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, driver):
        long = reset({"id": "long", "config": [{"type": "sleep", "parameters": {"seconds": 600}}]})
        job = await in_state(service, service.queue.submit(0, long), JobState.SETTING_UP)
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        assert driver.desktops == {}
        assert service.env(0).state == "empty"


async def test_the_next_waiting_job_inherits_the_boot_of_a_cancelled_one(tmp_path: Path) -> None:
    async with running(tmp_path, SLOW, envs=2) as (service, driver):
        first = service.queue.submit(0, task("a"))
        await in_state(service, first, JobState.BOOTING)
        second = service.queue.submit(1, task("b"))
        assert service.queue.cancel(first.id).state is JobState.CANCELLED
        heir = service.queue.get(second.id)
        assert heir.state is JobState.BOOTING
        assert (await ended(service, second)).state is JobState.SUCCEEDED
        assert [entry[1] for entry in driver.journal].count("create-begin") == 1
        assert service.env(0).state == "empty"


async def test_a_waiting_job_expires_without_ever_being_booted(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, envs=2) as (service, driver):
        await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        impatient = reset({"id": "b"}, queue_timeout_s=0.05)
        end = await ended(service, service.queue.submit(1, impatient))
        assert end.state is JobState.EXPIRED
        assert end.error is not None
        assert end.error.code == "job_expired"
        assert len(driver.desktops) == 1


async def test_a_full_queue_refuses_with_when_to_come_back_and_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, envs=4, queue_limit=2) as (service, _):
        await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        before = [service.queue.submit(env, task("b")).id for env in (1, 2)]
        with pytest.raises(QueueFull) as refused:
            service.queue.submit(3, task("c"))
        assert refused.value.retry_after is not None
        assert service.queue.submit(2, task("other")).position in (None, 2)
        assert service.queue.waiting()[0].id == before[0]
        assert len(service.queue.waiting()) == 2


async def test_a_failed_boot_says_phase_seconds_probes_and_log(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, ready_timeout=0.3) as (service, driver):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.state is JobState.FAILED
        assert end.error is not None
        assert (end.error.code, end.error.fault, end.error.retryable) == ("boot_timeout", "infra", True)
        facts = end.error.model_extra or {}
        assert facts["phase"] == "probe"
        assert set(facts["phases"]) == {"create", "probe"}
        assert set(facts["probes"]) == {"screenshot", "chrome_cdp"}
        assert isinstance(facts["log"], list)
        assert driver.desktops == {}


async def test_an_instance_that_dies_while_it_boots_fails_the_job_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(boot_s=3600, cdp_s=3600, dies_after_s=0.05, dies_when="booting"), SLOW) as (
        service,
        _,
    ):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.error is not None
        assert end.error.code == "instance_died"
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED


async def test_a_failed_create_fails_the_job_and_the_next_one_boots(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(create_fails="no more room"), SLOW) as (service, driver):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.error is not None
        assert end.error.code == "boot_failed"
        assert "no more room" in end.error.detail
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        assert len(driver.desktops) == 1


async def test_a_job_whose_env_still_sets_up_does_not_hold_up_other_envs(tmp_path: Path) -> None:
    async with running(tmp_path, envs=2) as (service, _):
        long = reset({"id": "long", "config": [{"type": "sleep", "parameters": {"seconds": 600}}]})
        await in_state(service, service.queue.submit(0, long), JobState.SETTING_UP)
        behind = service.queue.submit(0, task("behind"))
        other = service.queue.submit(1, task("other"))
        assert (await ended(service, other)).state is JobState.SUCCEEDED
        assert service.queue.get(behind.id).state is JobState.QUEUED


async def test_a_prewarmed_desktop_serves_the_next_reset_without_a_boot(tmp_path: Path) -> None:
    async with running(tmp_path, prewarm=True) as (service, driver):
        (warm,) = service.queue.active()
        assert warm.kind is JobKind.PREWARM
        assert (await ended(service, warm)).state is JobState.SUCCEEDED
        assert (await ended(service, service.queue.submit_prewarm())).state is JobState.SUCCEEDED
        end = await ended(service, service.queue.submit(0, task("a")))
        assert (end.state, end.reset_path) == (JobState.SUCCEEDED, ResetPath.SPARE)
        assert [entry[1] for entry in driver.journal].count("create-begin") == 1


async def test_a_spare_that_dies_is_not_handed_out(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, driver):
        await ended(service, service.queue.submit_prewarm())
        (spare,) = service.fleet.desktops()
        driver.kill(spare.id, "pulled the plug")
        await service.fleet.gone(spare.id)
        end = await ended(service, service.queue.submit(0, task("a")))
        assert (end.state, end.reset_path) == (JobState.SUCCEEDED, ResetPath.COLD)


async def test_a_desktop_that_dies_is_reported_and_the_next_reset_works(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, driver):
        await ended(service, service.queue.submit(0, task("a")))
        (desktop,) = service.fleet.desktops()
        after = service.events.sequence_of(service.events.last_id) or 0
        driver.kill(desktop.id, "pulled the plug")
        async with asyncio.timeout(2):
            async for batch in service.events.follow(after):
                if batch and any(event.data.get("state") == "lost" for event in batch):
                    break
        env = service.env(0)
        assert (env.state, env.detail) == ("lost", "pulled the plug")
        assert (await ended(service, service.queue.submit(0, task("b")))).state is JobState.SUCCEEDED
        assert service.env(0).state == "playing"


async def test_chrome_going_away_and_coming_back_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, driver):
        await ended(service, service.queue.submit(0, task("a")))
        (desktop,) = service.fleet.desktops()
        after = service.events.sequence_of(service.events.last_id) or 0
        driver.stop_chrome(desktop.id)
        told: list[str] = []
        async with asyncio.timeout(5):
            async for batch in service.events.follow(after):
                told += [event.data["state"] for event in batch or () if event.kind == "desktop"]
                if told == ["chrome gone"]:
                    await service.fleet.guest(desktop).launch(["google-chrome"])
                if "chrome back" in told:
                    break
        assert told == ["chrome gone", "chrome back"]
        assert service.env(0).state == "playing"


async def test_chrome_is_started_in_a_guest_that_boots_without_it(tmp_path: Path) -> None:
    without_chrome = Behaviour(cdp_s=None)
    async with running(tmp_path, without_chrome, chrome_grace=0.05) as (service, _):
        job = service.queue.submit(0, task("a"))
        assert (await ended(service, job)).state is JobState.SUCCEEDED
        notes = [event.data["message"] for event in service.events.recent() if event.kind == "note"]
        assert any("starting Chrome and the socat bridge" in note for note in notes)


async def test_closing_refuses_new_work_and_ends_what_there_is(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, envs=2) as (service, _):
        booting = await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        waiting = service.queue.submit(1, task("b"))
        service.queue.close()
        with pytest.raises(Draining):
            service.queue.submit(0, task("c"))
        assert [(await ended(service, job)).state for job in (booting, waiting)] == [JobState.CANCELLED] * 2
        await service.queue.idle()


async def test_a_mistake_in_one_job_fails_that_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as (service, _):
        broken = service.envs.begin

        async def begin(job: Job, *rest: Any) -> Beginning:
            if job.task_id == "poison":
                raise ZeroDivisionError
            return await broken(job, *rest)

        monkeypatch.setattr(service.envs, "begin", begin)
        end = await ended(service, service.queue.submit(0, task("poison")))
        assert end.error is not None
        assert (end.state, end.error.code) == (JobState.FAILED, "internal_error")
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        await removals(service)
        assert [desktop.state for desktop in service.fleet.desktops()] == [DesktopState.IN_USE]


async def test_an_unknown_job_is_told_apart(tmp_path: Path) -> None:
    async with running(tmp_path) as (service, _):
        for call in (service.queue.get, service.queue.cancel):
            with pytest.raises(UnknownJob):
                call("job-nope")
