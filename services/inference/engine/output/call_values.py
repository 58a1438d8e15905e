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
MAX_REFERENCES = 16  # one after another in a schema
MAX_ALTERNATIVES = 3  # in one another
MAX_DEPTH = 64  # of nested elements
_UNESCAPED = re.compile(r"""(['"])(.*)\1""", re.DOTALL)  # a string with quotes in it
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile(r"[\x00-\x1f]")


class ValueSchema:
    """A part of a JSON schema, as far as it says plainly what a value is. It may be anything."""

    def __init__(self, schema: Any, root: Any = None, depth: int = 0) -> None:
        """`depth` counts alternatives in alternatives, which may refer to themselves."""
        self._root, self._depth = root if root is not None else schema, depth
        self.schema = self._resolved(schema)

    def of_key(self, key: str) -> "ValueSchema":
        for schema in self._alternatives():
            properties = schema.get("properties")
            if isinstance(properties, dict) and key in properties:
                return ValueSchema(properties[key], self._root)
        return ValueSchema(self.schema.get("additionalProperties"), self._root)

    def of_item(self, number: int) -> "ValueSchema":
        prefix = self.schema.get("prefixItems")
        if isinstance(prefix, list) and number < len(prefix):
            return ValueSchema(prefix[number], self._root)
        return ValueSchema(self.schema.get("items"), self._root)

    @property
    def types(self) -> set[str] | None:
        """The JSON types that it allows; None if it does not say so."""
        schema = self.schema
        if isinstance(types := schema.get("type"), str | list):
            return {types} if isinstance(types, str) else {str(each) for each in types}
        if isinstance(values := schema.get("enum"), list):
            return {name for value in values for name in _TYPES.get(type(value), ())}
        if "const" in schema:
            return set(_TYPES.get(type(schema["const"]), ()))
        found = [branch.types for branch in self._branches("anyOf", "oneOf")]
        known = [types for types in found if types is not None]
        return set[str]().union(*known) if known and len(known) == len(found) else None

    def _alternatives(self) -> list[Schema]:
        branches = self._branches("allOf", "anyOf", "oneOf")
        return [self.schema, *(branch.schema for branch in branches)]

    def _branches(self, *keywords: str) -> list["ValueSchema"]:
        lists = [self.schema.get(keyword) for keyword in keywords]
        if self._depth == MAX_ALTERNATIVES:
            return []
        found = [each for branches in lists if isinstance(branches, list) for each in branches]
        return [ValueSchema(each, self._root, self._depth + 1) for each in found]

    def _resolved(self, schema: Any) -> Schema:
        """Follow references within the document (RFC 6901)."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, dict):
                return {}
            ref = schema.get("$ref")
            if not isinstance(ref, str) or not ref.startswith("#"):
                return schema
            schema = self._root
            for name in ref.split("/")[1:]:
                key = name.replace("~1", "/").replace("~0", "~")
                schema = schema.get(key) if isinstance(schema, dict) else None
        return {}


def types_of(schema: Schema | None) -> set[str] | None:
    """Return the JSON types that a schema allows, as far as it says so plainly, or None."""
    return ValueSchema(schema).types


def to_json(value: Any) -> str:
    """Return JSON in UTF-8, in which half a surrogate pair is escaped."""
    return escape_surrogates(json.dumps(value, ensure_ascii=False))


def escape_surrogates(text: str) -> str:
    """Return JSON in which each half of a surrogate pair is escaped."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_utf8(text: str) -> bool:
    """Return whether the text has no half of a surrogate pair, which can't be sent."""
    return not _SURROGATE.search(text)


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
        inner = _UNESCAPED.fullmatch(text.strip())
        return to_json(inner[2]) if inner else raw_to_json(text.strip(), types)
    return _dumps_or_text(value, text)


def tree_to_json(text: str, schema: ValueSchema, depth: int = 0) -> str:
    """
    Return a value as JSON whose objects are elements, and whose lists are `item` elements. Only
    the schema tells an empty object from an empty list.
    """
    types = schema.types
    children = _elements(text) if depth < MAX_DEPTH else None
    is_value = types is not None and types.isdisjoint({"object", "array"})
    if children is None or is_value:
        (only,) = types if types is not None and len(types) == 1 else ("",)
        return (not text.strip() and _EMPTY.get(only)) or raw_to_json(text, types)
    if types != {"object"} and all(name == "item" for name, _ in children):
        items = [
            tree_to_json(inner, schema.of_item(number), depth + 1)
            for number, (_, inner) in enumerate(children)
        ]
        return f"[{', '.join(items)}]"
    values = [
        f"{to_json(name)}: {tree_to_json(inner, schema.of_key(name), depth + 1)}"
        for name, inner in children
    ]
    return "{" + ", ".join(values) + "}"


_ELEMENT = re.compile(r"\s*(\]<\]\w+\[>\[)<([^<>/\s]+)>")
_EMPTY = {"object": "{}", "array": "[]", "null": "null"}


def _elements(text: str) -> list[tuple[str, str]] | None:
    """Return names and texts of the elements that the text consists of; None if there is else."""
    elements = []
    position = 0
    while found := _ELEMENT.match(text, position):
        end = _element_end(text, found[2], found.end())
        if end is None:
            return None
        elements.append((found[2], text[found.end() : end.start()]))
        position = end.end()
    return None if text[position:].strip() else elements or None


def _element_end(text: str, name: str, start: int) -> re.Match[str] | None:
    """Return the closing tag of an element."""
    depth = 1
    for found in re.finditer(rf"\]<\]\w+\[>\[<(/?){re.escape(name)}>", text[start:]):
        depth += -1 if found[1] else 1
        if not depth:
            return re.compile(re.escape(found[0])).match(text, start + found.start())
    return None


def _dumps_or_text(value: Any, text: str) -> str:
    try:
        json.dumps(value, allow_nan=False)
        return to_json(value)
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
