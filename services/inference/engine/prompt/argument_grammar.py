"""The grammar of arguments that a model writes one by one, not as JSON."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice, product
from typing import Any

import msgspec

from services.contract.conversation import Tool
from services.inference.engine.output.answer_format import KEY, ArgumentFormat
from services.inference.engine.output.call_values import GEMMA_QUOTE, types_of
from services.inference.engine.prompt.lark_writer import LarkWriter, quote
from services.inference.engine.prompt.string_regex import string_regexes
from services.inference.engine.sampling.constraints import refusal, schema_lark
from services.inference.engine.sampling.json_schema import rebase_refs

Json = dict[str, Any]

NO_PARAMETERS: Json = {"type": "object", "properties": {}}
MAX_ALTERNATIVES = 32  # of a whole call, from `anyOf` and `oneOf` of its parameters
_ANY_KEY = r"/[A-Za-z_][A-Za-z0-9_-]{0,63}/"
_NUMBER = r"/-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?/"
_PYTHON_CHARACTER = r"(?:[^'\\\n\r]|\\[\\'nrt])"
_PYTHON_WORDS = {True: "True", False: "False", None: "None"}
_ROOT = "tool_parameters"
_ANNOTATIONS = {"description", "title", "default", "examples", "deprecated"}
# Keywords of parameters that only JSON can be held to.
_OF_WHOLE_OBJECTS = ("minProperties", "maxProperties", "patternProperties")


def arguments_schema(tool: Tool) -> Json:
    """Return the parameters as a schema of an object, which arguments always are."""
    parameters = tool.function.parameters
    if parameters is None:
        return NO_PARAMETERS | {"additionalProperties": False}
    return {"type": "object"} | parameters


class ArgumentGrammar:
    """Writes the rules of one tool's arguments, whose names begin with `prefix`."""

    def __init__(
        self, writer: LarkWriter, argument: ArgumentFormat, tool: Tool, prefix: str
    ) -> None:
        self._writer, self._argument, self._prefix = writer, argument, prefix
        self._schema = arguments_schema(tool)
        self._is_strict = bool(tool.function.strict)
        self._count = 0  # of rules
        self._values: dict[str, str] = {}  # rules of values in Gemma's notation, by schema
        key = r"[^<>\"\n/]+" if argument.open.strip() else r"[^\s<>\"'=(){}\[\],:]+"
        self._key = re.compile(key)  # what the parser takes for a name

    def lark(self) -> str:
        """
        Return Lark for the arguments, in the order of the schema. Raises
        ServiceError(invalid_request) for parameters that this form can't express.
        """
        _check_shape(self._schema)
        alternatives = _bounded(_PlainObjects(self._schema).of(self._schema))
        return f"({' | '.join(f'({self._object(each)})' for each in alternatives)})"

    def _object(self, schema: Json) -> str:
        """Return Lark for the arguments of an object without alternatives."""
        self._reject_if_strict(each for each in _OF_WHOLE_OBJECTS if each in schema)
        others, required = schema.get("additionalProperties", True), schema["required"]
        properties = dict.fromkeys(required, others) | schema["properties"]
        if not properties:
            return "" if others is False else self._any_arguments(others)
        if unwritable := [key for key in required if not self._key.fullmatch(key)]:
            reason = f"the model can't write an argument with the name {unwritable[0]!r:.100}."
            raise refusal("tools", reason)
        keys = [key for key in properties if self._key.fullmatch(key)]
        if self._argument.syntax == "gemma":
            keys.sort()
        rules = [self._named_argument(key, properties[key]) for key in keys]
        return self._sequence(rules, [key in required for key in keys])

    def _any_arguments(self, schema: Any) -> str:
        """Return Lark for arguments with any names."""
        argument, separator = self._argument, self._argument.separator
        if KEY in argument.close:  # a grammar can't repeat a name: the model closes the elements
            return ""
        one = self._add(self._written(_ANY_KEY, argument.close, schema))
        if not separator.strip():
            return f"({one} {self._writer.text(separator)})*"
        return f"({one} ({self._writer.text(separator)} {one})*)?"

    def _named_argument(self, key: str, schema: Any) -> str:
        close = self._argument.close.replace(KEY, key)
        return self._add(self._written(quote(key), close, schema))

    def _written(self, name: str, close: str, schema: Any) -> str:
        """Return Lark for an argument."""
        branches = _bounded(self._branches(schema, 0))
        text, argument = self._writer.text, self._argument
        values: dict[str, list[str]] = {}
        for branch in branches:
            mid = argument.mid_of(types_of(branch))
            values.setdefault(mid, []).append(self._value(branch, close, len(branches) > 1))
        either = " | ".join(f"{text(mid)} ({' | '.join(each)})" for mid, each in values.items())
        return f"{text(argument.open)} {name} ({either})"

    def _sequence(self, rules: Sequence[str], is_required: Sequence[bool]) -> str:
        """Return Lark for the required arguments and any of the others, in this order."""
        separator = self._writer.text(self._argument.separator)
        pairs = list(zip(rules, is_required, strict=True))
        if not self._argument.separator.strip():
            parts = [rule if each else f"({rule})?" for rule, each in pairs]
            return f" {separator} ".join(parts)
        rest, starts = '""', list[str]()
        for rule, each in reversed(pairs):
            starts = [f"{rule} {rest}", *([] if each else starts)]
            one = f"{separator} {rule}"
            rest = self._add(f"{one if each else f'({one})?'} {rest}")
        return f"({' | '.join(starts)}){'' if True in is_required else '?'}"

    # values

    def _branches(self, schema: Any, depth: int) -> Iterator[Json]:
        """Yield the alternatives of a property, each of one type if the schema says so."""
        schema = _resolved(schema, self._schema) if isinstance(schema, dict) else {}
        plain = {key: item for key, item in schema.items() if key not in _ANNOTATIONS}
        for keyword in ("anyOf", "oneOf", "allOf"):
            parts = plain.get(keyword)
            if not isinstance(parts, list) or not parts or depth > 8:
                continue
            if keyword != "allOf" or len(parts) == 1:
                rest = {key: item for key, item in plain.items() if key != keyword}
                for part in parts:
                    own = _resolved(part, self._schema) if isinstance(part, dict) else {}
                    yield from self._branches(rest | own, depth + 1)
                return
        types, listed = plain.get("type"), _listed(plain)
        if listed is not None:
            kinds = groupby(sorted(listed, key=_kind), _kind)
            yield from ({"enum": list(values)} for _, values in kinds)
        elif isinstance(types, list) and types:
            yield from ({**plain, "type": each} for each in types)
        else:
            yield plain

    def _value(self, schema: Json, close: str, is_one_of_several: bool) -> str:
        """Return Lark for a value of a schema without alternatives, and its end."""
        syntax, end = self._argument.syntax, self._writer.text(close)
        if (listed := _listed(schema)) is not None:
            literals = (self._literal(each) for each in listed)
            return f"({' | '.join(literals)}) {end}"
        types = types_of(schema)
        if types and "string" not in types or not types and _is_composed(schema):
            if syntax == "gemma" and not (types and types <= _SCALARS):
                return f"{self._gemma(schema)} {end}"
            if syntax == "python" and types == {"boolean"}:
                return f'("True" | "False") {end}'
            return f"{self._json(schema)} {end}"
        if syntax == "python":
            return f"{self._python_string(schema)} {end}"
        if syntax == "gemma":
            return f"{self._gemma(schema)} {end}"
        return self._raw_string(schema, close, is_one_of_several)

    def _literal(self, value: Any) -> str:
        """Return Lark for a listed value."""
        syntax = self._argument.syntax
        if syntax == "python" and (value is None or isinstance(value, bool)):
            return quote(_PYTHON_WORDS[value])
        if not isinstance(value, str):
            return quote(json.dumps(value, ensure_ascii=False))
        if syntax == "gemma":
            mark = self._writer.text(GEMMA_QUOTE)
            return f"{mark} {quote(value)} {mark}"
        return quote(_python_string(value) if syntax == "python" else value)

    def _json(self, schema: Json) -> str:
        """Return Lark for JSON of a property, whose `$ref`s point into the parameters."""
        if "$ref" in json.dumps(schema):
            rebased = rebase_refs(self._schema, f"/$defs/{_ROOT}")
            schema = rebase_refs(schema, f"/$defs/{_ROOT}") | {"$defs": {_ROOT: rebased}}
        return self._writer.shared(schema_lark(schema, self._is_strict, "tools"))

    def _regexes(self, schema: Json) -> list[str]:
        """Return the regexes that a string must match."""
        found = dict(string_regexes(schema))
        self._reject_if_strict(keyword for keyword, regex in found.items() if regex is None)
        return [regex for regex in found.values() if regex is not None]

    def _raw_string(self, schema: Json, close: str, is_one_of_several: bool) -> str:
        regexes = self._regexes(schema)
        if not regexes:
            trailing = close[len(close.rstrip()) :]
            text = self._writer.until(close)
            return f"{text} {self._writer.text(trailing)}" if trailing else text
        if is_one_of_several:  # a quoted text would be read as JSON
            regexes.append(r"(?s:[^\"].*)?")
        return self._writer.matching(regexes, close)

    def _python_string(self, schema: Json) -> str:
        """Return Lark for a quoted string; one with a pattern has no escapes."""
        regexes = self._regexes(schema)
        if not regexes:
            return f"/'{_PYTHON_CHARACTER}*'/"
        own = [r"'[^'\\\n\r]*'", *(f"'(?:{each})'" for each in regexes)]
        return self._writer.terminal(" & ".join(f"/{each}/" for each in own))

    # Gemma's notation

    def _gemma(self, schema: Any) -> str:
        """Return the rule of a value in Gemma's notation: `{a:<|"|>x<|"|>,b:[1,true]}`."""
        key = json.dumps(schema)
        if key not in self._values:
            self._values[key] = rule = self._next_name()  # first, since schemas may be recursive
            branches = _bounded(self._branches(schema, 0))
            self._writer.add(rule, " | ".join(map(self._gemma_branch, branches)))
        return self._values[key]

    def _gemma_branch(self, schema: Json) -> str:
        if (listed := _listed(schema)) is not None:
            return " | ".join(self._literal(each) for each in listed)
        kinds = types_of(schema) or {"value"}
        if kinds <= _SCALARS:
            return self._json(schema)
        if kinds == {"string"}:
            return self._gemma_string(schema)
        if kinds == {"object"} and isinstance(schema.get("properties"), dict):
            return self._gemma_object(schema)
        if kinds == {"array"} and "items" in schema:
            return self._gemma_array(schema)
        return self._gemma_any(min(kinds) if len(kinds) == 1 else "value")

    def _gemma_string(self, schema: Json) -> str:
        mark, regexes = self._writer.text(GEMMA_QUOTE), self._regexes(schema)
        if not regexes:
            return self._gemma_any("string")
        return f"{mark} {self._writer.matching(regexes, GEMMA_QUOTE)}"

    def _gemma_object(self, schema: Json) -> str:
        self._reject_if_strict(each for each in _OF_WHOLE_OBJECTS if each in schema)
        plain, *_ = _bounded(_PlainObjects(self._schema).of(schema))
        keys = sorted(key for key in plain["properties"] if self._key.fullmatch(key))
        rules = [
            self._add(f'{quote(key)} ":" {self._gemma(plain["properties"][key])}') for key in keys
        ]
        pairs = self._sequence(rules, [key in plain["required"] for key in keys])
        return f'"{{" {pairs} "}}"'

    def _gemma_array(self, schema: Json) -> str:
        item = self._gemma(schema["items"])
        low, high = schema.get("minItems", 0), schema.get("maxItems", "")
        if high == 0:
            return '"[" "]"'
        most = "" if high == "" else high - 1
        items = f'{item} ("," {item}){{{max(low - 1, 0)},{most}}}'
        return f'"[" {items} "]"' if low else f'"[" ({items})? "]"'

    def _gemma_any(self, kind: str = "value") -> str:
        """Return the rule of any value of a kind."""
        if "gemma_value" not in self._writer.rules:
            mark = self._writer.text(GEMMA_QUOTE)
            pair = f'{_ANY_KEY} ":" gemma_value'
            for rule, body in {
                "string": f"{mark} {self._writer.until(GEMMA_QUOTE)}",
                "value": f'gemma_string | {_NUMBER} | "true" | "false" | "null"'
                " | gemma_object | gemma_array",
                "object": f'"{{" ({pair} ("," {pair})*)? "}}"',
                "array": '"[" (gemma_value ("," gemma_value)*)? "]"',
            }.items():
                self._writer.add(f"gemma_{rule}", body)
        return f"gemma_{kind}"

    # rules

    def _next_name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _add(self, body: str) -> str:
        return self._writer.add(self._next_name(), body)

    def _reject_if_strict(self, keywords: Iterator[str]) -> None:
        keyword = next(keywords, None) if self._is_strict else None
        if keyword:
            reason = (
                f"its schema's `{keyword}` can't be enforced in this model's form of calls. Remove"
                " it, or send the tool without `strict`, which ignores it."
            )
            raise refusal("tools", reason)


_SCALARS = {"integer", "number", "boolean", "null"}


class _Shape(msgspec.Struct, rename={"ref": "$ref", "defs": "$defs"}):
    """The JSON types of the keywords that are read here."""

    type: str | list[str] = ""
    ref: str = ""
    properties: dict[str, "_Shape | bool"] = {}
    required: list[str] = []
    additionalProperties: "_Shape | bool" = True
    items: "_Shape | bool | list[_Shape | bool]" = True
    allOf: list["_Shape | bool"] = []
    anyOf: list["_Shape | bool"] = []
    oneOf: list["_Shape | bool"] = []
    enum: list[Any] = []
    minLength: int = 0
    maxLength: int = 0
    minItems: int = 0
    maxItems: int = 0
    pattern: str = ""
    format: str = ""
    defs: dict[str, "_Shape | bool"] = {}


def _check_shape(schema: Json) -> None:
    """Raise ServiceError(invalid_request) for a schema with a keyword of a wrong type."""
    try:
        msgspec.convert(schema, _Shape)
    except (msgspec.ValidationError, RecursionError) as error:
        raise refusal("tools", f"its schema is invalid: {error}.") from error


class _PlainObjects:
    """Finds the alternatives of schemas of objects, in time linear in the size of the root."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._known: dict[str, list[Json]] = {}  # by `$ref`

    def of(self, schema: Any) -> list[Json]:
        """
        Return alternatives, at most one more than MAX_ALTERNATIVES, each with `properties`,
        `required` and no `$ref`, `allOf`, `anyOf` or `oneOf`. A `$ref` inside its own target, and a
        schema that is no object, allows anything.
        """
        if not isinstance(schema, dict):
            return [_merged(())]
        ref = schema.get("$ref", "")
        if ref and ref in self._known:
            return self._known[ref]
        self._known[ref] = [_merged(())]
        found = self._of_resolved(
            {"properties": {}, "required": []} | _resolved(schema, self._root)
        )
        self._known[ref] = found
        return found

    def _of_resolved(self, own: Json) -> list[Json]:
        groups = [self.of(part) for part in own.pop("allOf", ())]
        for keyword in ("anyOf", "oneOf"):
            if parts := own.pop(keyword, ()):
                either = chain.from_iterable(map(self.of, parts))
                groups.append(list(islice(either, MAX_ALTERNATIVES + 1)))
        both = (_merged(each) for each in product([own], *groups))
        return list(islice(both, MAX_ALTERNATIVES + 1))


def _merged(schemas: Sequence[Json]) -> Json:
    merged: Json = {"properties": {}, "required": []}
    for each in schemas:
        properties = merged["properties"] | each["properties"]
        required = [*dict.fromkeys((*merged["required"], *each["required"]))]
        merged = merged | each | {"properties": properties, "required": required}
    return merged


def _bounded(alternatives: Iterable[Json]) -> list[Json]:
    """Return the alternatives. Raises ServiceError(invalid_request) for none or too many."""
    found = list(islice(alternatives, MAX_ALTERNATIVES + 1))
    if not 0 < len(found) <= MAX_ALTERNATIVES:
        raise refusal("tools", f"its schema has not 1 to {MAX_ALTERNATIVES} alternatives.")
    return found


def _resolved(schema: Mapping[str, Any], root: Json) -> Json:
    """Return a schema with the target of its `$ref`s into the root, if there is one."""
    node: Json = dict(schema)
    for _ in range(8):
        ref = node.get("$ref")
        if not isinstance(ref, str) or not ref.startswith("#"):
            return node
        target: Any = root
        for name in ref[2:].split("/") if ref != "#" else ():
            target = target.get(name) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            return node
        node = target | {key: item for key, item in node.items() if key != "$ref"}
    return node


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """Return the only values that a schema allows, if it lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) and values else None


def _kind(value: Any) -> str:
    """Return the JSON type of a listed value."""
    return min(types_of({"const": value}) or {""})


def _is_composed(schema: Json) -> bool:
    """Return whether a schema without a type describes more than a string."""
    return not schema.keys().isdisjoint({"properties", "items", "allOf", "anyOf", "oneOf", "$ref"})


def _python_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"
