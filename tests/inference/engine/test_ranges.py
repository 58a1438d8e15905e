import json
from typing import Any

import pytest

from services.inference.engine import ranges
from services.inference.engine.gbnf import GrammarError
from tests.inference.engine.test_grammar import matches

WHOLE = [*range(-130, 131), -1000, 999, 1000, 1001, 10**15]
DECIMALS = [
    -10.5,
    -10.0,
    -9.75,
    -1.5,
    -1.0,
    -0.25,
    0.0,
    0.05,
    0.5,
    1.0,
    1.25,
    9.99,
    10.0,
    10.01,
    99.5,
]


def fits(value: float, schema: dict[str, Any]) -> bool:
    return bool(
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value
        and value < schema.get("exclusiveMaximum", value + 1)
    )


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 0},
        {"minimum": 1, "maximum": 1},
        {"minimum": 0, "maximum": 9},
        {"minimum": 7, "maximum": 113},
        {"minimum": -13, "maximum": 99},
        {"minimum": -113, "maximum": -7},
        {"maximum": -1},
        {"maximum": 0},
        {"minimum": 100},
        {"minimum": -10},
        {"exclusiveMinimum": 0},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 10},
        {"exclusiveMaximum": 0},
        {"minimum": 990, "maximum": 1000},
        {"minimum": 0, "exclusiveMaximum": 1},
    ],
)
def test_a_number_fits_where_it_is_between_the_bounds_and_nowhere_else(
    bounds: dict[str, Any],
) -> None:
    for kind, values in (("integer", WHOLE), ("number", [*WHOLE, *DECIMALS])):
        schema = {"type": kind, **bounds}
        grammar = f"root ::= {ranges.to_gbnf(schema)}"
        wrong = [x for x in values if matches(grammar, json.dumps(x)) != fits(x, schema)]
        assert wrong == [], grammar


def test_an_integer_s_bounds_may_be_broken_numbers() -> None:
    schema = {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3.5}
    grammar = f"root ::= {ranges.to_gbnf(schema)}"
    assert [x for x in range(-5, 9) if matches(grammar, str(x))] == [1, 2, 3]


def test_older_schemas_say_by_true_that_a_bound_is_strict() -> None:
    schema = {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 3}
    grammar = f"root ::= {ranges.to_gbnf(schema)}"
    assert [x for x in range(-5, 9) if matches(grammar, str(x))] == [2, 3]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no number"),
        ({"type": "integer", "minimum": 5, "exclusiveMaximum": 5}, "no number"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 0}, "no number"),
        ({"type": "number", "minimum": 0.5}, "whole"),
        ({"type": "integer", "minimum": "1"}, "minimum"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": 1}, "both"),
    ],
)
def test_bounds_that_can_not_be_held_to_are_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        ranges.to_gbnf(schema)
