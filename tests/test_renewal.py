"""Desktops that are made of the one before, and spares that sleep while they wait, over sim desktops that can do so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
from serving import eventually
from test_boot_faults import running, sim_settings
from test_queue import FOR_EVER, ended, in_state, task
from test_spares import created, spare, told, with_spares

from envd.drivers.base import InstanceSpec, Made, Report
from envd.drivers.sim import Behaviour, SimDriver
from envd.errors import BootFailed
from envd.models import DesktopState, JobState, ResetPath
from envd.service import Service

RENEWS = Behaviour(renews=True)
PARKS = Behaviour(parks=True)


def ids(service: Service) -> set[str]:
    return {desktop.id for desktop in service.fleet.desktops()}


# Renewing


async def test_a_reset_renews_the_desktop_that_the_env_had(tmp_path: Path) -> None:
    async with running(tmp_path, RENEWS) as (service, driver):
        first = await ended(service, service.queue.submit(0, task("a")))
        second = await ended(service, service.queue.submit(0, task("b")))
        assert second.state is JobState.SUCCEEDED
        assert "renew" in [phase.name for phase in second.phases]
        assert [entry.id for entry in driver.journal if entry.verb == "renew"] == [first.desktop_id]
        await eventually(lambda: ids(service) == {second.desktop_id})
        assert set(driver.desktops) == {second.desktop_id}
        assert not any("lost" in words for words in told(service, "desktop"))


async def test_a_desktop_that_died_is_not_renewed(tmp_path: Path) -> None:
    async with running(tmp_path, RENEWS) as (service, driver):
        first = await ended(service, service.queue.submit(0, task("a")))
        assert first.desktop_id is not None
        driver.kill(first.desktop_id)
        await eventually(lambda: not ids(service))
        assert (await ended(service, service.queue.submit(0, task("b")))).state is JobState.SUCCEEDED
        assert created(driver, "renew") == 0


async def test_a_renewal_that_fails_fails_the_reset_and_leaves_nothing(tmp_path: Path) -> None:
    class Breaking(SimDriver):
        async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
            self.desktops[spec.id] = self.desktops.pop(instance_id)
            raise BootFailed("The root volume could not be replaced.")

    driver = Breaking(sim_settings(tmp_path), "test", RENEWS)
    async with running(tmp_path, driver=driver) as (service, _):
        await ended(service, service.queue.submit(0, task("a")))
        end = await ended(service, service.queue.submit(0, task("b")))
        assert end.state is JobState.FAILED
        assert end.error is not None
        assert "could not be replaced" in end.error.detail
        await eventually(lambda: not ids(service))
        assert driver.desktops == {}


async def test_a_reset_that_is_cancelled_while_it_renews_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, RENEWS, FOR_EVER) as (service, driver):
        await ended(service, service.queue.submit(0, task("a")))
        job = await in_state(service, service.queue.submit(0, task("b")), JobState.BOOTING)
        await eventually(lambda: created(driver, "renew") == 1)
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        await eventually(lambda: not ids(service))
        assert driver.desktops == {}


async def test_without_room_for_two_an_old_desktop_that_cannot_be_renewed_goes_before_the_new_one_comes(
    tmp_path: Path,
) -> None:
    class Unable(SimDriver):
        async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
            return None

    driver = Unable(sim_settings(tmp_path), "test", RENEWS)
    driver.traits = replace(driver.traits, make_before_break=False)
    async with running(tmp_path, driver=driver) as (service, _):
        await ended(service, service.queue.submit(0, task("a")))
        assert (await ended(service, service.queue.submit(0, task("b")))).state is JobState.SUCCEEDED
        verbs = [entry.verb for entry in driver.journal if entry.verb in ("create-begin", "destroy-end")]
        assert verbs == ["create-begin", "destroy-end", "create-begin"]


async def test_a_kept_desktop_goes_when_the_new_one_is_there_and_not_before(tmp_path: Path) -> None:
    class Unable(SimDriver):
        async def renew(self, instance_id: str, spec: InstanceSpec, report: Report) -> Made | None:
            return None

    driver = Unable(sim_settings(tmp_path), "test", RENEWS)
    async with running(tmp_path, driver=driver) as (service, _):
        first = await ended(service, service.queue.submit(0, task("a")))
        second = await ended(service, service.queue.submit(0, task("b")))
        await eventually(lambda: ids(service) == {second.desktop_id})
        verbs = [entry.verb for entry in driver.journal if entry.verb in ("create-end", "destroy-begin")]
        assert verbs == ["create-end", "create-end", "destroy-begin"]
        assert first.desktop_id not in driver.desktops


# Parking


async def test_spares_sleep_while_they_wait_and_are_woken_for_a_reset(tmp_path: Path) -> None:
    async with running(tmp_path, PARKS, spares=1) as (service, driver):
        await with_spares(service)
        waiting = spare(service)
        await eventually(lambda: created(driver, "park") == 1)
        end = await ended(service, service.queue.submit(0, task("a")))
        assert (end.state, end.reset_path, end.desktop_id) == (JobState.SUCCEEDED, ResetPath.SPARE, waiting.id)
        assert [phase.name for phase in end.phases][:3] == ["queue", "unpark", "probe"]
        assert {probe.name for probe in end.probes if probe.passed} == {"screenshot", "chrome_cdp"}


async def test_a_spare_that_sleeps_is_not_looked_at(tmp_path: Path) -> None:
    async with running(tmp_path, PARKS, spares=1) as (service, driver):
        await with_spares(service)
        await eventually(lambda: created(driver, "park") == 1)
        (desktop,) = driver.desktops.values()
        asked = desktop.requests.total()
        await anyio.sleep(3 * driver.traits.monitor_interval_s)
        assert desktop.requests.total() == asked
        assert service.fleet.spares == 1
        assert not any("Chrome" in words for words in told(service, "desktop"))


async def test_a_spare_that_dies_asleep_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, PARKS, spares=1) as (service, driver):
        await with_spares(service)
        await eventually(lambda: created(driver, "park") == 1)
        first = spare(service)
        driver.kill(first.id)
        await eventually(lambda: service.fleet.spares == 1 and spare(service).id != first.id)


async def test_a_spare_that_does_not_wake_is_removed_and_the_reset_has_another(tmp_path: Path) -> None:
    sleepy = Behaviour(parks=True, unpark_fails=True)
    async with running(tmp_path, sleepy, Behaviour(parks=True), spares=1) as (service, driver):
        await with_spares(service)
        first = spare(service)
        end = await ended(service, service.queue.submit(0, task("a")))
        assert end.state is JobState.SUCCEEDED
        assert end.desktop_id != first.id
        assert any("did not wake up" in words for words in told(service))
        await eventually(lambda: first.id not in driver.desktops)


async def test_a_reset_that_is_cancelled_while_its_spare_wakes_leaves_the_spare_to_nobody(tmp_path: Path) -> None:
    slow = Behaviour(parks=True, unpark_s=3600)
    async with running(tmp_path, slow, FOR_EVER, spares=1) as (service, driver):
        await with_spares(service)
        first = spare(service)
        job = service.queue.submit(0, task("a"))
        await eventually(lambda: created(driver, "unpark") == 1)
        service.queue.cancel(job.id)
        assert (await ended(service, job)).state is JobState.CANCELLED
        assert first.id not in driver.desktops


async def test_a_spare_that_cannot_be_parked_is_replaced(tmp_path: Path) -> None:
    class Restless(SimDriver):
        async def park(self, instance_id: str) -> None:
            await super().park(instance_id)
            if created(self, "park") == 1:
                raise BootFailed("It would not sleep.")

    driver = Restless(sim_settings(tmp_path), "test", PARKS)
    async with running(tmp_path, driver=driver, spares=1) as (service, _):
        await eventually(lambda: created(driver, "park") == 2)
        await with_spares(service)
        assert spare(service).state is DesktopState.READY
        assert any("It would not sleep" in words for words in told(service))
