"""Event streams over real sockets: snapshot, replay, gaps, the end, and readers that misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from serving import CLICK, Served, eventually, raw_connection, serving

from envd.client.sse import Message
from envd.drivers.sim import Behaviour

FOR_EVER = Behaviour(boot_s=3600)


def kinds(messages: list[Message]) -> list[str]:
    return [message.event for message in messages]


def number(message: Message) -> int:
    return int(message.id.rpartition("-")[2])


def is_state(state: str) -> Any:
    return lambda message: message.event == "state" and json.loads(message.data)["job"]["state"] == state


async def submitted(served: Served, env: int = 0) -> str:
    _, job = await served.post(f"/v1/envs/{env}/reset", {})
    return str(job["id"])


async def test_a_stream_opens_with_retry_and_a_snapshot() -> None:
    async with serving(FOR_EVER) as served:
        job_id = await submitted(served)
        async with served.stream(f"/v1/jobs/{job_id}/events") as reader:
            headers = reader.response.headers
            assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
            snapshot = await reader.next()
            assert reader.raw.startswith(b"retry: 1000\n\nid: ")
            assert (snapshot.event, snapshot.id) == ("snapshot", headers["Last-Event-ID"])
            assert json.loads(snapshot.data)["job"]["id"] == job_id


async def test_a_job_is_followed_to_its_end_and_then_the_stream_closes() -> None:
    async with serving(Behaviour(boot_s=0.2)) as served:
        job_id = await submitted(served)
        async with served.stream(f"/v1/jobs/{job_id}/events") as reader:
            snapshot, *events = await reader.rest()
        assert snapshot.event == "snapshot"
        assert {"state", "phase", "probe"} <= set(kinds(events))
        assert is_state("succeeded")(events[-1])
        numbers = [number(message) for message in events]
        assert numbers == sorted(set(numbers))
        assert number(snapshot) < numbers[0]
        for message in events:
            event = json.loads(message.data)
            assert (event["id"], event["kind"]) == (message.id, message.event)
            assert event["job_id"] == event["job"]["id"] == job_id


async def test_a_watcher_that_has_seen_the_end_gets_204() -> None:
    async with serving() as served:
        job = await served.reset()
        path = f"/v1/jobs/{job['id']}/events"
        async with served.stream(path) as reader:
            late = await reader.rest()
        assert kinds(late) == ["snapshot", "state"]
        assert json.loads(late[-1].data)["job"] == {name: value for name, value in job.items() if name != "links"}
        for last in (late[-1].id, served.service.events.last_id):
            status, body, _ = await served.ask("GET", path, headers={"Last-Event-ID": last})
            assert (status, body) == (204, b"")
            assert (await served.get(f"{path}?last_event_id={last}"))[0] == 204


async def test_a_reader_that_drops_anywhere_loses_nothing_and_sees_nothing_twice() -> None:
    async with serving(Behaviour(boot_s=0.2)) as served:
        path = f"/v1/jobs/{await submitted(served)}/events"
        async with served.stream(path) as reader:
            whole = await reader.rest()
        events = [message for message in whole if message.event != "snapshot"]
        for position in range(len(events) - 1):
            async with served.stream(path, Last_Event_ID=events[position].id) as reader:
                snapshot, *rest = await reader.rest()
            assert (snapshot.event, snapshot.id) == ("snapshot", events[position].id)
            assert rest == events[position + 1 :]
        async with served.stream(path, Last_Event_ID=whole[0].id) as reader:
            assert (await reader.rest())[1:] == events


async def test_a_reader_that_drops_while_it_happens_loses_nothing() -> None:
    async with serving(Behaviour(boot_s=0.3), envs=2) as served:
        path = f"/v1/jobs/{await submitted(served)}/events"
        seen: list[Message] = []
        last = ""
        while not (seen and is_state("succeeded")(seen[-1])):
            async with served.stream(path, **({"Last_Event_ID": last} if last else {})) as reader:
                for _ in range(3):
                    message = await reader.next()
                    last = message.id
                    if message.event != "snapshot":
                        seen.append(message)
                    if is_state("succeeded")(message):
                        break
        events = served.service.events
        job_id = path.split("/")[3]
        logged = [event.id for event in events.recent() if event.job_id == job_id]
        assert [message.id for message in seen] == logged[len(logged) - len(seen) :]
        assert len(seen) > 3


async def test_the_header_wins_over_the_query() -> None:
    async with serving() as served:
        await served.reset()
        epoch = served.service.events.epoch
        async with served.stream(f"/v1/events?last_event_id={epoch}-1", Last_Event_ID=f"{epoch}-3") as reader:
            assert reader.response.headers["Last-Event-ID"] == f"{epoch}-3"
            await reader.next()
            assert (await reader.next()).id == f"{epoch}-4"
        async with served.stream(f"/v1/events?last_event_id={epoch}-1") as reader:
            await reader.next()
            assert (await reader.next()).id == f"{epoch}-2"


@pytest.mark.parametrize(
    "unknown", ["00000000-3", "nonsense", "-", "{epoch}-999999", "{epoch}-x", "{epoch}-" + "9" * 5000]
)
async def test_an_id_that_is_not_ours_gives_a_snapshot_and_a_gap(unknown: str) -> None:
    async with serving(FOR_EVER) as served:
        path = f"/v1/jobs/{await submitted(served)}/events"
        async with served.stream(path, Last_Event_ID=unknown.format(epoch=served.service.events.epoch)) as reader:
            opening = [await reader.next(), await reader.next()]
            assert kinds(opening) == ["snapshot", "gap"]
            assert opening[0].id == opening[1].id == reader.response.headers["Last-Event-ID"]
            assert json.loads(opening[1].data)["kind"] == "gap"


async def test_an_id_that_has_left_the_ring_gives_a_gap() -> None:
    async with serving(FOR_EVER) as served:
        events = served.service.events
        path = f"/v1/jobs/{await submitted(served)}/events"
        first = events.recent()[0].id
        for _ in range(8200):
            events.publish("progress")
        async with served.stream(path, Last_Event_ID=first) as reader:
            assert kinds([await reader.next(), await reader.next()]) == ["snapshot", "gap"]


async def test_an_unknown_job_has_no_stream() -> None:
    async with serving() as served:
        status, problem = await served.get("/v1/jobs/job-none/events")
        assert (status, problem["code"]) == (404, "unknown_job")


async def test_everything_is_followed_with_the_job_inside() -> None:
    async with serving(envs=2) as served:
        await served.play(0)
        async with served.stream("/v1/events") as reader:
            snapshot = json.loads((await reader.next()).data)
            assert snapshot.keys() == {"queue", "envs", "jobs"}
            assert [env["state"] for env in snapshot["envs"]] == ["playing", "empty"]
            job = await served.reset(1)
            await served.post("/v1/envs/0/step", {"prediction": CLICK})
            seen = await reader.until(lambda message: message.event == "step")
        assert {"state", "phase", "probe", "desktop", "episode", "step"} <= set(kinds(seen))
        assert [number(message) for message in seen] == list(range(number(seen[0]), number(seen[-1]) + 1))
        assert job["id"] in {json.loads(message.data)["job_id"] for message in seen}
        step = json.loads(seen[-1].data)
        assert (step["env"], step["data"]["done"], step["data"]["actions"][0]["outcome"]) == (0, False, "ok")
        assert "screenshot" not in step["data"]


async def test_silence_is_broken_by_comments() -> None:
    async with serving(heartbeat=0.05) as served, served.stream("/v1/events") as reader:
        await reader.next()
        await reader.comment()
        assert reader.raw.endswith(b"\n\n: still here\n\n")


async def test_a_job_that_waits_hears_a_heartbeat_though_others_are_busy() -> None:
    async with serving(FOR_EVER, envs=2, heartbeat=0.2) as served:
        await submitted(served, 1)
        path = f"/v1/jobs/{await submitted(served, 0)}/events"

        async def chatter() -> None:
            while True:
                served.service.events.publish("progress")
                await asyncio.sleep(0.02)

        busy = asyncio.create_task(chatter())
        async with served.stream(path) as reader:
            await reader.comment()
        busy.cancel()


async def test_head_is_answered_with_headers_alone() -> None:
    async with serving(FOR_EVER) as served:
        for path in ("/v1/events", f"/v1/jobs/{await submitted(served)}/events"):
            status, body, headers = await served.ask("HEAD", path)
            assert (status, body, headers["Content-Type"]) == (200, b"", "text/event-stream; charset=utf-8")
        assert served.service.streams == 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_stream_is_only_read(method: str) -> None:
    async with serving() as served:
        status, problem, headers = await served.ask(method, "/v1/events")
        assert (status, problem["code"]) == (405, "method_not_allowed")
        assert set(headers["Allow"].split(", ")) == {"GET", "HEAD"}


async def test_http_1_0_is_served_until_the_connection_closes() -> None:
    async with serving() as served:
        job = await served.reset()
        async with raw_connection(served.address) as (reader, writer):
            writer.write(f"GET /v1/jobs/{job['id']}/events HTTP/1.0\r\n\r\n".encode())
            async with asyncio.timeout(5):
                answer = await reader.read(-1)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"chunked" not in head.lower()
        assert body.startswith(b"retry: 1000\n\n")
        assert body.endswith(b"\n\n")


async def test_http_2_is_refused_since_it_has_no_backpressure() -> None:
    """Asked for by an upgrade of a plain connection, which hypercorn grants to anybody."""
    async with serving() as served, raw_connection(served.address) as (reader, writer):
        writer.write(
            b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        )
        async with asyncio.timeout(5):
            answer = b""
            while b"http_version_unsupported" not in answer:
                answer += await reader.read(65536)
        assert served.service.streams == 0


async def test_no_more_streams_than_allowed() -> None:
    async with serving(max_streams=2) as served:
        async with served.stream("/v1/events") as one, served.stream("/v1/events") as two:
            await asyncio.gather(one.next(), two.next())
            status, problem, headers = await served.ask("GET", "/v1/events")
            assert (status, problem["code"], problem["fault"]) == (503, "too_many_watchers", "capacity")
            assert int(headers["Retry-After"]) >= 10
        await eventually(lambda: served.service.streams == 0)
        async with served.stream("/v1/events") as again:
            assert (await again.next()).event == "snapshot"


async def test_a_watcher_that_vanishes_is_noticed() -> None:
    async with serving() as served:
        async with raw_connection(served.address) as (reader, writer):
            writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"event: snapshot")
            assert served.service.streams == 1
            writer.transport.abort()
        await eventually(lambda: served.service.streams == 0)


async def test_shutdown_ends_every_stream_with_a_farewell() -> None:
    async with serving(FOR_EVER) as served:
        path = f"/v1/jobs/{await submitted(served)}/events"
        async with served.stream("/v1/events") as everything, served.stream(path) as job:
            await asyncio.gather(everything.next(), job.next())
            async with asyncio.timeout(5):
                await served.service.drain()
                last = (await everything.rest())[-1]
                ended = await job.rest()
        assert last.event == "server-shutdown"
        assert 1 <= json.loads(last.data)["data"]["retry_s"] <= 5
        assert 1000 <= (everything.parser.retry_ms or 0) <= 5000
        assert is_state("cancelled")(ended[-1])
        assert (await served.get("/v1/events"))[0] == 503


async def test_a_reader_that_never_reads_holds_nobody_up() -> None:
    async with (
        serving() as served,
        raw_connection(served.address, receive_buffer=4096) as (_, writer),
        served.stream("/v1/events") as good,
    ):
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a read transport
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await good.next()
        await eventually(lambda: served.service.streams == 2)
        slowest = 0.0
        for round_number in range(60):
            began = time.monotonic()
            for _ in range(100):
                served.service.events.publish("progress", message="x" * 1000)
            slowest = max(slowest, time.monotonic() - began)
            served.service.events.publish("note", round=round_number)
            seen = await good.until(lambda message: message.event == "note")
            assert len(seen) == 101
        assert slowest < 1


async def test_a_reader_that_fell_behind_is_let_go_and_told_of_the_gap_when_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("envd.app.sse.SEND_LIMIT", 1.0)
    async with serving() as served:
        async with raw_connection(served.address, receive_buffer=4096) as (reader, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a read transport
            writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await eventually(lambda: served.service.streams == 1)
            for _ in range(100):
                for _ in range(100):
                    served.service.events.publish("progress", message="x" * 2000)
                await asyncio.sleep(0)
            await eventually(lambda: served.service.streams == 0)
            writer.transport.resume_reading()  # type: ignore[attr-defined]  # it is a read transport
            async with asyncio.timeout(10):
                received = await reader.read(-1)
        last = re.findall(rb"\nid: ([^\n]+)\n", received)[-1].decode()
        assert served.service.events.missed(served.service.events.sequence_of(last) or 0)
        async with served.stream("/v1/events", Last_Event_ID=last) as again:
            assert kinds([await again.next(), await again.next()]) == ["snapshot", "gap"]


async def test_five_hundred_watchers_all_hear_an_event() -> None:
    async with serving() as served, AsyncExitStack() as open_streams:
        connector = aiohttp.TCPConnector(limit=0)
        http = await open_streams.enter_async_context(aiohttp.ClientSession(connector=connector))
        served.http, own = http, served.http
        readers = await asyncio.gather(
            *(open_streams.enter_async_context(served.stream("/v1/events")) for _ in range(500))
        )
        served.http = own
        await asyncio.gather(*(reader.next() for reader in readers))
        assert served.service.streams == 500
        began = time.monotonic()
        event = served.service.events.publish("note", message="to all")
        heard = await asyncio.gather(*(reader.next() for reader in readers))
        assert {message.id for message in heard} == {event.id}
        assert time.monotonic() - began < 5


async def test_every_data_line_is_short_and_strict_json() -> None:
    """Also when there is much to tell: hundreds of envs, long outputs, a long log."""
    actions = [f"print('x' * 9000)\n{name} = 1 / 0" for name in "abcdefgh"]
    async with serving(envs=300) as served, served.stream("/v1/events") as reader:
        await served.play(task={"instruction": "y" * 100_000})
        await served.post("/v1/envs/0/step", {"actions": [f"# {'z' * 30_000}", *actions]})
        messages = await reader.until(lambda message: message.event == "step")
        async with served.stream("/v1/events") as late:
            messages.append(await late.next())
        for raw in (reader.raw, late.raw):
            assert max(len(line) for line in raw.split(b"\n")) <= 16 * 1024

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    documents = [json.loads(message.data, parse_constant=no_constants) for message in messages]
    assert len(documents[-1]["envs"]) == 300
    assert documents[-1]["envs"][0]["episode"]["instruction"].startswith("yyy")
