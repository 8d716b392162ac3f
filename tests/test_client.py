import asyncio
import json
import os
import tarfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from daemon_process import daemon as process
from fake_server import (
    NO_SCORE,
    PNG,
    FakeServer,
    Fault,
    answering,
    bundle_that_stalls,
    draining,
    endless_body,
    endless_bundle,
    half_a_bundle,
    half_an_event,
    reset_connection,
    saying,
    serving,
    silent,
    too_many,
    verdict,
)
from serving import eventually
from serving import serving as daemon

from envd.client import Client, Drain
from envd.client.sse import Message, SseParser
from envd.client.transport import Backoff, Transport
from envd.drivers.sim import Behaviour
from envd.errors import (
    BootTimeout,
    EnvdError,
    GuestUnreachable,
    InfraError,
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobSuperseded,
    Leased,
    NoEpisode,
    NotFound,
    QueueFull,
    RequestError,
    ServerUnreachable,
    SettingsError,
    SetupFailed,
    StillBooting,
    UnknownEnv,
    UnknownJob,
)
from envd.errors import Fault as Blame
from envd.models import Event, Job, JobState, SetupOutcome, SetupRecord, VerdictStatus

# The parser


@pytest.mark.parametrize(
    ("stream", "messages"),
    [
        pytest.param(b"data: a\n\n", [("message", "a", "")], id="lf"),
        pytest.param(b"data: a\r\n\r\n", [("message", "a", "")], id="crlf"),
        pytest.param(b"data: a\r\rdata: b\r\r", [("message", "a", ""), ("message", "b", "")], id="cr"),
        pytest.param(b"data: a\ndata: b\ndata\n\n", [("message", "a\nb\n", "")], id="several data lines"),
        pytest.param(b": heartbeat\n\ndata: a\n\n", [("message", "a", "")], id="comment"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [("message", "a", "")], id="byte order mark"),
        pytest.param(b"data\n\n", [("message", "", "")], id="empty data"),
        pytest.param(b"event: x\nid: 7\n\ndata: a\n\n", [("message", "a", "7")], id="no data, no message, but the id"),
        pytest.param(b"id: 1\nid: 2\0\ndata: a\n\n", [("message", "a", "1")], id="id with NUL is ignored"),
        pytest.param(
            b"id: 1\ndata: a\n\nid\ndata: b\n\n", [("message", "a", "1"), ("message", "b", "")], id="id reset"
        ),
        pytest.param(b"event: x\ndata:  a\nfoo: bar\n\n", [("x", " a", "")], id="one leading space, unknown field"),
        pytest.param("data: ü\u2028ß\n\n".encode(), [("message", "ü\u2028ß", "")], id="only CR and LF end lines"),
        pytest.param(b"data: \xff\n\n", [("message", "\ufffd", "")], id="not UTF-8"),
        pytest.param(b"data: a\n\ndata: b\n", [("message", "a", "")], id="what the end cuts off is dropped"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_parser_follows_the_standard_however_the_bytes_are_cut(
    stream: bytes, messages: list[tuple[str, str, str]], size: int
) -> None:
    parser = SseParser()
    found = [m for i in range(0, len(stream), size) for m in parser.feed(stream[i : i + size])]
    assert found == [Message(*m) for m in messages]


@pytest.mark.parametrize(
    ("line", "retry"),
    [
        pytest.param(b"retry: 1500\n", 1500, id="digits"),
        pytest.param(b"retry: 15s\n", None, id="letters"),
        pytest.param(b"retry: -1\n", None, id="sign"),
        pytest.param("retry: ٣\n".encode(), None, id="other digits"),
        pytest.param(b"retry:\n", None, id="empty"),
    ],
)
def test_parser_takes_retry_from_digits_alone(line: bytes, retry: int | None) -> None:
    parser = SseParser()
    parser.feed(line)
    assert parser.retry_ms == retry


def test_parser_refuses_to_grow_without_bound() -> None:
    parser = SseParser(limit=1000)
    parser.feed(b"data: " + b"x" * 900)
    with pytest.raises(ValueError, match="larger than 1000"):
        parser.feed(b"x" * 200)


def test_backoff_doubles_its_bound_up_to_the_cap_and_uses_all_of_it() -> None:
    samples = [[Backoff(base=1.0, cap=4.0, attempt=n).next() for _ in range(500)] for n in range(4)]
    assert [max(s) <= bound and max(s) > 0.9 * bound for s, bound in zip(samples, (1, 2, 4, 4), strict=True)] == [
        True
    ] * 4
    assert all(min(s) < 0.1 for s in samples)


# Jobs


async def test_reset_returns_the_job_once_it_succeeded() -> None:
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        reset = group.create_task(client.reset({"id": "t1"}, env=3, max_steps=5))
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.BOOTING)
        server.advance("job-1", state=JobState.SUCCEEDED)
        job = await reset
    assert (job.id, job.env, job.state) == ("job-1", 3, JobState.SUCCEEDED)
    method, path, facts = server.seen[0]
    assert (method, path, facts["body"]) == ("POST", "/v1/envs/3/reset", {"task": {"id": "t1"}, "max_steps": 5})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        pytest.param(
            {"state": JobState.FAILED, "error": BootTimeout("Too slow.", phase="ready").problem()},
            BootTimeout,
            id="failed",
        ),
        pytest.param({"state": JobState.CANCELLED}, JobCancelled, id="cancelled"),
        pytest.param({"state": JobState.SUPERSEDED}, JobSuperseded, id="superseded"),
        pytest.param({"state": JobState.EXPIRED}, JobExpired, id="expired"),
    ],
)
async def test_reset_raises_the_error_its_job_ended_with(changes: dict[str, Any], error: type[EnvdError]) -> None:
    async with serving() as server, Client(server.url) as client:
        reset = asyncio.create_task(client.reset())
        await server.until(lambda: server.streams)
        server.advance("job-1", **changes)
        with pytest.raises(error) as raised:
            await reset
    assert raised.value.facts["job_id"] == "job-1"


async def test_a_reset_says_which_limits_it_is_given_and_no_others() -> None:
    async with serving() as server, Client(server.url) as client:
        await client.submit_reset(max_steps=3, counts="predictions", episode_timeout_s=60, screen=(4, 3))
        with pytest.raises(StillBooting):
            await client.env(0).reset(counts="actions", max_steps=None, timeout=0.2)
    assert [seen[2]["body"] for seen in server.seen if seen[0] == "POST"] == [
        {"task": {}, "max_steps": 3, "counts": "predictions", "episode_timeout_s": 60, "screen": [4, 3]},
        {"task": {}, "counts": "actions"},
    ]


async def test_a_set_up_that_failed_keeps_its_step_and_whose_fault_it_was() -> None:
    behind = GuestUnreachable("No answer.")
    error = SetupFailed("Step 2 failed.", behind=behind, step=2, step_type="execute")
    records = (SetupRecord(index=2, type="execute", outcome=SetupOutcome.FAILED, seconds=0.1, detail="No answer."),)
    async with serving() as server, Client(server.url) as client:
        server.new_job(state=JobState.FAILED, attempts=2, setup=records, error=error.problem())
        with pytest.raises(SetupFailed) as raised:
            await client.wait("job-1")
        assert (await client.job("job-1")).setup == records
    assert (raised.value.fault, raised.value.retryable) == (Blame.INFRA, True)
    assert raised.value.facts == {"cause": "guest_unreachable", "step": 2, "step_type": "execute", "job_id": "job-1"}


async def test_wait_sees_a_job_that_had_already_ended() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job(state=JobState.SUCCEEDED)
        assert (await client.wait("job-1", timeout=5)).state is JobState.SUCCEEDED


async def test_wait_for_an_unknown_job_says_so() -> None:
    async with serving() as server, Client(server.url) as client:
        with pytest.raises(UnknownJob):
            await client.wait("nobody")


async def test_a_reset_that_outlasts_its_timeout_carries_the_job_which_goes_on() -> None:
    async with serving() as server, Client(server.url) as client:
        with pytest.raises(StillBooting) as raised:
            await client.reset(timeout=0.3)
        assert raised.value.facts["job"]["id"] == "job-1"
        assert server.jobs["job-1"].state is JobState.QUEUED
        assert server.count("POST", "/v1/jobs/job-1/cancel") == 0


async def test_reset_survives_a_restart_of_the_daemon() -> None:
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        reset = group.create_task(client.reset())
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.BOOTING)
        await server.restart()
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.SUCCEEDED)
        assert (await reset).state is JobState.SUCCEEDED
    opened = [seen[2]["last_event_id"] for seen in server.seen if seen[1].endswith("/events")]
    assert opened[0] is None
    assert opened[-1].startswith("e1-")


async def test_a_job_that_the_restarted_daemon_forgot_is_unknown() -> None:
    async with serving() as server, Client(server.url) as client:
        reset = asyncio.create_task(client.reset())
        await server.until(lambda: server.streams)
        await server.restart(forget=True)
        with pytest.raises(UnknownJob):
            await reset


async def test_waiting_for_a_server_that_stays_away_ends_with_its_patience() -> None:
    async with serving() as server, Client(server.url, patience=0.5) as client:
        reset = asyncio.create_task(client.reset())
        await server.until(lambda: server.streams)
        await server.stop()
        with pytest.raises(ServerUnreachable, match=str(server.port)):
            await reset


async def test_a_reset_whose_time_runs_out_while_the_server_is_away_says_that_it_is_away() -> None:
    async with serving() as server, Client(server.url) as client:
        reset = asyncio.create_task(client.reset(timeout=2))
        await server.until(lambda: server.streams)
        await server.stop()
        with pytest.raises(ServerUnreachable):
            await reset


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(half_an_event, id="broken off in the middle of an event"),
        pytest.param(reset_connection, id="reset"),
        pytest.param(draining, id="503 with Retry-After"),
        pytest.param(saying(502, "<h1>Bad gateway</h1>"), id="a proxy's 502"),
    ],
)
async def test_a_stream_that_breaks_is_opened_again(fault: Fault) -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        server.break_next("GET", "/v1/jobs/job-1/events", fault)
        async with asyncio.TaskGroup() as group:
            wait = group.create_task(client.wait("job-1"))
            await server.until(lambda: server.streams)
            server.advance("job-1", state=JobState.SUCCEEDED)
        assert wait.result().state is JobState.SUCCEEDED
        assert server.count("GET", "/v1/jobs/job-1/events") == 2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(too_many, id="too many watchers"),
        pytest.param(saying(200, "<html>", "text/html"), id="no event stream"),
    ],
)
async def test_where_streams_do_not_get_through_the_job_is_polled(fault: Fault) -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        server.break_next("GET", "/v1/jobs/job-1/events", fault)
        async with asyncio.TaskGroup() as group:
            wait = group.create_task(client.wait("job-1"))
            await server.until(lambda: any("after=1" in seen[1] for seen in server.seen))
            server.advance("job-1", state=JobState.BOOTING)
            await server.until(lambda: any("after=2" in seen[1] for seen in server.seen))
            server.advance("job-1", state=JobState.SUCCEEDED)
        assert wait.result().version == 3


async def test_a_poll_that_is_sent_away_by_a_drain_comes_again() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        server.break_next("GET", "/v1/jobs/job-1/events", too_many)
        server.break_next("GET", "/v1/jobs/job-1", draining, draining, draining)
        async with asyncio.TaskGroup() as group:
            wait = group.create_task(client.wait("job-1"))
            await server.until(lambda: any("after=1" in seen[1] for seen in server.seen))
            server.advance("job-1", state=JobState.SUCCEEDED)
        assert wait.result().state is JobState.SUCCEEDED


async def _kinds(server: FakeServer, client: Client, count: int, job_id: str | None = None) -> list[str]:
    kinds = []
    async with asyncio.timeout(10), aclosing(client.watch(job_id)) as events:
        async for event in events:
            kinds.append(event.kind)
            if len(kinds) == count:
                break
    return kinds


async def test_watching_a_job_gives_a_snapshot_then_its_events_and_ends_with_it() -> None:
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        server.new_job()
        watch = group.create_task(_kinds(server, client, 99, "job-1"))
        await server.until(lambda: server.streams)
        server.new_job()  # another's events are not ours
        server.advance("job-1", "phase", phase="create")
        server.advance("job-1", state=JobState.SUCCEEDED)
        assert await watch == ["snapshot", "phase", "state"]


async def test_watching_everything_outlives_a_restart_and_tells_of_it() -> None:
    retries: list[EnvdError] = []
    events: list[Event] = []
    async with serving() as server, Client(server.url) as client:

        async def watch() -> None:
            stream = client.watch(on_retry=lambda error, pause: retries.append(error))
            async with asyncio.timeout(10), aclosing(stream):
                async for event in stream:
                    events.append(event)
                    if event.kind == "note":
                        break

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            await server.until(lambda: server.streams)
            await server.restart()
            await server.until(lambda: server.streams)
            server.publish("note", message="hello")
    assert [event.kind for event in events] == ["snapshot", "snapshot", "gap", "note"]
    assert events[0].data["queue"]["limit"] == 1024
    assert retries


async def test_the_farewell_of_a_draining_server_is_passed_on_and_its_wish_kept() -> None:
    pauses: list[float] = []
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        async with asyncio.TaskGroup() as group:
            stream = client.watch("job-1", on_retry=lambda error, pause: pauses.append(pause))
            watch = group.create_task(_collect(stream))
            await server.until(lambda: server.streams)
            server.publish("server-shutdown", retry_s=0.3)
            await server.until(lambda: server.count("GET", "/v1/jobs/job-1/events") == 2)
            server.advance("job-1", state=JobState.SUCCEEDED)
        assert [e.kind for e in watch.result()][:2] == ["snapshot", "server-shutdown"]
        assert 0.3 <= pauses[0] <= 0.33


async def _collect(stream: Any) -> list[Event]:
    async with asyncio.timeout(10):
        return [event async for event in stream]


async def test_an_answer_204_means_that_all_was_delivered() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job(state=JobState.SUCCEEDED)
        server.break_next("GET", "/v1/jobs/job-1/events", saying(204, "", "text/event-stream"))
        events = await _collect(client.watch("job-1"))
        assert [(e.kind, e.job and e.job.state) for e in events] == [("snapshot", JobState.SUCCEEDED)]


async def test_leaving_a_watch_closes_its_connection() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        assert await _kinds(server, client, 1, "job-1") == ["snapshot"]
        await server.until(lambda: not server.streams)


async def test_an_event_that_cannot_be_read_is_an_error_and_not_a_loop() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        watch = asyncio.create_task(_collect(client.watch("job-1")))
        await server.until(lambda: server.streams)
        server.publish("raw", bytes='data: {"job": {"surprise": 1}}\n\n')
        with pytest.raises(InfraError, match="cannot read"):
            await watch


async def test_cancel_returns_the_job() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        server.break_next("POST", "/v1/jobs/job-1/cancel", reset_connection)  # carried out, answer lost: safe again
        assert (await client.cancel("job-1")).state is JobState.CANCELLED
        assert server.count("POST", "/v1/jobs/job-1/cancel") == 2


async def test_prewarm_returns_its_job_at_once() -> None:
    async with serving() as server, Client(server.url) as client:
        job = await client.prewarm()
        assert (job.env, job.state) == (None, JobState.QUEUED)


# The real daemon, over sim desktops


async def test_reset_act_and_look_against_the_daemon() -> None:
    async with daemon() as served, Client(served.url) as client:
        env = client.env(0)
        job = await env.reset({"id": "t"}, max_steps=5, timeout=20)
        assert (job.state, job.task_id) == (JobState.SUCCEEDED, "t")
        assert (await env.click(10, 20)).actions[0].outcome == "ok"
        assert (await env.screenshot()).startswith(b"\x89PNG")
        state = await env.state()
        assert state.episode is not None
        assert (state.episode.actions, state.episode.max_steps) == (1, 5)
        assert [m["role"] for m in await env.history()][:2] == ["system", "user"]
        assert (await client.ready()).ready
        assert (await client.envs(), await client.jobs()) == ([state], [job])
        assert (await client.version())["provider"] == "sim"
        assert (await client.queue()).limit == 1024


async def test_verdict_and_evidence_can_be_had_from_the_daemon(tmp_path: Path) -> None:
    async with daemon(state_dir=tmp_path / "state") as served, Client(served.url) as client:
        env = client.env(0)
        await env.reset({"id": "t"}, counts="predictions", max_steps=7, screen=served.settings.screen)
        found = await env.evaluate()
        assert (found.status, found.score) == (VerdictStatus.NOT_EVALUABLE, None)
        assert await env.evaluate() == await client.verdict(found.episode_id) == found
        assert await client.episodes() == [found.episode_id]
        with tarfile.open(await client.bundle(found.episode_id, tmp_path)) as bundle:
            assert f"{found.episode_id}/verdict.json" in bundle.getnames()


async def test_watching_a_reset_against_the_daemon_shows_its_whole_life() -> None:
    async with daemon(Behaviour(boot_s=0.2)) as served, Client(served.url) as client:
        job = await client.submit_reset()
        events = await _collect(client.watch(job.id))
        assert (events[0].kind, events[-1].kind, events[-1].terminal) == ("snapshot", "state", True)
        assert {"phase", "probe", "state"} <= {event.kind for event in events}
        assert [e.job and e.job.state for e in await _collect(client.watch(job.id))] == [JobState.SUCCEEDED]


async def test_a_cancelled_boot_ends_cancelled_against_the_daemon() -> None:
    async with daemon(Behaviour(boot_s=30)) as served, Client(served.url) as client:
        job = await client.submit_reset()
        await client.cancel(job.id)
        with pytest.raises(JobCancelled):
            await client.wait(job.id, timeout=20)


async def test_watching_everything_survives_a_restart_of_the_real_process(tmp_path: Path) -> None:
    events: list[Event] = []
    async with process(tmp_path / "state") as (first, _):
        client = Client(first.url)
        stream = client.watch()
        events.append(await anext(stream))
        first.signal()
        events += [await anext(stream), await anext(stream)]
        await first.ended()
    port = client.url.rpartition(":")[2]
    async with process(tmp_path / "state", "--port", port), asyncio.timeout(30):
        events.append(await anext(stream))
        await client.prewarm()
        events.append(await anext(stream))
        await stream.aclose()
        await client.aclose()
    # Nothing was missed, so there is no gap.
    assert [event.kind for event in events] == ["snapshot", "note", "server-shutdown", "snapshot", "state"]


async def test_a_refused_request_keeps_its_code_against_the_daemon() -> None:
    async with daemon() as served, Client(served.url) as client:
        with pytest.raises(UnknownEnv):
            await client.reset(env=99)
        with pytest.raises(NoEpisode):
            await client.step(actions=["pyautogui.click(1, 2)"])
        with pytest.raises(InvalidRequest):
            await client.step()


# What is sent again, and what never is


@pytest.mark.parametrize("fault", [reset_connection, saying(502, "bad gateway")])
async def test_input_is_sent_once_to_a_server_that_keeps_no_keys(fault: Fault) -> None:
    async with serving() as server, Client(server.url) as client:
        await client.version()
        server.break_next("POST", "/v1/envs/0/step", fault)
        with pytest.raises(EnvdError):
            await client.step(actions=["x"])
        assert server.count("POST", "/v1/envs/0/step") == 1


@pytest.mark.parametrize("fault", [reset_connection, draining, saying(502, "bad gateway")])
async def test_a_step_is_sent_again_under_its_key_to_a_server_that_keeps_keys(fault: Fault) -> None:
    async with serving() as server, Client(server.url) as client:
        server.keeps_keys = True
        await client.envs()
        server.break_next("POST", "/v1/envs/0/step", fault, fault)
        await client.step(actions=["x"])
        await client.step(actions=["x"])
        keys = [facts["key"] for method, path, facts in server.seen if path == "/v1/envs/0/step"]
        assert len(keys) == 4
        assert keys[0] == keys[1] == keys[2] != keys[3]


async def test_a_step_that_a_server_without_keys_refused_for_now_is_sent_again() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/step", draining)
        await client.step(actions=["x"])
        assert server.count("POST", "/v1/envs/0/step") == 2


async def test_the_server_is_told_how_long_it_is_waited_for() -> None:
    async with serving() as server, Client(server.url) as client:
        await client.step(actions=["x"], timeout=7)
        [facts] = [facts for method, path, facts in server.seen if path == "/v1/envs/0/step"]
        assert 6 < float(facts["deadline"]) <= 7


@pytest.mark.parametrize("fault", [reset_connection, draining, saying(502, "bad gateway")])
async def test_a_verdict_whose_answer_was_lost_is_asked_for_again(fault: Fault) -> None:
    async with serving() as server, Client(server.url) as client:
        await client.version()
        server.break_next("POST", "/v1/envs/0/evaluate", fault, fault, fault)
        assert await client.evaluate() == server.verdict
        assert server.count("POST", "/v1/envs/0/evaluate") == 4


async def test_a_step_whose_answer_was_lost_is_unknown() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/step", reset_connection)
        with pytest.raises(ServerUnreachable, match=r"POST .*/step") as raised:
            await client.step(prediction="Action: wait()")
        assert raised.value.facts["outcome"] == "unknown"


async def test_a_step_that_could_not_connect_is_sent_when_the_server_is_back() -> None:
    async with serving() as server, Client(server.url) as client:
        await client.version()
        await server.stop()
        step = asyncio.create_task(client.step(actions=["x"]))
        await asyncio.sleep(0)
        assert not step.done()
        await server.start()
        assert (await step).actions[0].action == "x"
        assert server.count("POST", "/v1/envs/0/step") == 1


async def test_a_reset_refused_with_retry_after_is_asked_again_no_sooner() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/reset", answering(QueueFull("Full.", retry_after=0.4)))
        before = time.monotonic()
        job = await client.submit_reset()
        assert time.monotonic() - before >= 0.4
        assert job.id == "job-1"


async def test_retry_after_beyond_the_deadline_raises_at_once() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/reset", answering(QueueFull("Full.", retry_after=100)))
        async with asyncio.timeout(5):
            with pytest.raises(QueueFull) as raised:
                await client.reset(timeout=50)
        assert raised.value.retry_after == 100


async def test_a_reset_whose_answer_was_lost_is_not_sent_twice() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/reset", reset_connection)
        with pytest.raises(ServerUnreachable) as raised:
            await client.reset()
        assert raised.value.facts["outcome"] == "unknown"
        assert server.count("POST", "/v1/envs/0/reset") == 1


async def test_a_read_is_tried_again() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("GET", "/v1/envs", reset_connection, draining, saying(504, "gateway timeout"))
        assert [env.id for env in await client.envs()] == [0]
        assert server.count("GET", "/v1/envs") == 4


@pytest.mark.parametrize(
    ("method", "path", "call"),
    [
        pytest.param("GET", "/v1/envs", lambda client: client.envs(timeout=0.3), id="read"),
        pytest.param("POST", "/v1/envs/0/step", lambda client: client.step(actions=["x"], timeout=0.3), id="step"),
        pytest.param("POST", "/v1/envs/0/evaluate", lambda client: client.evaluate(timeout=0.3), id="evaluate"),
    ],
)
async def test_the_timeout_bounds_a_call_that_is_never_answered(
    method: str, path: str, call: Callable[[Client], Awaitable[Any]]
) -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next(method, path, silent)
        before = time.monotonic()
        with pytest.raises(ServerUnreachable, match="no answer in time"):
            await call(client)
        assert time.monotonic() - before < 3


async def test_a_body_without_end_is_cut_off() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("GET", "/v1/envs", endless_body)
        with pytest.raises(InfraError, match="more than"):
            await client.envs()


# Verdicts and evidence


async def test_a_verdict_without_a_score_is_an_answer_and_no_error() -> None:
    async with serving() as server, Client(server.url) as client:
        server.verdict = verdict(**NO_SCORE)
        found = await client.env(0).evaluate()
    assert (found.status, found.score, found.mask) == (VerdictStatus.INFRA_ERROR, None, True)
    assert (found.fault, found.code) == (Blame.INFRA, "guest_unreachable")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"score": 0.0} | {"status": "infra_error"}, id="a number for a failure"),
        pytest.param({"score": None}, id="scored without a number"),
        pytest.param({"provenance": None}, id="resting on nothing"),
    ],
)
async def test_a_verdict_that_cannot_be_trusted_is_an_error(changes: dict[str, Any]) -> None:
    async with serving() as server, Client(server.url) as client:
        body = json.dumps(server.verdict.model_dump(mode="json") | changes)
        server.break_next("POST", "/v1/envs/0/evaluate", saying(200, body, "application/json"))
        with pytest.raises(InfraError, match="cannot read"):
            await client.evaluate()


async def test_the_verdict_of_an_episode_can_be_had_later() -> None:
    async with serving() as server, Client(server.url) as client:
        assert await client.verdict("e1") == server.verdict
        for other in ("e2", "e1/../e1", "?"):
            with pytest.raises(NotFound):
                await client.verdict(other)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_bundle_is_saved_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    async with serving() as server, Client(server.url) as client:
        server.bundles = {"e2": b"\1" * 5_000_001, "e1": b""}
        assert await client.episodes() == ["e2", "e1"]
        (tmp_path / "old").write_bytes(b"old")
        assert await client.bundle("e2", tmp_path / "old") == tmp_path / "old"
        assert await client.bundle("e1", tmp_path) == tmp_path / "e1.tar"
    assert _files(tmp_path) == {"old": b"\1" * 5_000_001, "e1.tar": b""}


@pytest.mark.parametrize("fault", [half_a_bundle, reset_connection, draining, saying(502, "bad gateway")])
async def test_a_bundle_that_was_cut_off_is_fetched_again_from_its_beginning(fault: Fault, tmp_path: Path) -> None:
    async with serving() as server, Client(server.url) as client:
        server.bundles["e1"] = b"\1\2" * 2_000_000
        server.break_next("GET", "/v1/episodes/e1/bundle", fault)
        await client.bundle("e1", tmp_path)
        assert server.count("GET", "/v1/episodes/e1/bundle") == 2
    assert _files(tmp_path) == {"e1.tar": b"\1\2" * 2_000_000}


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        pytest.param(answering(NotFound("It was cleared away.")), NotFound, "cleared away", id="none"),
        pytest.param(endless_bundle, InfraError, "more than 5000000 bytes", id="without end"),
        pytest.param(bundle_that_stalls, ServerUnreachable, "no answer in time", id="stalls"),
        pytest.param(saying(200, "<html>"), InfraError, "text/html where application/x-tar", id="something else"),
    ],
)
async def test_a_bundle_that_cannot_be_had_leaves_the_folder_as_it_was(
    fault: Fault, error: type[EnvdError], words: str, tmp_path: Path
) -> None:
    old = tmp_path / "bundle.tar"
    old.write_bytes(b"old")
    async with serving() as server, Client(server.url) as client:
        server.break_next("GET", "/v1/episodes/e1/bundle", fault)
        with pytest.raises(error, match=words):
            await client.bundle("e1", old, limit=5_000_000, timeout=1)
    assert _files(tmp_path) == {"bundle.tar": b"old"}


@pytest.mark.parametrize(
    "to",
    [
        pytest.param("nowhere/bundle.tar", id="no such folder"),
        pytest.param("file/bundle.tar", id="in a file"),
        pytest.param("x" * 300, id="name too long"),
        pytest.param("pipe", id="no ordinary file"),
    ],
)
async def test_a_disk_that_does_not_take_a_bundle_is_not_taken_for_a_server_that_is_away(
    to: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    async with serving() as server, Client(server.url) as client:
        server.bundles["e1"] = b"tar"
        with pytest.raises(RequestError, match="cannot be written"):
            await client.bundle("e1", tmp_path / to)
        assert server.count("GET", "/v1/episodes/e1/bundle") == 1
    assert (tmp_path / "pipe").is_fifo()


async def test_leaving_a_download_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("GET", "/v1/episodes/e1/bundle", bundle_that_stalls)
        download = asyncio.create_task(client.bundle("e1", tmp_path))
        await eventually(lambda: any(_files(tmp_path).values()))
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
    assert _files(tmp_path) == {}


# Who is there


async def test_nobody_there_is_said_within_seconds_with_what_to_check() -> None:
    async with serving() as server:
        url = server.url
    async with Client(url) as client:
        before = time.monotonic()
        with pytest.raises(ServerUnreachable, match="Is envd running") as raised:
            await client.envs()
        assert time.monotonic() - before < 8
    assert raised.value.facts == {"outcome": "not_sent", "host": "127.0.0.1", "port": int(url.rpartition(":")[2])}


async def test_a_name_that_does_not_resolve_is_told_from_a_closed_port() -> None:
    async with Client("http://no-such-host.invalid:15001", patience=0) as client:
        with pytest.raises(ServerUnreachable, match="cannot be resolved"):
            await client.envs()


async def test_something_else_on_the_port_is_told_from_envd() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("GET", "/v1/envs", saying(404, "<h1>nginx</h1>"), saying(200, "<html>"), saying(200, "[]"))
        with pytest.raises(RequestError, match="404: <h1>nginx"):
            await client.envs()
        for _ in range(2):
            with pytest.raises(InfraError, match="cannot read"):
                await client.envs()


async def test_what_does_not_speak_http_is_unreachable() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", patience=0) as client:
        with pytest.raises(ServerUnreachable):
            await client.envs()


@pytest.mark.parametrize("url", ["localhost:15001", "ftp://host", "http://", "/path"])
def test_an_address_that_is_none_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(SettingsError, match="http://127"):
        Client(url)


def test_the_address_comes_from_the_argument_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ENVD_URL", raising=False)
    assert Client().url == "http://127.0.0.1:15001"
    monkeypatch.setenv("ENVD_URL", "http://desk:9/")
    assert (Client().url, Client("http://other:1").url) == ("http://desk:9", "http://other:1")


async def test_proxy_variables_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with serving() as server, Client(server.url) as client:
        assert await client.version() == {"version": "0.1.0"}


# The plain calls


async def test_the_readme_snippet_works() -> None:
    async with serving() as server, Client(server.url) as client, asyncio.TaskGroup() as group:
        env = client.env(0)
        reset = group.create_task(env.reset())
        await server.until(lambda: server.streams)
        server.advance("job-1", state=JobState.SUCCEEDED)
        await reset
        result = await env.act("pyautogui.click(960, 540)")
        clicked = await env.click(960, 540)
        assert result.actions == clicked.actions
        assert await env.screenshot() == PNG
    assert server.seen[-2][2]["body"] == {"actions": ["pyautogui.click(960, 540)"], "include_screenshot": True}


async def test_ready_is_an_answer_even_when_it_is_no() -> None:
    async with serving() as server, Client(server.url) as client:
        ready = await client.ready()
        assert (ready.ready, ready.reasons) == (False, ("no desktop yet",))


async def test_queue_jobs_and_state_are_typed() -> None:
    async with serving() as server, Client(server.url) as client:
        first, second = server.new_job(state=JobState.BOOTING), server.new_job(env=1)
        queue = await client.queue()
        assert (queue.booting, queue.waiting, queue.limit) == ((first,), (second,), 1024)
        assert await client.jobs(env=1) == [second]
        assert await client.jobs(state=JobState.BOOTING) == [first]
        assert await client.job(first.id) == first
        assert (await client.env_state(2)).id == 2
        assert await client.history() == []


async def test_a_problem_becomes_the_error_it_was() -> None:
    async with serving() as server, Client(server.url) as client:
        server.break_next("POST", "/v1/envs/0/evaluate", answering(NoEpisode("Reset it first.")))
        with pytest.raises(NoEpisode, match="Reset it first"):
            await client.evaluate()


async def test_what_is_no_json_is_refused_before_it_is_sent() -> None:
    async with serving() as server, Client(server.url) as client:
        with pytest.raises(InvalidRequest, match="JSON"):
            await client.reset({"id": float("nan")})
        assert server.seen == []


async def test_a_newer_servers_fields_are_ignored() -> None:
    async with serving() as server, Client(server.url) as client:
        job = server.new_job()
        newer = json.dumps(job.model_dump(mode="json") | {"colour": "blue"})
        server.break_next("GET", "/v1/jobs/job-1", saying(200, newer, "application/json"))
        assert await client.job("job-1") == job


async def test_a_hundred_watchers_do_not_keep_a_call_waiting() -> None:
    async with serving() as server, Client(server.url) as client:
        server.new_job()
        async with asyncio.TaskGroup() as group:
            for _ in range(120):
                group.create_task(_collect(client.watch("job-1")))
            await server.until(lambda: server.streams == 120)
            assert isinstance(await client.job("job-1", timeout=5), Job)
            server.advance("job-1", state=JobState.SUCCEEDED)


async def test_a_drain_is_asked_for_followed_and_seen_to_its_end(tmp_path: Path) -> None:
    async with process(tmp_path / "state") as (running, _), Client(running.url) as client:
        await client.alive()
        assert await client.drained() == Drain(draining=False)
        await client.reset()
        told = await client.drain(600)
        assert (told.draining, told.envs) == (True, (0,))
        assert told.left_s is not None
        assert 500 < told.left_s <= 600
        assert (await client.drain(0)).left_s == 0
        await running.ended()
        with pytest.raises(ServerUnreachable):
            await client.drained(patience=0)


async def test_a_lease_that_somebody_else_holds_is_played_under_by_its_id(tmp_path: Path) -> None:
    async with process(tmp_path / "state") as (running, session), Client(running.url) as client:
        async with session.post(f"{running.url}/v1/leases", json={"owner": "alice"}) as answer:
            lease_id = (await answer.json())["id"]
        [lease] = await client.leases()
        assert (lease.owner, lease.envs) == ("alice", (0,))
        with pytest.raises(Leased):
            await client.submit_reset()
        holder = client.under(lease_id)
        assert (await holder.env(0).submit()).env == 0
        with pytest.raises(SettingsError):
            client.under("no id\n")


async def test_closing_twice_is_fine() -> None:
    transport = Transport("http://127.0.0.1:1")
    await transport.aclose()
    await transport.aclose()
