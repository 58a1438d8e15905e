"""
Long texts in parts, so that a tokenizer needs no more stack and no more than linear time for them:
llama.cpp's regexes recurse with each letter of a word, and its search for special tokens walks a
list of all that it has found.
"""

import re
from collections.abc import Iterator

MAX_CHARS = 2**13  # of a part
# Where tokenizers begin a new token whatever follows: at a line's beginning, else at a word's.
_LINE = re.compile(r"(?s).*\S\n(?=[^\W_])")
_WORD = re.compile(r"(?s).*[^\W\d_](?= [^\W\d_]|[。，、])")


def split(text: str, special: re.Pattern[str] | None = None) -> Iterator[str]:
    """
    Yield parts of at most MAX_CHARS characters. A text is cut before what `special` finds, at a
    line's beginning or at a word's; where there is none of these, after MAX_CHARS characters.
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
    # one more character is seen, as what stands behind the cut matters
    found = _LINE.match(text, at, end) or _WORD.match(text, at, end)
    return found.end() if found else end
