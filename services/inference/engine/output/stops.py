"""
Stop strings in a stream: none leaks, not even in part, and no character waits longer than it must.

A request's own `stop` is literal. The strings of CHAT_STOP end what a model appends to its answer,
but most of them also occur in ordinary answers, so they match only in certain places.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_FENCE = re.compile(r"[\s>]*(?:(?:[-*+]|\d+[.)])\s*)?(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)\Z")
_ANNOUNCES = re.compile(r"\s*#|.*[:：][*_\s]*\Z|\s*\*\*[^*]+\*\*\s*\Z")  # colon, heading, bold
_LABEL = re.compile(r"[^:：]{1,64}[:：]")
_WORD = re.compile(r"\w")
_OPEN, _CLOSE = "<think>", "</think>"


class Rule(NamedTuple):
    """
    A stop string. `text` matches everywhere if it is literal, else in prose; a label, such as
    `User:`, only if the answer does not call for such a line. `name` is the string as in the
    request or CHAT_STOP.
    """

    name: str
    text: str
    is_literal: bool = False
    is_label: bool = False


class StopRules(NamedTuple):
    rules: tuple[Rule, ...] = ()
    openers: tuple[
        str, ...
    ] = ()  # a one-line paragraph that begins so is removed with the label after it
    is_thinking: bool = False  # at the start of the answer


def literal(strings: Sequence[str]) -> StopRules:
    """Return the rules of a request's own `stop`, as in OpenAI's API."""
    return StopRules(tuple(Rule(string, string, is_literal=True) for string in strings))


def of_setting(strings: Sequence[str], prompt: str, is_thinking: bool = False) -> StopRules:
    """
    Return the rules of CHAT_STOP for an answer to `prompt`. No string matches in code or reasoning
    (`<think>`), and one that begins with a newline only after some text.

    A label begins with a letter and ends with a colon ("Example:"), or begins with a letter after a
    newline. It matches at the start of a line: after a blank line, or after any line if the string
    has the newline; unless the prompt mentions it, a line such as "Here is a quiz:" announces it,
    or the answer begins with it or has used it before.

    Other phrases ("Let me") start ordinary sentences. They match only in the line before a label,
    which is removed with it.
    """
    rules, openers = [], []
    for string in strings:
        if not string.lstrip("\n")[:1].isalpha():
            rules.append(Rule(string, string))
        elif not string.startswith("\n") and not string.rstrip().endswith((":", "：")):
            openers.append(string)
        elif not _is_named(string, prompt):
            text = string if string.startswith("\n") else f"\n\n{string}"
            rules.append(Rule(string, text, is_label=True))
    return StopRules(tuple(rules), tuple(openers), is_thinking)


def _is_named(label: str, prompt: str) -> bool:
    """Return whether the prompt mentions the label, also in the plural ("two questions")."""
    word = re.escape(label.strip("\n:： "))
    return re.search(rf"\b{word}s?\b", prompt, re.IGNORECASE) is not None


class _Place(NamedTuple):
    """The state of an answer after some of its text."""

    line: str = ""  # the unfinished last line
    before: str = ""  # the last complete line with a word, or the end of a code block
    fence: str = ""  # the one that opened the current code block
    is_thinking: bool = False
    used: frozenset[str] = frozenset()  # labels at the start of earlier lines

    def after(self, text: str) -> "_Place":
        *lines, rest = (self.line + text).split("\n")
        place = self
        for line in lines:
            place = place._with(line)
        return place._replace(line=rest)

    @property
    def has_text(self) -> bool:
        return bool(self._with(self.line).before)

    @property
    def is_prose(self) -> bool:
        """Whether this is neither code nor reasoning."""
        place = self._with(self.line)
        is_code = self.line.count("`") % 2 and not _FENCE.match(self.line)
        return not (place.fence or place.is_thinking or is_code)

    def has_used(self, label: str) -> bool:
        return label in self._with(self.line).used

    @property
    def is_announcement(self) -> bool:
        """Whether the last line announces what follows."""
        return _ANNOUNCES.match(self._with(self.line).before) is not None

    def _with(self, line: str) -> "_Place":
        """Return the state after this complete line, which began with `self.line`."""
        if self.is_thinking or not self.before and line.lstrip().startswith(_OPEN):
            _, close, rest = line.partition(_CLOSE)
            place = _Place(is_thinking=not close)
            return place._with(rest) if close else place
        if fence := _FENCE.match(line):
            return self._replace(fence=self._fence_after(fence), before=line)
        if self.fence or not line.strip() or self.before and not _WORD.search(line):
            return self
        label = _LABEL.match(line)
        return self._replace(before=line, used=self.used | {label[0]} if label else self.used)

    def _fence_after(self, found: re.Match[str]) -> str:
        if not self.fence:
            return found["mark"]
        closes = found["mark"].startswith(self.fence) and not found["info"].strip()
        return "" if closes else self.fence


class Text(NamedTuple):
    """Text that can be sent, and the stop string that followed it, if any."""

    out: str
    stop: str | None = None


class StopBuffer:
    """
    Holds back the longest end of the text that a stop string could begin with, and nothing
    more.
    """

    def __init__(self, stops: StopRules) -> None:
        self._rules = stops.rules
        self._texts = [rule.text for rule in stops.rules]
        self._openings = [*self._texts, *(f"\n\n{opener}" for opener in stops.openers)]
        openers = "|".join(map(re.escape, stops.openers))
        self._introduction = re.compile(rf"\n\n(?:{openers})[^\n]*\n*\Z" if openers else r"(?!)")
        self._place = _Place(is_thinking=stops.is_thinking)
        self._held = ""

    def push(self, text: str) -> Text:
        text = self._held + text
        if found := self._first_stop(text):
            at, rule = found
            self._held = ""
            introduction = self._introduction.search(text[:at]) if rule.is_label else None
            return Text(text[: introduction.start() if introduction else at], rule.name)
        keep = _beginning_of_one(self._openings, text)
        introduction = self._introduction.search(text[:keep])
        return Text(self._release(text, introduction.start() if introduction else keep))

    def flush(self) -> str:
        """Return the held-back text at the end of the answer: it is no stop string."""
        held, self._held = self._held, ""
        return held

    def cut(self) -> str:
        """Return the held-back text of a cut answer, without half of a stop string."""
        return self._release(self._held, _beginning_of_one(self._texts, self._held))

    def _release(self, text: str, end: int) -> str:
        self._held = text[end:]
        self._place = self._place.after(text[:end])
        return text[:end]

    def _first_stop(self, text: str) -> tuple[int, Rule] | None:
        found = [(at, rule) for rule in self._rules if (at := self._find(rule, text)) >= 0]
        return min(found, key=lambda found: found[0], default=None)

    def _find(self, rule: Rule, text: str) -> int:
        at = text.find(rule.text)
        while at >= 0 and not self._counts(rule, text[:at]):
            at = text.find(rule.text, at + 1)
        return at

    def _counts(self, rule: Rule, before: str) -> bool:
        if rule.is_literal:
            return True
        place = self._place.after(before)
        if not place.is_prose or rule.text.startswith("\n") and not place.has_text:
            return False
        if not rule.is_label or self._introduction.search(before):
            return True
        return not place.is_announcement and not place.has_used(rule.text.lstrip("\n"))


def _beginning_of_one(strings: Sequence[str], text: str) -> int:
    """Return the start of the longest suffix of `text` that is a proper prefix of a string."""
    longest = max(map(len, strings), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(string.startswith(text[start:]) for string in strings):
            return start
    return len(text)
