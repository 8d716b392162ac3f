"""Names under which getters keep their files: one name must not stand for two files.

Upstream keeps everything in one folder and does not download a file whose name is there already. So a file of the
guest that has the same name as the file it is compared with is compared with itself, and scores. There is a public
task like that (74d5859f-ed66-4d3e-aa0e-93d7a592ce41).
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .needs import files
from .task import Metric, Step

PATHS = ("path", "ppt_file_path")
"""Keys by which getters name a file of the guest that they keep under its own name."""


def apart(metrics: Sequence[Metric], postconfig: Sequence[Step]) -> tuple[Metric, ...]:
    """`metrics` with other names for files of `cloud_file` whose name something else has."""
    taken = set(_guest_names(metrics, postconfig))
    names: dict[tuple[str, str], str] = {}
    numbers: dict[str, int] = {}

    def own(url: str, name: str) -> str:
        if (url, name) not in names:
            candidate = name
            while candidate in taken:
                numbers[name] = numbers.get(name, 0) + 1
                candidate = f"cloud{numbers[name]}_{name}"
            taken.add(candidate)
            names[url, name] = candidate
        return names[url, name]

    return tuple(
        replace(metric, result=_renamed(metric.result, own), expected=_renamed(metric.expected, own))
        for metric in metrics
    )


def _renamed(config: Mapping[str, Any] | None, own: Callable[[str, str], str]) -> Mapping[str, Any] | None:
    names = [own(url, name) for _, url, name in files(config)] if config else []
    if not names or config is None:
        return config
    return {**config, "dest": names if isinstance(config["dest"], list) else names[0]}


def _guest_names(metrics: Sequence[Metric], postconfig: Sequence[Step]) -> Iterator[str]:
    for config in (config for metric in metrics for config in (metric.result, metric.expected) if config):
        if config["type"] != "cloud_file":
            dest = config.get("dest", ())
            yield from [dest] if isinstance(dest, str) else dest
            for key in PATHS:
                if isinstance(path := config.get(key), str):
                    yield posixpath.basename(path)
    for step in postconfig:
        yield from (step.parameters[key] for key in ("stdout", "stderr") if step.parameters.get(key))
