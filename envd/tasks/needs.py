"""What a task uses of its surroundings, and which fields of its file say so."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .catalog import GETTERS, INTERNET, METRICS, NEEDS, PROXY, STEPS
from .shapes import is_true
from .task import Metric, Step, Task

WISHES_PROXY = "proxy"
"""The field by which a task asks for a proxy, if there is one."""

SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:(?!\d)")
"""What `localhost:8000` does not begin with."""


@dataclass(frozen=True)
class Use:
    """`need` is a word of `NEEDS`, or `asset:<url>`, for which `url` is set."""

    need: str
    field: str
    url: str = ""


def uses(task: Task) -> Iterator[Use]:
    """In no particular order, and the same need as often as it is felt."""
    if task.proxy:
        yield Use(PROXY, WISHES_PROXY)
        yield Use(INTERNET, WISHES_PROXY)
    for place, step in all_steps(task):
        yield from _of_step(place, step)
    if task.evaluator is not None:
        several = isinstance(task.raw["evaluator"].get("func"), list)
        for index, metric in enumerate(task.evaluator.metrics):
            yield from _of_metric(f"[{index}]" if several else "", metric)


def ordered(found: Iterable[Use]) -> tuple[str, ...]:
    """Each need once: words in the order of `NEEDS`, then files in the order in which they are used."""
    names = dict.fromkeys(use.need for use in found)
    return (*(need for need in NEEDS if need in names), *(name for name in names if name not in NEEDS))


def all_steps(task: Task) -> Iterator[tuple[str, Step]]:
    """The steps of the set-up and of the post-configuration, with their places."""
    for index, step in enumerate(task.steps):
        yield f"config[{index}]", step
    for index, step in enumerate(task.evaluator.postconfig if task.evaluator else ()):
        yield f"evaluator.postconfig[{index}]", step


def assets_of_steps(steps: Sequence[Step]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(url for step in steps for _, url in _step_assets(step)))


def assets_of_metrics(metrics: Sequence[Metric]) -> tuple[tuple[str, str], ...]:
    configs = (config for metric in metrics for config in (metric.result, metric.expected) if config)
    return tuple(dict.fromkeys((url, dest) for config in configs for _, url, dest in files(config)))


def files(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key in the configuration, URL, name) of each file of the getter `cloud_file`."""
    if config.get("type") != "cloud_file":
        return
    if not is_true(config.get("multi")):
        yield ".path", config["path"], config["dest"]
        return
    for index, (url, dest) in enumerate(zip(config["path"], config["dest"], strict=True)):
        yield f".path[{index}]", url, dest


def is_remote(url: str) -> bool:
    """Whether the page is beyond the desktop. `about:blank`, `file:` and the desktop's own servers are not."""
    try:
        parts = urlsplit(url if SCHEME.match(url) else f"http://{url}")
        host = parts.hostname or "localhost"
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    return not (address.is_loopback or address.is_unspecified)


def _of_step(place: str, step: Step) -> Iterator[Use]:
    step_type = STEPS[step.type]
    for need in step_type.needs:
        yield Use(need, f"{place}.type")
    for key, url in _step_assets(step):
        yield Use(f"asset:{url}", f"{place}.parameters{key}", url)
    if step_type.pages:
        for index, page in enumerate(step.parameters.get(step_type.pages) or ()):
            if is_remote(page):
                yield Use(INTERNET, f"{place}.parameters.{step_type.pages}[{index}]")
    command = step.parameters.get("command", ())
    words = command.split() if isinstance(command, str) else command
    if any(word.startswith(("http://", "https://")) and is_remote(word) for word in words):
        yield Use(INTERNET, f"{place}.parameters.command")


def _step_assets(step: Step) -> Iterator[tuple[str, str]]:
    """(key in the parameters, URL) of each file that the step fetches."""
    if step.type == "download":
        for index, entry in enumerate(step.parameters["files"]):
            yield f".files[{index}].url", entry["url"]
    elif step.type == "googledrive":
        for index, operation in enumerate(step.parameters["operation"]):
            if operation == "upload":
                yield f".args[{index}].url", step.parameters["args"][index]["url"]


def _of_metric(at: str, metric: Metric) -> Iterator[Use]:
    for need in METRICS[metric.func].needs if metric.func in METRICS else ():
        yield Use(need, f"evaluator.func{at}")
    for side, config in (("result", metric.result), ("expected", metric.expected)):
        if config:
            yield from _of_getter(f"evaluator.{side}{at}", config)


def _of_getter(place: str, config: Mapping[str, Any]) -> Iterator[Use]:
    getter = GETTERS.get(config["type"])
    if getter is None or getter.broken:
        return
    for need in getter.needs:
        yield Use(need, f"{place}.type")
    if getter.page and is_remote(config[getter.page]):
        yield Use(INTERNET, f"{place}.{getter.page}")
    for key, url, _ in files(config):
        yield Use(f"asset:{url}", f"{place}{key}", url)
