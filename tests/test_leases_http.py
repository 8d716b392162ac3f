"""Leases over HTTP: who may play where, who is next, and what an end takes away and leaves."""

from __future__ import annotations

import asyncio
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from serving import CLICK, Served, eventually, raw_connection, serving

from envd.drivers.sim import Behaviour
from envd.drivers.sim.behaviour import FOREVER, Fault
from envd.errors import LeaseOver
from envd.events import EventLog
from envd.journal import Journal
from envd.leases import GRACE, Leases
from envd.models import Env, EnvState, Job, Lease, LeaseEnd, LeaseRequest, LeaseState
from envd.settings import Settings, load

TASK = {"id": "t-1", "config": [], "evaluator": {"func": "infeasible"}}


async def ask(served: Served, count: int = 1, owner: str = "ann", **more: Any) -> dict[str, Any]:
    status, lease = await served.post("/v1/leases", {"count": count, "owner": owner, **more})
    assert status == (201 if lease["state"] == "held" else 202), lease
    return lease  # type: ignore[no-any-return]  # JSON


def under(lease: dict[str, Any] | Lease) -> dict[str, Any]:
    return {"headers": {"X-Lease": lease.id if isinstance(lease, Lease) else lease["id"]}}


def brief(served: Served, count: int = 1, ttl_s: float = 0.3) -> Lease:
    """A lease that ends sooner than any that can be had over HTTP."""
    return served.service.leases.ask("ann", LeaseRequest.model_construct(count=count, ttl_s=ttl_s))


async def over(served: Served, lease: Lease) -> Lease:
    """The lease once it has ended, and nothing runs on its envs."""
    leases = served.service.leases
    await eventually(lambda: leases.get(lease.id).ended_at is not None and not leases.get(lease.id).leaving)
    return leases.get(lease.id)


async def play(served: Served, env: int, lease: dict[str, Any] | Lease) -> dict[str, Any]:
    status, job = await served.post(f"/v1/envs/{env}/reset", {"task": TASK}, **under(lease))
    assert status == 202, job
    job = await served.ended(job["id"])
    assert job["state"] == "succeeded", job
    return job


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/envs/0/reset", {"task": TASK}, id="reset"),
        pytest.param("/v1/envs/0/step", {"prediction": CLICK}, id="step"),
        pytest.param("/v1/envs/0/evaluate", None, id="evaluate"),
        pytest.param("/env/reset", {"slot_id": 0, "task_config": TASK}, id="legacy reset"),
        pytest.param("/env/step", {"slot_id": 0, "prediction": CLICK}, id="legacy step"),
        pytest.param("/env/evaluate", {"slot_id": 0}, id="legacy evaluate"),
    ],
)
async def test_a_leased_env_is_locked_for_others_and_open_for_its_holder(path: str, body: Any) -> None:
    async with serving(envs=2) as served:
        lease = await ask(served)
        assert lease["envs"] == [0]
        await play(served, 0, lease)
        other = await ask(served, owner="bob")
        for how in ({}, under(other), {"headers": {"X-Lease": "lease-000000000000"}}):
            status, problem, headers = await served.ask("POST", path, body, **how)
            assert (status, problem["code"], problem["holder"]) == (423, "leased", "ann")
            assert problem["retry_after"] == pytest.approx(300, abs=20)
            assert int(headers["Retry-After"]) >= problem["retry_after"]
            assert problem["expires_at"] <= served.service.leases.get(lease["id"]).expires_at
        status, answer = await served.post(path, body, **under(lease))
        assert status in (200, 202), answer


async def test_existing_trainers_play_without_a_lease_on_what_is_not_leased() -> None:
    async with serving(envs=2) as served:
        await ask(served)
        waiting = await ask(served, 2, "bob")
        for _ in range(2):
            assert (await served.post("/env/reset", {"slot_id": 1, "task_config": TASK}))[0] == 200
            assert (await served.post("/env/step", {"slot_id": 1, "prediction": CLICK}))[0] == 200
            assert await served.post("/env/evaluate", {"slot_id": 1}) == (200, 0.0)
        assert (await served.get(f"/v1/leases/{waiting['id']}"))[1]["state"] == "waiting"


async def test_looking_needs_no_lease() -> None:
    async with serving() as served:
        await play(served, 0, await ask(served))
        for path in ("/v1/envs/0", "/v1/envs/0/screenshot", "/v1/envs/0/history", "/env/history_messages"):
            assert (await served.get(path))[0] == 200


async def test_a_lease_is_of_all_the_envs_that_were_asked_for_or_waits() -> None:
    async with serving(envs=3) as served:
        first = await ask(served, 2)
        second = await ask(served, 2, "bob")
        assert (first["envs"], second["envs"], second["state"], second["position"]) == ([0, 1], [], "waiting", 1)
        seen = asyncio.create_task(served.get(f"/v1/leases/{second['id']}?wait=20&after=2"))
        assert (await served.ask("DELETE", f"/v1/leases/{first['id']}"))[0] == 200
        status, held = await seen
        assert (status, held["state"], held["envs"], held["position"]) == (200, "held", [0, 1], None)


async def test_owners_take_turns_and_each_is_first_come_first_served() -> None:
    async with serving() as served:
        holder = await ask(served, owner="ann")
        for owner in ("ann", "ann", "bob", "bob"):
            await ask(served, owner=owner)
        _, listed = await served.get("/v1/leases")
        assert [(one["owner"], one["position"]) for one in listed["leases"]] == [
            ("ann", None),
            ("ann", 2),
            ("ann", 4),
            ("bob", 1),
            ("bob", 3),
        ]
        order = []
        ids = [lease.id for lease in served.service.leases.all()]
        for _ in range(4):
            await served.ask("DELETE", f"/v1/leases/{holder['id']}")
            [holder] = [one for name in ids if (one := (await served.get(f"/v1/leases/{name}"))[1])["state"] == "held"]
            order.append(ids.index(holder["id"]))
        assert order == [3, 1, 4, 2]


async def test_an_answer_may_wait_for_the_grant() -> None:
    async with serving() as served:
        first = await ask(served)
        second = asyncio.create_task(ask(served, owner="bob", wait_s=20, ttl_s=10))
        await eventually(lambda: len(served.service.leases.all()) == 2)
        await served.ask("DELETE", f"/v1/leases/{first['id']}")
        assert ((await second)["state"], (await second)["envs"]) == ("held", [0])
        third = await ask(served, wait_s=0.05)
        assert third["state"] == "waiting"


async def test_a_caller_who_hangs_up_before_the_grant_leaves_nothing_in_line() -> None:
    async with serving() as served:
        await ask(served)
        body = json.dumps({"wait_s": 60}).encode()
        async with raw_connection(served.address) as (_, writer):
            head = f"POST /v1/leases HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await eventually(lambda: len(served.service.leases.all()) == 2)
        await eventually(lambda: len(served.service.leases.all()) == 1)


async def test_a_trainer_in_mid_episode_keeps_its_env_and_loses_it_at_its_end() -> None:
    async with serving() as served:
        await served.play(task=TASK)
        episode = served.service.env(0).episode
        lease = await ask(served)
        assert lease["state"] == "waiting"
        assert (await served.post("/v1/envs/0/step", {"prediction": CLICK}))[0] == 200
        seen = asyncio.create_task(served.get(f"/v1/leases/{lease['id']}?wait=20&after=2"))
        verdict = await served.evaluate()
        assert verdict["status"] == "scored"
        assert (await seen)[1]["state"] == "held"
        # What the trainer before left there is not the holder's.
        status, problem = await served.post("/v1/envs/0/evaluate", **under(lease))
        assert (status, problem["code"]) == (409, "no_episode")
        assert episode is not None
        assert (await served.get(f"/v1/episodes/{episode.id}/verdict"))[1] == verdict


async def test_an_env_that_is_being_reset_or_waits_for_that_is_not_leased() -> None:
    async with serving(Behaviour(boot_s=0.3), envs=2) as served:
        jobs = [(await served.post(f"/v1/envs/{env}/reset", {"task": TASK}))[1]["id"] for env in range(2)]
        lease = await ask(served, owner="bob")
        assert lease["state"] == "waiting"
        for job in jobs:
            assert (await served.ended(job))["state"] == "succeeded"
        assert (await served.get(f"/v1/leases/{lease['id']}"))[1]["state"] == "waiting"


async def test_an_untouched_env_is_leased_before_one_whose_episode_may_still_be_evaluated() -> None:
    async with serving(envs=2) as served:
        await served.play(0, task=TASK)
        assert (await served.post("/v1/envs/0/step", {"actions": ["DONE"]}))[1]["done"] is True
        assert (await ask(served))["envs"] == [1]
        assert (await served.evaluate(0))["status"] == "scored"


async def test_use_renews_a_lease_and_so_does_a_heartbeat() -> None:
    async with serving() as served:
        lease = await ask(served, ttl_s=50)
        ends = [lease["expires_at"]]
        await play(served, 0, lease)
        ends.append((await served.get(f"/v1/leases/{lease['id']}"))[1]["expires_at"])
        await served.post("/v1/envs/0/step", {"prediction": CLICK}, **under(lease))
        ends.append((await served.get(f"/v1/leases/{lease['id']}"))[1]["expires_at"])
        status, renewed = await served.post(f"/v1/leases/{lease['id']}/renew")
        assert status == 200
        ends.append(renewed["expires_at"])
        await served.post("/v1/envs/0/step", {"prediction": CLICK})
        assert ends == sorted(set(ends))
        assert (await served.get(f"/v1/leases/{lease['id']}"))[1]["expires_at"] == ends[-1]


async def test_a_lease_in_use_outlives_its_ttl_and_one_at_rest_does_not() -> None:
    async with serving(envs=2) as served:
        used, idle = brief(served, ttl_s=0.5), brief(served, ttl_s=0.5)
        ended = asyncio.create_task(over(served, idle))
        while not ended.done():
            served.service.leases.require(used.envs[0], used.id)
            await asyncio.sleep(0.05)
        assert (await ended).end_reason is LeaseEnd.EXPIRED
        assert served.service.leases.get(used.id).state is LeaseState.HELD


async def test_a_lease_that_waits_is_dropped_when_nobody_asks_about_it() -> None:
    async with serving() as served:
        await ask(served)
        asked, forgotten = brief(served, ttl_s=0.4), brief(served, ttl_s=0.4)
        held = asyncio.create_task(served.get(f"/v1/leases/{asked.id}?wait=20&after={asked.version}"))
        ended = await over(served, forgotten)
        assert (ended.end_reason, ended.envs) == (LeaseEnd.EXPIRED, ())
        assert served.service.leases.get(asked.id).state is LeaseState.WAITING
        assert not held.done()
        held.cancel()
        assert (await over(served, asked)).end_reason is LeaseEnd.EXPIRED


async def test_expiry_cancels_the_boot_and_the_job_that_waits_and_frees_the_envs() -> None:
    async with serving(Behaviour(boot_s=60), envs=2) as served:
        lease = brief(served, 2, ttl_s=0.4)
        _, booting = await served.post("/v1/envs/0/reset", {"task": TASK}, **under(lease))
        _, waits = await served.post("/v1/envs/1/reset", {"task": TASK}, **under(lease))
        await served.in_state(booting["id"], "booting")
        lease = await over(served, lease)
        assert lease.end_reason is LeaseEnd.EXPIRED
        for job in (booting, waits):
            assert (await served.get(f"/v1/jobs/{job['id']}"))[1]["state"] == "cancelled"
        await eventually(lambda: not served.service.fleet.desktops())
        assert [env.state for env in served.service.all_envs()] == [EnvState.EMPTY] * 2
        assert (await ask(served, 2, "bob"))["state"] == "held"


async def test_the_reset_that_waits_does_not_inherit_the_boot_of_a_lease_that_ends() -> None:
    async with serving(Behaviour(boot_s=60)) as served:
        lease = await ask(served)
        _, booting = await served.post("/v1/envs/0/reset", {"task": TASK}, **under(lease))
        await served.in_state(booting["id"], "booting")
        _, waits = await served.post("/v1/envs/0/reset", {"task": {**TASK, "id": "t-2"}}, **under(lease))
        await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        assert [(await served.ended(job["id"]))["state"] for job in (booting, waits)] == ["cancelled"] * 2
        await eventually(lambda: not served.service.fleet.desktops())
        assert served.service.env(0).state is EnvState.EMPTY


async def test_an_env_is_nobodys_until_what_runs_there_has_ended() -> None:
    async with serving(Behaviour(boot_s=60, destroy_s=0.3), envs=1) as served:
        lease = await ask(served)
        _, job = await served.post("/v1/envs/0/reset", {"task": TASK}, **under(lease))
        await served.in_state(job["id"], "booting")
        await eventually(lambda: bool(served.service.fleet.desktops()))
        _, released, _ = await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        assert (released["state"], released["leaving"]) == ("ended", [0])
        status, problem = await served.post("/v1/envs/0/reset", {"task": TASK})
        assert (status, problem["code"], problem["retry_after"]) == (423, "leased", 1)
        waits = await ask(served, owner="bob")
        assert waits["state"] == "waiting"
        _, held = await served.get(f"/v1/leases/{waits['id']}?wait=20&after=2")
        assert held["state"] == "held"
        assert (await served.get(f"/v1/jobs/{job['id']}"))[1]["state"] == "cancelled"
        assert (await served.get(f"/v1/leases/{lease['id']}"))[1]["leaving"] == []


async def test_expiry_ends_a_step_and_keeps_its_evidence() -> None:
    async with serving(Behaviour(hang="/execute")) as served:
        lease = brief(served, ttl_s=60)
        job = await play(served, 0, lease)
        desktop = served.service.env(0).desktop
        step = asyncio.create_task(served.post("/v1/envs/0/step", {"prediction": CLICK}, **under(lease)))
        await eventually(lambda: calls(served, "/execute") > 0)
        await expire(served, lease)
        status, problem = await step
        assert (status, problem["code"]) == (503, "desktop_lost")
        assert (await served.get("/v1/envs/0"))[1]["detail"] == "its lease ended"
        await evidence(served, job)
        assert desktop is not None
        await eventually(lambda: served.service.fleet.get(desktop.id) is None)


async def test_expiry_ends_an_evaluation_without_a_number_and_keeps_its_evidence() -> None:
    async with serving() as served:
        lease = brief(served, ttl_s=60)
        job = await play(served, 0, lease)
        before = calls(served, "/screenshot")
        served.desktop().behaviour = Behaviour(on={"/screenshot": Fault("stall", times=FOREVER)})
        asked = asyncio.create_task(served.post("/v1/envs/0/evaluate", **under(lease)))
        await eventually(lambda: calls(served, "/screenshot") > before)
        await expire(served, lease)
        status, verdict = await asked
        assert (status, verdict["status"], verdict["score"]) == (200, "cancelled", None)
        assert verdict["detail"] == "The desktop of env 0 was taken away: its lease ended."
        await evidence(served, job)


def calls(served: Served, route: str) -> int:
    return sum(call.route == route for call in served.desktop().calls)


async def expire(served: Served, lease: Lease) -> None:
    """As if its time had come: it is made to have a short one, and not used."""
    book = served.service.leases._book
    book._put(served.service.leases.get(lease.id), expires_at=0.0)
    served.service.leases._stir()
    assert (await over(served, lease)).end_reason is LeaseEnd.EXPIRED


async def evidence(served: Served, job: dict[str, Any]) -> None:
    status, raw = await served.get(f"/v1/episodes/{job['episode_id']}/bundle")
    assert status == 200
    with tarfile.open(fileobj=BytesIO(raw)) as tar:
        assert any(name.endswith(".png") for name in tar.getnames())


async def test_a_release_takes_everything_back_and_may_be_repeated() -> None:
    async with serving(envs=2) as served:
        lease = await ask(served, 2)
        await play(served, 0, lease)
        desktop = served.service.env(0).desktop
        assert desktop is not None
        status, released, _ = await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        assert (status, released["state"], released["end_reason"]) == (200, "ended", "released")
        assert (await served.ask("DELETE", f"/v1/leases/{lease['id']}"))[:2] == (200, released)
        assert await served.get(f"/v1/leases/{lease['id']}") == (200, released)
        await eventually(lambda: served.service.fleet.get(desktop.id) is None)
        assert (await served.get("/v1/leases"))[1] == {"leases": []}
        assert (await served.reset(0, task=TASK))["desktop_id"] != desktop.id


async def test_whose_lease_has_ended_is_told_so_and_plays_on_nobodys_env() -> None:
    async with serving(envs=2) as served:
        lease = await ask(served)
        await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        status, problem = await served.post("/v1/envs/0/reset", {"task": TASK}, **under(lease))
        assert (status, problem["code"], problem["end_reason"]) == (410, "lease_over", "released")
        status, problem = await served.post(f"/v1/leases/{lease['id']}/renew")
        assert (status, problem["code"]) == (410, "lease_over")
        status, problem = await served.post("/env/reset", {"task_config": TASK}, headers={"X-Lease": "lease-nobody"})
        assert (status, problem["code"]) == (410, "lease_over")
        await ask(served, owner="bob")
        status, problem = await served.post("/v1/envs/0/reset", {"task": TASK}, **under(lease))
        assert (status, problem["code"], problem["holder"]) == (423, "leased", "bob")


async def test_a_lease_of_other_envs_or_that_waits_is_no_key() -> None:
    async with serving(envs=2) as served:
        held, waiting = await ask(served), await ask(served, 2, "bob")
        for lease in (held, waiting):
            status, problem = await served.post("/v1/envs/1/reset", {"task": TASK}, **under(lease))
            assert (status, problem["errors"][0]["field"]) == (422, "X-Lease")
        status, problem = await served.post("/v1/envs/9/reset", {"task": TASK})
        assert (status, problem["code"]) == (404, "unknown_env")


async def test_leases_that_are_not_known_are_not_found() -> None:
    async with serving() as served:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/renew")):
            status, problem, _ = await served.ask(method, f"/v1/leases/lease-000000000000{path}")
            assert (status, problem["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        pytest.param({"count": 3}, "count", id="more than there are"),
        pytest.param({"count": 0}, "count", id="none"),
        pytest.param({"ttl_s": 1}, "ttl_s", id="too short"),
        pytest.param({"ttl_s": 1e9}, "ttl_s", id="too long"),
        pytest.param({"wait_s": -1}, "wait_s", id="a wait that is over"),
        pytest.param({"owner": "a\nb"}, "owner", id="an owner who would move the cursor"),
        pytest.param({"envs": [0]}, "envs", id="what it does not know"),
    ],
)
async def test_what_cannot_be_leased_is_refused_and_changes_nothing(body: Any, field: str) -> None:
    async with serving(envs=2) as served:
        status, problem = await served.post("/v1/leases", body)
        assert (status, problem["errors"][0]["field"]) == (422, field)
        assert served.service.leases.all() == []


async def test_the_line_is_no_longer_than_the_queue_may_be() -> None:
    async with serving(queue_limit=2) as served:
        for _ in range(3):
            await ask(served)
        status, problem = await served.post("/v1/leases", {})
        assert (status, problem["code"]) == (503, "queue_full")


async def test_a_drain_wakes_who_waits() -> None:
    async with serving() as served:
        await ask(served)
        waiting = await ask(served, owner="bob")
        held_open = asyncio.create_task(served.post("/v1/leases", {"wait_s": 60, "owner": "cyd"}))
        polled = asyncio.create_task(served.get(f"/v1/leases/{waiting['id']}?wait=60"))
        await eventually(lambda: len(served.service.leases.all()) == 3)
        await eventually(lambda: waiting["id"] in served.service.leases._news)
        await served.service.drain()
        for woken in (held_open, polled):
            status, problem = await woken
            assert (status, problem["code"]) == (503, "draining")
        # Who was told of a lease has it also afterwards; who was not has none.
        assert [lease.owner for lease in served.service.leases.all()] == ["ann", "bob"]
        assert (await served.get(f"/v1/leases/{waiting['id']}"))[0] == 200
        assert (await served.post("/v1/leases", {}))[0] == 503


async def test_a_token_says_who_the_owner_is_and_ids_are_shown_to_owners_and_admins(tmp_path: Path) -> None:
    tokens = {name: f"{name}-0123456789abcdef" for name in ("ann", "bob", "root")}
    file = tmp_path / "tokens"
    file.write_text("".join(f"{name} {'admin' if name == 'root' else 'play'} {tokens[name]}\n" for name in tokens))
    file.chmod(0o600)
    async with serving(token_file=file, envs=2) as served:

        def bearer(name: str) -> dict[str, Any]:
            return {"headers": {"Authorization": f"Bearer {tokens[name]}"}}

        _, mine = await served.post("/v1/leases", {"owner": "somebody"}, **bearer("ann"))
        assert mine["owner"] == "ann"
        seen = {name: (await served.get("/v1/leases", **bearer(name)))[1]["leases"][0]["id"] for name in tokens}
        assert seen == {"ann": mine["id"], "bob": mine["id"][:10], "root": mine["id"]}
        assert (await served.get(f"/v1/leases/{mine['id'][:10]}", **bearer("bob")))[0] == 404


async def test_without_a_token_the_owner_is_who_is_said_or_the_address() -> None:
    async with serving(envs=2) as served:
        assert (await served.post("/v1/leases", {}))[1]["owner"] == "127.0.0.1"
        assert (await ask(served, owner="trainer-7"))["owner"] == "trainer-7"


async def test_an_env_and_the_events_show_a_lease_but_not_its_key() -> None:
    async with serving() as served, served.stream("/v1/events") as reader:
        lease = await ask(served)
        _, env = await served.get("/v1/envs/0")
        assert env["lease"] == {"id": lease["id"][:10], "owner": "ann", "expires_at": lease["expires_at"]}
        await ask(served, owner="bob")
        await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        seen: list[tuple[str, str]] = []
        while len(seen) < 4:
            message = await reader.next()
            if message.event == "lease":
                data = json.loads(message.data)["data"]
                seen.append((data["owner"], data["state"]))
        assert seen == [("ann", "granted"), ("bob", "waiting"), ("ann", "released"), ("bob", "granted")]
        assert lease["id"].encode() not in reader.raw


async def test_a_poll_ends_with_a_change_of_the_place_in_line() -> None:
    async with serving() as served:
        await ask(served)
        before, after = await ask(served, owner="bob"), await ask(served, owner="cyd")
        polled = asyncio.create_task(served.get(f"/v1/leases/{after['id']}?wait=20&after={after['version']}"))
        await eventually(lambda: after["id"] in served.service.leases._news)
        await served.ask("DELETE", f"/v1/leases/{before['id']}")
        assert ((await polled)[1]["position"], after["position"]) == (1, 2)
        assert (await served.get(f"/v1/leases/{after['id']}?wait=0.05"))[1]["position"] == 1


# A restart


class NobodyPlays:
    """Envs on which nothing ever happened, and a queue without jobs."""

    def __init__(self, envs: int) -> None:
        self.envs = envs
        self.on_idle = lambda: None

    def __len__(self) -> int:
        return self.envs

    def env(self, env: int) -> Env:
        return Env(id=env, state=EnvState.EMPTY)

    def is_idle(self, env: int) -> bool:
        return True

    def recycle(self, env: int, why: str) -> None: ...

    def of_env(self, env: int) -> tuple[Job | None, Job | None]:
        return None, None

    def cancel(self, job_id: str) -> Job:
        raise AssertionError(job_id)

    async def stirred(self) -> None:
        await asyncio.Event().wait()


def settings_in(path: Path) -> Settings:
    return load({}, env_file=None, provider="sim", state_dir=path)


async def test_the_journal_of_an_earlier_life_has_the_leases(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    def leases_of(journal: Journal) -> Leases:
        desk = NobodyPlays(2)
        return Leases(settings, desk, desk, journal, EventLog(journal))

    async with Journal.open(settings) as journal:
        leases = leases_of(journal)
        held = leases.ask("ann", LeaseRequest.model_construct(count=2, ttl_s=0.01))
        line = [leases.ask(owner, LeaseRequest(count=1)) for owner in ("ann", "bob", "bob")]
        gone = leases.release(leases.ask("cyd", LeaseRequest(count=1)).id)
        line = [leases.get(lease.id) for lease in line]
        await journal.commit()
    async with Journal.open(settings) as journal:
        leases = leases_of(journal)
        await leases.recover()
        again = leases.get(held.id)
        assert again.state is LeaseState.HELD
        assert again.expires_at > held.expires_at + GRACE - 5
        leases.require(0, held.id)
        assert [lease.position for lease in line] == [2, 1, 3]
        assert [leases.get(lease.id).position for lease in line] == [2, 1, 3]
        assert leases.get(gone.id) == gone
        with pytest.raises(LeaseOver):
            leases.renew(gone.id)
        leases.release(held.id)
        assert [lease.owner for lease in leases.all() if lease.state is LeaseState.HELD] == ["ann", "bob"]


async def test_a_lease_is_held_by_its_holder_also_after_a_restart_of_the_daemon(tmp_path: Path) -> None:
    async with serving(state_dir=tmp_path) as served:
        lease = await ask(served)
        waiting = await ask(served, owner="bob")
    async with serving(state_dir=tmp_path) as served:
        assert (await served.post("/v1/envs/0/reset", {"task": TASK}))[0] == 423
        await play(served, 0, lease)
        await served.ask("DELETE", f"/v1/leases/{lease['id']}")
        assert (await served.get(f"/v1/leases/{waiting['id']}?wait=20&after=2"))[1]["state"] == "held"
