"""One grading: its getters, its metrics, and how their numbers become one.

The algorithm is that of desktop-env's `DesktopEnv.evaluate`, mended: a list joined by `and` scores the least of its
numbers (upstream takes the mean, so half of a conjunction was worth something), a result getter that finds no file
counts 0 for its own metric (upstream goes on with the value before), and what failed is never a number.
"""

from __future__ import annotations

import copy
import datetime
import math
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import frames, jail, values
from .desktop import Controller, Env
from .ledger import GuestFailure, InternetFailure, Ledger, Missing, Stop, TaskFault
from .library import Library, missing_module, watch_for_missing
from .network import Guest, watch

_FAILED_MARK = "__EVALUATION_FAILED__"
"""What getters/chrome.py of 1.0.2 puts where it could not read a page."""
_HIDING_TITLES = ("Load timeout", "Error encountered", "Connection failed", "Unknown error")
"""Titles that get_page_info of 1.0.2 makes up for a page that it could not read."""
_EMPTY_PDF = 64
"""Bytes. The PDF that get_pdf_from_url of 1.0.2 makes up is shorter."""


class Grading:
    """`run` gives the report. `tell` is called with what is known so far, before each stage: if the process is killed,
    that remains."""

    def __init__(
        self, request: dict[str, Any], root: Path, library: Library, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._request = request
        self._root = root
        self._cache = root / "cache"
        self._library = library
        self._tell = tell
        self._ledger = Ledger()
        self._guest = Guest(request, self._ledger, time.monotonic() + request["deadline_s"])
        self._env = Env(request, str(self._cache), Controller(self._guest, self._ledger))
        self._records: list[dict[str, Any]] = []
        self._stage, self._index = "process", 0
        self._trace = ""

    def run(self) -> dict[str, Any]:
        report: dict[str, Any] = {"status": "scored"}
        try:
            self._prepare()
            report["score"] = self._score()
        except Stop as stop:
            report = self._failed(stop)
        except ModuleNotFoundError as error:
            report = self._failed(missing_module(error), error)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like of evaluators must not end this process
            report = self._failed(Stop(f"{self._where()} raised {_one_line(error)}"), error)
        return report | self._facts()

    def _prepare(self) -> None:
        watch_for_missing(self._ledger)
        watch(self._guest, allow_internet=self._request["allow_internet"])
        _set_clock(self._request["now"], self._request["timezone"])
        _set_machine(self._request["machine"])

    def _score(self) -> float:
        conj, numbers = self._request["conj"], []
        for index, metric in enumerate(self._request["metrics"]):
            number = self._metric(index, metric)
            numbers.append(number)
            if (conj == "and" and number == 0) or (conj == "or" and number >= 1):
                break
        if not numbers:
            raise TaskFault("The evaluator has no metric.")
        score = min(numbers) if conj == "and" else max(numbers)
        if not 0 <= score <= 1:
            self._ledger.warn(f"The score {score:g} was brought into 0…1.")
        return min(1.0, max(0.0, score))

    def _metric(self, index: int, asked: dict[str, Any]) -> float:
        record = {"index": index, "func": asked["func"], "options": asked.get("options") or {}, "seconds": {}}
        self._index = index
        self._records.append(record)
        judge = self._library.metrics.get(asked["func"])
        if judge is None or asked["func"] == "infeasible":
            raise TaskFault(f"There is no metric {asked['func']!r} to judge a desktop by.")
        given = []
        try:
            given.append(self._get("result", asked["result"], record))
        except FileNotFoundError as error:
            return self._nothing_there(record, str(error))
        except Exception as error:
            if not self._ledger.absent:
                raise
            self._trace = traceback.format_exc()
            return self._nothing_there(record, f"{', '.join(sorted(self._ledger.absent))}; {_one_line(error)}")
        absent = frozenset(self._ledger.absent) if _has_none(given[0]) else frozenset()
        if asked.get("expected"):
            given.append(self._expected(asked["expected"], record))
        return self._judge(judge, given, record, absent)

    def _nothing_there(self, record: dict[str, Any], what: str) -> float:
        """The file that the task asks for is not in the desktop, as the guest itself says: not done."""
        record["value"] = 0.0
        if self._trace:
            record["traceback"], self._trace = self._trace, ""
        self._ledger.warn(f"Metric {record['index']} counts 0, since a file is not there: {what}"[:500])
        return 0.0

    def _expected(self, config: dict[str, Any], record: dict[str, Any]) -> Any:
        try:
            return self._get("expected", config, record)
        except FileNotFoundError as error:
            raise TaskFault(f"What the result is compared with is not there: {error}") from error

    def _get(self, side: str, config: dict[str, Any], record: dict[str, Any]) -> Any:
        """The value of a getter, or the saved one, which is entered in `record`."""
        self._enter(side)
        saved = (self._request.get("values") or {}).get(str(record["index"]), {})
        if side in saved:
            self._ledger.begin("saved value")
            value = values.decode(saved[side], self._root)
        else:
            value = self._run_getter(side, config, record)
        record[side] = values.save(value, self._cache, self._root / "values" / f"{record['index']}-{side}.json")
        return value

    def _run_getter(self, side: str, config: dict[str, Any], record: dict[str, Any]) -> Any:
        name = config["type"]
        getter = self._library.getters.get(name)
        if getter is None:
            raise TaskFault(f"There is no getter {name!r}.")
        if name == "googledrive_file":
            raise Missing("Google Drive is not there for evaluators.", missing="Google Drive credentials")
        self._ledger.begin(name)
        start = time.monotonic()
        try:
            # A copy: get_rule_relativeTime writes into what it is given.
            value = getter(self._env, copy.deepcopy(config))
        except Exception:
            self._ledger.judge()  # what was at the root of it comes first
            raise
        finally:
            record["seconds"][side] = round(time.monotonic() - start, 4)
        self._ledger.judge()
        _refuse_placeholders(name, value)
        return value

    def _judge(
        self, judge: Callable[..., Any], given: list[Any], record: dict[str, Any], absent: frozenset[str]
    ) -> float:
        self._enter("metric")
        start = time.monotonic()
        options = dict(record["options"])

        def call() -> dict[str, Any]:
            return _call(judge, given, options, self._ledger, self._cache)

        answer = _in_child(call)
        record["seconds"]["metric"] = round(time.monotonic() - start, 4)
        if "missing" in answer:
            raise Missing(answer["missing"]["message"], hint=answer["missing"]["hint"], **answer["missing"]["facts"])
        if "traceback" in answer:
            record["traceback"] = self._trace = answer["traceback"]
            if absent:
                return self._nothing_there(record, ", ".join(sorted(absent)))
            raise Stop(f"{self._where()} raised {answer['error']}")
        record["value"] = answer["value"]
        number = answer["number"]
        if number is None:
            raise Stop(f"{self._where()} returned {str(answer['value'])[:200]} where a number belongs.")
        if not 0 <= number <= 1:
            self._ledger.warn(f"Metric {record['index']} ({record['func']}) returned {number:g}.")
        return float(number)

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self._tell({"stage": stage, "index": self._index, **self._facts()})

    def _where(self) -> str:
        record = self._records[-1] if self._records else {"func": "evaluator"}
        of = {"result": "The result getter of", "expected": "The expected getter of"}.get(self._stage, "The metric")
        return f"{of} {record['func']}"

    def _failed(self, stop: Stop, error: BaseException | None = None) -> dict[str, Any]:
        trace = self._trace or "".join(traceback.format_exception(error or stop))
        if self._records:
            self._records[-1].setdefault("traceback", trace[-20_000:])
        return {
            "status": "failed",
            "failure": {
                "kind": stop.kind,
                "stage": self._stage,
                "index": self._index,
                "message": stop.message[:2000],
                "hint": stop.hint,
                "traceback": trace[-20_000:],
                "facts": stop.facts | {"error": type(stop).__name__},
            },
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "metrics": self._records,
            "warnings": self._ledger.warnings,
            "calls": [asdict(call) for call in self._ledger.calls],
            "call_count": self._ledger.count,
        }


def work(request: dict[str, Any], root: Path, library: Library, report_fd: int) -> None:
    """Run the grading and write its report. The process is its own: it is put in order and left for the caller to
    exit."""

    def tell(facts: dict[str, Any]) -> None:
        frames.send(report_fd, {"progress": facts})

    os.chdir(root)
    report = Grading(request, root, library, tell).run()
    sys.stdout.flush()
    sys.stderr.flush()
    frames.send(report_fd, {"report": report})


def _call(
    judge: Callable[..., Any], given: list[Any], options: dict[str, Any], ledger: Ledger, cache: Path
) -> dict[str, Any]:
    """In the metric's own process. The answer has `value` and `number` (None if it is none), or what went wrong."""
    try:
        value = judge(*given, **options)
    except ModuleNotFoundError as error:
        ledger.missing.append(missing_module(error))
        value = None
    except Missing:  # it is in the ledger
        value = None
    except BaseException as error:  # noqa: BLE001 - as in Grading.run
        trace = traceback.format_exc()
        if not ledger.missing:
            return {"traceback": trace[-20_000:], "error": _one_line(error)}
        value = None
    if ledger.missing:
        stop = ledger.missing[0]
        return {"missing": {"message": stop.message, "hint": stop.hint, "facts": stop.facts}}
    return {"value": values.encode(value, cache), "number": _number(value)}


def _number(value: Any) -> float | None:
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _in_child(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns in a process that has no network. Raises Stop when that process is killed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            jail.without_network()
            jail.die_with_parent()
            answer = call()
            sys.stdout.flush()
            sys.stderr.flush()
            frames.send(write_end, answer)
        except BaseException:  # noqa: BLE001 - nothing may leave this process but by its exit
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(write_end)
    try:
        told = frames.receive(lambda size: os.read(read_end, size))
    finally:
        os.close(read_end)
    if told is not None:
        # It has nothing more to say. The keeper reaps it: to wait for its memory to go takes 10 ms.
        os.kill(pid, signal.SIGKILL)
        return told
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raise Killed(f"The metric's process ended with {_ending(status)} before it had a value.")


class Killed(Stop):
    kind = "killed"


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _refuse_placeholders(name: str, value: Any) -> None:
    """Values that a getter makes up for what it could not read."""
    if name == "page_info" and isinstance(value, dict) and value.get("title") in _HIDING_TITLES:
        raise InternetFailure(f"The page {value.get('url')} could not be read: {value.get('title')}.")
    if name == "pdf_from_url" and (not os.path.exists(value) or os.path.getsize(value) < _EMPTY_PDF):
        raise InternetFailure("The page could not be made a PDF.")
    if name == "gotoRecreationPage_and_get_html_content" and _FAILED_MARK in str(value):
        raise InternetFailure(f"The page could not be read: {str(value)[:300]}")
    if name == "vm_wallpaper" and os.path.getsize(value) == 0:
        raise GuestFailure("The guest gave no wallpaper.")


def _set_clock(now: float, timezone: str) -> None:
    """The dates of get_rule_relativeTime count from the reset, and in the guest's zone where the task names none."""

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Frozen:
            return cls.fromtimestamp(now, tz)

    from desktop_env.evaluators.getters import misc

    misc.datetime = Frozen
    misc.get_timezone_from_ip = lambda: timezone


def _set_machine(machine: str) -> None:
    """Where Chrome keeps its profile depends on the guest's machine; getters ask for the host's."""
    from desktop_env.evaluators.getters import chrome

    chrome.platform = types.SimpleNamespace(machine=lambda: machine)


def _has_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(item is None for item in value))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
