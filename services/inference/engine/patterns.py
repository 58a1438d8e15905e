"""A JSON schema's `pattern` to GBNF for the inside of a JSON string whose text matches it. Pure."""

import re
from collections.abc import Iterator

from services.inference.engine.gbnf import Chars, GrammarError, complement, literal, merged

PART = re.compile(
    r"""(?P<open>\((?:\?:)?)
      | (?P<close>\))
      | (?P<or>\|)
      | (?P<repeat>[*+?]|\{\d{1,9}(?:,\d{0,9})?})\??
      | \[(?P<negated>\^?)(?P<chars>(?:[^]\\]|\\.)+)]
      | (?P<any>\.)
      | (?P<char>\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|[^\\()|*+?{}[\].^$])""",
    re.VERBOSE | re.DOTALL,
)
CHAR = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL)
LINE_BREAKS: Chars = ((0x0A, 0x0A), (0x0D, 0x0D))
SETS: dict[str, Chars] = {
    "d": ((0x30, 0x39),),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
SETS |= {name.upper(): complement(chars) for name, chars in SETS.items()}
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
NOT_IN_STRINGS: Chars = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))
ESCAPES = {
    0x08: r"\b",
    0x09: r"\t",
    0x0A: r"\n",
    0x0C: r"\f",
    0x0D: r"\r",
    0x22: r"\"",
    0x5C: r"\\",
}


def to_gbnf(pattern: str) -> str:
    """Raises GrammarError for what is no regular expression, or more than that."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        raise GrammarError(f"its pattern {pattern[:64]!r} must begin with ^ and end with $")
    return f"({' '.join(_parts(pattern))})"


def _parts(pattern: str) -> Iterator[str]:
    at, depth = 1, 0
    while at < len(pattern) - 1:
        match = PART.match(pattern, at, len(pattern) - 1)
        depth += bool(match and match["open"]) - bool(match and match["close"])
        if match is None or depth < 0:
            raise _refusal(pattern, at)
        yield _part(match)
        at = match.end()
    if depth:
        raise GrammarError(f"its pattern {pattern[:64]!r} leaves a parenthesis open")


def _part(match: re.Match[str]) -> str:
    if match["open"]:
        return "("
    if sign := match["close"] or match["or"] or match["repeat"]:
        return sign
    if match["any"]:
        return _in_string(complement(LINE_BREAKS))
    chars = merged(_ranges(match["chars"] or match["char"], match.string))
    return _in_string(complement(chars) if match["negated"] else chars)


def _ranges(text: str, pattern: str) -> Iterator[tuple[int, int]]:
    """Of what stands between [ and ], or of a single character."""
    signs = CHAR.findall(text)
    while signs:
        sign = signs.pop(0)
        if sign[0] == "\\" and sign[1] in SETS:
            yield from SETS[sign[1]]
            continue
        low = high = _code_point(sign, pattern)
        if len(signs) > 1 and signs[0] == "-":
            high = _code_point(signs[1], pattern)
            del signs[:2]
        yield low, high


def _code_point(sign: str, pattern: str) -> int:
    if len(sign) == 1:
        return ord(sign)
    if len(sign) > 2:
        return int(sign[2:], 16)
    if sign[1].isalnum() and sign[1] not in CONTROLS:
        raise _refusal(pattern, pattern.index(sign))
    return CONTROLS.get(sign[1], ord(sign[1]))


def _in_string(chars: Chars) -> str:
    """One of the characters, as JSON's strings have it."""
    plain = complement(merged([*complement(chars), *NOT_IN_STRINGS]))
    ways = ["".join(("[", *(rf"\U{low:08x}-\U{high:08x}" for low, high in plain), "]"))]
    ways = ways if plain else []
    ways += [
        literal(escape)
        for point, escape in ESCAPES.items()
        if any(low <= point <= high for low, high in chars)
    ]
    if not ways:
        raise GrammarError("its pattern asks for a character that there is not")
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _refusal(pattern: str, at: int) -> GrammarError:
    return GrammarError(
        f"its pattern {pattern[:64]!r} can't be followed from {pattern[at : at + 8]!r} on"
    )
