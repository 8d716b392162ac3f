"""Whether a task can be run here, found out before a desktop is spent on it: `parse` turns a task file's object into
a `Task`, or says which fields are wrong and what this server lacks.

Nothing is executed, opened or downloaded. Task files come from strangers: any JSON is answered in bounded time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from ..errors import MissingRequirement, TaskInvalid
from . import catalog, needs
from .abilities import Abilities
from .catalog import GETTERS, METRICS, STEPS
from .json_values import strange
from .names import apart
from .shapes import Shape, is_true, near
from .task import Evaluator, Metric, Step, Task

__all__ = [
    "Abilities",
    "Examination",
    "TaskProblem",
    "evaluation_assets",
    "examine",
    "parse",
    "postconfig_assets",
    "setup_assets",
]

LONGEST_ID = 200
MOST_STEPS = 500
MOST_METRICS = 100
ERRORS_SHOWN = 100
ERRORS_TOLD = 5


@dataclass(frozen=True)
class TaskProblem:
    """`field` is a place in the file, such as `config[2].parameters.files[0].url`. `missing`: the task is well-formed
    and needs what this server does not have."""

    field: str
    message: str
    kind: Literal["invalid", "missing"] = "invalid"


@dataclass(frozen=True)
class Examination:
    """`task` is there unless the file is malformed; `needs` are words of `catalog.NEEDS`, in that order, and
    `asset:<url>` for each file. A server can run the task if there are no problems."""

    task: Task | None
    needs: tuple[str, ...] = ()
    problems: tuple[TaskProblem, ...] = ()


@dataclass
class Findings:
    """Collects problems; those beyond the hundredth are not kept."""

    problems: list[TaskProblem] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.problems) >= ERRORS_SHOWN

    def add(self, field: str, message: str, kind: Literal["invalid", "missing"] = "invalid") -> None:
        if not self.full:
            self.problems.append(TaskProblem(field[:200], message, kind))

    def look(self, shape: Shape, value: object, place: str) -> None:
        """Add what is wrong with the shape of the value at `place`."""
        for below, message in islice(shape(value), ERRORS_SHOWN):
            self.add(f"{place}{below}", message)


def parse(raw: Mapping[str, Any], abilities: Abilities) -> Task:
    """The task. Raises TaskInvalid for a file that is malformed, MissingRequirement for one that this server cannot
    run; both name the fields: facts errors [{"field", "message"}], at most 100."""
    found = examine(raw, abilities)
    if found.task is not None and not found.problems:
        return found.task
    errors = [{"field": problem.field, "message": problem.message} for problem in found.problems]
    summary = "; ".join(f"{error['field']}: {error['message']}" for error in errors[:ERRORS_TOLD])
    if len(errors) > ERRORS_TOLD:
        summary += f"; and {len(errors) - ERRORS_TOLD} more"
    summary += "" if summary.endswith("?") else "."
    if found.task is None:
        raise TaskInvalid(f"The task cannot be used: {summary}", errors=errors)
    raise MissingRequirement(f"The task cannot be run on this server: {summary}", errors=errors)


def examine(raw: Mapping[str, Any], abilities: Abilities) -> Examination:
    """What `parse` goes by. Raises nothing."""
    found = Findings()
    if not isinstance(raw, dict):
        return Examination(None, (), (TaskProblem("", "must be an object"),))
    for place, message in strange(raw):
        # What is no JSON, or too much of it, is not looked into any further.
        return Examination(None, (), (TaskProblem(place, message),))
    _heading(raw, found)
    steps = _steps(raw.get("config"), "config", found)
    evaluator = _evaluator(raw.get("evaluator"), found)
    if any(problem.kind == "invalid" for problem in found.problems):
        return Examination(None, (), tuple(found.problems))
    if evaluator is not None:
        evaluator = replace(evaluator, metrics=apart(evaluator.metrics, evaluator.postconfig))
    name = raw.get("id") or raw.get("task_id")
    task = Task(
        raw=raw,
        id=str(name) if name else None,
        instruction=raw.get("instruction", ""),
        steps=steps,
        evaluator=evaluator,
        proxy=is_true(raw.get("proxy")),
    )
    uses = [*needs.uses(task)]
    for place, message in abilities.lacking(task, uses):
        found.add(place, message, "missing")
    return Examination(task, needs.ordered(uses), tuple(found.problems))


def setup_assets(task: Task) -> tuple[str, ...]:
    """URLs of the files that the set-up puts on the desktop, each once."""
    return needs.assets_of_steps(task.steps)


def postconfig_assets(task: Task) -> tuple[str, ...]:
    """URLs of the files that the post-configuration puts on the desktop, each once."""
    return needs.assets_of_steps(task.evaluator.postconfig if task.evaluator else ())


def evaluation_assets(task: Task) -> tuple[tuple[str, str], ...]:
    """(URL, name) of the files that the getter `cloud_file` gives to metrics, each pair once. Such a name is no path,
    and stands for one URL alone."""
    return needs.assets_of_metrics(task.evaluator.metrics if task.evaluator else ())


def _heading(raw: Mapping[str, Any], found: Findings) -> None:
    for name in ("id", "task_id"):
        value = raw.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > LONGEST_ID
        ):
            found.add(name, f"must be a string of at most {LONGEST_ID} characters")
    if not isinstance(raw.get("instruction", ""), str):
        found.add("instruction", "must be a string")


def _steps(given: object, place: str, found: Findings) -> tuple[Step, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        found.add(place, "must be a list of set-up steps")
        return ()
    if len(given) > MOST_STEPS:
        found.add(place, f"must have at most {MOST_STEPS} steps")
        return ()
    return tuple(_step(step, f"{place}[{index}]", found) for index, step in enumerate(given))


def _step(given: object, place: str, found: Findings) -> Step:
    if found.full:
        return Step("", {})
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        found.add(place, "must be an object with a type")
        return Step("", {})
    name, parameters = given["type"], given.get("parameters")
    parameters = {} if parameters is None else parameters
    step_type = STEPS.get(name)
    if step_type is None:
        known = near(name, [*STEPS]) or f"; there is {', '.join(STEPS)}"
        found.add(f"{place}.type", f"there is no set-up step {name[:60]!r}{known}")
    else:
        found.look(step_type.parameters, parameters, f"{place}.parameters")
    if not isinstance(parameters, dict):
        return Step(name, {})
    # What is null is not given: whoever runs a step need not know both ways to leave something out.
    return Step(name, {key: value for key, value in parameters.items() if value is not None})


def _evaluator(given: object, found: Findings) -> Evaluator | None:
    if given is None or given == {}:
        return None
    if not isinstance(given, dict):
        found.add("evaluator", "must be an object")
        return None
    postconfig = _steps(given.get("postconfig"), "evaluator.postconfig", found)
    conj = "and" if given.get("conj") is None else given["conj"]
    if conj not in ("and", "or"):
        found.add("evaluator.conj", "must be and or or")
    func = given.get("func")
    metrics = _several(given, func, found) if isinstance(func, list) else (_metric(func, given, "", found),)
    return Evaluator(metrics, "or" if conj == "or" else "and", postconfig)


def _several(given: Mapping[str, Any], func: list[Any], found: Findings) -> tuple[Metric, ...]:
    if not 0 < len(func) <= MOST_METRICS:
        found.add("evaluator.func", f"must name from 1 to {MOST_METRICS} metrics")
        return ()
    lists: dict[str, list[Any]] = {}
    for name in ("result", "expected", "options"):
        value = given.get(name)
        if value is None or value in ([], {}):
            lists[name] = [None] * len(func)
        elif not isinstance(value, list):
            found.add(f"evaluator.{name}", f"must be a list of {len(func)}, one for each func")
        elif len(value) != len(func):
            found.add(f"evaluator.{name}", f"has {len(value)} entries, and func has {len(func)}")
        else:
            lists[name] = value
    if len(lists) < 3:
        return ()
    if "infeasible" in func and len(func) > 1:
        found.add(f"evaluator.func[{func.index('infeasible')}]", "infeasible cannot stand beside other metrics")
        return ()
    return tuple(
        _metric(name, {key: value[index] for key, value in lists.items()}, f"[{index}]", found)
        for index, name in enumerate(func)
    )


def _metric(func: object, given: Mapping[str, Any], at: str, found: Findings) -> Metric:
    """One metric; `at` is its index as it stands in field names, "" for one that is not in a list."""
    if found.full:
        return Metric("")
    if func is None:
        found.add(f"evaluator.func{at}", "is missing")
        return Metric("")
    if not isinstance(func, str):
        found.add(f"evaluator.func{at}", "must be the name of a metric")
        return Metric("")
    if func == "infeasible":
        return Metric(func)
    metric_type = METRICS.get(func)
    if metric_type is None:
        _unknown(f"evaluator.func{at}", "metric", func, [*METRICS], found)
    result = _getter(given.get("result"), f"evaluator.result{at}", found)
    expected = _getter(given.get("expected"), f"evaluator.expected{at}", found)
    if result is None:
        found.add(f"evaluator.result{at}", f"is missing; {func[:60]} needs to know what to look at")
    options = given.get("options") or {}
    if not isinstance(options, dict):
        found.add(f"evaluator.options{at}", "must be an object")
        options = {}
    if metric_type is not None:
        _arguments(func, metric_type, expected is not None, options, at, found)
    return Metric(func, result, expected, options)


def _arguments(
    func: str,
    metric_type: catalog.MetricType,
    has_expected: bool,
    options: Mapping[str, Any],
    at: str,
    found: Findings,
) -> None:
    if metric_type.compares is True and not has_expected:
        found.add(f"evaluator.expected{at}", f"is missing; {func} compares the result with it")
    if metric_type.compares is False and has_expected:
        found.add(f"evaluator.expected{at}", f"must be left out; {func} looks at the result alone")
    for name, shape in metric_type.required_options.items():
        if options.get(name) is None:
            found.add(f"evaluator.options{at}.{name}", f"is missing; {func} needs it")
        else:
            found.look(shape, options[name], f"evaluator.options{at}.{name}")
    if metric_type.options is not None:
        for name in options.keys() - metric_type.options - metric_type.required_options.keys():
            known = ", ".join(sorted(metric_type.options)) or "no options"
            found.add(f"evaluator.options{at}.{name[:60]}", f"is no option of {func}, which takes {known}")


def _getter(given: object, place: str, found: Findings) -> Mapping[str, Any] | None:
    if given is None or given in ({}, []):
        return None
    if isinstance(given, list):
        found.add(place, "must be one object, as func is one name")
        return {}
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        found.add(place, "must be an object with a type")
        return {}
    name = given["type"]
    getter = GETTERS.get(name)
    if getter is None:
        _unknown(f"{place}.type", "getter", name, [*GETTERS], found)
    elif getter.broken:
        found.add(
            f"{place}.type",
            f"the getter {name} of desktop-env 1.0.2 cannot work: {getter.broken}; it takes evaluators in which it is"
            " mended",
            "missing",
        )
    else:
        found.look(getter.config, given, place)
    return given


def _unknown(place: str, what: str, name: str, known: list[str], found: Findings) -> None:
    if name in catalog.ELSEWHERE:
        message = f"the evaluators here have no {what} {name}; {catalog.ELSEWHERE[name]}, and it takes those evaluators"
        found.add(place, message, "missing")
    else:
        hint = near(name, known) or "; it takes evaluators that have it"
        found.add(place, f"the evaluators here (desktop-env 1.0.2) have no {what} {name[:60]!r}{hint}")
