"""
JSON schemas to GBNF, by llama-cpp-python's converter; mended where what it makes is not JSON, and
kept from what it would do without an end.
"""

import json
from typing import Any

import msgspec
from llama_cpp.llama_grammar import BuiltinRule, SchemaConverter

from services.inference.engine import patterns, ranges
from services.inference.engine.gbnf import GrammarError, literal

MAX_BYTES = 16_384
MAX_REPETITIONS = 1_000  # the converter writes each of them out
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
MAX_PARTS = 2_000  # each is a rule or more
MAX_NAME = 64  # characters of a rule's name, which holds the path to it
ANYTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}
CHAR = r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})'  # no line breaks in strings
# For these there is no grammar.
NOT_HELD = (
    "multipleOf uniqueItems contains minProperties maxProperties patternProperties propertyNames"
    " dependentRequired dependentSchemas dependencies not if"
).split()
EXACT = {"enum", "const"}
CHOICES = ("$ref", "anyOf", "oneOf")
OF_OBJECTS = {"properties", "required"}
# What would be passed over beside one of CHOICES, or another part of an allOf.
MATTERS = {*CHOICES, *OF_OBJECTS, *EXACT, *COUNTS, *ranges.BOUNDS}
MATTERS |= {"allOf", "items", "prefixItems", "pattern"}


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
        schema = self._in_its_words(schema)
        if schema.get("type") in ("integer", "number") and schema.keys() & ranges.BOUNDS:
            return self._add_rule(f"{name}-range" if name else "root", ranges.to_gbnf(schema))
        return super().visit(schema, name)  # type: ignore[no-untyped-call]

    def _in_its_words(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Without what the converter would pass over."""
        _check_words(schema)
        kind = schema.get("type")
        if schema.keys() & EXACT:
            return {key: value for key, value in schema.items() if key in EXACT}
        if isinstance(kind, list):
            return {"anyOf": [schema | {"type": one} for one in kind]}
        if "allOf" in schema:
            return self._joined(schema)
        if "prefixItems" in schema:
            return {"type": kind or "array", "prefixItems": schema["prefixItems"]}
        if "items" in schema or kind == "array" and schema.keys() & COUNTS:
            is_any = schema.get("items", True) in ({}, True)
            return schema | {"items": ANYTHING} if is_any else schema
        if "required" in schema:
            properties, more = schema.get("properties", {}), schema.get("additionalProperties")
            lacking = {name: more or {} for name in schema["required"] if name not in properties}
            return schema | {"properties": properties | lacking}
        return schema

    def _joined(self, schema: dict[str, Any]) -> dict[str, Any]:
        """One schema of all in an allOf, and of what stands beside it."""
        own = {key: value for key, value in schema.items() if key != "allOf"}
        parts = schema["allOf"]
        if len(parts) == 1 and not own.keys() & MATTERS:
            return self._in_its_words(parts[0])
        parts = [self._refs[part["$ref"]] if "$ref" in part else part for part in parts]
        properties: dict[str, Any] = {}
        required: list[str] = []
        for part in (own, *(self._joined(p) if "allOf" in p else p for p in parts)):
            _check_joined(part, properties)
            properties |= part.get("properties", {})
            required += part.get("required", [])
        return self._in_its_words(own | {"properties": properties, "required": required})

    def _resolve_ref(self, ref: str) -> str:
        """The converter's own calls it by its path's last part, which another may have too."""
        if ref not in self._named:
            self._named[ref] = name = f"ref-{len(self._named)}"
            self._named[ref] = self.visit(self._refs[ref], name)
        return self._named[ref]

    def _add_rule(self, name: str, rule: str) -> Any:
        return super()._add_rule(name[:MAX_NAME], rule)  # type: ignore[no-untyped-call]

    def _visit_pattern(self, pattern: str, name: str) -> Any:
        return self._add_rule(name, rf'"\"" {patterns.to_gbnf(pattern)} "\"" space')

    def _add_primitive(self, name: str, rule: BuiltinRule) -> Any:
        return super()._add_primitive(name, BuiltinRule(CHAR) if name == "char" else rule)

    def _format_literal(self, value: str) -> str:
        """`value` is JSON: its backslashes must survive GBNF, its characters be themselves."""
        return literal(json.dumps(json.loads(value), ensure_ascii=False))


def _check_words(schema: dict[str, Any]) -> None:
    if wrong := next((word for word in NOT_HELD if schema.get(word)), None):
        raise GrammarError(f"there is no grammar for its `{wrong}`")
    for word in ("anyOf", "oneOf", "allOf", "enum", "type"):
        if schema.get(word) == []:
            raise GrammarError(f"its `{word}` is empty")
    for word in CHOICES:
        if word in schema and (beside := sorted(schema.keys() & MATTERS - {word})):
            raise GrammarError(f"its `{word}` stands beside `{beside[0]}`: both can't be held to")
    if "pattern" in schema and schema.keys() & COUNTS:
        raise GrammarError("its `pattern` stands beside a length: say it in the pattern")


def _check_joined(part: dict[str, Any], properties: dict[str, Any]) -> None:
    """Whether it can be joined with the others, which have the `properties`."""
    is_object = part.get("type", "object") == "object" and not part.keys() & MATTERS - OF_OBJECTS
    if not is_object or properties.keys() & part.get("properties", {}).keys():
        raise GrammarError("its `allOf` joins more than the properties of objects")


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
    for name, count in counts:
        if not isinstance(count, int | dict) or isinstance(count, int) and count > MAX_REPETITIONS:
            raise GrammarError(f"its {name} is {count!r}, and {MAX_REPETITIONS:,} is the most")


def _check_reference(part: dict[str, Any]) -> None:
    reference = part.get("$ref", "#/")
    if isinstance(reference, str) and not reference.startswith("#/"):
        raise GrammarError(f"its $ref {reference[:64]!r} does not begin with `#/`")
