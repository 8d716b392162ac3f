"""Limits of number and price: what is refused, in which words, and where prices come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from envd.drivers.aws.budget import Budget, load_prices
from envd.drivers.aws.prices import PRICES
from envd.errors import BudgetExhausted, SettingsError

XLARGE = "t3.xlarge"


def refusal(types: list[str], one_more: str, instances: int | None = None, usd: float | None = None) -> BudgetExhausted:
    with pytest.raises(BudgetExhausted) as caught:
        Budget(PRICES, instances, usd).require(types, one_more)
    return caught.value


@pytest.mark.parametrize(
    ("types", "instances", "usd", "words"),
    [
        pytest.param([XLARGE] * 4, 4, None, "4 instances of t3.xlarge exist, and ENVD_AWS_MAX_INSTANCES is 4.", id="n"),
        pytest.param([XLARGE], 1, None, "1 instance of t3.xlarge exists, and ENVD_AWS_MAX_INSTANCES is 1.", id="one"),
        pytest.param(
            [XLARGE] * 3,
            None,
            0.6,
            "3 instances of t3.xlarge cost $0.50 an hour; one more would make $0.67, and ENVD_AWS_MAX_HOURLY_USD is"
            " 0.60.",
            id="dollars",
        ),
        pytest.param(
            ["m5.large"],
            None,
            0.25,
            "1 instance of m5.large costs $0.10 an hour; one of t3.xlarge more would make $0.26, and"
            " ENVD_AWS_MAX_HOURLY_USD is 0.25.",
            id="another type",
        ),
        pytest.param(
            ["m5.large", XLARGE, XLARGE],
            None,
            0.45,
            "3 instances (1 of m5.large, 2 of t3.xlarge) cost $0.43 an hour; one of t3.xlarge more would make $0.60,"
            " and ENVD_AWS_MAX_HOURLY_USD is 0.45.",
            id="several types",
        ),
        pytest.param(
            [XLARGE],
            None,
            0.3327,
            "1 instance of t3.xlarge costs $0.166 an hour; one more would make $0.333, and ENVD_AWS_MAX_HOURLY_USD is"
            " 0.3327.",
            id="by a hair",
        ),
    ],
)
def test_what_exceeds_a_limit_is_refused_with_numbers_and_the_settings_name(
    types: list[str], instances: int | None, usd: float | None, words: str
) -> None:
    refused = refusal(types, XLARGE, instances, usd)
    assert refused.detail == words
    assert refused.retryable
    assert refused.facts["setting"] in words
    assert refused.problem().status == 503


@pytest.mark.parametrize(
    ("one_more", "words"),
    [
        pytest.param("t3.2xlarge", "One instance of t3.2xlarge costs $0.33 an hour, and", id="too dear alone"),
        pytest.param("x9.huge", "What x9.huge costs is not known, and", id="price not known"),
    ],
)
def test_what_never_fits_is_not_worth_another_try(one_more: str, words: str) -> None:
    refused = refusal([], one_more, usd=0.3)
    assert refused.detail == f"{words} ENVD_AWS_MAX_HOURLY_USD is 0.30."
    assert not refused.retryable
    assert "ENVD_AWS" in refused.hint


def test_an_instance_whose_price_is_not_known_leaves_no_room_below_a_limit_of_dollars() -> None:
    assert "x9.huge costs is not known" in refusal(["x9.huge"], XLARGE, usd=100).detail


@pytest.mark.parametrize(
    ("types", "instances", "usd"),
    [
        pytest.param([XLARGE] * 500, None, None, id="no limit"),
        pytest.param(["x9.huge"] * 3, 4, None, id="no limit of dollars and no price"),
        pytest.param([XLARGE] * 3, 4, None, id="the last one"),
        pytest.param([XLARGE] * 2, None, 0.1664 * 3, id="to the cent"),
        pytest.param([XLARGE] * 9, None, 1.664, id="fractions add up"),
    ],
)
def test_what_keeps_to_the_limits_is_allowed(types: list[str], instances: int | None, usd: float | None) -> None:
    budget = Budget(PRICES, instances, usd)
    budget.require(types, XLARGE)
    assert budget.has_room(types, XLARGE)


def test_room_is_what_require_allows() -> None:
    budget = Budget(PRICES, 2, None)
    assert [budget.has_room([XLARGE] * count, XLARGE) for count in range(4)] == [True, True, False, False]


def test_a_file_of_prices_is_put_over_the_table(tmp_path: Path) -> None:
    given = tmp_path / "prices.json"
    given.write_text('{"t3.xlarge": 0.2, "x9.huge": 7}')
    prices = load_prices(given)
    assert (prices["t3.xlarge"], prices["x9.huge"], prices["m5.large"]) == (0.2, 7, 0.096)
    assert Budget(prices, None, None).hourly("t3.xlarge") == 0.2
    assert Budget(prices, None, None).hourly("x10.huge") is None


def test_the_table_itself_is_never_changed() -> None:
    load_prices(None)["t3.xlarge"] = 99
    assert load_prices(None)["t3.xlarge"] == 0.1664


def test_larger_sizes_of_a_family_cost_more_and_no_type_is_made_up() -> None:
    assert PRICES["m5.large"] * 8 == pytest.approx(PRICES["m5.4xlarge"])
    assert not {"t2.4xlarge", "t3.4xlarge", "t3a.4xlarge"} & PRICES.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("t3.xlarge: 0.2", "cannot be read as JSON", id="no JSON"),
        pytest.param('["t3.xlarge"]', "must hold an object", id="a list"),
        *(
            pytest.param(json.dumps({"t3.xlarge": price}), "the price of t3.xlarge is", id=f"{price!s:.10}")
            for price in (0, -1, "0.2", True, None, float("nan"), float("inf"), 10**400, [1])
        ),
    ],
)
def test_a_file_that_is_no_table_of_prices_stops_the_start(tmp_path: Path, text: str, words: str) -> None:
    given = tmp_path / "prices.json"
    given.write_text(text)
    with pytest.raises(SettingsError, match=words) as caught:
        load_prices(given)
    assert f"ENVD_AWS_PRICES={given}" in caught.value.detail


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.json cannot be read"):
        load_prices(tmp_path / "absent.json")
