"""GBNF, llama.cpp's notation for grammars, to rules. Pure; any text is read in linear time."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

MAX_ELEMENTS = 50_000  # that a grammar may have once its repetitions are written out
LAST_CODE_POINT = 0x10FFFF

# a character is in one of these ranges, ends included; they are sorted and don't touch
Chars = tuple[tuple[int, int], ...]
Element = Chars | int | None  # one character, the rule of this number, or the end of an alternative
Alternative = list[list[Element]]  # items: a repetition repeats all elements of the last one

ANY: Chars = ((0, LAST_CODE_POINT),)
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


class GrammarError(Exception):
    """The grammar can't be used; the message says why, as the end of a sentence."""


class Rules(NamedTuple):
    """All alternatives of all rules, one after another; None is the end of each."""

    program: list[Element]
    starts: list[list[int]]  # by rule, where in the program its alternatives begin
    root: int


def parse(text: str) -> Rules:
    """Raises GrammarError."""
    return _Parser(text).rules()


def literal(text: str) -> str:
    """The text itself, in this notation."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Group(NamedTuple):
    """A rule, or what stands in parentheses, which is a rule without a name."""

    rule: int
    alternatives: list[Alternative]


class _Parser:
    """
    Reads as llama.cpp does, but for its `<token>` elements. Groups are on a stack of its own, since
    a grammar may nest deeper than Python can.
    """

    def __init__(self, text: str) -> None:
        self._numbers: dict[str, int] = {}  # of the rules that have a name
        self._rules: list[list[list[Element]]] = []  # by number; without alternatives: not defined
        self._classes: dict[Chars, Chars] = {}  # so that the same ones are one object
        self._size = 0
        self._open: list[_Group] = []
        self._read(text)

    def rules(self) -> Rules:
        if "root" not in self._numbers:
            raise GrammarError("it has no rule `root`")
        for name, number in self._numbers.items():
            if not self._rules[number]:
                raise GrammarError(f"its rule `{name}` is not defined")
        program: list[Element] = []
        starts: list[list[int]] = []
        for alternatives in self._rules:
            starts.append([])
            for elements in alternatives:
                starts[-1].append(len(program))
                program += [*elements, None]
        return Rules(program, starts, self._numbers["root"])

    def _read(self, text: str) -> None:
        before = ""
        for match in _lex(text):
            kind = match.lastgroup or ""
            if kind == "newline":
                # a rule goes on after one only in parentheses, after `::=` and after `|`
                if len(self._open) == 1 and before not in ("rule", "or"):
                    self._close()
                continue
            if not self._open and kind != "rule":
                raise GrammarError(f"a rule begins with a name and `::=`, not with {_shown(match)}")
            self._take(kind, match)
            before = kind
        if len(self._open) > 1:
            raise GrammarError("a parenthesis is not closed")
        if self._open:
            self._close()

    def _take(self, kind: str, match: re.Match[str]) -> None:
        match kind:
            case "rule":
                self._define(match)
            case "or":
                self._open[-1].alternatives.append([])
            case "open":
                self._open.append(_Group(self._new_rule(), [[]]))
            case "repeat":
                self._repeat(match[0])
            case _:
                item = self._item(kind, match)
                self._grow(len(item))
                self._open[-1].alternatives[-1].append(item)

    def _item(self, kind: str, match: re.Match[str]) -> list[Element]:
        match kind:
            case "name":
                return [self._number(match[0])]
            case "literal":
                return [self._class(((at, at),)) for at in _code_points(match["literal"])]
            case "chars":
                return [self._class(_chars(match["chars"], bool(match["negated"])))]
            case "any":
                return [ANY]
            case _:
                if len(self._open) == 1:
                    raise GrammarError("a parenthesis is closed that was not opened")
                return [self._close()]

    def _define(self, match: re.Match[str]) -> None:
        if self._open:
            raise GrammarError(f"a new line is missing before {_shown(match)}")
        self._open.append(_Group(self._number(match[0][:-3].strip()), [[]]))

    def _close(self) -> int:
        group = self._open.pop()
        self._rules[group.rule] = _distinct(list(chain(*items)) for items in group.alternatives)
        return group.rule

    def _repeat(self, mark: str) -> None:
        items = self._open[-1].alternatives[-1]
        if not items:
            raise GrammarError(f"there is nothing before {mark} to repeat")
        least, most = _bounds(mark)
        item = items.pop()
        if len(item) > 1:
            item = [self._new_rule([item])]
        self._grow(least + 3 * ((most or least) - least))
        items.append(item * least + self._optional(item, least, most))

    def _optional(self, item: list[Element], least: int, most: int | None) -> list[Element]:
        """What may come after the repetitions that must: x{0,2} is (x (x)?)?."""
        if most is None:
            rule = self._new_rule()
            self._rules[rule] = [[*item, rule], []]
            return [rule]
        rest: list[Element] = []
        for _ in range(most - least):
            rest = [self._new_rule([[*item, *rest], []])]
        return rest

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = self._new_rule()
        return self._numbers[name]

    def _class(self, chars: Chars) -> Chars:
        return self._classes.setdefault(chars, chars)

    def _new_rule(self, alternatives: list[list[Element]] | None = None) -> int:
        self._grow(1)
        self._rules.append(alternatives or [])
        return len(self._rules) - 1

    def _grow(self, elements: int) -> None:
        self._size += elements
        if self._size > MAX_ELEMENTS:
            raise GrammarError(f"its repetitions make more than {MAX_ELEMENTS:,} elements of it")


def _lex(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text):
        match = LEXER.match(text, at)
        if match is None:
            raise GrammarError(f"{text[at : at + 20]!r} at character {at} can't be read")
        if match.lastgroup != "space":
            yield match
        at = match.end()


def _distinct(alternatives: Iterable[list[Element]]) -> list[list[Element]]:
    """
    Each once, an empty one too. A class is told by its object, since its hash takes time for each
    range, wherever the class is repeated; below zero, it is no rule's number.
    """
    found: dict[tuple[int | None, ...], list[Element]] = {}
    for elements in alternatives:
        key = tuple(-id(item) if isinstance(item, tuple) else item for item in elements)
        found.setdefault(key, elements)
    return list(found.values())


def _shown(match: re.Match[str]) -> str:
    return f"{match[0][:20]!r} at character {match.start()}"


def _bounds(mark: str) -> tuple[int, int | None]:
    """The least and the most of a repetition; None: no end."""
    if mark in "*+?":
        return int(mark == "+"), 1 if mark == "?" else None
    least, comma, most = (part.strip() for part in mark[1:-1].partition(","))
    if not comma:
        return int(least), int(least)
    if most and int(most) < int(least):
        raise GrammarError(f"{mark} asks for less than its least")
    return int(least), int(most) if most else None


def _code_points(text: str) -> list[int]:
    points, at = [], 0
    while at < len(text):
        point, at = _code_point(text, at)
        points.append(point)
    return points


def _code_point(text: str, at: int) -> tuple[int, int]:
    """The one written at `at`, maybe as an escape, and where the next begins."""
    match = CHARACTER.match(text, at)
    if match is None:
        raise GrammarError(f"{text[at : at + 2]!r} is no escape that is known")
    if len(match[0]) == 1:
        return ord(match[0]), match.end()
    if match[0][1] in "xuU":
        return int(match[0][2:], 16), match.end()
    return CONTROLS.get(match[0], ord(match[0][1])), match.end()


def _chars(text: str, negated: bool) -> Chars:
    """Of what stands between [ and ]; `-` is itself where it is the last."""
    ranges, at = [], 0
    while at < len(text):
        low, at = _code_point(text, at)
        high = low
        if text[at : at + 1] == "-" and at + 1 < len(text):
            high, at = _code_point(text, at + 1)
        ranges.append((low, high))
    chars = merged(ranges)
    return complement(chars) if negated else chars


def merged(ranges: Iterable[tuple[int, int]]) -> Chars:
    done: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if low > high:
            continue
        if done and low <= done[-1][1] + 1:
            low, before = done.pop()
            high = max(high, before)
        done.append((low, high))
    return tuple(done)


def complement(chars: Chars) -> Chars:
    left, begin = [], 0
    for low, high in chars:
        if low > begin:
            left.append((begin, low - 1))
        begin = high + 1
    return (*left, (begin, LAST_CODE_POINT)) if begin <= LAST_CODE_POINT else tuple(left)
