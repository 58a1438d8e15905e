"""
JSON schemas as constrained decoding can hold them. Pure, so that the edge and a worker agree.

llguidance holds most of JSON Schema and refuses the rest by name
(https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md). This module decides what
of that rest a caller may send all the same. Keywords are looked for where a schema stands, never in
data (`default`, `examples`, `enum`, `const`), and a property may have any name.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

Json = dict[str, Any]

FORMATS = set("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())

ONE = set(  # keywords whose value is a schema; of `items` also a list
    "items additionalItems additionalProperties contains not if then else propertyNames"
    " unevaluatedItems unevaluatedProperties".split()
)
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

IN_PLACE = {"anyOf", "oneOf", "allOf", "$ref"}  # what they hold is about the same value
OF_OBJECTS = set(
    "properties required additionalProperties patternProperties minProperties maxProperties".split()
)
LOOKS_AROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9])")  # and back references
LARGEST = 10**18  # what 64 bits hold; a model that knows no JSON writes digits without an end
CONTROL = re.compile(r"\\u00[01]")  # in JSON: a character that only `\u` can write
NEGATED = re.compile(r"(?<!\\)((?:\\\\)*)\[\^(?!])")
IN_FRAGMENTS = "#/%$:~!'()*,;=@&+?"  # as they are; other signs of a name are written as %XX

# Keywords that can't be held, and the values with which they say nothing.
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


class Held(NamedTuple):
    """
    A schema without the keywords that can't be held, and their paths, such as
    `properties.tags.uniqueItems`. A value that fits this schema fits the original but for those.
    """

    schema: Json
    left_out: tuple[str, ...]


def held(schema: Json) -> Held:
    """Return what of the schema can be held; each object is closed where that can be told."""
    left_out: list[str] = []
    kept = _kept(schema, "", left_out)
    return Held(kept if _joins(kept) else _closed(kept), tuple(left_out))


def moved(node: Any, pointer: str) -> Any:
    """Return a schema as it must read at `pointer` of another: its `$ref`s to itself still hold."""
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


def _kept(node: Any, path: str, left_out: list[str]) -> Any:
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        if key == "$schema":
            continue  # the keywords of all drafts hold; an unknown one would have to be fetched
        if key == "oneOf" and "discriminator" in node:
            key = "anyOf"  # the branches are told apart; llguidance would have to prove it
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
    """Return the schema with bounds for integers that have none."""
    kinds = node.get("type")
    if kinds != "integer" and not (isinstance(kinds, list) and "integer" in kinds):
        return node
    low = {} if node.keys() & {"minimum", "exclusiveMinimum"} else {"minimum": -LARGEST}
    high = {} if node.keys() & {"maximum", "exclusiveMaximum"} else {"maximum": LARGEST}
    return node | low | high


def _spelled(key: str, value: Any) -> Any:
    """
    Return the value as llguidance 1.9.1 reads it rightly. A class of a pattern that has all control
    characters, and not the quotation mark, would have it all the same; `json_quote` of its regular
    expressions takes a short cut. No text has U+0000, so `[^"]` and `[^\\x00"]` mean the same here.
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
    """Return the value of a keyword with `change` made to each schema that stands in it."""
    if isinstance(value, list) and key in LISTS:
        return [change(part, f"{path}.{number}") for number, part in enumerate(value)]
    if isinstance(value, dict) and key in NAMED:
        return {name: change(part, f"{path}.{name}") for name, part in value.items()}
    if isinstance(value, dict) and key in ONE:
        return change(value, path)
    return value


def _joins(node: Any) -> bool:
    """
    Return whether a value must fit two schemas at once, or one and not another: closing one of them
    would change what that says.
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
    Return the schema with `additionalProperties: false` where properties are declared and nothing
    is said of others. What fits it fits the original, and a model can't make up further keys.
    """
    if not isinstance(node, dict):
        return node
    closed = {key: _inside(key, value, "", _closed) for key, value in node.items()}
    if "properties" in closed:
        is_open = closed.keys() & {"additionalProperties", "patternProperties"}
        return {"type": "object"} | closed | ({} if is_open else {"additionalProperties": False})
    return closed
