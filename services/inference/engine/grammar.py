"""
Which tokens may come next, by a grammar: an automaton over bytes whose states are found as they are
needed. Pure.

llama.cpp's own grammar sampler is not used: its time is exponential for rules such as `(.|.|.)*`,
some left recursions take memory until the process aborts, and a thread in it can't be stopped. Here
states are merged, and all work is counted.
"""

from bisect import bisect
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.inference.engine.gbnf import LAST_CODE_POINT, Chars, GrammarError, Rules
from services.inference.engine.vocabulary import Vocabulary

MAX_STACKS = 4_000  # ways to go on from one state
MAX_WORK = 1_000_000  # stacks looked at or begun for one answer: a second or two
MAX_STATES = 8_192  # of a KiB each

EMPTY = 0  # the stack that has nothing more to match
DEAD, UNKNOWN = 0, -1  # states
SURROGATES = (0xD800, 0xDFFF)  # no characters
LEAST_OF_LENGTH = (0, 0, 0x80, 0x800, 0x10000)  # code points in so many bytes of UTF-8


class _State(NamedTuple):
    """
    The stacks that what was said so far can be on. A stack's top is what must come next.

    In the middle of a character: its first bytes, or, if any bytes may complete it, how many are
    missing. So the states inside a string are a few, and not one for each beginning of a character.
    """

    stacks: frozenset[int]
    partial: bytes = b""
    missing: int = 0


class _Character(NamedTuple):
    """What some bytes of UTF-8 can become: a code point from `low` to `high`."""

    low: int
    high: int
    missing: int  # bytes
    is_free: bool  # whether any bytes of UTF-8's middle are right as the missing ones


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
        self._states: list[_State] = [_State(frozenset())]
        self._ids = {self._states[DEAD]: DEAD}
        self._table = np.full((16, 256), UNKNOWN, np.int32)  # [state, byte] -> state
        self._work = 0
        for rule in range(len(rules.starts)):  # those too that only a later state would meet
            if not self._tops(self._beginnings(rule)):
                raise GrammarError("it is left-recursive: a rule leads only to itself")
        self._work = 0
        start = self._tops(self._beginnings(rules.root))
        self._state = self._number(_State(start))

    @property
    def may_end(self) -> bool:
        stacks, partial, missing = self._states[self._state]
        return EMPTY in stacks and not partial and not missing

    @property
    def is_finished(self) -> bool:
        """Nothing may come any more."""
        return self._states[self._state] == _State(frozenset([EMPTY]))

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
        following = self._number(self._read(self._states[state], byte))
        self._table[state, byte] = following
        return following

    def _read(self, state: _State, byte: int) -> _State:
        self._count(len(state.stacks))
        if not state.missing:
            return self._narrow(state.stacks, state.partial + bytes([byte]))
        if byte >> 6 != 0b10:
            return self._states[DEAD]
        return self._wait(state.stacks, state.missing - 1)

    def _narrow(self, stacks: frozenset[int], data: bytes) -> _State:
        """Keeps the stacks that a character of these first bytes can be on top of."""
        character = _character(data)
        if character is None:
            return self._states[DEAD]
        low, high, missing, is_free = character
        tops = {stack: self._top(stack) for stack in stacks}
        found = frozenset(stack for stack, top in tops.items() if _overlaps(top, low, high))
        if not missing or is_free and all(_covers(tops[stack], low, high) for stack in found):
            return self._wait(found, missing)
        return _State(found, data) if found else self._states[DEAD]

    def _wait(self, stacks: frozenset[int], missing: int) -> _State:
        """The stacks' next character is right, and complete once the missing bytes are there."""
        if not stacks or missing:
            return _State(stacks, missing=missing if stacks else 0)
        return _State(self._tops(self._push(*self._after_top(stack)) for stack in stacks))

    def _top(self, stack: int) -> Chars:
        """The character that must come next; none on the empty stack."""
        if stack == EMPTY:
            return ()
        chars = self._rules.program[self._stacks[stack][0]]
        assert isinstance(chars, tuple), "rules on top are opened"
        return chars

    def _after_top(self, stack: int) -> tuple[int, int]:
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
        starts = self._rules.starts[rule]
        self._count(len(starts))
        return [self._push(place, below) for place in starts]

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


def _overlaps(chars: Chars, low: int, high: int) -> bool:
    """By halves, so that a stack counts as one whatever its class."""
    at = bisect(chars, high, key=itemgetter(0))
    return at > 0 and low <= chars[at - 1][1]


def _covers(chars: Chars, low: int, high: int) -> bool:
    at = bisect(chars, low, key=itemgetter(0))
    return at > 0 and high <= chars[at - 1][1]


def _character(data: bytes) -> _Character | None:
    """What can begin with these bytes; None: no UTF-8 does."""
    first = data[0]
    if first < 0x80:
        return _Character(first, first, 0, True)
    length = 2 + (first >= 0xE0) + (first >= 0xF0)
    if not 0xC2 <= first <= 0xF4 or any(byte >> 6 != 0b10 for byte in data[1:]):
        return None
    value = first & (0x7F >> length)
    for byte in data[1:]:
        value = value << 6 | byte & 0x3F
    missing = length - len(data)
    low, high = value << 6 * missing, (value + 1 << 6 * missing) - 1
    least, most = max(low, LEAST_OF_LENGTH[length]), min(high, LAST_CODE_POINT)
    if least > most or SURROGATES[0] <= least and most <= SURROGATES[1]:
        return None
    is_free = (least, most) == (low, high) and not _overlaps((SURROGATES,), low, high)
    return _Character(least, most, missing, is_free)
