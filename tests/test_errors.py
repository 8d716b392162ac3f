"""The error tree: one code each, and every error survives the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from envd import errors
from envd.errors import EnvdError, Fault, Problem, from_problem

CLASSES = sorted(
    (thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, EnvdError)),
    key=lambda cls: cls.code,
)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)


def over_the_wire(error: EnvdError) -> Problem:
    return Problem.model_validate_json(error.problem("/v1/jobs/job-1").model_dump_json(exclude_none=True))


def test_a_code_belongs_to_one_class() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(codes) == len(set(codes))
    assert len(CLASSES) > 30


@every_class
def test_a_class_has_words_of_its_own(cls: type[EnvdError]) -> None:
    assert cls.code.isidentifier()
    assert cls.code == cls.code.lower()
    assert cls is EnvdError or {"code", "title"} <= vars(cls).keys()


@every_class
def test_a_class_says_what_causes_it_and_what_to_do(cls: type[EnvdError]) -> None:
    assert {"cause", "remedy"} <= vars(cls).keys()
    for words in (cls.cause, cls.remedy):
        assert words[0].isupper() or words[0] == "`"
        assert words.endswith(".")
        assert "  " not in words


@every_class
def test_an_error_comes_back_from_the_wire_as_it_was(cls: type[EnvdError]) -> None:
    error = cls("It broke.", hint="Mend it.", retry_after=2.5, step=3, probes={"screenshot": "fail: flat"})
    back = from_problem(over_the_wire(error))
    assert type(back) is cls
    assert (back.detail, back.hint, back.retry_after) == ("It broke.", "Mend it.", 2.5)
    assert back.facts == {"step": 3, "probes": {"screenshot": "fail: flat"}}


@every_class
def test_a_problem_says_the_same_as_its_class(cls: type[EnvdError]) -> None:
    problem = json.loads(over_the_wire(cls("It broke.")).model_dump_json(exclude_none=True))
    assert problem == {
        "type": f"/errors#{cls.code}",
        "title": cls.title,
        "status": cls.status,
        "detail": "It broke.",
        "code": cls.code,
        "fault": cls.fault,
        "retryable": cls.retryable,
        "hint": "",
        "instance": "/v1/jobs/job-1",
    }


@every_class
def test_the_status_fits_the_fault(cls: type[EnvdError]) -> None:
    allowed = {
        Fault.CLIENT: {400, 401, 403, 404, 405, 408, 409, 410, 413, 421, 422, 423, 429, 505},
        Fault.CAPACITY: {503},
        Fault.INFRA: {500, 503},
        Fault.TASK: {422, 500, 503},
    }
    assert cls.status in allowed[cls.fault]


@pytest.mark.parametrize(
    ("fault", "cls"),
    [
        (Fault.CLIENT, errors.RequestError),
        (Fault.CAPACITY, errors.CapacityError),
        (Fault.TASK, errors.TaskError),
        (Fault.INFRA, errors.InfraError),
    ],
)
def test_a_code_of_a_newer_server_becomes_a_plain_error_of_its_fault(fault: Fault, cls: type[EnvdError]) -> None:
    known = EnvdError("New.").problem().model_dump() | {"code": "from_the_future", "fault": fault}
    assert type(from_problem(Problem.model_validate(known))) is cls


@pytest.mark.parametrize(
    ("facts", "text"), [({"hint": "Mend it."}, "It broke. Mend it."), ({}, "It broke.")], ids=["hint", "no hint"]
)
def test_an_error_reads_as_what_happened_and_what_to_do(facts: dict[str, Any], text: str) -> None:
    assert str(EnvdError("It broke.", **facts)) == text
