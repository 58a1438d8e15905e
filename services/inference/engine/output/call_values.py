"""Argument values in a model's own syntax, and as JSON."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from services.inference.engine.output.answer_format import ValueSyntax

Schema = Mapping[str, Any]

GEMMA_QUOTE = '<|"|>'
_TYPES: dict[type, set[str]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    type(None): {"null"},
    dict: {"object"},
    list: {"array"},
}
_PYTHON_NAMES = {"True": True, "False": False, "None": None}
_GEMMA_TOKEN = re.compile(
    r'<\|"\|>(?P<string>.*?)<\|"\|>|"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^{}\[\],:"<\s]+|\s+|.', re.DOTALL
)
_LINE_BREAK = re.compile(r"[\x00-\x1f]")


def property_schema(parameters: Any, key: str) -> Schema | None:
    """Return the schema of an argument, or None if there is none."""
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    found = properties.get(key) if isinstance(properties, dict) else None
    return _resolved(found, parameters) if isinstance(found, dict) else None


def _resolved(schema: Schema, root: Any) -> Schema:
    ref = schema.get("$ref")
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return schema
    node = root
    for name in ref[2:].split("/"):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else schema


def types_of(schema: Schema | None) -> set[str] | None:
    """Return the JSON types that a schema allows, as far as it says so plainly, or None."""
    if schema is None:
        return None
    if "type" in schema:
        types = schema["type"]
        return {types} if isinstance(types, str) else {str(each) for each in types or ()}
    if isinstance(values := schema.get("enum"), list):
        return {name for value in values for name in _TYPES.get(type(value), ())}
    if "const" in schema:
        return set(_TYPES.get(type(schema["const"]), ()))
    for keyword in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(keyword), list):
            found = [types_of(each) if isinstance(each, dict) else None for each in branches]
            return None if None in found else set[str]().union(*(each or () for each in found))
    return None


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def raw_to_json(text: str, types: set[str] | None) -> str:
    """
    Return an unquoted value as JSON of an allowed type; text of no such type stays text. JSON and
    Python's names are understood.
    """
    stripped = text.strip()
    try:
        value = json.loads(stripped, parse_constant=_reject)
        written = stripped
    except (ValueError, RecursionError):
        value = _python(stripped)
        written = ""
    found = _TYPES.get(type(value), set())
    if value is ... or isinstance(value, str) and written != text.strip():
        return to_json(text)
    is_allowed = not found.isdisjoint(types) if types is not None else type(value) is not str
    if type(value) is float and types and "integer" in types and value.is_integer():
        is_allowed, value, written = True, int(value), ""
    if not is_allowed:
        return to_json(text)
    if not written or _LINE_BREAK.search(written):
        return _dumps_or_text(value, text)
    return written


def expression_to_json(text: str, syntax: ValueSyntax, types: set[str] | None) -> str:
    """Return a quoted or nested value in Python's or Gemma's syntax as JSON."""
    value = _gemma(text.strip()) if syntax == "gemma" else _python_or_json(text.strip())
    if value is ...:
        return raw_to_json(text.strip(), types)
    return _dumps_or_text(value, text)


def tree_to_json(text: str, types: set[str] | None) -> str:
    """Return a value as JSON whose objects are elements, and whose lists are `item` elements."""
    if types is not None and types.isdisjoint({"object", "array"}) or not _ELEMENT.search(text):
        empty = {"object": "{}", "array": "[]"}
        is_empty = not text.strip() and types is not None and len(types) == 1
        return (
            empty.get(min(types), raw_to_json(text, types))
            if is_empty and types
            else (raw_to_json(text, types))
        )
    children = []
    position = 0
    while found := _ELEMENT.search(text, position):
        end = _element_end(text, found[2], found.end())
        children.append((found[2], tree_to_json(text[found.end() : end], None)))
        position = text.find(">", end) + 1
    if all(name == "item" for name, _ in children):
        return f"[{', '.join(value for _, value in children)}]"
    return "{" + ", ".join(f"{to_json(name)}: {value}" for name, value in children) + "}"


_ELEMENT = re.compile(r"(\]<\]\w+\[>\[)?<([^<>/\s]+)>")


def _element_end(text: str, name: str, start: int) -> int:
    """Return where the closing tag of an element begins, or the end of the text."""
    depth = 1
    tags = re.compile(rf"(?:\]<\]\w+\[>\[)?<(/?){re.escape(name)}>")
    for found in tags.finditer(text, start):
        depth += -1 if found[1] else 1
        if not depth:
            return found.start()
    return len(text)


def _dumps_or_text(value: Any, text: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return to_json(text)


def _reject(name: str) -> None:
    raise ValueError(name)


def _python_or_json(text: str) -> Any:
    value = _python(text)
    if value is not ...:
        return value
    try:
        return json.loads(text, strict=False, parse_constant=_reject)
    except (ValueError, RecursionError):
        return ...


def _python(text: str) -> Any:
    """Return the value of a Python literal, or `...` if it is none that JSON can express."""
    if text in _PYTHON_NAMES:
        return _PYTHON_NAMES[text]
    if not text.startswith(("{", "[", "'", '"', "-")) and not text[:1].isdigit():
        return ...
    try:
        value = ast.literal_eval(text.replace("\r", "\\r").replace("\n", "\\n"))
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ...
    return value if _is_json(value) else ...


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | None)


def _gemma(text: str) -> Any:
    """Return a value like `{a:<|"|>x<|"|>,b:[1,true]}`, or `...` if it is none."""
    written, keys = [], []
    for token in _GEMMA_TOKEN.finditer(text):
        if token["string"] is not None:
            written.append(to_json(token["string"]))
        elif token[0] in _PYTHON_NAMES:
            written.append(to_json(_PYTHON_NAMES[token[0]]))
        elif _is_gemma_word(token[0]):
            written.append(to_json(token[0]))
            keys.append(len(written) - 1)
        else:
            written.append(token[0])
    try:
        return json.loads("".join(written), parse_constant=_reject)
    except (ValueError, RecursionError):
        return ...


def _is_gemma_word(token: str) -> bool:
    if token.isspace() or token[0] in '{}[],:"<' or token in ("true", "false", "null"):
        return False
    return re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", token) is None
