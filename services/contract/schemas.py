"""
Prepares JSON schemas for constrained decoding. Pure, so that the edge and a worker agree.

llguidance enforces most of JSON Schema and rejects the rest by name
(https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md). This module decides which
of these keywords are ignored instead. It looks for keywords in schemas only, never in data
(`default`, `examples`, `enum`, `const`), and a property may have any name.
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

ONE = set(  # keywords whose value is a schema; of `items` also a list
    "items additionalItems additionalProperties contains not if then else propertyNames"
    " unevaluatedItems unevaluatedProperties".split()
)
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

IN_PLACE = {"anyOf", "oneOf", "allOf", "$ref"}  # their schemas apply to the same value
OF_OBJECTS = set(
    "properties required additionalProperties patternProperties minProperties maxProperties".split()
)
LOOKS_AROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9])")  # and back references
LARGEST = 10**18  # fits 64 bits; a model that knows no JSON writes digits without end
CONTROL = re.compile(r"\\u00[01]")  # in JSON: a character that needs a `\u` escape
NEGATED = re.compile(r"(?<!\\)((?:\\\\)*)\[\^(?!])")
IN_FRAGMENTS = "#/%$:~!'()*,;=@&+?"  # kept as they are; all other characters are percent-encoded

# Keywords that can't be enforced, and the values with which they have no effect.
ANY_SCHEMA: tuple[Any, ...] = (True, {})
NOT_HELD: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "contains": (),
    "minContains": (),
    "maxContains": (),
    "not": (False,),
    "if": (),
    "then": ANY_SCHEMA,
    "else": ANY_SCHEMA,
    "propertyNames": (*ANY_SCHEMA, {"type": "string"}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "unevaluatedProperties": ANY_SCHEMA,
    "unevaluatedItems": ANY_SCHEMA,
}


# llguidance's own limits leave out that a text must fit several patterns, where a further one
# doubles the work (16 take seconds, 30 hours); that it compares all patterns of names in pairs; and
# the states of several `multipleOf` (ten of a million take a minute).
MAX_JOINED_PATTERNS = 8
MAX_NAME_PATTERNS = 32
MAX_REMAINDERS = 20_000
# With 3,000 its first step takes a sixth of a second, in which no other thread runs, and fails.
MAX_PROPERTIES = 1_000


class Held(NamedTuple):
    """
    A schema without the keywords that can't be enforced, and their paths, such as
    `properties.tags.uniqueItems`. A value that matches it matches the original except for those.
    """

    schema: Json
    left_out: tuple[str, ...]


def held(schema: Json) -> Held:
    """Return the enforceable part of a schema, with objects closed where that is safe."""
    left_out: list[str] = []
    kept = _kept(schema, "", left_out)
    return Held(kept if _joins(kept) else _closed(kept), tuple(left_out))


def moved(node: Any, pointer: str) -> Any:
    """Return a schema for use at `pointer` of another, with its `$ref`s to itself adapted."""
    if not isinstance(node, dict):
        return node
    parts = {
        key: _inside(key, value, "", lambda part, _: moved(part, pointer))
        for key, value in node.items()
    }
    ref = node.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        return parts | {"$ref": f"#{pointer}{ref[1:]}"}
    return parts


def excess(schema: Json) -> str | None:
    """Return what of the schema would take minutes to prepare, as a clause."""
    if _Joined(schema).patterns() > MAX_JOINED_PATTERNS:
        return f"more than {MAX_JOINED_PATTERNS} patterns and formats are joined by `allOf`"
    names = _values(schema, "patternProperties")
    if sum(len(given) for given in names if isinstance(given, dict)) > MAX_NAME_PATTERNS:
        return f"`patternProperties` has more than {MAX_NAME_PATTERNS} patterns"
    declared = _values(schema, "properties")
    if any(len(given) > MAX_PROPERTIES for given in declared if isinstance(given, dict)):
        return f"`properties` has more than {MAX_PROPERTIES:,} names"
    divisors = [_remainders(value) for value in _values(schema, "multipleOf")]
    if max(sum(divisors), math.lcm(*divisors)) > MAX_REMAINDERS:
        return f"the numbers of `multipleOf` need more than {MAX_REMAINDERS:,} remainders"
    return None


def _values(node: Any, keyword: str) -> Iterator[Any]:
    """Yield what the keyword has, wherever it stands."""
    if not isinstance(node, dict):
        return
    if keyword in node:
        yield node[keyword]
    parts: list[Any] = []
    for key, value in node.items():
        _inside(key, value, "", lambda part, _: parts.append(part))
    for part in parts:
        yield from _values(part, keyword)


def _remainders(divisor: Any) -> int:
    """Return how many must be told apart: the last digits tell those of powers of 2 and 5."""
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not divisor:
        return 1
    _, digits, _ = Decimal(repr(divisor)).as_tuple()
    rest = int("".join(map(str, digits)))
    for factor in (2, 5):
        while rest and rest % factor == 0:
            rest //= factor
    return rest


class _Joined:
    """Counts how many patterns and formats one text must fit: never fewer than there are."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._counts: dict[str, int] = {}  # by `$ref`
        self._missing: list[str] = []

    def patterns(self) -> int:
        """Follows references one after another, as a chain of them may be long."""
        waiting, begun = ["#"], set[str]()
        while waiting:
            ref = waiting[-1]
            begun.add(ref)
            self._missing.clear()
            count = 0 if ref in self._counts else self._of(self._target(ref))
            if missing := [other for other in self._missing if other not in begun]:
                waiting += missing
                continue
            self._counts.setdefault(ref, count)
            waiting.pop()
        return self._counts["#"]

    def _of(self, node: Any) -> int:
        if not isinstance(node, dict):
            return 0
        counts = {key: self._counts_in(key, value) for key, value in node.items()}
        own = ("pattern" in node) + ("format" in node)
        within = [max(found, default=0) for key, found in counts.items() if key not in IN_PLACE]
        both = sum(sorted(counts.get("oneOf", ()))[-2:])  # branches are compared in pairs
        either = max(counts.get("anyOf", ()), default=0)
        joined = sum(counts.get("allOf", ())) + both + either + self._referred(node.get("$ref"))
        return max(own, *within, 0) + joined

    def _counts_in(self, key: str, value: Any) -> list[int]:
        counts: list[int] = []
        _inside(key, value, "", lambda part, _: counts.append(self._of(part)))
        return counts

    def _referred(self, ref: Any) -> int:
        if not isinstance(ref, str):
            return 0
        if ref not in self._counts:
            self._missing.append(ref)
        return self._counts.get(ref, 0)

    def _target(self, ref: str) -> Any:
        """Return what a pointer leads to; for a name, which may be anywhere, the whole schema."""
        node: Any = self._root
        for part in unquote(ref[2:]).split("/") if ref.startswith("#/") else ():
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list):
                node = node[int(name)] if name.isdecimal() and int(name) < len(node) else None
            else:
                node = node.get(name) if isinstance(node, dict) else None
        return node


def _kept(node: Any, path: str, left_out: list[str]) -> Any:
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        if key == "$schema":
            continue  # keywords of all drafts are supported; an unknown draft would be fetched
        if key == "oneOf" and "discriminator" in node:
            key = "anyOf"  # the branches are distinct; llguidance would have to prove it
        if _is_held(key, value):
            kept[key] = _inside(key, _spelled(key, value), f"{path}{key}", _kept_in(left_out))
        elif not _says_nothing(key, value, node):
            left_out.append(f"{path}{key}")
    return _bounded(kept)


def _kept_in(left_out: list[str]) -> Callable[[Any, str], Any]:
    return lambda node, path: _kept(node, f"{path}.", left_out)


def _is_held(key: str, value: Any) -> bool:
    if key == "format":
        return value in FORMATS if isinstance(value, str) else True
    if key == "pattern":
        return not (isinstance(value, str) and LOOKS_AROUND.search(value))
    if key in ("const", "enum"):
        return not CONTROL.search(json.dumps(value))
    return key not in NOT_HELD


def _bounded(node: Json) -> Json:
    """Return the schema with bounds for unbounded integers."""
    kinds = node.get("type")
    if kinds != "integer" and not (isinstance(kinds, list) and "integer" in kinds):
        return node
    low = {} if node.keys() & {"minimum", "exclusiveMinimum"} else {"minimum": -LARGEST}
    high = {} if node.keys() & {"maximum", "exclusiveMaximum"} else {"maximum": LARGEST}
    return node | low | high


def _spelled(key: str, value: Any) -> Any:
    """
    Return the value in a spelling that llguidance 1.9.1 handles correctly. Its `json_quote` adds
    the quotation mark to a class that has all control characters but not that mark. No text
    has U+0000, so `[^"]` and `[^\\x00"]` mean the same here.
    """
    if key == "pattern" and isinstance(value, str):
        return NEGATED.sub(r"\1[^\\x00", value)
    if key == "$ref" and isinstance(value, str):
        return quote(value, safe=IN_FRAGMENTS)
    return value


def _says_nothing(key: str, value: Any, node: Json) -> bool:
    if key == "format":
        return "string" not in str(node.get("type", "string"))  # `int32` and the like, of numbers
    return any(value == empty and type(value) is type(empty) for empty in NOT_HELD.get(key, ()))


def _inside(key: str, value: Any, path: str, change: Callable[[Any, str], Any]) -> Any:
    """Return the value of a keyword with `change` applied to each schema in it."""
    if isinstance(value, list) and key in LISTS:
        return [change(part, f"{path}.{number}") for number, part in enumerate(value)]
    if isinstance(value, dict) and key in NAMED:
        return {name: change(part, f"{path}.{name}") for name, part in value.items()}
    if isinstance(value, dict) and key in ONE:
        return change(value, path)
    return value


def _joins(node: Any) -> bool:
    """
    Return whether a value must match two schemas at once, or one and not another: closing one of
    them would change the result.
    """
    if not isinstance(node, dict):
        return False
    places = node.keys() & IN_PLACE
    both = len(places) > 1 or bool(places and node.keys() & OF_OBJECTS)
    several = isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1
    found = [both or several or "oneOf" in node]
    for key, value in node.items():
        _inside(key, value, "", lambda part, _: found.append(_joins(part)))
    return any(found)


def _closed(node: Any, _: str = "") -> Any:
    """
    Return the schema with `additionalProperties: false` where it declares properties and has no
    rule for others. A matching value matches the original, and a model can't invent keys.
    """
    if not isinstance(node, dict):
        return node
    closed = {key: _inside(key, value, "", _closed) for key, value in node.items()}
    if "properties" in closed:
        is_open = closed.keys() & {"additionalProperties", "patternProperties"}
        return {"type": "object"} | closed | ({} if is_open else {"additionalProperties": False})
    return closed
