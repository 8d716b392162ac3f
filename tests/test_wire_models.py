"""All that comes in from outside, made up at random: it becomes what it should be, or one error that has a name."""

from __future__ import annotations

import io
import json
import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ValidationError
from serving import serving

from envd.access import Access, access_of
from envd.app.bodies import LONGEST_FIELD, invalid
from envd.app.legacy import LegacyReset, LegacyStep, Slot
from envd.boot.probes import judge_picture
from envd.client.answers import Answer, retry_after
from envd.client.follow import _event
from envd.client.sse import Message, SseParser
from envd.errors import (
    EnvdError,
    GuestMisbehaved,
    InfraError,
    Problem,
    SettingsError,
    Unauthorized,
    error_classes,
    from_problem,
)
from envd.events import EventLog
from envd.guest.client import parse_json
from envd.models import LinkRequest, ProbeResult, ResetRequest, StepRequest
from envd.settings import VARIABLES, Settings, effective, load
from envd.settle import differs

often = settings(max_examples=200, derandomize=True, deadline=None, database=None)

TEXT = st.text(max_size=20)
NUMBERS = st.integers() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
REQUESTS: list[type[BaseModel]] = [ResetRequest, StepRequest, LinkRequest, LegacyReset, LegacyStep, Slot]


def bodies(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Fields of the model, with anything in them, and others."""
    names = st.sampled_from(list(model.model_fields)) | TEXT
    likely = JSON | st.sampled_from([1, 60, "1", "inf", [1, 2], ["WAIT"], "actions", "/v1/envs", {}])
    return st.dictionaries(names, likely, max_size=5) | JSON


@pytest.mark.parametrize("model", REQUESTS)
def test_a_body_is_a_request_that_can_be_written_again_or_one_error(model: type[BaseModel]) -> None:
    @often
    @given(bodies(model))
    def check(body: Any) -> None:
        try:
            asked = model.model_validate(body)
        except ValidationError as error:
            problem = invalid(error).problem()
            assert problem.status == 422
            assert problem.detail
            json.dumps(problem.model_dump(mode="json"), allow_nan=False)
            return
        fields = asked.model_dump()
        # What is of any kind is the task, which is looked at by itself.
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in fields.values())
        again = model.model_validate(fields | {name: {} for name in fields.keys() & {"task", "task_config"}})
        again = model.model_validate_json(again.model_dump_json())
        assert again.model_dump(exclude={"task", "task_config"}) == asked.model_dump(exclude={"task", "task_config"})

    check()


async def test_a_body_of_very_many_unknown_fields_is_one_short_problem() -> None:
    body = json.dumps({f"a{number}": 1 for number in range(200_000)}).encode()
    async with serving() as served:
        began = time.monotonic()
        status, problem, _ = await served.ask("POST", "/v1/envs/0/reset", data=io.BytesIO(body))
        assert (status, problem["code"], len(problem["errors"])) == (422, "invalid_request", 1)
        assert time.monotonic() - began < 5
        status, problem, _ = await served.ask("POST", "/v1/envs/0/reset", {"x" * 100_000: 1})
        assert status == 422
        assert problem["errors"][0]["field"] == "x" * LONGEST_FIELD
        assert len(problem["detail"]) < 1000


@pytest.mark.parametrize(("empty", "most"), [(b"[]", 50_000), (b'{"a": {}}', 25_000)], ids=["lists", "objects"])
async def test_a_body_of_very_many_parts_is_not_taken_apart(empty: bytes, most: int) -> None:
    async with serving() as served:
        for count, code in ((most, "task_invalid"), (3 * most, "malformed_json")):
            body = io.BytesIO(b'{"task": {"id": "t-1", "x": [' + (empty + b",") * count + b"1]}}")
            _, problem, _ = await served.ask("POST", "/v1/envs/0/reset", data=body)
            assert problem["code"] == code


@pytest.mark.parametrize("name", VARIABLES)
def test_a_setting_is_one_that_can_be_told_or_one_error(name: str) -> None:
    values = (
        st.text(st.characters(exclude_characters="\0"), max_size=20)
        | NUMBERS.map(str)
        | st.sampled_from(
            ["inf", "nan", "1e999", "9" * 400, "9" * 400 + "G", "~nobody-there/x", "~", "/\udcff", ",", "1x1"]
        )
    )

    @settings(often, max_examples=40)
    @given(values)
    @example("9" * 400 + "G")
    @example("~nobody-there/x")
    @example("/\udcff")
    @example("inf")
    def check(value: str) -> None:
        loaded = loaded_or_refused({"HOME": "/nowhere", name: value})
        if isinstance(loaded, SettingsError):
            assert name in str(loaded)
            return
        told = effective(loaded)
        assert told.keys() == VARIABLES.keys()
        json.dumps(told, ensure_ascii=False, allow_nan=False).encode()

    check()


def loaded_or_refused(environ: dict[str, str]) -> Settings | SettingsError:
    try:
        return load(environ, env_file=None)
    except SettingsError as error:
        return error


HEADERS = st.text(st.characters(max_codepoint=0xFF), max_size=40)
ADDRESSES = st.sampled_from(["127.0.0.1", "::1", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "192.168.0.1"])
ACCESSES = [
    access_of(load({"HOME": "/nowhere", **environ}, env_file=None), {})
    for environ in (
        {},
        {"ENVD_TOKEN": "t" * 20, "ENVD_PROXIES": "10.0.0.0/8,fe80::/10"},
        {"ENVD_ALLOW": "192.168.0.0/24", "ENVD_PROXIES": "10.0.0.0/8"},
        {"ENVD_INSECURE": "1", "ENVD_PROXIES": "0.0.0.0/1"},
    )
]


@often
@given(
    st.sampled_from(ACCESSES),
    ADDRESSES,
    HEADERS | HEADERS.map("Bearer {}".format),
    st.lists(HEADERS | ADDRESSES, max_size=3),
    TEXT | st.builds("{}.{}".format, st.integers(), TEXT),
    TEXT,
)
def test_whoever_asks_is_somebody_or_refused(
    access: Access, peer: str, authorization: str, forwarded: list[str], link: str, path: str
) -> None:
    try:
        caller = access.caller(peer, authorization, forwarded, link, path)
    except Unauthorized:
        return
    # No token and no link that was made up is a right one.
    assert caller.how in ("network", "open")


@often
@given(HEADERS | st.sampled_from(["[::1", "[", "]", ":", "@", "a@[::1]:1", "%", "1.2.3.4.5"]))
def test_any_host_is_known_or_not(host: str) -> None:
    for access in ACCESSES:
        assert access.knows_host(host) in (True, False)


async def test_any_last_event_id_is_a_place_in_the_log_or_none() -> None:
    log = EventLog()
    for _ in range(5):
        log.publish("note")

    @often
    @given(TEXT | st.builds(f"{log.epoch}-{{}}".format, st.integers() | TEXT) | HEADERS)
    @example(f"{log.epoch}-٣")
    @example(f"{log.epoch}-{'9' * 5000}")
    def check(given: str) -> None:
        sequence = log.sequence_of(given)
        assert sequence is None or (0 <= sequence <= 5 and int(given.rpartition("-")[2]) == sequence)

    check()


PROBLEMS = st.fixed_dictionaries(
    {
        "type": TEXT,
        "title": TEXT,
        "status": st.integers(100, 599),
        "detail": TEXT,
        "code": st.sampled_from(list(error_classes())) | TEXT,
        "fault": st.sampled_from(["infra", "capacity", "task", "agent", "client"]),
        "retryable": st.booleans(),
    },
    optional={"hint": TEXT, "retry_after": NUMBERS, "instance": TEXT},
)
FACTS = st.dictionaries(
    st.sampled_from(["self", "detail", "behind", "cause", "errors", "args"]) | TEXT, JSON, max_size=3
)


@often
@given(PROBLEMS, FACTS, st.sampled_from(["application/problem+json", "application/json", "text/html", ""]))
@example(
    {"type": "", "title": "", "status": 500, "detail": "d", "code": "setup_failed", "fault": "task", "retryable": True},
    {"self": 1, "behind": "x"},
    "application/problem+json",
)
def test_any_refusal_of_a_server_is_an_error_of_ours(said: Any, facts: dict[str, Any], kind: str) -> None:
    body = json.dumps({**facts, **said} if isinstance(said, dict) else said).encode()
    error = Answer(500, kind, None, body, "GET /x").error()
    assert isinstance(error, EnvdError)
    assert error.retry_after is None or 0 <= error.retry_after <= 86_400


@often
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 200_000)
@example(b"\xff")
def test_any_answer_of_a_server_is_read_or_an_error_of_ours(body: bytes) -> None:
    answer = Answer(200, "application/json", None, body, "GET /x")
    assert isinstance(Answer(500, "application/problem+json", None, body, "GET /x").error(), EnvdError)
    try:
        assert isinstance(answer.object(), dict)
    except InfraError:
        pass


def test_a_problem_comes_out_of_the_wire_as_it_went_in() -> None:
    for code, cls in error_classes().items():
        problem = cls("what", hint="do", retry_after=3.0, cause="b").problem("/x")
        again = from_problem(Problem.model_validate_json(problem.model_dump_json()))
        assert (type(again), again.problem("/x")) == (cls, problem), code


@often
@given(TEXT | NUMBERS.map(str) | st.datetimes().map(lambda when: when.strftime("%a, %d %b %Y %H:%M:%S GMT")))
@example("Mon, 01 Jan 2020 00:00:00 +99999999999999999999")
@example("Mon, 01 Jan 9999999999999999999999999 00:00:00 GMT")
@example("nan")
@example("1e999")
def test_any_retry_after_is_at_most_a_day_or_none(value: str) -> None:
    seconds = retry_after({"Retry-After": value})
    assert seconds is None or 0 <= seconds <= 86_400


@often
@given(JSON.map(json.dumps) | TEXT, st.sampled_from(["snapshot", "state", "gap", "server-shutdown", "x"]), TEXT)
@example("[" * 200_000, "state", "")
def test_any_event_of_a_server_is_read_or_an_error_of_ours(data: str, kind: str, event_id: str) -> None:
    try:
        event = _event(Message(kind, data, event_id))
    except InfraError:
        return
    assert (event.kind, event.id) == (kind, event_id)


@often
@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\r\n\0"), max_size=10)), max_size=5), st.data())
def test_what_is_sent_as_events_is_read_however_it_is_cut(sent: list[tuple[str]], data: st.DataObject) -> None:
    stream = "".join(f"id: {number}\ndata: {text}\n\n" for number, (text,) in enumerate(sent)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    parser = SseParser()
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    messages = [message for piece in pieces for message in parser.feed(piece)]
    assert messages == [Message("message", text, str(number)) for number, (text,) in enumerate(sent)]


@often
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_json_of_a_guest_can_be_said_again_or_is_a_value_error(raw: bytes) -> None:
    try:
        value = parse_json(raw)
    except ValueError:
        return
    json.dumps(value, ensure_ascii=False).encode()


def picture(kind: str) -> bytes:
    made = io.BytesIO()
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(made, kind)
    return made.getvalue()


PICTURES = [picture("PNG"), picture("JPEG")]


@often
@given(
    st.sampled_from(PICTURES), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=6), st.integers(0, 50)
)
def test_any_picture_is_judged_or_refused(whole: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    spoilt = bytearray(whole)
    for at, byte in changes:
        spoilt[at % len(spoilt)] = byte
    given = bytes(spoilt[: len(spoilt) - cut])
    assert judge_picture(given, (64, 48))[0] in (ProbeResult.OK, ProbeResult.FAIL)
    try:
        assert differs(whole, given) in (True, False)
    except GuestMisbehaved:
        pass
