"""
Stop strings in the streamed content of an answer: no part of one is ever sent, and no character is
held back that could not begin one.

The `stop` of a request matches literally. The strings of CHAT_STOP end what a model appends to its
answer, such as an invented user turn; most of them also occur in ordinary answers, so they match
only in certain places.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from services.inference.engine.output.patterns import first_characters

_CODE_FENCE = re.compile(r"[\s>]*(?:(?:[-*+]|\d+[.)])\s*)?(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)\Z")
_ANNOUNCEMENT = re.compile(r"\s*#|.*[:：][*_\s]*\Z|\s*\*\*[^*]+\*\*\s*\Z")  # heading, colon, bold
_LABEL = re.compile(r"[^:：]{1,64}[:：]")
_WORD = re.compile(r"\w")


class StopRule(NamedTuple):
    """
    One stop string: `name` as in the request or CHAT_STOP, `text` as it is searched. A literal rule
    matches everywhere, another one only in prose; a label, such as `User:`, only if the answer does
    not announce or use such lines itself.
    """

    name: str
    text: str
    is_literal: bool = False
    is_label: bool = False


class StopRules(NamedTuple):
    """
    The stop strings of one answer. A one-line paragraph that begins with one of `openers` is
    removed together with the label after it.
    """

    rules: tuple[StopRule, ...] = ()
    openers: tuple[str, ...] = ()

    @classmethod
    def literal(cls, strings: Sequence[str]) -> Self:
        """Return the rules of a request's own `stop`, as in OpenAI's API."""
        return cls(tuple(StopRule(string, string, is_literal=True) for string in strings))

    @classmethod
    def from_setting(cls, strings: Sequence[str], prompt: str) -> Self:
        """
        Return the rules of CHAT_STOP for an answer to `prompt`. No string matches in code, and one
        that begins with a newline only after some text.

        A label begins with a letter and ends with a colon ("Example:"), or begins with a letter
        after a newline. It matches at the start of a line: after a blank line, or after any line if
        the string has the newline; unless the prompt mentions it, a line such as "Here is a quiz:"
        announces it, or the answer begins with it or has used it before.

        Other phrases ("Let me") begin ordinary sentences. They are openers, and match only in the
        line before a label.
        """
        rules, openers = [], []
        for string in strings:
            if not string.lstrip("\n")[:1].isalpha():
                rules.append(StopRule(string, string))
            elif not string.startswith("\n") and not string.rstrip().endswith((":", "：")):
                openers.append(string)
            elif not _mentions(prompt, string):
                text = string if string.startswith("\n") else f"\n\n{string}"
                rules.append(StopRule(string, text, is_label=True))
        return cls(tuple(rules), tuple(openers))


def _mentions(prompt: str, label: str) -> bool:
    """Return whether the prompt contains the word, also in the plural ("two questions")."""
    word = re.escape(label.strip("\n:： "))
    return re.search(rf"\b{word}s?\b", prompt, re.IGNORECASE) is not None


class _Position(NamedTuple):
    """The state of a Markdown text after some of its characters."""

    line: str = ""  # the unfinished last line
    previous: str = ""  # the last complete line with a word, or the end of a code block
    fence: str = ""  # the mark that opened the current code block
    labels: frozenset[str] = frozenset()  # at the start of earlier lines

    def advance(self, text: str) -> "_Position":
        *lines, rest = (self.line + text).split("\n")
        position = self
        for line in lines:
            position = position._complete(line)
        return position._replace(line=rest)

    def allows(self, rule: StopRule, follows_opener: bool) -> bool:
        """Return whether the rule matches here."""
        here = self._complete(self.line)
        is_code = self.line.count("`") % 2 and not _CODE_FENCE.match(self.line)
        if here.fence or is_code:
            return False
        if rule.text.startswith("\n") and not here.previous:
            return False
        if not rule.is_label or follows_opener:
            return True
        is_announced = _ANNOUNCEMENT.match(here.previous) is not None
        return not is_announced and rule.text.lstrip("\n") not in here.labels

    def _complete(self, line: str) -> "_Position":
        """Return the state after this complete line, which began with `self.line`."""
        if fence := _CODE_FENCE.match(line):
            return self._replace(fence=self._fence_after(fence), previous=line)
        if self.fence or not line.strip() or self.previous and not _WORD.search(line):
            return self
        label = _LABEL.match(line)
        return self._replace(previous=line, labels=self.labels | ({label[0]} if label else set()))

    def _fence_after(self, found: re.Match[str]) -> str:
        if not self.fence:
            return found["mark"]
        closes = found["mark"].startswith(self.fence) and not found["info"].strip()
        return "" if closes else self.fence


class StopResult(NamedTuple):
    """Text that can be sent, and the name of the stop string after it, if there is one."""

    text: str
    stop: str | None = None


class StopBuffer:
    """Holds back the longest suffix of the text that a stop string could begin with."""

    def __init__(self, stops: StopRules) -> None:
        self._rules = stops.rules
        self._strings = [rule.text for rule in stops.rules]
        self._prefixes = [*self._strings, *(f"\n\n{opener}" for opener in stops.openers)]
        openers = "|".join(map(re.escape, stops.openers))
        self._opener = re.compile(rf"\n\n(?:{openers})[^\n]*\n*\Z" if openers else r"(?!)")
        self._begin = first_characters(tuple(self._prefixes))
        self._position = _Position()
        self._passed: list[str] = []  # released text after the position
        self.held = ""
        """The text that is held back."""

    def push(self, text: str, may_stop: bool = True) -> StopResult:
        """
        Return the text that can be sent now. After a stop string nothing more is pushed. Without
        `may_stop`, a stop string that ends in this text is a part of the answer.
        """
        if not self.held and not self._begin.search(text):
            self._passed.append(text)
            return StopResult(text)
        known, text = len(self.held), self.held + text
        if may_stop and (found := self._first_stop(text, known)):
            end, rule = found
            self.held = ""
            end = self._opener_start(text[:end]) if rule.is_label else end
            return StopResult(text[:end], rule.name)
        end = _held_back_from(self._prefixes, text)
        return StopResult(self._release(text, self._opener_start(text[:end])))

    def flush(self) -> str:
        """Return the held-back text, after which other text can't complete a stop string."""
        return self._release(self.held, len(self.held))

    def flush_interrupted(self) -> str:
        """Return the held-back text of an interrupted answer without half of a stop string."""
        return self._release(self.held, _held_back_from(self._strings, self.held))

    def _release(self, text: str, end: int) -> str:
        self.held = text[end:]
        self._passed.append(text[:end])
        return text[:end]

    def _opener_start(self, text: str) -> int:
        """Return where an opener at the end of the text starts, else the length of the text."""
        opener = self._opener.search(text)
        return opener.start() if opener else len(text)

    def _first_stop(self, text: str, known: int) -> tuple[int, StopRule] | None:
        """Return the first stop string that ends after the first `known` characters, and where."""
        found = [
            (start, rule) for rule in self._rules if (start := self._find(rule, text, known)) >= 0
        ]
        return min(found, key=lambda found: found[0], default=None)

    def _find(self, rule: StopRule, text: str, known: int) -> int:
        start = text.find(rule.text, max(0, known + 1 - len(rule.text)))
        while start >= 0 and not self._matches(rule, text[:start]):
            start = text.find(rule.text, start + 1)
        return start

    def _matches(self, rule: StopRule, before: str) -> bool:
        if rule.is_literal:
            return True
        self._position = self._position.advance("".join(self._passed))
        self._passed.clear()
        follows_opener = rule.is_label and self._opener.search(before) is not None
        return self._position.advance(before).allows(rule, follows_opener)


def _held_back_from(strings: Sequence[str], text: str) -> int:
    """Return the start of the longest suffix of `text` that is a proper prefix of a string."""
    longest = max(map(len, strings), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(string.startswith(text[start:]) for string in strings):
            return start
    return len(text)
