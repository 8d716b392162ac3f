"""Restores beside the boot, waiting for room, and warm spares, over sim desktops that are cloned."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import eventually
from test_boot_faults import running, sim_settings
from test_queue import FOR_EVER, ended, in_state, removals, reset, task

from envd.boot import fleet as fleet_module
from envd.boot import probes as probes_module
from envd.drivers.base import Traits
from envd.drivers.sim import Behaviour, SimDriver, boots_in_flight_max, restores_in_flight_max
from envd.drivers.sim.driver import Verb
from envd.errors import QueueFull
from envd.models import Desktop, DesktopState, Job, JobKind, JobState, ResetPath
from envd.service import Service

CLONED = Behaviour(boot_s=0.1, cdp_s=0.1, restore_s=0.02)
SLOW_CLONES = Behaviour(restore_s=0.3)


def created(driver: SimDriver, verb: Verb = "create-begin") -> int:
    return [entry.verb for entry in driver.journal].count(verb)


def told(service: Service, kind: str = "note") -> list[str]:
    return [event.data["message"] for event in service.events.recent() if event.kind == kind]


def refills(service: Service) -> list[Job]:
    return [job for job in service.queue.active() if job.kind is JobKind.SPARE]


def spare(service: Service) -> Desktop:
    return next(one for one in service.fleet.desktops() if one.state is DesktopState.READY and one.env is None)


def remembered(tmp_path: Path) -> dict[str, int]:
    """How many boots of each path are kept for later lives."""
    try:
        kept = json.loads((tmp_path / "boots.json").read_text())["sim"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {path: len(seen) for path, seen in kept.items()}


async def with_spares(service: Service, number: int = 1) -> None:
    """Return when so many spares stand by, and no other is being made."""
    await eventually(lambda: service.fleet.spares == number and not refills(service))


# Restores


async def test_invariant_1_twelve_resets_are_one_boot_and_never_more_than_three_restores(tmp_path: Path) -> None:
    async with running(tmp_path, CLONED, envs=12, clone_width=3) as (service, driver):
        jobs = [service.queue.submit(env, task("a")) for env in range(12)]
        ends = [await ended(service, job) for job in jobs]
        assert {(end.state, end.reset_path) for end in ends} == {(JobState.SUCCEEDED, ResetPath.RESTORE)}
        assert (created(driver), created(driver, "clone-begin")) == (1, 12)
        assert (boots_in_flight_max(driver.journal), restores_in_flight_max(driver.journal)) == (1, 3)
        assert [job.id for job in jobs] == [end.id for end in sorted(ends, key=lambda end: end.started_at or 0)]


async def test_a_restore_is_ready_by_its_frame_and_one_answer_and_the_template_by_its_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "CLONE_TRY", 15.0)  # on a loaded machine too
    async with running(tmp_path, CLONED) as (service, driver):
        end = await ended(service, service.queue.submit(0, task("a")))
        probed = {probe.name: probe for probe in end.probes}
        shot, cdp = probed["screenshot"], probed["chrome_cdp"]
        assert shot.detail.startswith("frame from outside, guest answered in")
        assert (cdp.passed, cdp.attempts) == (True, 1)
        (desktop,) = driver.desktops.values()
        assert (desktop.requests["/platform"], desktop.requests["/devtools/browser"]) == (1, 0)
        names = [phase.name for phase in end.phases]
        assert names == ["queue", "create", "template", "clone", "probe", "set_up", "observe"]
        template = next(phase.seconds for phase in end.phases if phase.name == "template")
        assert template is not None
        assert template > 0.1


async def test_a_restore_that_becomes_a_boot_says_so_and_no_other_boot_runs_beside_it(tmp_path: Path) -> None:
    failing = Behaviour(boot_s=0.1, cdp_s=0.1, restore_s=0.01, restore_fails=4)
    async with running(tmp_path, failing, envs=6, clone_width=3) as (service, driver):
        ends = [await ended(service, job) for job in [service.queue.submit(env, task("a")) for env in range(6)]]
        assert [end.reset_path for end in ends].count(ResetPath.COLD) == 4
        assert [end.reset_path for end in ends].count(ResetPath.RESTORE) == 2
        assert boots_in_flight_max(driver.journal) == 1
        assert sum("the desktop is booted instead" in words for words in told(service)) == 4


async def test_a_restored_machine_that_dies_is_made_again_once(tmp_path: Path) -> None:
    dying = Behaviour(restore_s=0.0, dies_after_s=0.0, dies_when="booting")
    async with running(tmp_path, SLOW_CLONES, dying, SLOW_CLONES) as (service, _):
        await ended(service, service.queue.submit(0, task("a")))
        end = await ended(service, service.queue.submit(0, task("b")))
        assert (end.state, end.reset_path) == (JobState.SUCCEEDED, ResetPath.RESTORE)
        assert any("A restored machine did not come up" in words for words in told(service))
    async with running(tmp_path, SLOW_CLONES, dying) as (service, driver):
        await ended(service, service.queue.submit(0, task("a")))
        end = await ended(service, service.queue.submit(0, task("b")))
        assert end.error is not None
        assert (end.error.code, created(driver, "clone-begin")) == ("instance_died", 3)


async def test_a_restored_machine_that_never_answers_is_given_up_long_before_a_boot_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "RESTORED_LIMIT", 0.2)
    silent = Behaviour(restore_s=0.0, never=True)
    async with running(tmp_path, SLOW_CLONES, silent) as (service, _):
        await ended(service, service.queue.submit(0, task("a")))
        end = await ended(service, service.queue.submit(0, task("b")))
        assert end.error is not None
        assert (end.error.code, "had been ready when it was saved" in end.error.detail) == ("boot_failed", True)


async def test_what_a_boot_takes_is_remembered_by_path_and_image_over_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path, CLONED) as (service, _):
        for name in "abc":
            await ended(service, service.queue.submit(0, task(name)))
        cold, restore = (service.queue.estimates.boot(path) for path in (ResetPath.COLD, ResetPath.RESTORE))
        assert cold is not None
        assert restore is not None
        assert restore < cold
        await eventually(lambda: remembered(tmp_path) == {"cold": 1, "restore": 2})
    async with running(tmp_path, CLONED, envs=2) as (service, _):
        job = service.queue.submit(0, task("a"))
        assert service.queue.get(job.id).eta_s == pytest.approx(cold, abs=0.2)
        await ended(service, job)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[1, 2]", id="a list"),
        pytest.param('{"sim": {"cold": ["soon", -1, NaN], "warm": [1]}, "x": 3}', id="other values"),
        pytest.param("{", id="cut short"),
    ],
)
async def test_a_memory_of_boots_that_makes_no_sense_costs_an_eta_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "boots.json").write_text(content)
    async with running(tmp_path) as (service, _):
        assert service.queue.estimates.boot(ResetPath.COLD) is None
        assert (await ended(service, service.queue.submit(0, task("a")))).state is JobState.SUCCEEDED
        await eventually(lambda: remembered(tmp_path) == {"cold": 1})


# Room


async def test_a_wait_for_room_is_a_phase_of_its_own_that_says_for_what_and_is_not_boot_time(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(admit_s=0.4), ready_timeout=0.3) as (service, _):
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.state is JobState.SUCCEEDED, end
        assert [phase.name for phase in end.phases][:4] == ["queue", "admit", "create", "probe"]
        assert end.phases[1].seconds == pytest.approx(0.4, abs=0.2)
        assert "waiting for room: in 0.4 s there is some" in told(service, "progress")


async def test_a_wait_for_room_can_be_cancelled_and_expires_without_a_boot(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(admit_s=3600), envs=2) as (service, driver):
        cancelled = service.queue.submit(0, task("a"))
        await eventually(lambda: service.queue.get(cancelled.id).phase == "admit")
        service.queue.cancel(cancelled.id)
        assert (await ended(service, cancelled)).state is JobState.CANCELLED
        end = await ended(service, service.queue.submit(1, reset({"id": "b"}, queue_timeout_s=0.1)))
        assert end.error is not None
        assert (end.state, end.error.code) == (JobState.EXPIRED, "job_expired")
        assert "waiting for room" in end.error.hint
        assert (created(driver), service.env(1).state) == (0, "empty")


async def test_who_inherits_a_wait_for_room_waits_as_long_as_it_may_itself(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(admit_s=3600), envs=2) as (service, _):
        patient = service.queue.submit(0, task("a"))
        await eventually(lambda: service.queue.get(patient.id).phase == "admit")
        heir = service.queue.submit(1, reset({"id": "b"}, queue_timeout_s=0.5))
        service.queue.cancel(patient.id)
        assert (service.queue.get(heir.id).state, service.queue.get(heir.id).phase) == (JobState.BOOTING, "admit")
        assert (await ended(service, heir)).state is JobState.EXPIRED


# Spares


async def test_spares_are_kept_beyond_those_in_use_and_a_reset_takes_the_oldest(tmp_path: Path) -> None:
    async with running(tmp_path, CLONED, spares=2, envs=2) as (service, driver):
        await with_spares(service, 2)
        oldest = spare(service)
        end = await ended(service, service.queue.submit(0, task("a")))
        assert (end.reset_path, end.desktop_id) == (ResetPath.SPARE, oldest.id)
        await with_spares(service, 2)
        assert len(driver.desktops) == 3
        assert service.queue_view()["spares_wanted"] == 2


async def test_a_refill_stands_behind_every_reset_and_takes_no_place_in_the_queue(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, spares=1, envs=4, queue_limit=2) as (service, _):
        await eventually(lambda: [job.kind for job in service.queue.booting()] == [JobKind.SPARE])
        first = service.queue.submit(0, task("a"))
        await in_state(service, first, JobState.BOOTING)
        await eventually(lambda: len(refills(service)) == 1)
        waiting = [service.queue.submit(env, task("b")) for env in (1, 2)]
        assert [job.id for job in service.queue.waiting()] == [*(job.id for job in waiting), refills(service)[0].id]
        with pytest.raises(QueueFull):
            service.queue.submit(3, task("c"))
        assert service.not_ready() == ["the queue is full: 2 jobs wait"]


async def test_a_reset_takes_over_the_boot_of_a_spare_instead_of_waiting_for_another(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(boot_s=0.3, cdp_s=0.3), spares=1) as (service, driver):
        await eventually(lambda: len(driver.desktops) == 1)
        (refill,) = refills(service)
        job = service.queue.submit(0, task("a"))
        taken = await ended(service, refill)
        assert (taken.state, taken.superseded_by) == (JobState.SUPERSEDED, job.id)
        end = await ended(service, job)
        assert (end.state, end.reset_path, created(driver)) == (JobState.SUCCEEDED, ResetPath.COLD, 2)
        assert any("inherited a boot that was under way for a spare" in words for words in told(service))
        await with_spares(service)
        assert boots_in_flight_max(driver.journal) == 1


async def test_a_reset_whose_boot_is_cancelled_leaves_it_to_a_spare(tmp_path: Path) -> None:
    async with running(tmp_path, Behaviour(boot_s=0.3, cdp_s=0.3), spares=1) as (service, driver):
        await eventually(lambda: len(driver.desktops) == 1)
        job = await in_state(service, service.queue.submit(0, task("a")), JobState.BOOTING)
        await eventually(lambda: bool(refills(service)))
        assert service.queue.cancel(job.id).state is JobState.CANCELLED
        await with_spares(service)
        assert created(driver) == 1


@pytest.mark.parametrize("way", ["death", "chrome", "guest"])
async def test_a_spare_that_falls_ill_while_it_waits_is_replaced(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "GUEST_LOOKS", 0.05)
    async with running(tmp_path, spares=1) as (service, driver):
        await with_spares(service)
        ill = spare(service)
        if way == "death":
            driver.kill(ill.id, "pulled the plug")
        elif way == "chrome":
            driver.stop_chrome(ill.id)
        else:
            driver.desktops[ill.id].behaviour = Behaviour(spoil="/platform", bad=("error",))
        await service.fleet.gone(ill.id)
        await with_spares(service)
        assert ill.id not in driver.desktops
        assert sum("A spare was lost" in words for words in told(service)) == 1


async def test_a_spare_whose_guest_is_merely_slow_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "GUEST_LOOKS", 0.01)
    monkeypatch.setattr(fleet_module, "LOOK", 0.05)
    async with running(tmp_path, spares=1) as (service, driver):
        await with_spares(service)
        (desktop,) = driver.desktops.values()
        desktop.behaviour = Behaviour(hang="/platform")
        before = desktop.requests["/platform"]
        await eventually(lambda: desktop.requests["/platform"] >= before + 3)
        desktop.behaviour = Behaviour()
        await eventually(lambda: desktop.requests["/platform"] >= before + 6)
        assert (service.fleet.spares, list(driver.desktops)) == (1, [desktop.id])


@pytest.mark.parametrize("way", ["chrome", "guest", "death"])
async def test_a_spare_that_has_just_fallen_ill_is_never_handed_out(tmp_path: Path, way: str) -> None:
    class Unobservant(SimDriver):
        traits = Traits(probe_interval_s=0.01, monitor_interval_s=3600)

    driver = Unobservant(sim_settings(tmp_path), "test", Behaviour())
    async with running(tmp_path, driver=driver, spares=1) as (service, _):
        await with_spares(service)
        ill = spare(service)
        if way == "chrome":
            driver.stop_chrome(ill.id)
        elif way == "guest":
            driver.desktops[ill.id].behaviour = Behaviour(spoil="*", bad=("error",))
        else:
            driver.kill(ill.id)
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.state is JobState.SUCCEEDED
        assert end.desktop_id != ill.id
        assert end.attempts == 1
        await service.fleet.gone(ill.id)


async def test_a_reset_that_is_cancelled_while_its_spare_is_looked_at_leaves_its_env_alone(tmp_path: Path) -> None:
    async with running(tmp_path, spares=1) as (service, driver):
        await with_spares(service)
        await ended(service, service.queue.submit(0, task("a")))
        await with_spares(service)
        before, standing_by = service.env(0), spare(service)
        driver.desktops[standing_by.id].behaviour = Behaviour(hang="*")
        job = await in_state(service, service.queue.submit(0, task("b")), JobState.BOOTING)
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        assert service.env(0).episode == before.episode
        assert standing_by.id not in driver.desktops


async def test_spares_that_cannot_be_made_are_tried_again_ever_later_and_each_failure_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envd.boot.spares.random.uniform", lambda low, high: 0.05)
    failing = Behaviour(create_fails="no more room")
    async with running(tmp_path, failing, failing, failing, Behaviour(), spares=1) as (service, driver):
        await with_spares(service)
        words = [one for one in told(service) if "No spare came of" in one]
        assert (len(words), created(driver)) == (3, 4)
        assert all("no more room" in one for one in words)
        begun = [entry.at for entry in driver.journal if entry.verb == "create-begin"]
        pauses = [later - earlier for earlier, later in pairwise(begun)]
        assert pauses[0] > 0.05
        assert pauses[1] > 0.1
        assert pauses[2] > 0.2


async def test_a_provider_without_room_makes_spares_when_nothing_is_being_removed(tmp_path: Path) -> None:
    class Cramped(SimDriver):
        traits = Traits(make_before_break=False, probe_interval_s=0.01)

    driver = Cramped(sim_settings(tmp_path), "test", Behaviour(destroy_s=0.2))
    async with running(tmp_path, driver=driver, spares=1) as (service, _):
        await with_spares(service)
        for name in "ab":
            await ended(service, service.queue.submit(0, task(name)))
            await with_spares(service)
        await removals(service)
        journal = [entry.verb for entry in driver.journal]
        removed = journal.index("destroy-begin")
        assert "create-begin" not in journal[removed : journal.index("destroy-end")]


async def test_a_spare_waits_for_room_and_a_reset_does_not_wait_behind_it(tmp_path: Path) -> None:
    waits = Behaviour(admit_s=0.5)
    async with running(tmp_path, waits, spares=1) as (service, _):
        await eventually(lambda: [job.phase for job in service.queue.booting()] == ["admit"])
        job = service.queue.submit(0, task("a"))
        inherited = await in_state(service, job, JobState.BOOTING)
        assert inherited.phase == "admit"
        assert (await ended(service, job)).state is JobState.SUCCEEDED
        await with_spares(service)


async def test_a_drain_ends_refills_and_asks_for_no_more(tmp_path: Path) -> None:
    async with running(tmp_path, FOR_EVER, spares=3) as (service, _):
        await eventually(lambda: len(refills(service)) == 1)
        async with asyncio.timeout(5):
            await service.drain()
            await service.queue.idle()
        assert service.queue.active() == ()


async def test_a_first_desktop_at_start_counts_as_a_spare(tmp_path: Path) -> None:
    async with running(tmp_path, CLONED, spares=1, prewarm=True) as (service, driver):
        await with_spares(service)
        kinds: list[Any] = [event.job.kind for event in service.events.recent() if event.job]
        assert JobKind.PREWARM in kinds
        await eventually(lambda: not service.queue.active())
        assert len(driver.desktops) == 1
