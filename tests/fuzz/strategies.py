"""Hypothesis strategies for JSON values, from the types of services/contract."""

import base64
import json
from functools import cache
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as types

Json = st.SearchStrategy[Any]
MAX_ITEMS = 4  # of a list or object, unless its type has a minimum
MAX_TEXT = 40  # characters, likewise

json_values: Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=MAX_TEXT)
    | st.sampled_from(("", "\0", "{{ 7*7 }}", "<|im_start|>system", "_INBOX.>", "\ud800", "1e999")),
    lambda inner: (
        st.lists(inner, max_size=MAX_ITEMS)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@cache
def values_of(kind: Any) -> Json:
    """Return a strategy for the JSON of valid values of a type."""
    return _of(types.type_info(kind))


def _of(info: types.Type) -> Json:
    match info:
        case types.UnionType():
            return st.one_of(*map(_of, info.types))
        case types.StructType():
            # deferred: a type may contain itself, and building all of them takes seconds
            return st.deferred(lambda: _struct(info.cls))
        case types.CollectionType() | types.VarTupleType():
            smallest = info.min_length or 0
            return st.lists(_of(info.item_type), min_size=smallest, max_size=smallest + MAX_ITEMS)
        case types.TupleType():
            return st.tuples(*map(_of, info.item_types)).map(list)
        case types.DictType():
            return st.dictionaries(
                _of(info.key_type), _of(info.value_type), max_size=info.max_length or MAX_ITEMS
            )
        case types.Metadata():
            return _of(info.type)
    return _scalar(info)


def _scalar(info: types.Type) -> Json:
    match info:
        case types.IntType():
            least = info.ge if info.ge is not None else -(2**63)
            most = info.le if info.le is not None else (info.lt or 2**63) - 1
            return st.integers(least, most)
        case types.FloatType():
            lowest = info.gt if info.ge is None else info.ge
            is_open = info.gt is not None
            return st.floats(
                lowest, info.le, exclude_min=is_open, allow_nan=False, allow_infinity=False
            )
        case types.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, fullmatch=True)
        case types.StrType():
            smallest, largest = info.min_length or 0, info.max_length or MAX_TEXT
            return st.text(min_size=smallest, max_size=max(smallest, min(largest, MAX_TEXT)))
        case types.LiteralType():
            return st.sampled_from(info.values)
        case types.BytesType():
            return st.binary(max_size=64).map(lambda data: base64.b64encode(data).decode())
        case types.DateTimeType():
            return st.datetimes().map(lambda moment: f"{moment.isoformat()}Z")
        case types.BoolType():
            return st.booleans()
        case types.NoneType():
            return st.none()
    return json_values  # Any, Raw


@cache
def _struct(kind: type[msgspec.Struct]) -> Json:
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    required = {each.encode_name: _of(each.type) for each in info.fields if each.required}
    optional = {each.encode_name: _of(each.type) for each in info.fields if not each.required}
    if info.tag is not None:
        required[str(info.tag_field)] = st.just(info.tag)
    return st.fixed_dictionaries(required, optional=optional)


@st.composite
def nearly(draw: st.DrawFn, kind: Any) -> Any:
    """Return a value of the type in which one part, at any depth, is wrong, missing or new."""
    root: Any = [draw(values_of(kind))]
    part: Any = root
    key: Any = 0
    while (keys := _keys(part[key])) and draw(st.sampled_from((True, True, False))):
        part, key = part[key], draw(st.sampled_from(keys))
    match draw(st.sampled_from(("wrong", "missing", "new"))):
        case "missing" if part is not root:
            del part[key]
        case "new" if isinstance(part, dict):
            part[draw(st.text(max_size=8))] = draw(json_values)
        case _:
            part[key] = draw(json_values)
    return root[0]


def _keys(value: Any) -> list[Any]:
    """Return the keys or indexes of what is in a value."""
    match value:
        case dict():
            return [*value]
        case list():
            return [*range(len(value))]
    return []


def encoded(value: Any) -> bytes:
    """Return JSON; unlike msgspec's, it may have NaN, Infinity and half surrogate pairs."""
    return json.dumps(value).encode()


def payloads(kind: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy for messages: valid, nearly valid, any JSON, any bytes."""
    known = [values_of(kind).map(encoded), nearly(kind).map(encoded)] if kind else []
    return st.one_of(*known, json_values.map(encoded), st.binary(max_size=200))
