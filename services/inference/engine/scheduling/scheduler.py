"""
Who computes what in the next step. Pure: no llama.cpp, no thread, no clock but the sequences' own.
"""

import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from services.inference.engine.backend import Chunk
from services.inference.engine.kv_cache.slots import Slots
from services.inference.engine.scheduling.adapter_turns import AdapterRoundRobin
from services.inference.engine.scheduling.prefill_budget import PrefillBudget
from services.inference.engine.scheduling.sequence import Sequence

WORTH_WAITING = 64  # tokens of a common beginning that another is reading
LOOKED_AT = 32  # of those who wait, when a slot is free
AGEING = 500  # unread tokens that a second of waiting outweighs
TOGETHER = 0.1  # seconds after a stream's first token in which one that was there got its slot
# Seconds that streams are held for those that came with them, at most: 16 prompts of 50 tokens take
# a 500M model 2.6 on two cores, and read beside streams a third longer, with a fifth fewer tokens.
HELD = 4.0
MOVED_FOR = 64  # computed tokens that may be copied for each one that is still to come


class Planned(NamedTuple):
    sequence: Sequence
    chunk: Chunk


class Step(NamedTuple):
    planned: list[Planned]  # in the order of their slots
    is_read: bool  # chunks of prompts; else the next token of an adapter's streams
    beside: bool = False  # streams that are kept waiting by it


class Scheduler:
    """
    A step is either the next token of every running stream, or a chunk of one prompt, or of
    several where a step costs more than they do. llama.cpp computes with one adapter at a time:
    where streams have several, they take turns.

    The shortest prompt is read first, and who waits gains on it. A stream is held only for prompts
    that got their slots when it did, so that those who come together soon decode together; beside
    older streams a prompt is read at the pace that these can bear.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.pace = PrefillBudget()
        self.fixed_cost = 0
        """Of a step, in tokens of a prompt that take as long to read; 0 on a CPU."""
        self._turns = AdapterRoundRobin()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        sequence.found = self._slots.cached(sequence.run)
        self.waiting.append(sequence)
        self._number()

    def find(self, key: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.key == key), None)

    def admit(self) -> list[Sequence]:
        """Gives free slots to those who wait; returns them."""
        if not self.waiting or not self._slots.can_acquire():
            return []
        for sequence in islice(self.waiting, LOOKED_AT):
            sequence.found = self._slots.cached(sequence.run)
        admitted = []
        for sequence in self._queue()[:LOOKED_AT]:
            if not self._slots.can_acquire():
                break
            if not self._is_being_read(sequence):
                self.waiting.remove(sequence)
                self._start(sequence)
                admitted.append(sequence)
        self._number()
        return admitted

    def _queue(self) -> list[Sequence]:
        """Those who wait, in the order in which they would get slots now."""
        now = time.monotonic()
        first = islice(self.waiting, LOOKED_AT)
        by_urgency = sorted(first, key=lambda s: _urgency(s, s.unread - s.found, now))
        return [*by_urgency, *islice(self.waiting, LOOKED_AT, None)]

    def _number(self) -> None:
        for place, sequence in enumerate(self._queue(), start=1):
            sequence.place = place

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether another is reading the same beginning: in a few steps it can be shared."""
        reading = (s.run for s in self.running if not s.is_prefilled)
        coming = max((self._slots.shared(sequence.run, other) for other in reading), default=0)
        return coming >= WORTH_WAITING and coming > sequence.found

    def _start(self, sequence: Sequence) -> None:
        lease = self._slots.acquire(sequence.run, sequence.owner)
        sequence.slot, sequence.place = lease.slot, 0
        sequence.computed = sequence.cached = lease.cached
        sequence.started = time.monotonic()
        self.running.append(sequence)

    def plan(self) -> Step:
        """Raises BackendError."""
        streams = [s for s in self.running if s.is_prefilled]
        reader = self._reader()
        if reader is None:
            return self._decode(streams)
        if not streams or self._holds(reader, streams):
            return Step(self._read(reader, self.pace.chunk), is_read=True)
        if self.pace.may_read:
            return Step(self._read(reader, self.pace.chunk_beside), is_read=True, beside=True)
        return self._decode(streams)

    def _reader(self) -> Sequence | None:
        """Whose prompt is read next."""
        now = time.monotonic()
        reading = (s for s in self.running if not s.is_prefilled)
        return min(reading, key=lambda s: _urgency(s, s.unread, now), default=None)

    def _read(self, reader: Sequence, most: int) -> list[Planned]:
        """
        At most so many tokens. llama.cpp cuts a batch in two where lengths differ, so of those that
        have less to read than others in it the last tokens that are computed are read again.
        """
        together = self._with_neighbours(reader, most)
        length = max(s.unread for s in together)
        for sequence in together:
            if sequence.unread < length:
                sequence.computed -= length - sequence.unread
                assert sequence.slot is not None
                self._slots.cut(sequence.slot, sequence.computed)
        return _in_order(together, most)

    def _with_neighbours(self, reader: Sequence, most: int) -> list[Sequence]:
        """Also those that came later: it costs who waits less than a step of their own would."""
        assert reader.slot is not None
        by_slot = {s.slot: s for s in self.running if not s.is_prefilled}
        together = [reader]
        for direction in (1, -1):
            slot = reader.slot + direction
            while (other := by_slot.get(slot)) and self._saves_time(together, other, most):
                together.append(other)
                slot += direction
        return together

    def _saves_time(self, together: list[Sequence], other: Sequence, most: int) -> bool:
        """
        Whether they have their first tokens sooner on average. k prompts of n tokens in one step
        of f + k n have theirs then, one by one after (k + 1) / 2 (f + n): later, if n < f.
        """
        if any(s.is_exact or s.adapter != other.adapter for s in (*together, other)):
            return False
        group = [*together, other]
        length = max(s.unread for s in group)
        more = length * len(group) - max(s.unread for s in together) * len(together)
        has_so_many = all(s.length >= length for s in group)
        return more < self.fixed_cost and length * len(group) <= most and has_so_many

    def _holds(self, reader: Sequence, streams: list[Sequence]) -> bool:
        """Whether they came together, and it will not take long."""
        began = min(stream.first_token for stream in streams)
        those = [
            s
            for s in self.running
            if not s.is_prefilled and s.received < began and s.started <= began + TOGETHER
        ]
        return reader in those and self.pace.seconds(sum(s.unread for s in those)) <= HELD

    def _decode(self, streams: list[Sequence]) -> Step:
        adapter = self._turns.of({s.adapter for s in streams})
        streams = [s for s in streams if s.adapter == adapter]
        self._close_up(adapter)
        return Step(_in_order(streams, 1), is_read=False)

    def _close_up(self, adapter: int) -> None:
        """
        llama.cpp computes only neighbouring slots in one batch: the adapter's last sequence moves
        to a slot before it that is free or another adapter's, if so much is still to come that
        this is worth the copies.
        """
        held = {s.slot: s for s in self.running if s.slot is not None}
        own = {slot for slot, s in held.items() if s.adapter == adapter}
        hole = next((slot for slot in range(min(own), max(own)) if slot not in own), None)
        if hole is None:
            return
        last, other = held[max(own)], held.get(hole)
        copied = last.computed + (other.computed if other else 0)
        if copied <= MOVED_FOR * last.remaining:
            self._slots.move(max(own), hole)
            last.slot = hole
            if other:
                other.slot = max(own)

    def commit(self, step: Step, seconds: float) -> None:
        """The step was computed, in so much time."""
        for sequence, chunk in step.planned:
            sequence.computed += len(chunk.tokens)
            self._slots.update(chunk.slot, chunk.tokens)
        if step.is_read:
            tokens = sum(len(planned.chunk.tokens) for planned in step.planned)
            self.pace.has_read(tokens, seconds, step.beside)
        else:
            self.pace.has_decoded(seconds)
            self._turns.has_decoded(seconds)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended, wherever it was; its slot is free and stays warm."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            self._number()
            return
        self.running.remove(sequence)
        self._slots.release(sequence.slot)

    def check(self) -> None:
        self._slots.check(len(self.running))


def _urgency(sequence: Sequence, unread: int, now: float) -> float:
    """The lower, the sooner."""
    return unread - AGEING * (now - sequence.received)


def _in_order(sequences: list[Sequence], most: int) -> list[Planned]:
    """Of their slots, as llama.cpp wants them; at most so many tokens of each."""
    return sorted((_plan(s, most) for s in sequences), key=lambda p: p.chunk.slot)


def _plan(sequence: Sequence, most: int) -> Planned:
    assert sequence.slot is not None
    tokens = sequence.next_tokens(most)
    is_last = sequence.computed + len(tokens) == sequence.length
    sampler = sequence.sampler if is_last else None
    chunk = Chunk(sequence.slot, sequence.computed, tokens, sampler, sequence.adapter)
    return Planned(sequence, chunk)
