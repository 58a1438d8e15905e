"""
Translates GBNF, llama.cpp's notation for grammars, to llguidance's Lark. Pure; linear time.

Each character becomes its own lexeme. llguidance's lexer takes the longest lexeme, so the output of
`llguidance.gbnf_to_lark` has another meaning: `root ::= word "z"` with `word ::= [a-z]+` never
ends, and `root ::= "x" "yz" | "xy" "w"` rejects `xyz`.
"""

import re
from collections.abc import Iterator
from itertools import accumulate

from services.inference.engine.sampling.grammar import GrammarError

LEXER = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)
      | (?P<newline>\r\n?|\n)
      | (?P<rule>[a-zA-Z0-9-]+[ \t]*::=)
      | (?P<name>[a-zA-Z0-9-]+)
      | "(?P<literal>(?:[^"\\]|\\.)*)"
      | \[(?P<negated>\^?)(?P<chars>(?:[^]\\]|\\.)+)]
      | (?P<any>\.)
      | (?P<open>\()
      | (?P<close>\))
      | (?P<or>\|)
      | (?P<repeat>[*+?]|\{\s*\d{1,9}\s*(?:,\s*\d{0,9}\s*)?})""",
    re.VERBOSE | re.DOTALL,
)
CHARACTER = re.compile(
    r'\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[trn\\"[\]-]|[^\\]', re.DOTALL
)
CONTROLS = {"\\t": 9, "\\r": 13, "\\n": 10}
LAST_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)
NOTHING = '""'


def to_lark(text: str) -> str:
    """Return the grammar as Lark rules whose first one is `start`. Raises GrammarError."""
    return _Translator(text).lark()


class _Translator:
    """Writes Lark token by token, without recursion, so that no grammar is nested too deeply."""

    def __init__(self, text: str) -> None:
        self._names = {"root": "start"}
        self._rules: dict[
            str, list[str]
        ] = {}  # by name in Lark; a second definition replaces the first
        self._parts: list[str] = []  # of the rule that is open
        self._depth = 0  # of parentheses; 0 outside of a rule, 1 in it
        self._before = ""
        for match in _lex(text):
            self._take(match.lastgroup or "", match)
        if self._depth > 1:
            raise GrammarError("a parenthesis is not closed")
        self._end_rule()

    def lark(self) -> str:
        if "start" not in self._rules:
            raise GrammarError("it has no rule `root`")
        for name, lark in self._names.items():
            if lark not in self._rules:
                raise GrammarError(f"its rule `{name}` is not defined")
        return "\n".join(f"{name}: {_body(name, parts)}" for name, parts in self._rules.items())

    def _take(self, kind: str, match: re.Match[str]) -> None:
        if kind == "newline":
            # a rule goes on after a newline only in parentheses, after `::=` and after `|`
            if self._depth == 1 and self._before not in ("rule", "or"):
                self._end_rule()
            return
        if kind == "rule":
            self._begin_rule(match)
        elif self._depth == 0:
            raise GrammarError(f"a rule begins with a name and `::=`, not with {_shown(match)}")
        else:
            self._parts += self._part(kind, match)
        self._before = kind

    def _begin_rule(self, match: re.Match[str]) -> None:
        if self._depth:
            raise GrammarError(f"a new line is missing before {_shown(match)}")
        self._parts = self._rules[self._name(match[0][:-3].strip())] = []
        self._depth = 1

    def _end_rule(self) -> None:
        self._parts += self._missing()
        self._parts, self._depth, self._before = [], 0, ""

    def _part(self, kind: str, match: re.Match[str]) -> list[str]:
        match kind:
            case "or":
                return [*self._missing(), "|"]
            case "open":
                self._depth += 1
                return ["("]
            case "close":
                if self._depth == 1:
                    raise GrammarError("a parenthesis is closed that was not opened")
                self._depth -= 1
                return [*self._missing(), ")"]
            case "repeat":
                return [self._repetition(match[0])]
            case "name":
                return [self._name(match[0])]
            case _:
                return [_characters(match)]

    def _missing(self) -> list[str]:
        """Return the empty literal if an alternative is empty: Lark needs one."""
        return [NOTHING] if self._before in ("rule", "or", "open") else []

    def _repetition(self, mark: str) -> str:
        if self._before in ("rule", "or", "open"):
            raise GrammarError(f"there is nothing before {mark} to repeat")
        counts = [int(count) for count in re.findall(r"\d+", mark)]
        if len(counts) == 2 and counts[0] > counts[1]:
            raise GrammarError(f"{mark} has a maximum below its minimum")
        return re.sub(r"\s", "", mark)

    def _name(self, name: str) -> str:
        """Return a lower-case name: Lark takes upper-case ones for lexemes."""
        return self._names.setdefault(name, f"r{len(self._names)}")


def _body(name: str, parts: list[str]) -> str:
    """
    Return the rule's alternatives with right recursion as a repetition, which llguidance parses
    without a state per iteration: `r: a r | b` becomes `r: (a)* (b)`.
    """
    group = list(_alternatives(parts[1:-2])) if _is_optional_group(parts) else []
    ways = [*group, [NOTHING]] if group else list(_alternatives(parts))
    again = [" ".join(way[:-1]) for way in ways if len(way) > 1 and way[-1] == name]
    ends = [" ".join(way) for way in ways if way[-1] != name]
    if not again or not ends:
        return " ".join(parts)
    return f"({' | '.join(again)})* ({' | '.join(ends)})"


def _is_optional_group(parts: list[str]) -> bool:
    """Return whether the whole rule is one `( … )?`."""
    if parts[0] != "(" or parts[-1] != "?":
        return False
    depths = accumulate({"(": 1, ")": -1}.get(part, 0) for part in parts)
    return list(depths).index(0) == len(parts) - 2


def _alternatives(parts: list[str]) -> Iterator[list[str]]:
    """Yield the parts between each `|` outside parentheses."""
    depth, way = 0, list[str]()
    for part in parts:
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "|" and depth == 0:
            yield way
            way = []
        else:
            way.append(part)
    yield way


def _lex(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text):
        match = LEXER.match(text, at)
        if match is None:
            raise GrammarError(f"{text[at : at + 20]!r} at character {at} can't be read")
        if match.lastgroup != "space":
            yield match
        at = match.end()


def _shown(match: re.Match[str]) -> str:
    return f"{match[0][:20]!r} at character {match.start()}"


def _characters(match: re.Match[str]) -> str:
    if match.lastgroup == "any":
        return "/(?s:.)/"
    if match.lastgroup == "chars":
        return f"/[{match['negated']}{_ranges(match['chars'])}]/"
    points = [point for _, point in _code_points(match["literal"])]
    return f"({' '.join(f'/{_char(point)}/' for point in points)})" if points else NOTHING


def _ranges(text: str) -> str:
    """Return the inside of [ and ] in Rust regex syntax; a trailing `-` is literal."""
    signs = list(_code_points(text))
    ranges = ""
    while signs:
        _, low = signs.pop(0)
        high = low
        if len(signs) > 1 and signs[0][0] == "-":
            high = signs[1][1]
            del signs[:2]
        if low > high:
            raise GrammarError(f"a range of [{text[:20]}] ends before it begins")
        ranges += f"{_char(low)}-{_char(high)}"
    return ranges


def _code_points(text: str) -> Iterator[tuple[str, int]]:
    """Yield each character as written, possibly an escape, and its code point."""
    at = 0
    while at < len(text):
        match = CHARACTER.match(text, at)
        if match is None:
            raise GrammarError(f"{text[at : at + 2]!r} is not a known escape")
        yield match[0], _code_point(match[0])
        at = match.end()


def _code_point(sign: str) -> int:
    if len(sign) == 1:
        return ord(sign)
    return int(sign[2:], 16) if sign[1] in "xuU" else CONTROLS.get(sign, ord(sign[1]))


def _char(point: int) -> str:
    if point > LAST_CODE_POINT or point in SURROGATES:
        raise GrammarError(f"U+{point:04X} is not a character")
    return f"\\u{{{point:x}}}"
