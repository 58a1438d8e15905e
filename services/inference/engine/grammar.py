"""
Which tokens may come next, by a grammar: an automaton over bytes whose states are found as they are
needed. Pure.

llama.cpp's own grammar sampler is not used: `([^e]|[^e]|[^e]|[^e])*` keeps it busy for hours, some
left recursions eat all memory, and both in a thread that can't be stopped. Here states are merged,
and all work is counted.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.inference.engine.gbnf import LAST_CODE_POINT, Chars, GrammarError, Rules
from services.inference.engine.vocabulary import Vocabulary

MAX_STACKS = 4_000  # ways to go on from one state
MAX_WORK = 1_000_000  # stacks looked at for one answer: a second or two
MAX_STATES = 8_192  # of a KiB each

EMPTY = 0  # the stack that has nothing more to match
DEAD, UNKNOWN = 0, -1  # states
LEAST_OF_LENGTH = (0, 0, 0x80, 0x800, 0x10000)  # code points in so many bytes of UTF-8


class _State(NamedTuple):
    """
    The stacks that what was said so far can be on, and the first bytes of a character that is not
    complete. A stack's top is the element that must come next.
    """

    stacks: frozenset[int]
    partial: bytes


class Grammar:
    """
    What one answer must keep to, and how far it is.

    Anything here raises GrammarError where the grammar asks for too much work, `__init__` also
    where it is left-recursive.
    """

    def __init__(self, rules: Rules, vocabulary: Vocabulary) -> None:
        self._rules = rules
        self._vocabulary = vocabulary
        self._stacks: list[tuple[int, int]] = [(-1, EMPTY)]  # (place in the program, stack below)
        self._numbers = {self._stacks[EMPTY]: EMPTY}
        self._states: list[_State] = [_State(frozenset(), b"")]
        self._ids = {self._states[DEAD]: DEAD}
        self._table = np.full((16, 256), UNKNOWN, np.int32)  # [state, byte] -> state
        self._work = 0
        for rule in range(len(rules.starts)):  # those too that only a later state would meet
            self._tops(self._beginnings(rule))
        self._work = 0
        start = self._tops(self._beginnings(rules.root))
        self._state = self._number(_State(start, b""))

    @property
    def may_end(self) -> bool:
        return EMPTY in self._states[self._state].stacks and not self._states[self._state].partial

    @property
    def is_finished(self) -> bool:
        """Nothing may come any more."""
        return self._states[self._state] == (frozenset([EMPTY]), b"")

    def allows(self, token: int) -> bool:
        if token in self._vocabulary.ends:
            return self.may_end
        return bool(self._vocabulary.pieces[token]) and self._after(token) != DEAD

    def accept(self, token: int) -> None:
        """A token that was allowed has been said."""
        if token not in self._vocabulary.ends:
            self._state = self._after(token)

    def allowed(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """For each of the tokens, whether it may come next. All of them go on a byte at a time."""
        starts, lengths = self._vocabulary.starts[tokens], self._vocabulary.lengths[tokens]
        is_end = self._vocabulary.is_end[tokens]
        allowed: npt.NDArray[np.bool_] = is_end & self.may_end
        alive = np.flatnonzero((lengths > 0) & ~is_end)
        states = np.full(len(alive), self._state, np.int32)
        depth = 0
        while len(alive):
            states = self._step(states, self._vocabulary.bytes[starts[alive] + depth])
            depth += 1
            lives, ends = states != DEAD, lengths[alive] == depth
            allowed[alive[lives & ends]] = True
            alive, states = alive[lives & ~ends], states[lives & ~ends]
        return allowed

    def _after(self, token: int) -> int:
        state = self._state
        for byte in self._vocabulary.pieces[token]:
            known = int(self._table[state, byte])
            state = known if known != UNKNOWN else self._find(state, byte)
        return state

    def _step(
        self, states: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int32]:
        following = self._table[states, data]
        unknown = following == UNKNOWN
        if not unknown.any():
            return following
        for key in np.unique(states[unknown] * 256 + data[unknown]):
            self._find(*divmod(int(key), 256))
        return self._table[states, data]

    def _find(self, state: int, byte: int) -> int:
        stacks, partial = self._states[state]
        following = self._number(self._read(stacks, partial + bytes([byte])))
        self._table[state, byte] = following
        return following

    def _read(self, stacks: frozenset[int], data: bytes) -> _State:
        """`data` is a character, or the beginning of one."""
        points = _code_points(data)
        self._count(len(stacks))
        found = [stack for stack in stacks if points and self._meets(stack, *points)]
        if points and points[0] == points[1]:
            return _State(self._tops(self._push(*self._rest(stack)) for stack in found), b"")
        return _State(frozenset(found), data) if found else self._states[DEAD]

    def _meets(self, stack: int, low: int, high: int) -> bool:
        """Whether a character from `low` to `high` can be the stack's next one."""
        if stack == EMPTY:
            return False
        chars = self._rules.program[self._stacks[stack][0]]
        assert isinstance(chars, tuple), "a top is a character"
        return _overlap(chars, low, high)

    def _rest(self, stack: int) -> tuple[int, int]:
        place, below = self._stacks[stack]
        return place + 1, below

    def _tops(self, stacks: Iterable[int]) -> frozenset[int]:
        """The stacks, with the rules on top of them opened until each has a character there."""
        tops: set[int] = set()
        seen: set[int] = set()
        todo = list(stacks)
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            if len(seen) > MAX_STACKS:
                raise GrammarError("it is left-recursive, or has too many ways to go on")
            place, below = self._stacks[stack]
            rule = None if stack == EMPTY else self._rules.program[place]
            if isinstance(rule, int):
                todo += self._beginnings(rule, self._push(place + 1, below))
            else:
                tops.add(stack)
        self._count(len(seen))
        return frozenset(tops)

    def _beginnings(self, rule: int, below: int = EMPTY) -> list[int]:
        return [self._push(place, below) for place in self._rules.starts[rule]]

    def _push(self, place: int, below: int) -> int:
        """The stack with this on top of `below`; the same ones are one."""
        if self._rules.program[place] is None:
            return below
        key = (place, below)
        if key not in self._numbers:
            self._numbers[key] = len(self._stacks)
            self._stacks.append(key)
        return self._numbers[key]

    def _number(self, state: _State) -> int:
        if state not in self._ids:
            if len(self._states) == MAX_STATES:
                raise GrammarError("it has too many states")
            self._ids[state] = len(self._states)
            self._states.append(state)
            if len(self._states) > len(self._table):
                more = np.full_like(self._table, UNKNOWN)
                self._table = np.concatenate([self._table, more])
        return self._ids[state]

    def _count(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise GrammarError("it takes too much work to follow")


def _overlap(chars: Chars, low: int, high: int) -> bool:
    return any(first <= high and low <= last for first, last in chars)


def _code_points(data: bytes) -> tuple[int, int] | None:
    """The first and the last that can begin with these bytes of UTF-8; None: there is none."""
    first = data[0]
    if first < 0x80:
        return first, first
    length = 2 + (first >= 0xE0) + (first >= 0xF0)
    if not 0xC2 <= first <= 0xF4 or any(byte >> 6 != 0b10 for byte in data[1:]):
        return None
    value = first & (0x7F >> length)
    for byte in data[1:]:
        value = value << 6 | byte & 0x3F
    missing = 6 * (length - len(data))
    low = max(value << missing, LEAST_OF_LENGTH[length])
    high = min((value + 1 << missing) - 1, LAST_CODE_POINT)
    is_surrogate = 0xD800 <= low and high <= 0xDFFF
    return None if low > high or is_surrogate else (low, high)
