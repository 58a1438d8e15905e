"""A JSON schema's numbers between bounds, to GBNF. Pure."""

from collections.abc import Iterator
from math import ceil, floor
from typing import Any, NamedTuple

from services.inference.engine.gbnf import GrammarError

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
DIGITS = 16  # before the point where there is no bound, and behind it


class _Bound(NamedTuple):
    value: int
    is_strict: bool = False  # it is not itself between the bounds


ZERO = _Bound(0)


def to_gbnf(schema: dict[str, Any]) -> str:
    """Of an integer, or a number whose bounds are whole; never an exponent. Raises GrammarError."""
    is_whole = schema["type"] == "integer"
    low = _bound(schema, "minimum", "exclusiveMinimum", is_whole)
    high = _bound(schema, "maximum", "exclusiveMaximum", is_whole)
    ways = [f'"-" {way}' for way in _ways(*_without_sign(low, high), is_whole)]
    ways += _ways(low if low and low.value >= 0 else ZERO, high, is_whole)
    if not ways:
        raise GrammarError("there is no number between its bounds")
    return " | ".join(ways)


def _bound(schema: dict[str, Any], usual: str, exclusive: str, is_whole: bool) -> _Bound | None:
    """Of an integer the nearest one that is in it."""
    value, strict = schema.get(usual), schema.get(exclusive)
    is_strict = bool(strict)  # in older schemas it is true, and `usual` the value
    if strict is not None and not isinstance(strict, bool):
        if value is not None:
            raise GrammarError(f"it has both {usual} and {exclusive}: leave one of them out")
        value, is_strict = strict, True
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrammarError(f"its {usual} is {value!r}, which is no number")
    if not is_whole:
        if value != int(value):
            raise GrammarError(f"a bound of a number must be whole, and {value} is not")
        return _Bound(int(value), is_strict)
    if usual == "minimum":
        return _Bound(floor(value) + 1 if is_strict else ceil(value))
    return _Bound(ceil(value) - 1 if is_strict else floor(value))


def _without_sign(low: _Bound | None, high: _Bound | None) -> tuple[_Bound, _Bound | None]:
    """The bounds of what is below zero."""
    least = _Bound(-high.value, high.is_strict) if high and high.value < 0 else _Bound(0, True)
    return least, low and _Bound(-low.value, low.is_strict)


def _ways(low: _Bound, high: _Bound | None, is_whole: bool) -> Iterator[str]:
    first = low.value + low.is_strict
    if is_whole:
        yield from _whole(first, high and high.value - high.is_strict)
        return
    for way in _whole(first, high and high.value - 1):
        yield f'{way} ("." [0-9]{{1,{DIGITS}}})?'
    if low.is_strict and (high is None or low.value < high.value):
        yield f'"{low.value}." "0"{{0,{DIGITS}}} [1-9] [0-9]{{0,{DIGITS}}}'
    if high and not high.is_strict and (low.value < high.value or low == high):
        yield f'"{high.value}" ("." "0"{{1,{DIGITS}}})?'


def _whole(low: int, high: int | None) -> Iterator[str]:
    """From `low`, which is 0 or more, to `high`, both included."""
    if high is None:
        length = len(str(low))
        yield _of_one_length(str(low), "9" * length)
        if length < DIGITS:
            yield f"[1-9] [0-9]{{{length},{DIGITS - 1}}}"
        return
    while low <= high:
        last = min(high, 10 ** len(str(low)) - 1)
        yield _of_one_length(str(low), str(last))
        low = last + 1


def _of_one_length(low: str, high: str) -> str:
    """Digits from `low` to `high`, by the first of them."""
    if not low:
        return '""'
    if low[0] == high[0]:
        return f'"{low[0]}" {_of_one_length(low[1:], high[1:])}'
    rest = len(low) - 1
    if int(low) == 0 and int(high) + 1 == 10 ** len(high):
        return f"[0-9]{{{len(low)}}}"
    ways = [
        f'"{low[0]}" {_of_one_length(low[1:], "9" * rest)}',
        f'"{high[0]}" {_of_one_length("0" * rest, high[1:])}',
    ]
    if (least := int(low[0]) + 1) <= (most := int(high[0]) - 1):
        ways.append(f"[{least}-{most}] [0-9]{{{rest}}}")
    return f"({' | '.join(ways)})"
