"""JSON schemas as grammars on a vocabulary of bytes."""

import itertools
import json
import random
import re
from typing import Any

import pytest

from services.contract.errors import ServiceError
from services.contract.messages import JsonSchema, JsonSchemaFormat, Sampling
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.grammar import GrammarError
from tests.inference.fake_backend import VOCABULARY
from tests.inference.grammars import accepts

STRING = {"type": "string"}
COLOR = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}}}


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def matches(schema: dict[str, Any], text: str, is_strict: bool = True) -> bool:
    return accepts(f"start: {constraints.schema_lark(schema, is_strict, 'response_format')}", text)


def compile_schema(schema: dict[str, Any], strict: bool | None) -> None:
    """Compile the schema as for a request. Raises ServiceError."""
    form = JsonSchemaFormat(JsonSchema(schema, strict=strict))
    constraints.compile_grammar(Sampling(response_format=form), None, VOCABULARY)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "mystery"}, "Invalid type: mystery"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "array", "minItems": -1}, "minItems"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "'a' is unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "'a' is unsatisfiable"),
        ({"type": "integer", "minimum": "1"}, "minimum"),
        ({"anyOf": []}, "'a' is unsatisfiable"),
        ({"required": "a", "type": "object"}, "required"),
        ({"properties": []}, "properties"),
        ({"enum": ["x" * 140_000]}, "bytes"),
        (
            {"type": "object", "properties": dict.fromkeys("bcd", STRING), "minProperties": 2},
            "min/maxProperties",
        ),
    ],
)
@pytest.mark.parametrize("strict", [True, None])
def test_invalid_schema_is_rejected_with_its_keyword(
    part: dict[str, Any], why: str, strict: bool | None
) -> None:
    with pytest.raises(ServiceError, match=re.escape(why)) as error:
        compile_schema(object_of(a=part), strict)
    assert error.value.code == "invalid_request" and "response_format" in error.value.message
    assert "\n" not in error.value.message and "%json" not in error.value.message


UNENFORCEABLE: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "items": STRING, "uniqueItems": True},
    "format": {"type": "string", "format": "binary"},
    "pattern": {"type": "string", "pattern": "^(?!x).*$"},
    "not": {"type": "string", "not": {"const": "b"}},
    "if": {"type": "string", "if": {"const": "x"}, "then": {}},
    "contains": {"type": "array", "contains": STRING},
    "propertyNames": {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "enum": {"enum": ["a", "\u0001"]},
}


@pytest.mark.parametrize("keyword", UNENFORCEABLE)
def test_strict_schema_with_unenforceable_keyword_is_rejected(keyword: str) -> None:
    schema = object_of(list={"type": "array", "items": UNENFORCEABLE[keyword]})
    with pytest.raises(ServiceError, match=f"`properties.list.items.{keyword}`"):
        compile_schema(schema, True)
    compile_schema(schema, False)
    compile_schema(schema, None)


@pytest.mark.parametrize(
    ("schema", "accepted", "rejected"),
    [
        (UNENFORCEABLE["uniqueItems"], '["a", "a"]', "[1]"),
        (UNENFORCEABLE["format"], '"? ?"', "1"),
        (UNENFORCEABLE["not"], '"b"', "1"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "1", '"a"'),
    ],
)
def test_rest_of_the_schema_holds_without_strict(
    schema: dict[str, Any], accepted: str, rejected: str
) -> None:
    assert matches(schema, accepted, is_strict=False) and not matches(
        schema, rejected, is_strict=False
    )


def test_strict_one_of_with_overlapping_branches_is_rejected() -> None:
    """Also if the branches would be distinct without further properties."""
    branches = {"oneOf": [object_of(a=STRING), {"type": "object", "properties": {"b": STRING}}]}
    with pytest.raises(ServiceError, match="oneOf"):
        compile_schema(branches, True)
    compile_schema(branches, None)


@pytest.mark.parametrize(
    "keywords",
    [
        {"description": "any JSON"},
        {"title": "Value"},
        {"default": None},
        {"$comment": "x"},
        {"deprecated": True},
        {"examples": [{"$ref": "other.json"}, {"maxLength": 10**9}]},
        {"default": {"minItems": "two", "uniqueItems": True}},
        {"uniqueItems": False},
        {"anyOf": [{"type": ["integer", "null"], "format": "int32"}, {}]},
        {"propertyNames": {"type": "string"}},
        {"unevaluatedProperties": True},
        {"$schema": "http://json-schema.org/schema#"},
        {"nullable": False, "x-order": 3},
    ],
)
def test_keyword_without_effect_is_accepted(keywords: dict[str, Any]) -> None:
    schema = object_of(v=keywords)
    for value in ("1", '"a"', "[null, {}]", '{"x": true}'):
        assert matches(schema, f'{{"v": {value}}}'), value
    assert not matches(schema, '{"w": 1}')


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        (COLOR | {"additionalProperties": True}, '{"color":[1]}'),
        (COLOR | {"additionalProperties": STRING}, '{"color":"blue"}'),
        (COLOR | {"additionalProperties": STRING}, '{"x":"1","color":"blue"}'),
        (COLOR | {"additionalProperties": STRING}, '{"\\u0063olor":"blue"}'),
        (
            COLOR | {"required": ["color"], "additionalProperties": STRING},
            '{"color":"red","color":"blue"}',
        ),
    ],
)
def test_additional_property_never_has_a_declared_name(schema: dict[str, Any], wrong: str) -> None:
    assert not matches(schema, wrong)
    assert matches(schema, '{"color":"red","size":"big"}')


def test_keywords_in_data_are_not_schemas() -> None:
    assert matches(object_of(**{"$ref": {"type": "boolean"}}), '{"$ref":true}')
    assert matches(object_of(uniqueItems={"type": "boolean"}), '{"uniqueItems":true}')
    const = {"a": {"const": {"$ref": "#/properties/b", "not": {}}}, "b": {"type": "boolean"}}
    text = '{"a":{"$ref":"#/properties/b","not":{}},"b":true}'
    assert matches(object_of(**const), text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("date", "2024-02-29", "2024-02-30"),
        ("date-time", "2024-02-29T10:00:00Z", "2024-02-29"),
        ("time", "10:00:00Z", "25:00:00Z"),
        ("duration", "P3DT4H", "3 days"),
        ("email", "a@b.co", "? ?"),
        ("hostname", "a.example", "? ?"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
        ("ipv6", "::1", "1"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123"),
        ("uri", "https://a.b/c?d#e", "? ?"),
    ],
)
def test_format_is_enforced(kind: str, good: str, bad: str) -> None:
    schema = {"type": "string", "format": kind}
    assert matches(schema, f'"{good}"')
    assert not matches(schema, f'"{bad}"') and not matches(schema, '""')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
        {"type": "string", "maxLength": 65_536},
        {"type": "array", "items": STRING, "maxItems": 100_000},
        object_of(**{f"f{i}": {"type": "string", "maxLength": 255} for i in range(30)}),
        {"enum": [f"PROD-2024-{i:05d}" for i in range(2_000)]},
        {"type": "object", "properties": {f"p{i}": STRING for i in range(480)}},
        {"type": "array", "minItems": 900, "items": {"type": "array", "items": STRING}},
        object_of(**{f"name_{i:04d}": STRING | {"description": "x" * 100} for i in range(400)}),
    ],
    ids=[
        "URL",
        "long text",
        "many items",
        "form",
        "2,000 values",
        "480 optional properties",
        "900 arrays",
        "70 KiB",
    ],
)
def test_large_ordinary_schema_is_accepted(schema: dict[str, Any]) -> None:
    compile_schema(schema, True)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a{300}){300}b{60000}$"},
        {"type": "string", "pattern": "^(.*a.{30}){10}$"},
        {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    ],
    ids=["repetitions", "states", "items"],
)
def test_expensive_schema_is_compiled(schema: dict[str, Any]) -> None:
    compile_schema(schema, None)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"anyOf": [object_of(**{f"a{i}": {"const": i}}) for i in range(2_500)]}, "bytes"),
        ({"type": "integer", "multipleOf": 1234567891}, "remainders"),
        ({"type": "number", "minimum": -1.23e300, "maximum": 1.7e308}, "float range"),
        (
            {
                "allOf": [
                    {"anyOf": [COLOR | {"title": str(j)} for j in range(4)]} for _ in range(10)
                ]
            },
            "too large",
        ),
    ],
    ids=["choices", "multiples", "range", "product"],
)
def test_too_expensive_schema_is_rejected(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServiceError, match=f"`response_format`.*{reason}") as error:
        compile_schema(schema, None)
    assert error.value.code == "invalid_request"


def matching(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*{number}.*"}


def nested(depth: int) -> dict[str, Any]:
    return {"allOf": [nested(depth - 1), matching(depth)]} if depth else STRING


def test_library_failure_becomes_one_plain_sentence() -> None:
    names = [(f"a{i}", f"b{i}") for i in range(11)]
    required = [
        {"anyOf": [{"type": "object", "properties": {n: STRING}, "required": [n]} for n in pair]}
        for pair in names
    ]
    with pytest.raises(ServiceError, match="too complex to be compiled") as error:
        compile_schema({"allOf": required}, None)
    assert error.value.code == "invalid_request" and "panic" not in error.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [matching(i) for i in range(30)]},
        nested(30),
        {"allOf": [{"properties": {"a": matching(i)}} for i in range(30)]},
        {
            "$defs": {f"a{i}": matching(i) | {"$ref": f"#/$defs/a{i + 1}"} for i in range(30)}
            | {"a30": STRING},
            "$ref": "#/$defs/a0",
        },
        {"patternProperties": {f"^k{i}x": STRING for i in range(2_000)}},
        object_of(**{f"a{i}": {"type": "integer", "multipleOf": 10**6 + i} for i in range(10)}),
        {"allOf": [{"type": "integer", "multipleOf": i} for i in (7, 11, 13, 17, 19)]},
        object_of(**{f"a{i}": STRING for i in range(3_000)}),
    ],
    ids="list,nested,in a property,by reference,names,multiples,multiple,properties".split(","),
)
def test_schema_that_would_take_minutes_is_rejected_at_once(schema: dict[str, Any]) -> None:
    with pytest.raises(ServiceError, match="more than") as raised:
        compile_schema(schema, None)
    assert raised.value.code == "invalid_request" and "response_format" in raised.value.message


def test_schema_with_many_separate_patterns_is_accepted() -> None:
    texts = {f"a{i}": {"type": "string", "pattern": f"^{i}$"} for i in range(50)}
    named = [{"$ref": f"#/$defs/a{i}"} for i in range(50)]
    compile_schema({"allOf": [{"type": "object", "properties": texts}, {"required": ["a0"]}]}, None)
    divided = [{"type": "number", "multipleOf": step} for step in (0.01, 0.5, 12, 60, 1e9, -7)]
    compile_schema({"anyOf": [*divided, STRING]}, None)
    compile_schema(object_of(first=named[0], rest={"anyOf": named}) | {"$defs": texts}, None)


@pytest.mark.parametrize(
    "level",
    [
        lambda inner: inner,
        lambda inner: {"properties": {"x": inner}},
        lambda inner: {"items": {"items": {"items": inner}}},
        lambda inner: {"anyOf": [{"allOf": [inner]}]},
    ],
    ids=["alone", "in a property", "in items", "in a choice"],
)
def test_long_chain_of_references_does_not_crash(level: Any) -> None:
    depth = 1_800
    chain = {f"a{i}": level({"$ref": f"#/$defs/a{i + 1}"}) for i in range(depth)}
    compile_schema({"$defs": chain | {f"a{depth}": STRING}, "$ref": "#/$defs/a0"}, None)


def test_schema_referenced_often_is_compiled_once() -> None:
    parts: dict[str, Any] = {"a 30": STRING}
    for i in range(30):
        further = {"$ref": f"#/$defs/a {i + 1}"}
        parts[f"a {i}"] = {"properties": {"x": further, "y": further}}
    compile_schema({"$defs": parts, "$ref": "#/$defs/a 0"}, True)


@pytest.mark.parametrize(
    ("part", "good", "bad"),
    [
        ({}, ['"a"', "[1, null]", '{"x": {}}'], ["", "a"]),
        ({"type": "array", "items": {}}, ['[1,"a"]'], ["{}"]),
        ({"type": "integer"}, ["-17", "0", "9" * 18], ["1.5", "01", "9" * 20]),
        ({"type": "integer", "exclusiveMinimum": 0}, ["1", "1" * 18], ["0", "-1", "1" * 20]),
        ({"type": ["integer", "null"]}, ["1", "null"], ["1" * 20]),
        ({"type": ["integer", "number"]}, ["1", "1.5"], ['"a"']),
        ({"type": ["integer", "null"], "minimum": 0}, ["17", "null"], ["-1", '"a"']),
        ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"']),
        ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]", "[]"]),
        (
            {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}},
            ["[1]", "[1,null]"],
            ["[null]", "[1,1]"],
        ),
        (
            {"type": ["object", "null"], "properties": {"a": {"type": "null"}}, "required": ["a"]},
            ['{"a":null}', "null"],
            ["{}", '{"a":1}', '{"a":null,"b":1}'],
        ),
        ({"type": "object", "required": ["a"]}, ['{"a":[1]}'], ["{}", '{"b":1}']),
        (
            {
                "$defs": {"one": {"enum": [1]}},
                "properties": {"a": {"allOf": [{"$ref": "#/$defs/one"}]}},
            },
            ['{"a":1}', "{}"],
            ['{"a":2}', '{"a":{}}', '{"b":1}', "1"],
        ),
        (
            {
                "$defs": {"b": {"properties": {"b": {"type": "null"}}, "required": ["b"]}},
                "allOf": [{"$ref": "#/$defs/b"}],
                "properties": {"a": {"type": "null"}},
            },
            ['{"b":null,"a":null}', '{"b":null}'],
            ["{}", '{"a":null}', '{"b":1}'],
        ),
        (
            {"type": "object", "patternProperties": {"^x": STRING}, "additionalProperties": False},
            ['{"x1":"a"}', "{}"],
            ['{"x1":1}', '{"y":"a"}'],
        ),
        (
            {"type": "object", "minProperties": 1, "additionalProperties": STRING},
            ['{"a":"b"}'],
            ["{}"],
        ),
        ({"type": "number", "multipleOf": 0.01}, ["1.25", "3"], ["1.255"]),
        ({"type": ["string", "null"]}, ['"é\\n"', "null"], ['"a\nb"', "1"]),
        (
            {"type": "string", "pattern": r"^[\w.]{2,4}-\d+\.$"},
            ['"a.b-12."'],
            ['"a-12."', '"ab-1x"'],
        ),
        ({"type": "string", "pattern": "a", "maxLength": 3}, ['"xay"'], ['"xyz"', '"xaya"']),
        (
            {
                "$defs": {
                    "node": object_of(
                        value={"type": "integer"},
                        next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                    )
                },
                "$ref": "#/$defs/node",
            },
            ['{"value":1,"next":{"value":2,"next":null}}'],
            ['{"value":1}'],
        ),
        (
            {
                "$defs": {"A": object_of(k={"const": "a"}), "B": object_of(k={"const": "b"})},
                "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
                "discriminator": {"propertyName": "k"},
            },
            ['{"k":"a"}', '{"k":"b"}'],
            ['{"k":"c"}'],
        ),
    ],
)
def test_schema_accepts_matching_json_only(
    part: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not matches(part, text)] == []
    assert [text for text in bad if matches(part, text)] == []


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        ('{ "a" : 1 }', True),
        ('{\n  "a": 1,\n\n  "b": 2\n}', True),
        ('{"a":  1}', False),
        (' {"a": 1}', False),
        ('{"a": 1}\n', False),
    ],
)
def test_grammar_limits_white_space(text: str, is_accepted: bool) -> None:
    assert matches({"type": "object"}, text) == is_accepted


WHOLE = [*range(-130, 131), -1000, 999, 1000, 1001, 10**15]
DECIMALS = [-10.5, -9.75, -1.5, -0.25, 0.05, 0.5, 1.25, 9.99, 10.01, 99.5]
BOUNDS: list[dict[str, Any]] = [
    {"minimum": 0},
    {"minimum": 1, "maximum": 1},
    {"minimum": 7, "maximum": 113},
    {"minimum": -113, "maximum": -7},
    {"maximum": -1},
    {"minimum": -0.5, "maximum": 9.5},
    {"exclusiveMinimum": -1, "exclusiveMaximum": 10},
    {"minimum": 0, "exclusiveMaximum": 1},
]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_number_is_bounded(bounds: dict[str, Any]) -> None:
    def is_between(value: float) -> bool:
        return bool(
            bounds.get("minimum", value) <= value <= bounds.get("maximum", value)
            and bounds.get("exclusiveMinimum", value - 1) < value
            and value < bounds.get("exclusiveMaximum", value + 1)
        )

    for kind, values in (("integer", WHOLE[::7]), ("number", [*WHOLE[::7], *DECIMALS])):
        wrong = [x for x in values if matches({"type": kind} | bounds, str(x)) != is_between(x)]
        assert wrong == [], kind


TEXTS = ["", "a b", "\n", "a\nb", *"a b ab aab aaab abab a.b é 7 A7 [ ] \\ a\\b x41".split(), '"']
PATTERNS = r"^$ ^a*$ ^a{1,2}b$ ^(ab)+$ ^(a|b)+$ ^.+$ ^a\.b$ ^[^\"]+$ ^\\$ ^\S+$ ^\w+$ ^[\]\[]$"


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_string_matches_its_pattern(pattern: str) -> None:
    for text in TEXTS:
        is_match = bool(re.search(pattern[:-1] + r"\Z", text, re.ASCII))
        schema = {"type": "string", "pattern": pattern}
        assert matches(schema, json.dumps(text, ensure_ascii=False)) == is_match, text


def test_schema_of_the_request_is_not_changed() -> None:
    """The log keeps it."""
    asked = {"$defs": {"a": {"type": "null"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
    before = json.dumps(asked)
    constraints.schema_lark(asked, True, "response_format")
    assert json.dumps(asked) == before


def test_schema_can_not_set_library_options() -> None:
    lenient = {"type": "mystery", "x-guidance": {"lenient": True}}
    with pytest.raises(GrammarError):
        matches(lenient, "1")


@pytest.mark.parametrize("values", [*itertools.permutations([0, False, "0", None], 2)])
def test_const_compares_types(values: tuple[Any, Any]) -> None:
    one, other = values
    assert matches({"const": one}, json.dumps(one)) and not matches(
        {"const": one}, json.dumps(other)
    )


KEYWORDS = """
    type properties required additionalProperties patternProperties minProperties items anyOf oneOf
    prefixItems minItems maxItems enum const allOf $ref $defs format pattern minLength maxLength
    minimum maximum exclusiveMinimum multipleOf uniqueItems not if propertyNames discriminator $id
""".split()
VALUES = ["object", "string", "integer", "#/$defs/a", '^[^"]+$', "date", -1, 0, 1.5, 3, True, None]


def anything(dice: random.Random, depth: int = 3) -> Any:
    """Return a schema with random keywords and values."""
    kind = dice.random()
    if depth == 0 or kind < 0.3:
        return dice.choice(VALUES)
    if kind < 0.45:
        return [anything(dice, depth - 1) for _ in range(dice.randint(0, 3))]
    names = dice.sample([*KEYWORDS, "a"], dice.randint(0, 4))
    return {name: anything(dice, depth - 1) for name in names}


def test_any_schema_is_accepted_or_rejected_without_a_crash() -> None:
    dice, accepted = random.Random(1), 0
    for _ in range(500):
        schema = {name: anything(dice) for name in dice.sample(KEYWORDS, dice.randint(0, 4))}
        try:
            compile_schema(schema, dice.choice([True, None]))
            accepted += 1
        except ServiceError as error:
            assert error.code == "invalid_request" and "panic" not in error.message, schema
    assert 20 < accepted < 480
