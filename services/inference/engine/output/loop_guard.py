"""
An answer that says the same over and over would do so until its last token: it is ended. Pure.
"""

from collections import deque
from operator import ge

LONGEST = 32  # tokens that are said again and again
REPETITIONS = 8
TOKENS = 128  # that are repetition and nothing else

# Of each length, how many tokens must equal the one that stands so many before them.
_LIMITS = tuple(max(TOKENS, REPETITIONS * n) - n for n in range(1, LONGEST + 1))


class LoopGuard:
    """
    A loop is an end of the answer that is 8 times or more the same 1 to 32 tokens, and 128 tokens
    or more: so one token 128 times, or a sentence of 20 tokens 8 times.

    Not used with a grammar: what a grammar forces, such as a hundred zeros, is no loop, and
    `max_tokens` ends an answer whose grammar never ends.

    Long enough that a table's rules, a row of zeros or a laugh are not taken for one: what people
    want repeated differs somewhere (a number, a name), and one difference begins the count anew.
    """

    def __init__(self) -> None:
        self._runs = [0] * LONGEST  # by distance: the last tokens that equal the one so far before
        self._past = deque([-1] * LONGEST, LONGEST)  # newest first

    def push(self, token: int) -> bool:
        """Whether the answer loops now."""
        if token not in self._past:
            self._runs = [0] * LONGEST
        else:
            self._runs = [
                run + 1 if token == past else 0
                for run, past in zip(self._runs, self._past, strict=True)
            ]
        self._past.appendleft(token)
        return any(map(ge, self._runs, _LIMITS))
