"""A hundred clients reset at once, over HTTP, each on a connection of its own: nobody tears down anybody's boot."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import aiohttp
import pytest
from serving import serving

from envd.drivers.sim import Behaviour, boots_in_flight_max

CLIENTS = 100


async def one_client(url: str, number: int, env: int) -> tuple[int, Any]:
    """What existing trainers do: one POST on a new connection, and wait."""
    body = {"task_config": {"id": f"task-{number}", "instruction": f"task {number}"}, "slot_id": env}
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http, http.post(f"{url}/env/reset", json=body) as answer:
        return answer.status, await answer.json(content_type=None)


@pytest.mark.parametrize("envs", [1, 8])
async def test_invariant_1_a_hundred_clients_never_cause_two_boots_and_each_gets_an_answer(envs: int) -> None:
    async with serving(Behaviour(boot_s=0.02, cdp_s=0.02), envs=envs) as served:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(one_client(served.url, n, n % envs) for n in range(CLIENTS)))
        await served.service.queue.idle()
        desktops = served.service.fleet.desktops()
        await asyncio.gather(*(served.service.fleet.gone(d.id) for d in desktops if d.state == "removing"))
        in_use = {env.desktop.id for env in served.service.all_envs() if env.desktop}
        left = set(served.sim.desktops)
        journal = list(served.sim.journal)

    assert boots_in_flight_max(journal) == 1
    outcomes = Counter((status, body.get("code")) for status, body in answers)
    assert set(outcomes) <= {(200, None), (409, "job_superseded")}, outcomes
    assert all(len(body["obs_messages"]) == 3 for status, body in answers if status == 200)
    assert outcomes[200, None] >= envs
    assert left == in_use
    assert len(left) == envs


async def test_a_hundred_identical_resets_are_one_job_with_one_boot() -> None:
    async with serving(Behaviour(boot_s=0.3, cdp_s=0.3)) as served:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(one_client(served.url, 7, 0) for _ in range(CLIENTS)))
        begun = [entry for entry in served.sim.journal if entry[1] == "create-begin"]
    assert [status for status, _ in answers] == [200] * CLIENTS
    assert len({repr(body) for _, body in answers}) == 1
    assert len(begun) == 1


async def test_a_hundred_clients_that_hang_up_cancel_nothing() -> None:
    async with serving(Behaviour(boot_s=0.3, cdp_s=0.3)) as served:
        task = {"id": "task-7", "instruction": "task 7"}
        _, asked = await served.post("/v1/envs/0/reset", {"task": task})
        waiting = [asyncio.create_task(one_client(served.url, 7, 0)) for _ in range(CLIENTS)]
        job = served.service.queue.get(asked["id"])
        while job.joined < CLIENTS:
            job = await served.service.queue.changed(job.id, job.version, 20)
        for client in waiting:
            client.cancel()
        await asyncio.wait(waiting)
        assert (await served.ended(job.id))["state"] == "succeeded"
        assert served.service.env(0).state == "playing"
