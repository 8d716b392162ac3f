"""The API's own description: true to the routes, valid, and with examples that fit."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from serving import CLICK, Served, serving
from starlette.routing import Route, WebSocketRoute

from envd.app import create_app
from envd.app.docs import openapi_document

METHODS = {"get", "post", "put", "delete", "patch", "head", "options", "trace"}


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads(json.dumps(openapi_document(), allow_nan=False))  # type: ignore[no-any-return]  # JSON


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()]


async def test_the_document_has_exactly_the_routes_of_the_app(document: dict[str, Any]) -> None:
    async with serving() as served:
        routes = create_app(served.service).routes
    served_paths = {
        (route.path_format, method.lower())
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    sockets = {route.path_format for route in routes if isinstance(route, WebSocketRoute)}
    assert sockets < {path for path, _ in served_paths}
    assert len(routes) - len(sockets) == len({path for path, _ in served_paths})
    assert served_paths == {(path, method) for path, method, _ in operations(document)}


def test_the_document_has_the_structure_of_openapi_3_1(document: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert document.keys() <= {"openapi", "info", "security", "tags", "paths", "components"}
    assert {"title", "version"} <= document["info"].keys()
    assert all(path.startswith("/") for path in document["paths"])
    for path, method, operation in operations(document):
        assert method in METHODS
        assert operation.keys() <= {
            *("operationId", "tags", "summary", "description"),
            *("parameters", "requestBody", "security", "responses"),
        }
        assert operation["summary"], path
        assert all(re.fullmatch(r"[1-5]\d\d|default", status) for status in operation["responses"])
        assert all(response["description"] for response in operation["responses"].values())
        in_path = {one["name"] for one in operation["parameters"] if one["in"] == "path" and one["required"]}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        names = [(one["name"], one["in"]) for one in operation["parameters"]]
        assert len(names) == len(set(names))


def test_every_schema_is_valid_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = re.findall(r'"\$ref": "([^"]*)"', json.dumps(document))
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= schemas.keys()
    assert {"Job", "Env", "Problem", "StepResult", "ResetRequest", "LegacyReset"} <= schemas.keys()


def fits(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


async def answers(served: Served) -> list[tuple[str, Any]]:
    job = await served.reset(task={"id": "t-1"})
    _, result = await served.post("/v1/envs/0/step", {"prediction": CLICK})
    _, env = await served.get("/v1/envs/0")
    _, lease = await served.post("/v1/leases", {})
    _, problem = await served.get("/v1/jobs/none")
    async with served.stream(f"/v1/jobs/{job['id']}/events") as reader:
        events = [json.loads(message.data) for message in (await reader.rest())[1:]]
    return [
        ("Job", job),
        ("StepResult", result),
        ("Env", env),
        ("Lease", lease),
        ("Problem", problem),
        *(("Event", one) for one in events),
    ]


async def test_answers_are_as_their_schema_says(document: dict[str, Any]) -> None:
    async with serving() as served:
        found = await answers(served)
    assert len(found) >= 5
    for name, value in found:
        fits(document, name, value)


async def test_a_body_that_its_schema_refuses_is_refused(document: dict[str, Any]) -> None:
    bad: dict[str, Any] = {
        "ResetRequest": {"task": []},
        "StepRequest": {"acts": []},
        "LegacyStep": {},
        "LeaseRequest": {"count": 0},
    }
    for name, body in bad.items():
        with pytest.raises(jsonschema.ValidationError):
            fits(document, name, body)


def test_examples_of_bodies_and_answers_are_as_their_schemas_say(document: dict[str, Any]) -> None:
    seen = 0
    for path, _, operation in operations(document):
        for holder in (operation.get("requestBody", {}), *operation["responses"].values()):
            content = holder.get("content", {}).get("application/json", {})
            if "example" in content:
                schema = {**content["schema"], "components": document["components"]}
                jsonschema.Draft202012Validator(schema).validate(content["example"])
                seen += 1
        if "requestBody" in operation:
            assert "example" in operation["requestBody"]["content"]["application/json"], path
    assert seen > 20


def test_every_operation_has_a_name_a_tag_and_a_summary_of_one_sentence(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    told = {tag["name"] for tag in document["tags"]}
    assert {tag for _, _, operation in operations(document) for tag in operation["tags"]} == told
    for path, _, operation in operations(document):
        assert len(operation["summary"]) < 110, path
        assert operation["summary"].endswith("."), path
        missing = [
            one["name"] for one in operation["parameters"] if not one.get("description") and one["name"] != "path"
        ]
        assert missing == [], path


def test_waiting_for_a_job_is_offered_where_it_works(document: dict[str, Any]) -> None:
    preferring = {
        path
        for path, _, operation in operations(document)
        if any(one["name"] == "Prefer" for one in operation["parameters"])
    }
    assert preferring == {"/v1/envs/{env}/reset", "/v1/prewarm"}


async def test_the_document_is_served_as_it_is(document: dict[str, Any]) -> None:
    async with serving() as served:
        assert await served.get("/openapi.json") == (200, document)
