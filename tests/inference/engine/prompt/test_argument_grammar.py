"""Calls that are written argument by argument match the schema of their tool."""

import json
import random
import re
import time
from contextlib import nullcontext
from typing import Any

import pytest

from services.contract.conversation import Function, Tool
from services.contract.errors import ServiceError
from services.inference.engine.prompt.string_regex import whole_regex
from services.inference.engine.sampling.grammar import Vocabulary, compile_lark
from tests.inference.engine.prompt.round_trip import (
    TOOLS,
    Answer,
    parse,
    read,
    template,
    turn,
)
from tests.inference.engine.prompt.test_round_trip import walk
from tests.inference.fake_backend import VOCABULARY
from tests.inference.grammars import accepts
from tests.inference.vocabulary import load_vocabulary

# Unquoted, with types, quoted as in Python, nested elements, in Gemma's notation
FORMS = (
    "Qwen3-Coder",
    "Kimi-K3",
    "openbmb-MiniCPM5-1B",
    "LFM2.5-8B-A1B",
    "MiniMax-M3",
    "google-gemma-4-31B-it",
)
ITEM = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}


def schema(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]} | more


def drawn(name: str, parameters: dict[str, Any], strict: bool = True) -> list[dict[str, Any]]:
    """Return the arguments of three calls that the grammar allows."""
    form, draw = template(name).format, random.Random(json.dumps(parameters))
    tool = Tool(Function("act", "acts", parameters, strict))
    lark = form.answer_lark((tool,), "required", False, None, "content", may_reason=False)
    assert lark is not None
    answers = [read(parse(form.parser((tool,)), [walk(lark, draw)])) for _ in range(3)]
    assert all([called for called, _ in each.calls] == ["act"] for each in answers), answers
    return [arguments for each in answers for _, arguments in each.calls]


@pytest.mark.parametrize("name", FORMS)
def test_strings_match_pattern_length_and_format(name: str) -> None:
    properties = {
        "code": {"type": "string", "pattern": r"^[a-c]{2,3}$|^z\d$"},
        "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "day": {"type": "string", "format": "date"},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    }
    for got in drawn(name, schema(properties)):
        assert re.search(r"^[a-c]{2,3}$|^z\d$", got["code"])
        assert 2 <= len(got["short"]) <= 4
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", got["day"])
        assert got["maybe"] is None or len(got["maybe"]) <= 3


@pytest.mark.parametrize("name", FORMS)
def test_values_match_references_lists_and_branches(name: str) -> None:
    properties = {
        "item": {"$ref": "#/$defs/item"},
        "pair": {"type": "array", "items": {"enum": ["p", "q"]}, "minItems": 2, "maxItems": 2},
        "mixed": {"enum": [1, "x", None, True]},
        "count": {"type": ["integer", "null"], "minimum": 1, "maximum": 2},
    }
    for got in drawn(name, schema(properties, **{"$defs": {"item": ITEM}})):
        assert got["item"] in ({"n": True}, {"n": False})
        assert len(got["pair"]) == 2 and {*got["pair"]} <= {"p", "q"}
        assert got["mixed"] in (1, "x", None) and got["count"] in (1, 2, None)


@pytest.mark.parametrize("name", FORMS)
def test_parameters_may_be_composed(name: str) -> None:
    flag = schema({"a": {"type": "boolean"}})
    other = schema({"b": {"type": "boolean"}})
    for got in drawn(name, {"allOf": [flag, {"$ref": "#/$defs/o"}], "$defs": {"o": other}}):
        assert got.keys() == {"a", "b"}
    for got in drawn(name, {"oneOf": [flag, other]}):
        assert got.keys() in ({"a"}, {"b"})
    for got in drawn(name, flag | {"required": ["a", "zz"], "additionalProperties": {"const": 7}}):
        assert got["zz"] == 7


@pytest.mark.parametrize("name", FORMS)
def test_strict_keyword_beyond_the_form_is_rejected(name: str) -> None:
    flag = schema({"a": {"type": "boolean"}})
    lookahead = schema({"a": {"type": "string", "pattern": "^(?=x)"}})
    for keyword, parameters in (
        ("minProperties", flag | {"minProperties": 1}),
        ("uniqueItems", schema({"a": {"type": "array", "uniqueItems": True}})),
        ("pattern", lookahead),
        ("format", schema({"a": {"type": "string", "format": "iri"}})),
    ):
        with pytest.raises(ServiceError, match=f"`tools` .*{keyword}` can't be enforced"):
            drawn(name, parameters)
    assert drawn(name, flag | {"minProperties": 1}, strict=False)


@pytest.mark.parametrize("name", FORMS)
def test_name_that_a_form_can_not_write_is_rejected(name: str) -> None:
    with pytest.raises(ServiceError, match="can't write an argument with the name 'a\"b'"):
        drawn(name, schema({'a"b': {"type": "boolean"}}))
    optional = schema({"c": {"type": "boolean"}, 'a"b': {"type": "boolean"}}, required=["c"])
    assert all(got.keys() == {"c"} for got in drawn(name, optional))


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": []},
        {"required": "ab"},
        {"allOf": [5]},
        {"properties": {"a": {"type": 5}}},
        {"properties": {"a": {"type": "string", "minLength": "x"}}},
        {"anyOf": [{"allOf": [{"anyOf": [{"required": ["a"]}] * 9}] * 9}] * 9},
    ],
)
def test_impossible_parameters_are_rejected(parameters: dict[str, Any]) -> None:
    for name in FORMS:
        with pytest.raises(ServiceError, match="`tools` can't be used: its schema"):
            drawn(name, parameters)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "properties"])
def test_schemas_that_repeat_themselves_take_no_time(name: str, keyword: str) -> None:
    """Followed one by one, the references would make 8 to the 12th schemas."""
    defs: dict[str, Any] = {"d12": {"type": "object"}, "self": {"anyOf": [{"$ref": "#"}] * 8}}
    for number in range(12):
        parts = [{"$ref": f"#/$defs/d{number + 1}"} for _ in range(8)]
        properties = {f"p{i}": part for i, part in enumerate(parts)}
        defs[f"d{number}"] = {keyword: properties if keyword == "properties" else parts}
    parameters = {"properties": {"a": defs["d0"], "b": defs["self"]}, "$defs": defs}
    tool = Tool(Function("act", "acts", parameters | defs["d0"]))
    has_too_many = pytest.raises(ServiceError, match="alternatives")
    began = time.process_time()
    with has_too_many if keyword == "anyOf" else nullcontext():
        assert template(name).format.answer_lark((tool,), "required", False)
    assert time.process_time() - began < 5  # seconds; a tenth of one if the machine is idle


def test_long_strings_are_bounded_on_a_real_vocabulary() -> None:
    """A mask visits all tokens, and the lexer has a limit for one step."""
    backend = load_vocabulary("gpt-2")
    pieces = [backend.piece(token) for token in range(backend.vocabulary_size)]
    vocabulary = Vocabulary(pieces, frozenset())
    tool = Tool(Function("act", "acts", schema({"a": {"type": "string", "maxLength": 60_000}})))
    lark = template("GLM-4.6").format.answer_lark((tool,), "required", may_reason=False)
    assert lark is not None
    grammar = compile_lark(lark, vocabulary)
    text = "<tool_call>act\n<arg_key>a</arg_key>\n<arg_value>The old city of Rome</arg_value>\n"
    for token in backend.tokenize(text, special=False):
        assert grammar.allowed()[token]
        grammar.accept(token)


def test_many_tools_are_compiled_in_a_second() -> None:
    properties = {f"p{i}": {"type": ("string", "integer")[i % 2]} for i in range(20)}
    tools = [Tool(Function(f"act{i}", "acts", schema(properties))) for i in range(128)]
    began = time.process_time()
    lark = template("Qwen3-Coder").format.answer_lark(tools, "required", True)
    assert lark and compile_lark(lark, VOCABULARY)
    assert time.process_time() - began < 3  # a second


@pytest.mark.parametrize("name", ["muse-glimmer", "meetkai-functionary-medium-v3.2"])
def test_forced_calls_may_be_several_messages(name: str) -> None:
    given = turn(name, Answer("", "", (("act", {"text": "x"}), ("go_to.place", {"where": "y"}))))
    assert len(given.answer.calls) == 2
    for is_parallel in (True, False):
        lark = template(name).format.answer_lark(TOOLS, "required", is_parallel)
        assert lark and accepts(lark, given.text.rstrip()) == is_parallel


@pytest.mark.parametrize(
    ("pattern", "regex"),
    [
        ("a", "(?:(?s:.*)a(?s:.*))"),
        ("^a|b$", "(?:a(?s:.*)|(?s:.*)b)"),
        (r"^(a|b)/[^|$]\$$", r"(?:(a|b)\/[^|$]\$)"),
        ("^$", "(?:)"),
        ("(^a|b)", None),
        (r"\bword", None),
        ("(?!a)", None),
    ],
)
def test_regex_of_whole_texts_has_no_anchors(pattern: str, regex: str | None) -> None:
    assert whole_regex(pattern) == regex
