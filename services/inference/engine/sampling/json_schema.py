"""
Prepares JSON schemas for constrained decoding.

llguidance enforces most of JSON Schema and rejects the rest by name
(https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md). This module decides which
of these keywords are ignored instead, and rejects schemas that would take minutes to compile. It
looks for keywords in schemas only, never in data (`default`, `examples`, `enum`, `const`), and a
property may have any name.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

Json = dict[str, Any]

FORMATS = set("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())

# Keywords whose value is a schema (of `items` also a list), a list of schemas, or schemas by name.
SCHEMA_KEYWORDS = set(
    "items additionalItems additionalProperties contains not if then else propertyNames"
    " unevaluatedItems unevaluatedProperties".split()
)
LIST_KEYWORDS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
MAP_KEYWORDS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

IN_PLACE_KEYWORDS = {"anyOf", "oneOf", "allOf", "$ref"}  # their schemas apply to the same value
OBJECT_KEYWORDS = set(
    "properties required additionalProperties patternProperties minProperties maxProperties".split()
)

# Keywords that can't be enforced, and the values with which they have no effect.
_ANY_SCHEMA: tuple[Any, ...] = (True, {})
UNENFORCEABLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("contains", "minContains", "maxContains", "if"), ()),
    **dict.fromkeys(("uniqueItems", "not"), (False,)),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
    **dict.fromkeys(("then", "else", "unevaluatedProperties", "unevaluatedItems"), _ANY_SCHEMA),
    "propertyNames": (*_ANY_SCHEMA, {"type": "string"}),
}
LOOKAROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9])")  # and back references
CONTROL_CHARACTER = re.compile(r"\\u00[01]")  # in JSON: a character that needs a `\u` escape
NEGATED_CLASS = re.compile(r"(?<!\\)((?:\\\\)*)\[\^(?!])")
FRAGMENT_CHARACTERS = "#/%$:~!'()*,;=@&+?"  # kept in a $ref; all others are percent-encoded
MAX_INTEGER = 10**18  # fits 64 bits; a model that knows no JSON writes digits without end

# llguidance's own limits do not cover these. A string that must match several patterns: each one
# doubles the work (16 take seconds, 30 hours). Patterns of property names: all pairs are compared.
# The states of several `multipleOf`: ten values of a million take a minute. 3,000 properties: the
# first step takes a sixth of a second, in which no other thread runs, and fails.
MAX_JOINED_PATTERNS = 8
MAX_NAME_PATTERNS = 32
MAX_REMAINDERS = 20_000
MAX_PROPERTIES = 1_000


class EnforceableSchema(NamedTuple):
    """
    A schema without the keywords that can't be enforced, and the paths of these, such as
    `properties.tags.uniqueItems`. A value that matches it matches the original except for those.
    """

    schema: Json
    ignored: tuple[str, ...]


def enforceable(schema: Json) -> EnforceableSchema:
    """Return the enforceable part of a schema, with objects closed where that is safe."""
    ignored: list[str] = []
    kept = _keep_enforceable(schema, "", ignored)
    return EnforceableSchema(kept if _is_joined(kept) else _close_objects(kept), tuple(ignored))


def rebase_refs(node: Any, pointer: str) -> Any:
    """Return a schema for use at `pointer` of another, with its `$ref`s to itself adapted."""
    if not isinstance(node, dict):
        return node
    parts = _map_subschemas(node, lambda part: rebase_refs(part, pointer))
    ref = node.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        return parts | {"$ref": f"#{pointer}{ref[1:]}"}
    return parts


def excessive_cost(schema: Json) -> str | None:
    """Return a clause that names what would take minutes to compile, or None."""
    if _PatternCounter(schema).count() > MAX_JOINED_PATTERNS:
        return f"more than {MAX_JOINED_PATTERNS} patterns and formats are joined by `allOf`"
    named = [value for value in _values(schema, "patternProperties") if isinstance(value, dict)]
    if sum(map(len, named)) > MAX_NAME_PATTERNS:
        return f"`patternProperties` has more than {MAX_NAME_PATTERNS} patterns"
    declared = [value for value in _values(schema, "properties") if isinstance(value, dict)]
    if any(len(value) > MAX_PROPERTIES for value in declared):
        return f"`properties` has more than {MAX_PROPERTIES:,} names"
    divisors = [_remainders(value) for value in _values(schema, "multipleOf")]
    if max(sum(divisors), math.lcm(*divisors)) > MAX_REMAINDERS:
        return f"the numbers of `multipleOf` need more than {MAX_REMAINDERS:,} remainders"
    return None


def _map_subschemas(node: Json, change: Callable[[Any], Any]) -> Json:
    """Return the schema with `change` applied to each schema directly inside it."""
    return {
        key: _map_value(key, value, lambda part, _: change(part)) for key, value in node.items()
    }


def _map_value(key: str, value: Any, change: Callable[[Any, str], Any]) -> Any:
    """
    Return the value of a keyword with `change` applied to each schema in it. The second argument
    of `change` is the path to the schema, such as `properties.tags`.
    """
    if isinstance(value, list) and key in LIST_KEYWORDS:
        return [change(part, f"{key}.{index}") for index, part in enumerate(value)]
    if isinstance(value, dict) and key in MAP_KEYWORDS:
        return {name: change(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, dict) and key in SCHEMA_KEYWORDS:
        return change(value, key)
    return value


def _subschemas(node: Json) -> list[Any]:
    """Return the schemas directly inside a schema."""
    parts: list[Any] = []
    _map_subschemas(node, parts.append)
    return parts


def _values(node: Any, keyword: str) -> Iterator[Any]:
    """Yield every value of the keyword in the schema."""
    if not isinstance(node, dict):
        return
    if keyword in node:
        yield node[keyword]
    for part in _subschemas(node):
        yield from _values(part, keyword)


def _remainders(divisor: Any) -> int:
    """
    Return the number of remainders that a matcher of digits must distinguish: factors of 2 and 5
    need none, since the last digits decide.
    """
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not divisor:
        return 1
    _, digits, _ = Decimal(repr(divisor)).as_tuple()
    rest = int("".join(map(str, digits)))
    for factor in (2, 5):
        while rest and rest % factor == 0:
            rest //= factor
    return rest


class _PatternCounter:
    """Counts the patterns and formats that one string may have to match: an upper bound."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._counts: dict[str, int] = {}  # by `$ref`
        self._missing: list[str] = []

    def count(self) -> int:
        """Count in the whole schema. Long chains of `$ref`s are followed without recursion."""
        stack, started = ["#"], set[str]()
        while stack:
            ref = stack[-1]
            started.add(ref)
            self._missing.clear()
            count = 0 if ref in self._counts else self._count_in(self._resolve(ref))
            if missing := [other for other in self._missing if other not in started]:
                stack += missing
                continue
            self._counts.setdefault(ref, count)
            stack.pop()
        return self._counts["#"]

    def _count_in(self, node: Any) -> int:
        if not isinstance(node, dict):
            return 0
        counts = {
            key: [self._count_in(part) for part in _subschemas({key: value})]
            for key, value in node.items()
        }
        own = ("pattern" in node) + ("format" in node)
        inner = [max(c, default=0) for key, c in counts.items() if key not in IN_PLACE_KEYWORDS]
        both = sum(sorted(counts.get("oneOf", ()))[-2:])  # branches are compared in pairs
        either = max(counts.get("anyOf", ()), default=0)
        joined = sum(counts.get("allOf", ())) + both + either + self._count_ref(node.get("$ref"))
        return max(own, *inner, 0) + joined

    def _count_ref(self, ref: Any) -> int:
        if not isinstance(ref, str):
            return 0
        if ref not in self._counts:
            self._missing.append(ref)
        return self._counts.get(ref, 0)

    def _resolve(self, ref: str) -> Any:
        """Return the target of a pointer. An anchor may be anywhere: return the whole schema."""
        node: Any = self._root
        for part in unquote(ref[2:]).split("/") if ref.startswith("#/") else ():
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list):
                node = node[int(name)] if name.isdecimal() and int(name) < len(node) else None
            else:
                node = node.get(name) if isinstance(node, dict) else None
        return node


def _keep_enforceable(node: Any, path: str, ignored: list[str]) -> Any:
    """Return the schema without the keywords that can't be enforced, and list their paths."""
    if not isinstance(node, dict):
        return node

    def keep(part: Any, inner: str) -> Any:
        return _keep_enforceable(part, f"{path}{inner}.", ignored)

    kept = {}
    for key, value in node.items():
        if key == "$schema":
            continue  # keywords of all drafts are supported; an unknown draft would be fetched
        if key == "oneOf" and "discriminator" in node:
            key = "anyOf"  # the branches are distinct; llguidance would have to prove it
        if _is_enforceable(key, value):
            kept[key] = _map_value(key, _normalize(key, value), keep)
        elif not _has_no_effect(key, value, node):
            ignored.append(f"{path}{key}")
    return _bound_integers(kept)


def _is_enforceable(key: str, value: Any) -> bool:
    if key == "format":
        return value in FORMATS if isinstance(value, str) else True
    if key == "pattern":
        return not (isinstance(value, str) and LOOKAROUND.search(value))
    if key in ("const", "enum"):
        return not CONTROL_CHARACTER.search(json.dumps(value))
    return key not in UNENFORCEABLE


def _has_no_effect(key: str, value: Any, node: Json) -> bool:
    if key == "format":
        return "string" not in str(node.get("type", "string"))  # `int32` and the like, of numbers
    no_effect = UNENFORCEABLE.get(key, ())
    return any(value == other and type(value) is type(other) for other in no_effect)


def _bound_integers(node: Json) -> Json:
    """Return the schema with bounds for unbounded integers."""
    kinds = node.get("type")
    if kinds != "integer" and not (isinstance(kinds, list) and "integer" in kinds):
        return node
    low = {} if node.keys() & {"minimum", "exclusiveMinimum"} else {"minimum": -MAX_INTEGER}
    high = {} if node.keys() & {"maximum", "exclusiveMaximum"} else {"maximum": MAX_INTEGER}
    return node | low | high


def _normalize(key: str, value: Any) -> Any:
    """
    Return the value in a spelling that llguidance 1.9.1 handles correctly. Its `json_quote` adds
    the quotation mark to a class that has all control characters but not that mark. No text
    has U+0000, so `[^"]` and `[^\\x00"]` mean the same here.
    """
    if key == "pattern" and isinstance(value, str):
        return NEGATED_CLASS.sub(r"\1[^\\x00", value)
    if key == "$ref" and isinstance(value, str):
        return quote(value, safe=FRAGMENT_CHARACTERS)
    return value


def _is_joined(node: Any) -> bool:
    """
    Return whether a value must match two schemas at once, or one and not another: closing one of
    them would change the result.
    """
    if not isinstance(node, dict):
        return False
    in_place = node.keys() & IN_PLACE_KEYWORDS
    has_both = len(in_place) > 1 or bool(in_place and node.keys() & OBJECT_KEYWORDS)
    has_several = isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1
    return has_both or has_several or "oneOf" in node or any(map(_is_joined, _subschemas(node)))


def _close_objects(node: Any) -> Any:
    """
    Return the schema with `additionalProperties: false` where it declares properties and has no
    rule for others. A matching value matches the original, and a model can't invent keys.
    """
    if not isinstance(node, dict):
        return node
    closed = _map_subschemas(node, _close_objects)
    if "properties" in closed:
        is_open = closed.keys() & {"additionalProperties", "patternProperties"}
        return {"type": "object"} | closed | ({} if is_open else {"additionalProperties": False})
    return closed
