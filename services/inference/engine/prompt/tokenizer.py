"""
Tokenizes prompts so that text written by people never becomes a token that separates roles. Knows
no Jinja and no conversation.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

from services.inference.engine.backend import TokenBackend

MAX_PART_CHARS = 2**13
# Where tokenizers always start a new token: at the start of a line, else of a word.
_LINE = re.compile(r"(?s).*\S\n(?=[^\W_])")
_WORD = re.compile(r"(?s).*[^\W\d_](?= [^\W\d_]|[。，、])")
_SEARCH_CHARS = 2**16  # searched at once: the search holds the GIL
_ANCHOR = "\n"  # no tokenizer that puts a space before a text has a token that begins with it


class AnswerMatch(NamedTuple):
    """Tokens of an answer, the prefix of its text that they spell, and the rest of its text."""

    tokens: list[int]
    text: str
    rest: str


class Tokenizer:
    """
    The tokenizer of a model. Some of its tokens are reserved, so that only text of the chat
    template may become them: control tokens, and the special tokens that the template writes, which
    `template_text` shows. User-defined tokens of one character or of spaces are never reserved.

    `max_token_bytes` is the maximum number of bytes of text that one token stands for.
    """

    def __init__(self, backend: TokenBackend, template_text: str) -> None:
        self._backend = backend
        self._special = backend.special_tokens()
        used = {
            token for part in split(template_text) for token in backend.tokenize(part, special=True)
        }
        self._reserved = {
            token: text
            for token, (text, is_control) in self._special.items()
            if is_control or (token in used and len(text.strip()) > 1)
        }
        self._names = re.compile(any_of(self._reserved.values()))
        self._longest_name = max(map(len, self._reserved.values()), default=0)
        self._anchor = backend.tokenize(_ANCHOR, special=False) if self._adds_space() else []
        texts = (token.text.encode() for token in self._special.values())
        pieces = map(backend.piece, range(backend.vocabulary_size))
        self.max_token_bytes = max(map(len, (*texts, *pieces)))

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text; with `special`, special tokens for their names in it."""
        tokens: list[int] = []
        self.append(tokens, text, special)
        return tokens

    def append(self, tokens: list[int], text: str, special: bool) -> None:
        """Append the tokens of a text, in which names become special tokens with `special`."""
        if text:
            for part in split(text, self._names if special else None):
                tokens += self._tokenize_part(part, tokens, special)

    def append_content(self, tokens: list[int], text: str) -> None:
        """Append the tokens of a user's or a model's text, without reserved tokens."""
        start = len(tokens)
        self.append(tokens, text, special=False)
        if not self.reserved(tokens[start:]):
            return
        # llama.cpp finds user-defined tokens also without `special`: split their names
        del tokens[start:]
        cuts = [0, *(position + 1 for position in self._name_starts(text)), len(text)]
        for begin, end in pairwise(cuts):
            self.append(tokens, text[begin:end], special=False)

    def reserved(self, tokens: Iterable[int]) -> list[int]:
        """Return those of the tokens that are reserved."""
        return [token for token in tokens if token in self._reserved]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with the names of special ones."""
        pieces = (
            self._special[token].text.encode()
            if token in self._special
            else self._backend.piece(token)
            for token in tokens
        )
        return b"".join(pieces).decode(errors="replace")

    def names_reserved(self, text: str) -> bool:
        """Return whether the text contains the name of a reserved token."""
        windows = range(0, len(text) or 1, _SEARCH_CHARS)
        return any(
            self._names.search(text, start, start + _SEARCH_CHARS + self._longest_name)
            for start in windows
        )

    def replace_names(self, value: Any, replace: Callable[[str], str]) -> Any:
        """Return the JSON with every name of a reserved token in its strings replaced."""
        if isinstance(value, str):
            return self._names.sub(lambda found: replace(found[0]), value)
        if isinstance(value, dict):
            return {
                self.replace_names(key, replace): self.replace_names(item, replace)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.replace_names(item, replace) for item in value]
        return value

    def match_answer(self, tokens: Sequence[int], text: str) -> AnswerMatch:
        """
        Return the longest prefix of the tokens that spells a prefix of the text, in whole
        characters. It ends before a reserved token: a role that the model forged is not repeated.
        """
        data = text.encode()
        position = matched = end = 0
        for count, token in enumerate(tokens, start=1):
            piece = self._backend.piece(token)
            if token in self._reserved or not data.startswith(piece, position):
                break
            position += len(piece)
            if position == len(data) or data[position] & 0xC0 != 0x80:  # a character starts here
                matched, end = count, position
        return AnswerMatch(list(tokens[:matched]), data[:end].decode(), data[end:].decode())

    def _name_starts(self, text: str) -> Iterator[int]:
        """Yield where names of reserved tokens start, also inside other names."""
        position = 0
        while found := self._names.search(text, position):
            yield found.start()
            position = found.start() + 1

    def _tokenize_part(self, text: str, previous: Sequence[int], special: bool) -> list[int]:
        """
        SentencePiece tokenizers put a space before a text and after a special token, and nowhere
        else: text that continues other tokens gets none.
        """
        continues = previous and previous[-1] not in self._special
        if self._anchor and continues:
            tokens = self._backend.tokenize(_ANCHOR + text, special)
            if tokens[: len(self._anchor)] == self._anchor:
                return tokens[len(self._anchor) :]
        return self._backend.tokenize(text, special)

    def _adds_space(self) -> bool:
        tokens = self._backend.tokenize("a", special=False)
        return b"".join(map(self._backend.piece, tokens)) != b"a"


def split(text: str, special: re.Pattern[str] | None = None) -> Iterator[str]:
    """
    Yield parts of at most MAX_PART_CHARS characters, so that a tokenizer needs bounded stack and
    linear time: llama.cpp's regexes recurse with each letter of a word, and its search for special
    tokens walks a list of all that it has found. A text is split before a match of `special`, else
    at the start of a line, else of a word, else anywhere.
    """
    start = 0
    while len(text) - start > MAX_PART_CHARS:
        end = _part_end(text, start, special)
        yield text[start:end]
        start = end
    yield text[start:]


def _part_end(text: str, start: int, special: re.Pattern[str] | None) -> int:
    end = start + MAX_PART_CHARS
    if special and (found := [m.start() for m in special.finditer(text, start + 1, end)]):
        return found[-1]
    # the patterns also look at the character after the split
    boundary = _LINE.match(text, start, end) or _WORD.match(text, start, end)
    return boundary.end() if boundary else end


def any_of(texts: Iterable[str]) -> str:
    """
    Return a regex that matches any of the texts, preferring longer ones. Common prefixes are tried
    once, so that a search with a thousand texts is as fast: it holds the GIL.
    """
    by_first = groupby(sorted(filter(None, texts)), key=lambda text: text[0])
    return "|".join(_branch(list(group)) for _, group in by_first) or "(?!)"


def _branch(texts: list[str]) -> str:
    """Return the regex of texts with the same first character."""
    prefix = commonprefix(texts)
    rests = {text[len(prefix) :] for text in texts}
    if rests == {""}:
        return re.escape(prefix)
    return f"{re.escape(prefix)}(?:{any_of(rests)}){'?' if '' in rests else ''}"
