"""Argument values in a model's own syntax, typed by the schema, whatever the schema is."""

import json
import time
from typing import Any

import pytest

from services.inference.engine.output.call_values import (
    ValueSchema,
    expression_to_json,
    raw_to_json,
    tree_to_json,
)

DEFINED = {
    "$defs": {"Name": {"type": "string"}, "a/b": {"$ref": "#/$defs/Name"}, "Loop": {"$ref": "#"}},
    "properties": {
        "plain": {"$ref": "#/$defs/Name"},
        "escaped": {"$ref": "#/$defs/a~1b"},
        "either": {"anyOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]},
        "list": {"type": ["integer", "null"]},
        "values": {"enum": ["a", 1, None]},
        "fixed": {"const": True},
        "anything": True,
        "nothing": False,
        "no type": {"type": 5},
        "unknown": {"anyOf": [{"type": "string"}, {"minLength": 1}]},
    },
    "allOf": [{"properties": {"inherited": {"type": "boolean"}}}],
    "additionalProperties": {"type": "number"},
}


@pytest.mark.parametrize(
    ("key", "types"),
    [
        ("plain", {"string"}),
        ("escaped", {"string"}),
        ("either", {"string", "null"}),
        ("list", {"integer", "null"}),
        ("values", {"string", "integer", "number", "null"}),
        ("fixed", {"boolean"}),
        ("inherited", {"boolean"}),
        ("other", {"number"}),
        *((key, None) for key in ("anything", "nothing", "no type", "unknown")),
    ],
)
def test_types_of_an_argument_follow_the_schema(key: str, types: set[str] | None) -> None:
    assert ValueSchema(DEFINED).of_key(key).types == types


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        [],
        "x",
        {"properties": None},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"$ref": "https://example.com/x"}}},
        {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, {"$ref": "#"}] * 3}}},
    ],
)
def test_types_are_unknown_in_a_schema_that_does_not_tell(schema: Any) -> None:
    began = time.process_time()
    assert ValueSchema(schema).of_key("a").types is None
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'it's'", "it's"),
        ("'say \"hi\", it's'", 'say "hi", it\'s'),
        ("'''", "'"),
        (r"'it\'s'", "it's"),
        ("['a', 'b']", ["a", "b"]),
    ],
)
def test_quotes_in_a_python_string_may_be_unescaped(text: str, value: Any) -> None:
    assert json.loads(expression_to_json(text, "python", None)) == value


def test_half_of_a_surrogate_pair_is_escaped() -> None:
    assert expression_to_json(r"'\ud800'", "python", None) == r'"\ud800"'
    assert raw_to_json(r'"\ud800"', {"string"}) == r'"\ud800"'


def element(name: str, inner: str) -> str:
    return f"]<]minimax[>[<{name}>{inner}]<]minimax[>[</{name}>"


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        (element("a", "1") + element("b", "x"), None, {"a": 1, "b": "x"}),
        (element("item", "1") + element("item", "x"), None, [1, "x"]),
        (element("item", "1"), {"type": "object"}, {"item": 1}),
        (element("item", "1"), {"items": {"type": "string"}}, ["1"]),
        (element("a", "1"), {"properties": {"a": {"type": "string"}}}, {"a": "1"}),
        (element("a", element("a", "")), None, {"a": {"a": ""}}),
        ("", {"type": "array"}, []),
        ("", {"type": "null"}, None),
        (element("a", "1") + " and", None, element("a", "1") + " and"),
        ("<b>bold</b>", None, "<b>bold</b>"),
        ("]<]minimax[>[<a>1", None, "]<]minimax[>[<a>1"),
    ],
)
def test_elements_are_typed_by_the_schema(text: str, schema: Any, value: Any) -> None:
    assert json.loads(tree_to_json(text, ValueSchema(schema))) == value
