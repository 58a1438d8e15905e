"""
Splits long texts, so that a tokenizer needs bounded stack and linear time: llama.cpp's regexes
recurse with each letter of a word, and its search for special tokens walks a list of all that it
has found.
"""

import re
from collections.abc import Iterator

MAX_CHARS = 2**13  # of a part
# Where tokenizers always start a new token: at the start of a line, else of a word.
_LINE = re.compile(r"(?s).*\S\n(?=[^\W_])")
_WORD = re.compile(r"(?s).*[^\W\d_](?= [^\W\d_]|[。，、])")


def split(text: str, special: re.Pattern[str] | None = None) -> Iterator[str]:
    """
    Yield parts of at most MAX_CHARS characters. A text is split before a match of `special`, else
    at the start of a line, else of a word, else after MAX_CHARS characters.
    """
    at = 0
    while len(text) - at > MAX_CHARS:
        end = _cut(text, at, special)
        yield text[at:end]
        at = end
    yield text[at:]


def _cut(text: str, at: int, special: re.Pattern[str] | None) -> int:
    end = at + MAX_CHARS
    if special and (starts := [m.start() for m in special.finditer(text, at + 1, end)]):
        return starts[-1]
    # the patterns also look at the character after the split
    found = _LINE.match(text, at, end) or _WORD.match(text, at, end)
    return found.end() if found else end
