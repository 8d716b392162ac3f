"""What drivers, guests and callers do at the worst moment: every job still ends once, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_queue import SLOW, ended, removals, running, task

from envd.boot.queue import Reset
from envd.drivers.base import InstanceSpec, Report
from envd.drivers.sim import Behaviour, SimDriver, boots_in_flight_max
from envd.models import Endpoints, Job, JobState
from envd.service import Service

LONG = Reset(task={"id": "long", "config": [{"type": "sleep", "parameters": {"seconds": 600}}]})
Odd = Callable[[], BaseException]


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: Odd, slow_removal: int
) -> None:
    async with running(tmp_path, Behaviour(destroy_fails=slow_removal), SLOW, envs=2) as (service, driver):
        create = driver.create

        async def broken(spec: InstanceSpec, report: Report) -> Endpoints:
            await create(spec, report)
            monkeypatch.undo()
            raise odd()

        monkeypatch.setattr(driver, "create", broken)
        first, second = service.queue.submit(0, task("a")), service.queue.submit(1, task("b"))
        end = await ended(service, first)
        assert end.error is not None
        assert (end.state, end.error.code, facts(end)["phase"]) == (JobState.FAILED, "boot_failed", "create")
        assert (await ended(service, second)).state is JobState.SUCCEEDED
        begun = [entry[1] for entry in driver.journal]
        assert begun.index("destroy-end") < begun.index("create-begin", 1)
        await still_works(service, driver)
