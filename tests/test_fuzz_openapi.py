"""What the API's own document lets anybody send, and what it does not, against a daemon of its own: every answer is one
that the document tells of, every refusal a problem that `/errors` explains, and none takes long."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from daemon_process import daemon, ended_job, reset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from envd.app.docs import openapi_document

EXAMPLES = 25
"""Of each operation and kind: what fits the document with ids that exist, what fits it, and what does not."""
DEADLINE = 20.0
"""Seconds within which every request is answered; a loaded machine takes a few over what waits for nothing."""
QUICK = {
    "ENVD_ENVS": "3",
    "ENVD_SCREEN": "320x240",
    "ENVD_LEGACY_WAIT": "1",
    "ENVD_ACTION_PAUSE": "0",
    "ENVD_WAIT_SECONDS": "0",
    "ENVD_SETTLE_QUIET": "0",
    "ENVD_SETUP_TIMEOUT": "5",
    "ENVD_EVALUATION_TIMEOUT": "10",
    "ENVD_REQUEST_RATE": "0",
    "ENVD_OFFLINE": "1",
    "ENVD_LOG_FORMAT": "json",
}
NDJSON = "application/x-ndjson"
STREAMS = ("text/event-stream", NDJSON)
LONGEST_WAIT = 0.2
"""Seconds that a request may itself ask to be kept waiting: pauses and long polls are other tests' matter."""

DOCUMENT: dict[str, Any] = json.loads(json.dumps(openapi_document()))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
ENDS = "POST /v1/drain"
"""The one that ends the daemon: other tests' matter."""
EVERY = [found.ok() for found in SCHEMA.get_all_operations() if isinstance(found, Ok)]
OPERATIONS = [operation for operation in EVERY if operation.label != ENDS]


@dataclass
class Running:
    """The daemon that is tried, with ids that it knows."""

    url: str = ""
    known: tuple[dict[str, str], ...] = ()
    codes: frozenset[str] = frozenset()
    log: Callable[[], list[dict[str, Any]]] = list


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """It lives on a loop of its own, since what tries it blocks."""
    found, up, over = Running(), threading.Event(), threading.Event()
    home = tmp_path_factory.mktemp("fuzzed")

    async def live() -> None:
        try:
            async with daemon(home / "state", env={**QUICK, "HOME": str(home)}) as (process, session):
                job = await ended_job(session, process.url, (await reset(session, process.url, 1))["id"])
                found.url, found.log = process.url, process.records
                ids = {"job": job["id"], "episode": job["episode_id"]}
                found.known = tuple({"env": env, **ids} for env in ("0", "1", "2"))
                async with session.get(f"{process.url}/errors") as page:
                    found.codes = frozenset(re.findall(r'<h3 id="(\w+)"', await page.text()))
                up.set()
                await asyncio.to_thread(over.wait)
        finally:
            up.set()

    thread = threading.Thread(target=asyncio.run, args=(live(),))
    thread.start()
    try:
        assert up.wait(60)
        assert found.url, "the daemon did not start"
        yield found
    finally:
        over.set()
        thread.join(30)


@pytest.mark.parametrize("operation", [pytest.param(one, id=one.label) for one in OPERATIONS])
def test_every_answer_is_one_that_the_document_tells_of(
    operation: Any, running: Running, record_property: Callable[[str, object], None]
) -> None:
    answers: Counter[str] = Counter()
    with requests.Session() as session:

        def attempt(case: Any) -> None:
            answers[tried(case, running, session)] += 1

        fitting = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        bounded(st.builds(with_known_ids, fitting, st.sampled_from(running.known)), attempt)
        bounded(fitting, attempt)
        with suppress(Unsatisfiable):  # any text fits what may be any text
            bounded(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), attempt)
    record_property("tried", dict(answers))
    assert set(answers) - {"not sent"}


def test_no_operation_is_left_out() -> None:
    assert len(EVERY) == sum(len(item) for item in DOCUMENT["paths"].values())
    assert len(OPERATIONS) == len(EVERY) - 1


def test_nothing_of_all_that_was_a_mistake_of_the_daemons(running: Running) -> None:
    assert requests.get(f"{running.url}/livez", timeout=DEADLINE).status_code == 200
    troubles = [line for line in running.log() if line["level"] in ("error", "critical") or "exception" in line]
    assert troubles == []


def bounded(cases: st.SearchStrategy[Any], attempt: Callable[[Any], None]) -> None:
    """The same cases every time. None is made smaller: the daemon remembers what it was sent."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        attempt(case)

    run()


def with_known_ids(case: Any, known: dict[str, str]) -> Any:
    case.path_parameters = {name: known.get(name, "x") for name in case.path_parameters or {}}
    for holder in (case.body, case.query):
        if isinstance(holder, dict) and "slot_id" in holder:
            holder["slot_id"] = int(known["env"])
    return case


def impatient(case: Any) -> None:
    """Take the waits out that it asks for."""
    for holder, name in ((case.body, "pause_s"), (case.body, "wait_s"), (case.query, "wait")):
        if isinstance(holder, dict) and isinstance(holder.get(name), int | float):
            holder[name] = min(holder[name], LONGEST_WAIT)
    if case.headers and case.headers.get("Prefer", "").startswith("wait="):
        case.headers["Prefer"] = "wait=0"


def tried(case: Any, running: Running, session: requests.Session) -> str:
    """What became of it: a status, with the code of its problem."""
    impatient(case)
    try:
        sent = case.as_transport_kwargs(base_url=running.url)
        sent.pop("timeout", None)
        began = time.monotonic()
        with session.request(**sent, timeout=DEADLINE, stream=True, allow_redirects=False) as answer:
            kind = answer.headers.get("Content-Type", "").partition(";")[0]
            # A stream goes on: its beginning is enough.
            body = next(answer.iter_content(65_536), b"") if kind in STREAMS else answer.content
    except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
        return "not sent"
    assert time.monotonic() - began < DEADLINE
    return judged(answer.status_code, kind, body, case, running.codes)


def judged(status: int, kind: str, body: bytes, case: Any, codes: frozenset[str]) -> str:
    told = case.operation.definition.raw["responses"]
    if str(status) in told:
        content = told[str(status)].get("content")
        if content is None:
            assert (kind, body) == ("", b"")
            return str(status)
        assert kind in content, (status, kind)
        if kind == NDJSON:
            lines = body.rpartition(b"\n")[0].split(b"\n")  # the last may be cut
            assert all("event" in json.loads(line) for line in lines if line)
        elif kind.endswith("json"):
            fits(content[kind].get("schema", {}), json.loads(body))
        return str(status)
    assert status >= 400
    assert kind == "application/problem+json", (status, kind, body[:300])
    problem = json.loads(body)
    fits({"$ref": "#/components/schemas/Problem"}, problem)
    assert problem["status"] == status
    assert problem["code"] in codes
    assert problem["code"] != "internal_error", problem
    assert "Traceback" not in body.decode()
    return f"{status} {problem['code']}"


def fits(schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)
