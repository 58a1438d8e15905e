"""
Translates GBNF, llama.cpp's notation for grammars, to llguidance's Lark in linear time.
GBNF: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md

Each character becomes a lexeme of its own. llguidance's lexer takes the longest lexeme, so the
output of `llguidance.gbnf_to_lark` has another meaning: `root ::= word "z"` with `word ::= [a-z]+`
never ends, and `root ::= "x" "yz" | "xy" "w"` rejects `xyz`.
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
_CHARACTER = r'(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[trn\\"[\]-]|[^\\])'
CHARACTER = re.compile(_CHARACTER, re.DOTALL)
RANGE = re.compile(f"({_CHARACTER})(?:-({_CHARACTER}))?", re.DOTALL)
CONTROLS = {"\\t": 9, "\\r": 13, "\\n": 10}
MAX_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)
EMPTY = '""'
STARTS_ALTERNATIVE = ("rule", "or", "open")


def to_lark(text: str, start: str = "start") -> str:
    """Return the grammar as Lark rules, of which `start` is the root. Raises GrammarError."""
    return _Translator(text, start).lark()


class _Translator:
    """Writes Lark token by token, without recursion, so that no grammar is nested too deeply."""

    def __init__(self, text: str, start: str) -> None:
        self._start = start
        self._names = {"root": start}  # Lark name by GBNF name
        self._rules: dict[str, list[str]] = {}  # by Lark name; a second definition replaces one
        self._parts: list[str] = []  # of the current rule
        self._depth = 0  # of parentheses in the current rule, plus 1; 0 outside of a rule
        self._previous = ""  # kind of the previous token
        for match in _scan(LEXER, text, (0, len(text)), "can't be read"):
            self._add(match.lastgroup or "", match)
        if self._depth > 1:
            raise GrammarError("a parenthesis is not closed")
        self._end_rule()

    def lark(self) -> str:
        if self._start not in self._rules:
            raise GrammarError("it has no rule `root`")
        for name, lark in self._names.items():
            if lark not in self._rules:
                raise GrammarError(f"its rule `{name}` is not defined")
        return "\n".join(f"{name}: {_body(name, parts)}" for name, parts in self._rules.items())

    def _add(self, kind: str, match: re.Match[str]) -> None:
        if kind == "space":
            return
        if kind == "newline":
            # a rule continues after a newline only in parentheses, after `::=` and after `|`
            if self._depth == 1 and self._previous not in ("rule", "or"):
                self._end_rule()
            return
        if kind == "rule":
            self._begin_rule(match)
        elif self._depth == 0:
            raise GrammarError(f"a rule begins with a name and `::=`, not with {_quote(match)}")
        else:
            self._parts += self._translate(kind, match)
        self._previous = kind

    def _begin_rule(self, match: re.Match[str]) -> None:
        if self._depth:
            raise GrammarError(f"a new line is missing before {_quote(match)}")
        name = self._lark_name(match[0].removesuffix("::=").strip())
        self._parts = self._rules[name] = []
        self._depth = 1

    def _end_rule(self) -> None:
        self._parts += self._empty_alternative()
        self._parts, self._depth, self._previous = [], 0, ""

    def _translate(self, kind: str, match: re.Match[str]) -> list[str]:
        match kind:
            case "or":
                return [*self._empty_alternative(), "|"]
            case "open":
                self._depth += 1
                return ["("]
            case "close":
                if self._depth == 1:
                    raise GrammarError("a parenthesis is closed that was not opened")
                self._depth -= 1
                return [*self._empty_alternative(), ")"]
            case "repeat":
                return [self._repetition(match[0])]
            case "name":
                return [self._lark_name(match[0])]
            case _:
                return [_lexemes(match)]

    def _empty_alternative(self) -> list[str]:
        """Return the empty literal, which Lark needs, if an alternative is empty."""
        return [EMPTY] if self._previous in STARTS_ALTERNATIVE else []

    def _repetition(self, mark: str) -> str:
        if self._previous in STARTS_ALTERNATIVE:
            raise GrammarError(f"there is nothing before {mark} to repeat")
        counts = [int(count) for count in re.findall(r"\d+", mark)]
        if len(counts) == 2 and counts[0] > counts[1]:
            raise GrammarError(f"{mark} has a maximum below its minimum")
        return re.sub(r"\s", "", mark)

    def _lark_name(self, name: str) -> str:
        """Return a lower-case name: Lark takes upper-case ones for lexemes."""
        return self._names.setdefault(name, f"r{len(self._names)}")


def _scan(
    pattern: re.Pattern[str], text: str, span: tuple[int, int], problem: str
) -> Iterator[re.Match[str]]:
    """Yield adjacent matches. Raises GrammarError if the span does not consist of them."""
    position, end = span
    while position < end:
        match = pattern.match(text, position, end)
        if match is None:
            found = text[position : min(position + 20, end)]
            raise GrammarError(f"{found!r} at character {position} {problem}")
        yield match
        position = match.end()


def _quote(match: re.Match[str]) -> str:
    return f"{match[0][:20]!r} at character {match.start()}"


def _body(name: str, parts: list[str]) -> str:
    """
    Return the rule's alternatives with right recursion as a repetition, which llguidance parses
    without a state per iteration: `r: a r | b` becomes `r: (a)* (b)`.
    """
    if _is_optional_group(parts):
        alternatives = [*_alternatives(parts[1:-2]), [EMPTY]]
    else:
        alternatives = [*_alternatives(parts)]
    loops = [" ".join(each[:-1]) for each in alternatives if len(each) > 1 and each[-1] == name]
    ends = [" ".join(each) for each in alternatives if each[-1] != name]
    if not loops or not ends:
        return " ".join(parts)
    return f"({' | '.join(loops)})* ({' | '.join(ends)})"


def _is_optional_group(parts: list[str]) -> bool:
    """Return whether the whole rule is one `( … )?`."""
    if parts[0] != "(" or parts[-1] != "?":
        return False
    depths = accumulate({"(": 1, ")": -1}.get(part, 0) for part in parts)
    return list(depths).index(0) == len(parts) - 2


def _alternatives(parts: list[str]) -> Iterator[list[str]]:
    """Yield the parts between each `|` outside parentheses."""
    depth, alternative = 0, list[str]()
    for part in parts:
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "|" and depth == 0:
            yield alternative
            alternative = []
        else:
            alternative.append(part)
    yield alternative


def _lexemes(match: re.Match[str]) -> str:
    """Return Lark for a literal, a character class or `.`, with one lexeme per character."""
    if match.lastgroup == "any":
        return "/(?s:.)/"
    if match.lastgroup == "chars":
        return f"/[{match['negated']}{_ranges(match)}]/"
    characters = _scan(CHARACTER, match.string, match.span("literal"), "is not a known escape")
    lexemes = " ".join(f"/{_escape(_code_point(each[0]))}/" for each in characters)
    return f"({lexemes})" if lexemes else EMPTY


def _ranges(chars: re.Match[str]) -> str:
    """Return the inside of [ and ] in Rust regex syntax; a trailing `-` is literal."""
    ranges = ""
    for match in _scan(RANGE, chars.string, chars.span("chars"), "is not a known escape"):
        low, high = _code_point(match[1]), _code_point(match[2] or match[1])
        if low > high:
            raise GrammarError(f"a range of [{chars['chars'][:20]}] ends before it begins")
        ranges += f"{_escape(low)}-{_escape(high)}"
    return ranges


def _code_point(written: str) -> int:
    if len(written) == 1:
        return ord(written)
    if written[1] in "xuU":
        return int(written[2:], 16)
    return CONTROLS.get(written, ord(written[1]))


def _escape(point: int) -> str:
    if point > MAX_CODE_POINT or point in SURROGATES:
        raise GrammarError(f"U+{point:04X} is not a character")
    return f"\\u{{{point:x}}}"
