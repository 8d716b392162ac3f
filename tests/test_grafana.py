"""deploy/grafana: the dashboard and the rules speak of metrics, labels and values that a real scrape has, in PromQL."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serving import CLICK, serving

from envd.drivers.base import Costs
from envd.drivers.sim import Behaviour

FOLDER = Path(__file__).parent.parent / "deploy/grafana"
OF_PROMETHEUS = {"instance", "job"}
"""Labels that a scrape gives to every series."""
NOT_OURS = {"up"}
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}
SETUP = [{"type": "sleep", "parameters": {"seconds": 0}}]


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "envd.json").read_text())  # type: ignore[no-any-return]  # JSON


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each is, and what it is."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard()["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


EXPRESSIONS = dict(expressions())


def parsed(expression: str) -> promql_parser.Expr:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def parts(expression: promql_parser.Expr) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(expression, found.append)
    return found


async def scraped() -> dict[str, list[dict[str, str]]]:
    """The labels of every sample, by its name, once an episode was played and another one failed."""
    series: dict[str, list[dict[str, str]]] = {}
    fails = [Behaviour(), Behaviour(create_fails="injected")]
    async with serving(fails, envs=2) as served:
        served.driver.costs = lambda: Costs({"t3.xlarge": 1}, 0.2, {"t3.xlarge": 1}, 0.2)  # type: ignore[method-assign]
        job = await served.reset(0, task={"id": "t-1", "config": SETUP})
        assert job["state"] == "succeeded", job
        await served.post("/v1/envs/0/step", {"prediction": CLICK})
        await served.post("/v1/envs/0/step", {"actions": ["DONE"]})
        await served.evaluate(0)
        await served.reset(1)
        served.service.metrics.scrape_errors.labels("queue").inc()
        _, body = await served.get("/metrics")
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


async def test_every_metric_label_and_value_that_is_named_is_there() -> None:
    series = await scraped()
    missing: list[str] = []
    for where, expression in EXPRESSIONS.items():
        everywhere = parts(parsed(expression))
        selected = [part for part in everywhere if isinstance(part, promql_parser.VectorSelector)]
        labels: set[str] = set(OF_PROMETHEUS)
        for selector in selected:
            name = selector.name or ""
            if name not in series and name not in NOT_OURS:
                missing.append(f"{where}: {name}")
            for one in series.get(name, ()):
                labels |= one.keys()
            for matcher in selector.matchers.matchers:
                known = {one.get(matcher.name) for one in series.get(name, ())}
                exact = matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual)
                if matcher.name not in OF_PROMETHEUS and (None in known or (exact and matcher.value not in known)):
                    missing.append(f"{where}: {name}{{{matcher.name}={matcher.value}}}")
        missing += [f"{where}: by {name}" for name in grouped_by(everywhere) - labels]
    assert missing == []
    assert len(EXPRESSIONS) > 40


def grouped_by(everywhere: list[promql_parser.Expr]) -> set[str]:
    found: set[str] = set()
    for part in everywhere:
        modifier = getattr(part, "modifier", None)
        found |= set(getattr(modifier, "labels", None) or ())
        found |= set(getattr(getattr(modifier, "matching", None), "labels", None) or ())
    return found


def test_legends_name_labels_that_their_series_have() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = grouped_by(parts(parsed(target["expr"]))) | OF_PROMETHEUS
            assert shown <= kept, panel["title"]


def test_a_name_that_is_not_there_would_be_seen() -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parsed("sum by (le (rate(envd_boots_total[5m]))")
    assert [part.name for part in parts(parsed("envd_typo > 1")) if isinstance(part, promql_parser.VectorSelector)] == [
        "envd_typo"
    ]


def test_every_rule_says_what_is_wrong_and_what_to_do() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 10
    for rule in found:
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"].keys() == {"summary", "action"}


def test_every_panel_has_a_place_of_its_own_and_says_what_it_shows() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith(".")


def test_prometheus_itself_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; it comes with Debian's prometheus, which is too large to be needed")
    ran = subprocess.run(
        [promtool, "check", "rules", FOLDER / "alerts.yaml"], capture_output=True, text=True, check=False, timeout=30
    )
    assert ran.returncode == 0, ran.stderr
