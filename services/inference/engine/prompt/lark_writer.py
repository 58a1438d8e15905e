"""
Writes rules of llguidance's Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from services.inference.engine.output.answer_format import ID


class LarkWriter:
    """
    Collects the rules of a grammar. `tokens` are the control tokens of markers by their text;
    `ends` are the texts of tokens that end an answer, which a grammar leaves out.
    """

    def __init__(self, tokens: Mapping[str, int], ends: Iterable[str] = ()) -> None:
        self._tokens = tokens
        self._ends = frozenset(ends)
        texts = sorted({*tokens, *self._ends, ID}, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, texts))})")
        self.rules: dict[str, str] = {}
        self._numbers: dict[str, int] = {}  # of shared rules

    def add(self, rule: str, body: str, *, is_lazy: bool = False) -> str:
        """Add a rule and return its name."""
        self.rules[rule] = f"{rule}{'[lazy]' if is_lazy else ''}: {body}"
        return rule

    def text(self, literal: str) -> str:
        """Return Lark for a text of the template, in which markers become their tokens."""
        parts = []
        for part in self._split.split(literal):
            if part in self._tokens:
                parts.append(f"<[{self._tokens[part]}]>")
            elif part == ID:
                parts.append("/[A-Za-z0-9]{1,9}/")
            elif part and part not in self._ends:
                parts.append(quote(part))
        return " ".join(parts) or '""'

    def until(self, end: str) -> str:
        """Return Lark for any text up to its end, and the end, without the white space around."""
        text = self._begin(end.strip())
        if not text:
            return f"/(?s:.*)/ {self.text(end.strip())}"
        lexeme = self.shared(f"/(?s:.*){escaped(text)}/", is_lazy=True)
        return f"{lexeme} {self.text(end.strip()[len(text) :])}"

    def matching(self, regexes: Sequence[str], end: str) -> str:
        """
        Return Lark for a text that matches all regexes as a whole, and exactly this end. The text
        has no character with which the end begins: the lexer would need too many states.
        """
        text = self._begin(end)
        mark = text.strip()[:1]
        own = [*regexes, *([f"[^{escaped(mark)}]*"] if mark else [])]
        body = self.terminal(" & ".join(f"/{each}/" for each in own))
        whole = self.terminal(f"{body} {quote(text)}")
        return f"{self.shared(whole, is_lazy=bool(mark))} {self.text(end[len(text) :])}"

    def terminal(self, body: str) -> str:
        """Add a terminal and return its name."""
        return self.shared(body, "TERMINAL")

    def shared(self, body: str, prefix: str = "shared", *, is_lazy: bool = False) -> str:
        """Add a rule, unless there is an equal one: the lexer's size has a limit."""
        number = self._numbers.setdefault(f"{body} {is_lazy}", len(self._numbers))
        return self.add(f"{prefix}{number}", body, is_lazy=is_lazy)

    def _begin(self, literal: str) -> str:
        """Return the text before the first control token."""
        return self._split.split(literal)[0]


def quote(text: str) -> str:
    """Return JSON, which is also a string literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def escaped(literal: str) -> str:
    """Return a regex of Lark for a text."""
    found = re.sub(r"([\\^$.|?*+()\[\]{}/\-])", r"\\\1", literal)
    return found.replace("\n", "\\n")
