"""The pages of the API's reference, from the OpenAPI document and what is in `parts/`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..openapi import TAGS, Schema
from .generated import MARK

_PARTS = Path(__file__).parent / "parts"
TITLES = {
    "play": "Envs: reset, step, evaluate",
    "jobs": "Jobs and the queue",
    "events": "Event streams",
    "leases": "Leases over HTTP",
    "desktop": "Inside a desktop",
    "evidence": "Verdicts and bundles",
    "trainers": "Existing trainers",
    "daemon": "The daemon itself",
    "docs": "Documents",
}


def api_pages() -> dict[str, str]:
    """Page → Markdown: the conventions with a list of all operations, a page for each tag, and the models."""
    from . import openapi_document

    document = openapi_document()
    pages = {f"api-{tag}": _tag_page(document, tag) for tag in TAGS}
    return {"api": _front(document), **pages, "api-models": _models_page(document)}


def operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    """Method (in capitals), path and operation."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


@cache
def examples() -> dict[str, str]:
    """`METHOD /path` → Markdown of its example."""
    parts = re.split(r"^## (.*)$", (_PARTS / "examples.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.strip(): text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _front(document: Schema) -> str:
    lines = [(_PARTS / "conventions.md").read_text(encoding="utf-8")]
    for tag, words in TAGS.items():
        lines += [f"### {TITLES[tag]}\n", f"{words}\n", "| method | path | what it does |", "|---|---|---|"]
        for method, path, operation in operations(document):
            if tag in operation["tags"]:
                lines.append(
                    f"| {method} | [`{path}`](api-{tag}.md#{_anchor(method, path)}) | {operation['summary']} |"
                )
        lines.append("")
    return MARK + "\n".join(lines)


def _anchor(method: str, path: str) -> str:
    return re.sub(r"[^\w\s-]", "", f"{method} {path}".lower()).replace(" ", "-")


def _tag_page(document: Schema, tag: str) -> str:
    parts = [
        f"# {TITLES[tag]}\n\n{TAGS[tag]} How answers, errors and retries work is told under [conventions](api.md).\n"
    ]
    parts += [
        _operation(method, path, operation)
        for method, path, operation in operations(document)
        if tag in operation["tags"]
    ]
    return MARK + "\n".join(parts)


def _operation(method: str, path: str, operation: Schema) -> str:
    parts = [f"## {method} `{path}`\n\n{operation['description'] or operation['summary']}\n"]
    rows = [
        f"| `{one['name']}` | {one['in']} | {_kind(one['schema'])} | {one.get('description', '')} |"
        for one in operation["parameters"]
    ]
    if rows:
        parts.append("\n".join(["| parameter | in | kind | meaning |", "|---|---|---|---|", *rows]) + "\n")
    if body := operation.get("requestBody"):
        named = _kind(body["content"]["application/json"]["schema"])
        parts.append(f"Body: {named}{'' if body['required'] else ', may be left out'}.\n")
    answers = [
        f"{status}: {' or '.join(_content(kind, content) for kind, content in answer.get('content', {}).items())}"
        if answer.get("content")
        else f"{status}: {answer['description']}"
        for status, answer in operation["responses"].items()
        if status != "default"
    ]
    parts.append(f"Answers {'; '.join(answers)}; else a [problem](errors.md).\n")
    if example := examples().get(f"{method} {path}"):
        parts.append(f"{example}\n")
    return "\n".join(parts)


def _content(kind: str, content: Schema) -> str:
    return _kind(content["schema"]) if content.get("schema") else f"`{kind}`"


def _kind(schema: Schema) -> str:
    """A schema in a few words, models as links."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](api-models.md#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    for several, between in (("allOf", " and "), ("anyOf", " or "), ("oneOf", " or ")):
        if several in schema:
            return between.join(_kind(one) for one in schema[several] if one.get("properties", {}).keys() != {"links"})
    if isinstance(schema.get("type"), list):
        return " or ".join(schema["type"])
    if schema.get("type") == "array":
        each = schema.get("items") or {}
        return f"list of {_kind(each)}" if each else "list"
    if "properties" in schema:
        return "object of " + ", ".join(f"`{name}`" for name in schema["properties"])
    return f"{schema.get('type', 'any')}{_limits(schema)}"


def _limits(schema: Schema) -> str:
    told = [
        f"{words} {schema[name]:g}"
        for name, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
        )
        if name in schema
    ]
    return f", {' and '.join(told)}" if told else ""


def _models_page(document: Schema) -> str:
    parts = [
        "# Models\n\nWhat bodies and answers are made of. Times are Unix seconds, durations seconds. Readers should "
        "ignore fields that they do not know: newer daemons may have more.\n"
    ]
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(f"## {name}\n\n{' '.join(_told(schema).split())}\n")
        if "enum" in schema:
            parts.append(f"One of {_kind(schema)}.\n")
        elif fields := schema.get("properties"):
            rows = [_field(field, about, field in schema.get("required", ())) for field, about in fields.items()]
            parts.append("\n".join(["| field | kind | meaning |", "|---|---|---|", *rows]) + "\n")
    return MARK + "\n".join(parts)


def _told(schema: Schema) -> str:
    return str(schema.get("description", ""))


def _field(name: str, about: dict[str, Any], required: bool) -> str:
    words = " ".join(_told(about).split()).replace("|", "\\|")
    default = f" Default `{json.dumps(about['default'])}`." if about.get("default") not in (None, [], {}, "") else ""
    return f"| `{name}` | {_kind(about)}{', required' if required else ''} | {words}{default} |"
