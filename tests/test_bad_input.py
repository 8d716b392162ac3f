"""What nobody should send: each is answered by one clear problem, and leaves everything as it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import pytest
import requests
from serving import CLICK, Served, raw_connection, serving

from envd.drivers.sim import Behaviour
from envd.errors import Fault
from envd.guest.client import parse_json

RESET, STEP = "/v1/envs/0/reset", "/v1/envs/0/step"
OLD_RESET, OLD_STEP = "/env/reset", "/env/step"
DEEP = b'{"task": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}"
JUST_TOO_DEEP = b'{"task": {"a": ' + b"[" * 99 + b"]" * 99 + b"}}"
NAP = {"type": "sleep", "parameters": {"seconds": 1}}


class Bad(NamedTuple):
    """One request, and what it must be answered with. `field` is the first field that the problem names."""

    path: str
    body: bytes | Any
    status: int
    code: str
    field: str = ""
    method: str = "POST"


TABLE = {
    "no json": Bad(RESET, b"{", 400, "malformed_json"),
    "no json, old": Bad(OLD_RESET, b"task_config=1", 400, "malformed_json"),
    "no text": Bad(RESET, b"\xff\xfe\x00", 400, "malformed_json"),
    "NaN": Bad(RESET, b'{"task": {"x": NaN}}', 400, "malformed_json"),
    "infinity": Bad(STEP, b'{"actions": ["WAIT"], "pause_s": -Infinity}', 400, "malformed_json"),
    "deep": Bad(RESET, DEEP, 400, "malformed_json"),
    "just too deep": Bad(RESET, JUST_TOO_DEEP, 400, "malformed_json"),
    "deep, old": Bad(OLD_RESET, DEEP.replace(b"task", b"task_config"), 400, "malformed_json"),
    "half a character": Bad(RESET, b'{"task": {"id": "\\ud800"}}', 400, "malformed_json"),
    "half a character as a name": Bad(OLD_RESET, b'{"\\udfff": 1}', 400, "malformed_json"),
    "half a character, raw": Bad(RESET, b'{"task": {"id": "\xed\xa0\x80"}}', 400, "malformed_json"),
    "huge number": Bad(RESET, b'{"task": {"id": ' + b"9" * 5000 + b"}}", 400, "malformed_json"),
    "two documents": Bad(RESET, b"{} {}", 400, "malformed_json"),
    "list": Bad(RESET, [], 422, "invalid_request", "body"),
    "string": Bad(OLD_STEP, "click", 422, "invalid_request", "body"),
    "null": Bad(OLD_RESET, None, 422, "invalid_request", "task_config"),
    "nothing, old": Bad(OLD_RESET, b"", 422, "invalid_request", "task_config"),
    "unknown field": Bad(RESET, {"task": {}, "taks": {}}, 422, "invalid_request", "taks"),
    "unknown field of a step": Bad(STEP, {"prediction": CLICK, "slot_id": 0}, 422, "invalid_request", "slot_id"),
    "list for a task": Bad(RESET, {"task": []}, 422, "invalid_request", "task"),
    "string for a task, old": Bad(OLD_RESET, {"task_config": "{}"}, 422, "invalid_request", "task_config"),
    "no steps at all": Bad(RESET, {"max_steps": 0}, 422, "invalid_request", "max_steps"),
    "word for a number": Bad(RESET, {"max_steps": "many"}, 422, "invalid_request", "max_steps"),
    "negative patience": Bad(RESET, {"queue_timeout_s": -1}, 422, "invalid_request", "queue_timeout_s"),
    "negative slot": Bad(OLD_STEP, {"slot_id": -1, "prediction": CLICK}, 422, "invalid_request", "slot_id"),
    "slot that is no number": Bad(OLD_STEP, {"slot_id": "a", "prediction": CLICK}, 422, "invalid_request", "slot_id"),
    "half a slot": Bad("/env/history_messages?slot_id=0.5", None, 422, "invalid_request", "slot_id", "GET"),
    "unknown slot": Bad(OLD_STEP, {"slot_id": 10**30, "prediction": CLICK}, 404, "unknown_env"),
    "unknown slot in a query": Bad("/env/history_messages?slot_id=7", None, 404, "unknown_env", method="GET"),
    "unknown slot, evaluate": Bad("/env/evaluate", {"slot_id": 7}, 404, "unknown_env"),
    "number for a prediction": Bad(OLD_STEP, {"prediction": 5}, 422, "invalid_request", "prediction"),
    "no prediction": Bad(OLD_STEP, {}, 422, "invalid_request", "prediction"),
    "neither": Bad(STEP, {}, 422, "invalid_request", "prediction"),
    "both": Bad(STEP, {"prediction": CLICK, "actions": ["WAIT"]}, 422, "invalid_request", "prediction"),
    "no action": Bad(STEP, {"actions": []}, 422, "invalid_request", "actions"),
    "empty action": Bad(STEP, {"actions": [""]}, 422, "invalid_request", "actions.0"),
    "number for an action": Bad(STEP, {"actions": ["WAIT", 3]}, 422, "invalid_request", "actions.1"),
    "too many actions": Bad(STEP, {"actions": ["WAIT"] * 65}, 422, "invalid_request", "actions"),
    "long action": Bad(STEP, {"actions": ["x" * 65_537]}, 422, "invalid_request", "actions.0"),
    "long pause": Bad(STEP, {"actions": ["WAIT"], "pause_s": 61}, 422, "invalid_request", "pause_s"),
    "endless pause": Bad(STEP, {"actions": ["WAIT"], "pause_s": "inf"}, 422, "invalid_request", "pause_s"),
    "large body": Bad(RESET, b" " * 200_000, 413, "body_too_large"),
    "large body, old": Bad(OLD_STEP, b"x" * 900_000, 413, "body_too_large"),
    "large body, evaluate": Bad("/v1/envs/0/evaluate", b"x" * 200_000, 413, "body_too_large"),
    "no such path": Bad("/env/destroy", {}, 404, "not_found"),
    "trailing slash": Bad("/health/", None, 404, "not_found", method="GET"),
    "large body, no such path": Bad("/nowhere", b"x" * 900_000, 404, "not_found"),
    "no such job": Bad("/v1/jobs/job-none", None, 404, "unknown_job", method="GET"),
    "no such job to cancel": Bad("/v1/jobs/job-none/cancel", b"x" * 900_000, 404, "unknown_job"),
    "job with an odd name": Bad("/v1/jobs/%0d%0aX-Evil:%201", None, 404, "unknown_job", method="GET"),
    "wrong method": Bad(RESET, None, 405, "method_not_allowed", method="GET"),
    "wrong method, old": Bad(OLD_STEP, None, 405, "method_not_allowed", method="DELETE"),
    "wrong method, read": Bad("/v1/envs", {}, 405, "method_not_allowed"),
    "made-up method": Bad("/health", None, 405, "method_not_allowed", method="BREW"),
    "unknown set-up": Bad(RESET, {"task": {"config": [{"type": "dance"}]}}, 422, "task_invalid", "config[0].type"),
    "set-up that is a number": Bad(OLD_RESET, {"task_config": {"config": [NAP, 5]}}, 422, "task_invalid", "config[1]"),
    "set-up that is a word": Bad(RESET, {"task": {"config": "none"}}, 422, "task_invalid", "config"),
    "instruction that is no text": Bad(RESET, {"task": {"instruction": 5}}, 422, "task_invalid", "instruction"),
    "endless id": Bad(RESET, {"task": {"id": "x" * 5000}}, 422, "task_invalid", "id"),
    "id that is a list": Bad(OLD_RESET, {"task_config": {"task_id": ["a"]}}, 422, "task_invalid", "task_id"),
}


async def state(served: Served) -> list[Any]:
    """What a bad request must not change."""
    return [(await served.get(path))[1] for path in ("/v1/envs", "/v1/queue", "/v1/jobs", "/v1/envs/0/history")]


async def send(served: Served, bad: Bad) -> tuple[int, Any, Mapping[str, str]]:
    if bad.method != "POST":
        return await served.ask(bad.method, bad.path)
    body = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    return await served.ask("POST", bad.path, data=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in TABLE.items()])
async def test_a_bad_request_is_one_clear_problem_and_changes_nothing(bad: Bad) -> None:
    async with serving(envs=2, body_limit=100_000) as served:
        desktop = await served.play()
        before = await state(served)
        status, problem, headers = await send(served, bad)
        assert await state(served) == before
        assert desktop.inputs == []
    assert headers["Content-Type"] == "application/problem+json"
    assert (status, problem["status"], problem["code"]) == (bad.status, bad.status, bad.code)
    assert problem["type"] == f"/errors#{bad.code}"
    assert problem["fault"] == (Fault.TASK if bad.code == "task_invalid" else Fault.CLIENT)
    assert problem["retryable"] is False
    assert problem["detail"]
    assert bad.field == (problem["errors"][0]["field"] if "errors" in problem else "")
    assert "Traceback" not in str(problem)
    assert "X-Evil" not in headers


async def test_the_problem_of_a_wrong_method_says_which_are_right() -> None:
    async with serving() as served:
        _, problem, headers = await send(served, TABLE["wrong method"])
    assert headers["Allow"] == "POST"
    assert "POST" in problem["hint"]


async def test_the_old_routes_ignore_what_they_do_not_know() -> None:
    async with serving() as served:
        extra = {"noise_probability": 0.5, "made_up": [1, {"a": None}]}
        assert (await served.post("/env/reset", {"task_config": {}, **extra}))[0] == 200
        assert (await served.post("/env/step", {"prediction": CLICK, **extra}))[0] == 200
        assert (await served.post("/env/history_messages", extra))[0] == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize("path", ["/env/step", "/v1/jobs/job-none/cancel", "/nowhere"])
async def test_a_client_that_sends_a_large_body_reads_its_answer(path: str, chunked: bool) -> None:
    """One that sends all before it reads, as `requests` does; also where the body is of no interest."""

    def post(url: str) -> int:
        body = (b"x" * 65_536 for _ in range(150)) if chunked else b"x" * 9_830_400
        return requests.post(url, data=body, timeout=20).status_code

    async with serving(body_limit=100_000) as served:
        for _ in range(3):
            assert await asyncio.to_thread(post, served.url + path) == (413 if path == "/env/step" else 404)


async def test_a_body_without_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envd.app.problems.REST_BYTES", 1_000_000)

    async def for_ever() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    async with serving(body_limit=100_000) as served:
        async with asyncio.timeout(10):
            async with served.http.post(served.url + "/env/step", data=for_ever()) as response:
                assert response.status == 413
        assert (await served.get("/livez"))[0] == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", id="endless header"
        ),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: 1\r\n\r\n", id="blank in a name"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", id="TLS"),
        pytest.param(b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", id="raw bytes in the path"),
        pytest.param(b"POST /env/step HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", id="negative length"),
        pytest.param(
            b"POST /env/step HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
            id="two lengths",
        ),
        pytest.param(
            b"POST /env/step HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="no chunk"
        ),
    ],
)
async def test_what_is_not_http_is_refused_and_the_connection_closes(request_bytes: bytes) -> None:
    """Said by hypercorn, before there is a request: the one place where an error has no problem document."""
    async with serving() as served:
        async with raw_connection(served.address) as (reader, writer), asyncio.timeout(5):
            writer.write(request_bytes)
            answer = await reader.read(-1)
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
        assert (await served.get("/livez"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"X-Request-ID": "x" * 9000}, id="long id"),
        pytest.param({"If-None-Match": "," * 9000}, id="commas"),
        pytest.param({"Last-Event-ID": "-" * 9000}, id="dashes"),
        pytest.param({"Content-Type": "application/xml", "Accept": "nothing/atall"}, id="other types"),
        pytest.param({"Cookie": "a=" + "b" * 9000, "Range": "bytes=5-", "Accept-Language": "\xe9"}, id="others"),
    ],
)
async def test_absurd_headers_change_nothing(headers: dict[str, str]) -> None:
    async with serving() as served:
        job = await served.reset()
        for path in ("/health", "/v1/envs/0", f"/v1/jobs/{job['id']}"):
            assert (await served.get(path, headers=headers))[0] == 200
        assert (await served.post("/env/step", {"prediction": CLICK}, headers=headers))[0] == 200


async def test_a_client_that_leaves_in_the_middle_of_its_body_changes_nothing() -> None:
    async with serving() as served:
        before = await state(served)
        async with raw_connection(served.address) as (_, writer):
            writer.write(
                b'POST /env/reset HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"task_config": {}}'
            )
            await writer.drain()
        assert (await served.get("/livez"))[0] == 200
        assert await state(served) == before


async def test_a_mistake_of_ours_is_a_500_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        monkeypatch.setattr(served.service, "all_envs", lambda: 1 / 0)
        status, problem, headers = await served.ask("GET", "/v1/envs")
        assert (status, problem["code"], problem["fault"]) == (500, "internal_error", "infra")
        assert headers["Content-Type"] == "application/problem+json"
        assert headers["X-Request-ID"] in problem["hint"]
        assert problem["detail"] == "The daemon made a mistake: ZeroDivisionError."
        assert (await served.get("/livez"))[0] == 200


async def test_a_guest_that_shows_broken_pictures_breaks_no_answer() -> None:
    troubled = Behaviour(spoil="/screenshot", bad=("half", "flat", "size", "garbage", "html"), trouble_s=0.2)
    async with serving(troubled) as served:
        await served.play()
        await asyncio.sleep(0.2)
        for _ in range(5):
            status, answer = await served.post(STEP, {"actions": ["WAIT"]})
            assert status in (200, 503)
            assert answer.get("code", "guest_misbehaved") == "guest_misbehaved"
        assert (await served.get("/v1/envs"))[0] == 200


@pytest.mark.parametrize(
    ("said", "understood"),
    [
        pytest.param(rb'{"output": "a\ud800b"}', {"output": "a?b"}, id="half a character"),
        pytest.param(b'{"output": "\xed\xa0\x80"}', {"output": "\ufffd" * 3}, id="half a character, raw"),
        pytest.param(b'{"output": "\xff"}', {"output": "\ufffd"}, id="no text"),
        pytest.param(rb'{"output": "\ud83d\ude00"}', {"output": "😀"}, id="a whole one"),
    ],
)
def test_what_a_guest_says_can_always_be_said_again(said: bytes, understood: object) -> None:
    assert parse_json(said) == understood


@pytest.mark.parametrize("said", [b"", b"{", b"[" * 100_000], ids=["nothing", "cut off", "deep"])
def test_what_a_guest_cannot_mean_is_a_value_error(said: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(said)
