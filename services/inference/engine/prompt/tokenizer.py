"""
Text to tokens, and which of them only the template may say. Knows no Jinja and no conversation.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from os.path import commonprefix
from typing import Any, NamedTuple

from services.inference.engine.backend import Backend
from services.inference.engine.prompt import text_splitting

_WINDOW = 2**16  # characters searched at once: the search holds the GIL
_ANCHOR = "\n"  # no tokenizer that puts a space before a text has a token that goes on from it


class RenderedText(NamedTuple):
    """An answer as tokens: those that are its text's beginning, and the text that they leave."""

    tokens: list[int]
    text: str
    rest: str


class Tokenizer:
    """
    `own` is the text that the template itself writes. `longest_token` is the maximum number of
    bytes that one token stands for.

    Markers are the tokens that could forge something: control tokens, and what the template uses.
    A user-defined token of one character, or of spaces, is no marker: it is a letter like another.
    """

    def __init__(self, backend: Backend, own: str) -> None:
        self._backend = backend
        self._special = backend.special_tokens()
        vocabulary = range(backend.vocabulary_size)
        used = {
            id for part in text_splitting.split(own) for id in backend.tokenize(part, special=True)
        }
        self._markers = {
            id: text
            for id, (text, is_control) in self._special.items()
            if is_control or (id in used and len(text.strip()) > 1)
        }
        self._named = re.compile(any_of(self._markers.values()))
        self._longest = max(map(len, self._markers.values()), default=0)
        texts = (token.text.encode() for token in self._special.values())
        self.longest_token = max(map(len, (*texts, *map(backend.piece, vocabulary))))
        self._anchor = backend.tokenize(_ANCHOR, special=False) if self._adds_space() else []

    def tokenize(self, text: str, special: bool, before: Sequence[int] = ()) -> list[int]:
        """
        Return the tokens of a text that follows the tokens `before`. With `special`, names of
        control tokens become these. Texts over `text_splitting.MAX_CHARS` are tokenized in parts.
        """
        done = list(before[-1:])
        for part in text_splitting.split(text, self._named if special else None):
            done += self._part(part, done, special)
        return done[len(before[-1:]) :]

    def template(self, text: str, before: Sequence[int]) -> list[int]:
        """Of text after the tokens `before`; what names a marker becomes one."""
        return self.tokenize(text, special=True, before=before)

    def content(self, text: str, before: Sequence[int]) -> list[int]:
        """Of text that somebody wrote: never a marker."""
        tokens = self.tokenize(text, special=False, before=before)
        if not self.markers(tokens):
            return tokens
        # llama.cpp finds user-defined ones also where special tokens are off: they are taken apart
        done = list(before[-1:])
        cuts = [0, *(start + 1 for start in self._starts(text)), len(text)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            done += self.tokenize(text[start:end], special=False, before=done)
        return done[len(before[-1:]) :]

    def markers(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token in self._markers]

    def names_a_marker(self, text: str) -> bool:
        windows = range(0, len(text) or 1, _WINDOW)
        return any(self._named.search(text, at, at + _WINDOW + self._longest) for at in windows)

    def _starts(self, text: str) -> Iterator[int]:
        """Yield where markers start in a text, also inside other markers."""
        at = 0
        while found := self._named.search(text, at):
            yield found.start()
            at = found.start() + 1

    def hide(self, value: Any, by: Callable[[str], str]) -> Any:
        """The JSON with something else in the place of each marker that a text in it names."""
        if isinstance(value, str):
            return self._named.sub(lambda found: by(found[0]), value)
        if isinstance(value, dict):
            return {self.hide(key, by): self.hide(item, by) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, by) for item in value]
        return value

    def said(self, tokens: Sequence[int], text: str) -> RenderedText:
        """
        The longest beginning of the tokens that is a beginning of the text, in whole characters.

        It ends before a marker: a role that the model forged is not repeated.
        """
        data = text.encode()
        at = kept = end = 0
        for count, token in enumerate(tokens, start=1):
            piece = self._backend.piece(token)
            if token in self._markers or not data.startswith(piece, at):
                break
            at += len(piece)
            if at == len(data) or data[at] & 0xC0 != 0x80:  # the first byte of a character
                kept, end = count, at
        return RenderedText(list(tokens[:kept]), data[:end].decode(), data[end:].decode())

    def _part(self, text: str, before: Sequence[int], special: bool) -> list[int]:
        """
        Some tokenizers (SentencePiece) put a space before a text and after a special token, and
        nowhere else: text that goes on after other tokens gets none.
        """
        goes_on = before and before[-1] not in self._special
        if self._anchor and goes_on:
            tokens = self._backend.tokenize(_ANCHOR + text, special)
            if tokens[: len(self._anchor)] == self._anchor:
                return tokens[len(self._anchor) :]
        return self._backend.tokenize(text, special)

    def _adds_space(self) -> bool:
        tokens = self._backend.tokenize("a", special=False)
        return b"".join(map(self._backend.piece, tokens)) != b"a"


def any_of(texts: Iterable[str]) -> str:
    """
    Return a regex that matches any of the texts, preferring longer ones. Common prefixes are tried
    once, so that a search with a thousand texts is as fast: it holds the GIL.
    """
    by_first = groupby(sorted(filter(None, texts)), key=lambda text: text[0])
    return "|".join(_branch(list(group)) for _, group in by_first) or "(?!)"


def _branch(texts: list[str]) -> str:
    """Return the regex of texts with the same first character."""
    begin = commonprefix(texts)
    rests = {text[len(begin) :] for text in texts}
    if rests == {""}:
        return re.escape(begin)
    return f"{re.escape(begin)}(?:{any_of(rests)}){'?' if '' in rests else ''}"
