"""
Drafts from n-grams ("prompt lookup"): text that quotes its prompt or itself goes on as it did
there. Calls no model and reads no clock.
"""

from collections.abc import Iterable

NGRAM = 3  # tokens that must match before a draft
MAX_TOKENS = 32768  # indexed ones: of a longer prompt only the end
MAX_COMPARED = 64  # tokens before the n-gram, to find how long the match is
# At first, a match of m tokens is expected to go on with a chance of m / (m + 1). That counts as
# much as this many tokens of the sequence, which correct it.
PRIOR_TOKENS = 4
_CLASSES = 8  # of the lengths of matches: 1, 2 to 3, 4 to 7, … 128 and more


class NgramDrafter:
    """
    Follows one sequence. Its last tokens match those before an earlier place, the source; the
    tokens that follow there are a draft.

    Each token shows whether the source was right, also without a draft. So the chance that a match
    of some length goes on is known before anything is computed for it: in free text, which repeats
    a few words by chance, it stays low, and in a quotation it is high.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = tokens = list(tokens)[-MAX_TOKENS:]
        ngrams = zip(*(tokens[i:] for i in range(NGRAM)), strict=False)
        # The place after the last occurrence of each n-gram. The newest n-gram is not in it yet.
        self._places = dict(zip(ngrams, range(NGRAM, len(tokens)), strict=False))
        self._hits = [PRIOR_TOKENS * _prior(each) for each in range(_CLASSES)]
        self._trials = [float(PRIOR_TOKENS)] * _CLASSES
        self._source = 0  # the token that is expected next; meaningful if `_matched`
        self._matched = 0  # tokens before the source that equal the newest ones; 0: no source
        self.followed = 0  # tokens of the answer
        self._find()

    def follow(self, answer: list[int]) -> None:
        """Take in the tokens of the answer that are new."""
        for token in answer[self.followed :]:
            self._append(token)
        self.followed = len(answer)

    def draft(self, count: int) -> list[int]:
        """Return at most `count` tokens that may follow."""
        return self._tokens[self._source :][:count] if self._matched else []

    def expected_hits(self, count: int) -> float:
        """Return how many tokens of a draft of at most `count` tokens are probably right."""
        if not self._matched:
            return 0.0
        chance, hits = 1.0, 0.0
        for i in range(min(count, len(self._tokens) - self._source)):
            length = _class(self._matched + i)
            chance *= self._hits[length] / self._trials[length]
            hits += chance
        return hits

    def _append(self, token: int) -> None:
        is_hit = bool(self._matched) and self._tokens[self._source] == token
        if self._matched:
            length = _class(self._matched)
            self._hits[length] += is_hit
            self._trials[length] += 1
        if len(self._tokens) >= NGRAM:
            self._places[self._newest] = len(self._tokens)
        self._tokens.append(token)
        if is_hit:
            self._matched += 1
            self._source += 1
        else:
            self._find()

    @property
    def _newest(self) -> tuple[int, ...]:
        return tuple(self._tokens[-NGRAM:])

    def _find(self) -> None:
        """Find the last place where the newest n-gram occurred before, and how far back it goes."""
        self._source, self._matched = self._places.get(self._newest, 0), 0
        if not self._source:
            return
        tokens, newest = self._tokens, len(self._tokens)
        limit = min(self._source, NGRAM + MAX_COMPARED)
        while self._matched < limit:
            back = self._matched + 1
            if tokens[self._source - back] != tokens[newest - back]:
                return
            self._matched = back


def _class(length: int) -> int:
    return min(length.bit_length(), _CLASSES) - 1


def _prior(each: int) -> float:
    """Return the chance that a match goes on, by the shortest length of a class."""
    return 2.0**each / (2.0**each + 1)
