"""
Which sequence of the KV cache belongs to whom, and what each still holds for the next one to reuse.
"""

from collections.abc import Sequence as Tokens
from itertools import takewhile
from operator import eq
from typing import NamedTuple

from services.inference.engine.backend import Backend


class Lease(NamedTuple):
    slot: int
    cached: int  # tokens of the prompt that the slot already holds


class Slots:
    """
    A fixed number of slots, each free or held. A free one keeps the tokens of its last sequence.

    The longest beginning that a prompt shares with any slot, free or held, is not computed again:
    it is kept, or copied. At least one token always is computed, since its logits are needed.
    """

    def __init__(self, backend: Backend, count: int) -> None:
        self._backend = backend
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._free = list(range(count))  # least recently used first

    def can_acquire(self) -> bool:
        return bool(self._free)

    def cached(self, prompt: list[int]) -> int:
        """How many tokens of the prompt some slot holds."""
        return self._longest_prefix(prompt)[1]

    def acquire(self, prompt: list[int]) -> Lease:
        """Takes a free slot; there must be one."""
        source, shared = self._longest_prefix(prompt)
        slot = self._choose(source, shared)
        self._free.remove(slot)
        kept = shared if self._backend.share(source, slot, shared) else 0
        self._tokens[slot] = prompt[:kept]
        return Lease(slot, kept)

    def update(self, slot: int, new: Tokens[int]) -> None:
        """`new` tokens of the slot's sequence have been computed."""
        self._tokens[slot].extend(new)

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def forget(self, slot: int) -> None:
        """What the slot holds can't be trusted (a step failed)."""
        self._backend.share(slot, slot, 0)
        self._tokens[slot] = []

    def check(self, held: int) -> None:
        """Raises AssertionError if a slot was lost or given twice."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(free) + held == len(self._tokens), "a slot is lost"

    def _longest_prefix(self, prompt: list[int]) -> tuple[int, int]:
        """(slot, length); of equals a free one, so that nothing needs to be copied."""
        lengths = [common_prefix(prompt[:-1], tokens) for tokens in self._tokens]
        source = max(range(len(lengths)), key=lambda slot: (lengths[slot], slot in self._free))
        return source, lengths[source]

    def _choose(self, source: int, shared: int) -> int:
        """
        The source itself if it is free and mostly this conversation; else the least recently used.

        So a new session that shares only the system prompt with an old one leaves that one warm.
        """
        if source in self._free and 2 * shared >= len(self._tokens[source]):
            return source
        return self._free[0]


def common_prefix(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
