import json
import re
from typing import Any

import pytest

from services.contract.errors import ServiceError
from services.contract.messages import JsonSchema, JsonSchemaFormat, Sampling
from services.inference.engine import constraints, schema
from services.inference.engine.gbnf import GrammarError
from tests.inference.engine.test_grammar import BYTES, matches


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "mystery"}, "Unrecognized schema"),
        ({"$ref": "https://example.com/schema"}, "does not begin with `#/`"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "array", "items": {}, "maxItems": 10**9}, "maxItems"),
        ({"type": "string", "pattern": "^a{1,999999999}$"}, "repetitions"),
        ({"type": "string", "pattern": "a"}, "must begin with ^"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "beside a length"),
        ({"type": "number", "multipleOf": 0.5}, "no grammar for its `multipleOf`"),
        ({"type": "object", "minProperties": 1}, "no grammar for its `minProperties`"),
        ({"anyOf": []}, "`anyOf` is empty"),
        ({"anyOf": [{"type": "object"}], "required": ["b"]}, "`required`: both"),
        ({"allOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "`allOf` joins"),
        ({"allOf": [{"properties": {"b": {}}}, {"properties": {"b": {}}}]}, "`allOf` joins"),
        ({"enum": ["x" * 20_000]}, "bytes"),
        ({"properties": []}, "AttributeError"),
    ],
)
def test_a_schema_that_can_not_be_converted_is_refused(part: dict[str, Any], why: str) -> None:
    form = JsonSchemaFormat(JsonSchema("s", {"type": "object", "properties": {"a": part}}))
    with pytest.raises(ServiceError, match=re.escape(why)) as error:
        constraints.grammar(Sampling(response_format=form), BYTES)
    assert error.value.code == "invalid_request" and "response_format" in error.value.message


def test_what_a_schema_refers_to_again_and_again_is_one_rule() -> None:
    parts: dict[str, Any] = {"a 30": {"type": "string"}}
    for i in range(30):
        further = {"$ref": f"#/$defs/a {i + 1}"}
        parts[f"a {i}"] = {"properties": {"x": further, "y": further}}
    assert len(schema.to_gbnf({"$defs": parts, "$ref": "#/$defs/a 0"})) < 20_000


def test_two_parts_whose_paths_end_alike_are_two() -> None:
    own = {"a": {"$defs": {"n": {"const": 1}}}, "b": {"$defs": {"n": {"const": 2}}}}
    both = {name: {"$ref": f"#/$defs/{name}/$defs/n"} for name in own}
    rules = schema.to_gbnf(
        {"$defs": own, "type": "object", "properties": both, "required": ["a", "b"]}
    )
    assert matches(rules, '{"a": 1, "b": 2}') and not matches(rules, '{"a": 1, "b": 1}')


def test_a_schema_of_too_many_parts_is_refused() -> None:
    with pytest.raises(GrammarError, match="parts"):
        schema.to_gbnf({"anyOf": [{}] * 2_500})


@pytest.mark.parametrize(
    ("part", "fits", "fits_not"),
    [
        ({}, ['"a"', "[1, null]", '{"x": {}}'], ["", "a"]),
        ({"type": "array", "items": {}}, ['[1,"a"]'], ["{}"]),
        ({"type": "integer"}, ["-17", "0"], ["1.5", "01"]),
        ({"type": ["integer", "null"], "minimum": 0}, ["17", "null"], ["-1", '"a"']),
        ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"']),
        ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]", "[]"]),
        (
            {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}},
            ["[1]"],
            ["[null]"],
        ),
        (
            {"type": ["object", "null"], "properties": {"a": {"type": "null"}}, "required": ["a"]},
            ['{"a":null}', "null"],
            ["{}", '{"a":1}'],
        ),
        ({"type": "object", "required": ["a"]}, ['{"a":[1]}'], ["{}", '{"b":1}']),
        (
            {
                "$defs": {"one": {"enum": [1]}},
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/one"}]}},
            },
            ['{"a":1}', "{}"],
            ['{"a":2}', '{"a":{}}'],
        ),
        (
            {
                "$defs": {"b": {"properties": {"b": {"type": "null"}}, "required": ["b"]}},
                "allOf": [{"$ref": "#/$defs/b"}],
                "properties": {"a": {"type": "null"}},
            },
            ['{"b":null}', '{"b":null,"a":null}'],
            ["{}", '{"a":null}', '{"b":1}'],
        ),
        ({"type": ["string", "null"]}, ['"\\u00e9é"', "null"], ['"a\nb"', "1"]),
        (
            {"type": "string", "pattern": r"^[\w.]{2,4}-\d+\.$"},
            ['"a.b-12."'],
            ['"a-12."', '"ab-1x"'],
        ),
        (
            {
                "$defs": {
                    "node": {
                        "type": "object",
                        "properties": {
                            "value": {"type": "integer"},
                            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                        },
                        "required": ["value", "next"],
                    }
                },
                "$ref": "#/$defs/node",
            },
            ['{"value":1,"next":{"value":2,"next":null}}'],
            ['{"value":1}'],
        ),
    ],
)
def test_a_schema_takes_what_fits_and_nothing_else(
    part: dict[str, Any], fits: list[str], fits_not: list[str]
) -> None:
    rules = schema.to_gbnf(part)
    assert [text for text in fits if not matches(rules, text)] == []
    assert [text for text in fits_not if matches(rules, text)] == []


def test_a_schema_stays_as_it_was() -> None:
    """It is kept in the log, and the converter writes into what it is given."""
    asked = {"$defs": {"a": {"type": "null"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
    before = json.dumps(asked)
    schema.to_gbnf(asked)
    assert json.dumps(asked) == before
