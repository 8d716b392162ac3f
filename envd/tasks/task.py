"""A task as the daemon works with it: the parts of an OSWorld task file, after they were found to be well-formed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a set-up or a post-configuration."""

    type: str
    parameters: Parameters


@dataclass(frozen=True)
class Metric:
    """One metric, and the getters that feed it. `result` and `expected` are getter configurations ({"type": …});
    `expected` is None for a metric that takes none, `result` only for `infeasible`."""

    func: str
    result: Parameters | None = None
    expected: Parameters | None = None
    options: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    metrics: tuple[Metric, ...]
    conj: Literal["and", "or"] = "and"
    postconfig: tuple[Step, ...] = ()

    @property
    def infeasible(self) -> bool:
        """Whether the right thing to do is to say that it cannot be done."""
        return any(metric.func == "infeasible" for metric in self.metrics)


@dataclass(frozen=True)
class Task:
    """`raw` is the file as it came. `evaluator` is None for a task that can be played but not judged."""

    raw: Parameters
    id: str | None
    instruction: str
    steps: tuple[Step, ...]
    evaluator: Evaluator | None
    proxy: bool = False

    @cached_property
    def hash(self) -> str:
        """sha256 of the file as canonical JSON: sorted keys, no blanks, UTF-8."""
        text = json.dumps(self.raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


NO_TASK = Task(raw={}, id=None, instruction="", steps=(), evaluator=None)
"""A clean desktop and nothing to do on it."""
