"""
JSON schemas to GBNF, by llama-cpp-python's converter; mended where what it makes is not JSON, and
kept from what it would do without an end.
"""

import json
import re
from typing import Any

import msgspec
from llama_cpp.llama_grammar import BuiltinRule, SchemaConverter

from services.inference.engine.gbnf import GrammarError

MAX_BYTES = 16_384
MAX_REPETITIONS = 1_000  # the converter writes each of them out
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
MAX_PARTS = 2_000  # each is a rule or more
MAX_NAME = 64  # characters of a rule's name, which holds the path to it
QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?}")
ANYTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}
PART = re.compile(r"\\.|\[(?:[^]\\]|\\.)*]|\{[^}]*}", re.DOTALL)  # of a pattern: \x, [x] or {1,2}
CLASSES = {r"\d": "0-9", r"\w": "a-zA-Z0-9_", r"\s": r" \t\n"}
CHAR = r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})'  # no line breaks in strings


def to_gbnf(schema: dict[str, Any], name: str = "") -> str:
    """
    A grammar for the JSON that fits; with a `name`, only rules, of which the one of this name is
    for it. Raises GrammarError.
    """
    encoded = msgspec.json.encode(schema)
    if len(encoded) > MAX_BYTES:
        raise GrammarError(f"it has {len(encoded):,} bytes, and {MAX_BYTES:,} is the most")
    _check(schema)
    try:
        return _Converter().convert(msgspec.json.decode(encoded), name)  # it writes into its schema
    except GrammarError:
        raise
    except RecursionError as error:
        raise GrammarError("it is nested too deep, or repeats too much") from error
    except Exception as error:  # a schema can be wrong in any way, and the converter does not look
        raise GrammarError(f"{type(error).__name__} in its conversion: {error}") from error


class _Converter(SchemaConverter):
    def __init__(self) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False
        )
        self._parts = 0
        self._named: dict[str, str] = {}  # the rule of each $ref

    def convert(self, schema: dict[str, Any], name: str) -> str:
        if "$ref" in schema:  # beside one, the converter does not look at $defs
            schema["anyOf"] = [{"$ref": schema.pop("$ref")}]
        self.visit(self.resolve_refs(schema, "stdin"), name)
        grammar: str = self.format_grammar()  # type: ignore[no-untyped-call]
        return grammar

    def visit(self, schema: Any, name: str) -> Any:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise GrammarError(f"it has more than {MAX_PARTS:,} parts")
        if schema in ({}, True):  # which the converter takes for objects alone
            schema = ANYTHING
        elif schema.get("items") in ({}, True):
            schema = schema | {"items": ANYTHING}
        return super().visit(schema, name)  # type: ignore[no-untyped-call]

    def _resolve_ref(self, ref: str) -> str:
        """The converter's own calls it by its path's last part, which another may have too."""
        if ref not in self._named:
            self._named[ref] = name = f"ref-{len(self._named)}"
            self._named[ref] = self.visit(self._refs[ref], name)
        return self._named[ref]

    def _add_rule(self, name: str, rule: str) -> Any:
        return super()._add_rule(name[:MAX_NAME], rule)  # type: ignore[no-untyped-call]

    def _visit_pattern(self, pattern: str, name: str) -> Any:
        plain = PART.sub(lambda part: _plain(part[0]), pattern)
        return super()._visit_pattern(plain, name)  # type: ignore[no-untyped-call]

    def _add_primitive(self, name: str, rule: BuiltinRule) -> Any:
        return super()._add_primitive(name, BuiltinRule(CHAR) if name == "char" else rule)

    def _format_literal(self, literal: str) -> str:
        """`literal` is JSON: its backslashes must survive GBNF, its characters be themselves."""
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(part: str) -> str:
    """The part of a pattern without the escapes that GBNF has not."""
    if part in CLASSES:
        return f"[{CLASSES[part]}]"
    if part[0] == "[":
        return re.sub(r"\\[dws]", lambda escape: CLASSES[escape[0]], part)
    return f"[{part[1]}]" if part[0] == "\\" and part[1] in "./-:@#%&=,;!$^" else part


def _check(schema: Any) -> None:
    """What the converter would follow to any length, or over the network."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
            _check_counts(part)
            _check_reference(part)


def _check_counts(part: dict[str, Any]) -> None:
    counts = [(name, part[name]) for name in COUNTS if name in part]
    if isinstance(pattern := part.get("pattern"), str):
        if any(bracket in PART.sub("", pattern) for bracket in "]}"):
            raise GrammarError(f"its pattern {pattern[:64]!r} closes what it does not open")
        found = QUANTIFIER.findall(pattern)
        counts += [("pattern", int(count)) for pair in found for count in pair if count]
    for name, count in counts:
        if not isinstance(count, int | dict) or isinstance(count, int) and count > MAX_REPETITIONS:
            raise GrammarError(f"its {name} is {count!r}, and {MAX_REPETITIONS:,} is the most")


def _check_reference(part: dict[str, Any]) -> None:
    reference = part.get("$ref", "#/")
    if isinstance(reference, str) and not reference.startswith("#/"):
        raise GrammarError(f"its $ref {reference[:64]!r} does not begin with `#/`")
