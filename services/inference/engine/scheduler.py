"""
Who computes what in the next step. Pure: no llama.cpp, no thread, no clock but the sequences' own.
"""

import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from services.inference.engine.backend import Chunk
from services.inference.engine.sequence import Sequence
from services.inference.engine.slots import Slots, common_prefix

PREFILL_ALONE = 512  # prompt tokens a step while nobody decodes
PREFILL_BESIDE = 128  # while others decode, so that their streams don't stall
WORTH_WAITING = 64  # tokens that another is about to have computed
LOOKED_AT = 16  # of those who wait, in each step


class Planned(NamedTuple):
    sequence: Sequence
    chunk: Chunk


class Scheduler:
    """
    First come, first served into the slots, but for those whose beginning another is reading right
    now: they wait for it, and share it. Then continuous batching.

    Each step takes the newest token of every running sequence, and fills up with the next chunk of
    the prompts that are not read yet.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def find(self, key: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.key == key), None)

    def admit(self) -> list[Sequence]:
        """Gives free slots to those who wait; returns them."""
        admitted = []
        for sequence in list(islice(self.waiting, LOOKED_AT)):
            if not self._slots.can_acquire():
                break
            if not self._is_being_read(sequence.prompt):
                self.waiting.remove(sequence)
                self._start(sequence)
                admitted.append(sequence)
        return admitted

    def _is_being_read(self, prompt: list[int]) -> bool:
        """Whether another is reading the same beginning: in a few steps its cells can be shared."""
        reading = (s.prompt for s in self.running if not s.is_prefilled)
        coming = max((common_prefix(prompt, other) for other in reading), default=0)
        return coming - self._slots.cached(prompt) >= WORTH_WAITING

    def _start(self, sequence: Sequence) -> None:
        lease = self._slots.acquire(sequence.prompt)
        sequence.slot = lease.slot
        sequence.computed = sequence.cached = lease.cached
        sequence.started = time.monotonic()
        self.running.append(sequence)

    def plan(self) -> list[Planned]:
        decoding = [s for s in self.running if s.is_prefilled]
        budget = PREFILL_BESIDE if decoding else PREFILL_ALONE
        planned = [_plan(sequence, 1) for sequence in decoding]
        for sequence in self.running:
            if budget > 0 and not sequence.is_prefilled:
                planned.append(_plan(sequence, budget))
                budget -= len(planned[-1].chunk.tokens)
        return planned

    def commit(self, planned: list[Planned]) -> None:
        """The step was computed."""
        for sequence, chunk in planned:
            sequence.computed += len(chunk.tokens)
            self._slots.update(chunk.slot, chunk.tokens)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended, wherever it was; its slot is free and stays warm."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._slots.release(sequence.slot)

    def check(self) -> None:
        self._slots.check(len(self.running))


def _plan(sequence: Sequence, most: int) -> Planned:
    assert sequence.slot is not None
    tokens = sequence.next_tokens(most)
    is_last = sequence.computed + len(tokens) == sequence.length
    sampler = sequence.sampler if is_last else None
    return Planned(sequence, Chunk(sequence.slot, sequence.computed, tokens, sampler))
