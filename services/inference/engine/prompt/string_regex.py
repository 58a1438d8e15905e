"""Regexes for strings of JSON schemas, as llguidance takes them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from services.inference.engine.sampling.json_schema import LOOKAROUND

# Those of JSON schema that people use, as llguidance checks them in JSON: RFC 3339, 9562, 1123, …
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_HOUR = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+\-]{_HOUR})"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9\-]{0,61}[a-zA-Z0-9])?"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[a-zA-Z0-9_+\-]+(?:\.[a-zA-Z0-9_+\-]+)*@{_LABEL}(?:\.{_LABEL})*",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_ASSERTIONS = {"^", "$", r"\b", r"\B"}


def string_regexes(schema: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """
    Yield the keywords of a schema that restrict strings, with a regex that matches whole strings,
    or None if there is none.
    """
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if low or high != "":
        keyword = "minLength" if low else "maxLength"
        is_known = type(low) is int and (high == "" or type(high) is int)
        yield keyword, f"(?s:.{{{low},{high}}})" if is_known else None
    if isinstance(pattern := schema.get("pattern"), str):
        yield "pattern", whole_regex(pattern)
    if isinstance(name := schema.get("format"), str):
        yield "format", FORMATS.get(name)


def whole_regex(pattern: str) -> str | None:
    """
    Return a regex without anchors that matches the whole texts in which `pattern` is found, or None
    for one that has assertions elsewhere than around an alternative.
    """
    if LOOKAROUND.search(pattern):
        return None
    branches: list[list[str]] = [[]]
    depth = 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            branches.append([])
        else:
            branches[-1].append(_in_lark(token))
    wholes = [whole for branch in branches if (whole := _whole(branch)) is not None]
    return f"(?:{'|'.join(wholes)})" if len(wholes) == len(branches) else None


def _whole(tokens: list[str]) -> str | None:
    """Return the regex of one alternative."""
    is_begin, is_end = tokens[:1] == ["^"], tokens[-1:] == ["$"]
    inner = tokens[is_begin : len(tokens) - is_end]
    if not _ASSERTIONS.isdisjoint(inner):
        return None
    any_ = "(?s:.*)"
    return f"{'' if is_begin else any_}{''.join(inner)}{'' if is_end else any_}"


def _in_lark(token: str) -> str:
    """Return a part of a regex as a literal of Lark has it."""
    return {"/": r"\/", "\n": r"\n"}.get(token, re.sub(r"(?<!\\)/", r"\/", token))
