"""
Decides what the next step computes. Calls no llama.cpp, starts no thread, and measures no time: the
clock only tells how long sequences have waited.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from services.inference.engine.backend import ROW_BLOCK, Chunk
from services.inference.engine.kv_cache.slots import Lease, Slots
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.prefill_budget import PrefillBudget
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.scheduling.slot_block import slot_block
from services.inference.engine.scheduling.tenant_shares import TenantShares
from services.inference.engine.speculation.speculator import Speculator, with_drafts


class Step(NamedTuple):
    scheduled: list[tuple[Sequence, Chunk]]  # sorted by slot, as llama.cpp wants them
    is_prefill: bool  # else the next token of all streams of one adapter
    is_interleaved: bool = False  # prefill that keeps running streams waiting
    # One for each stream, if the step verifies drafts. Its chunk has the newest token, the draft,
    # and padding, so that all chunks have the same length.
    drafts: Seq[list[int]] = ()
    padding: Seq[Chunk] = ()  # of a decode step: in slots between the streams, to be dropped

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for sequence, _ in self.scheduled]

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for _, chunk in self.scheduled]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Scheduler:
    """
    Continuous batching over a waiting queue and the running sequences. A step is either the next
    token of every running stream, or a chunk of one prompt's prefill or, on a GPU, of several
    short prompts that together cost less than another step. llama.cpp computes with one adapter at
    a time, so the streams of several adapters take turns.

    Tenants share slots and prefill steps by the tokens that were computed for each of them. Within
    a tenant, the shortest prompt is prefilled first; waiting raises the priority. Sequences that
    arrive together are all prefilled before they decode together. Beside older streams, a prompt is
    prefilled in chunks limited by `PrefillBudget`, so that their token gaps stay bounded. With a
    `speculator`, decode steps may verify drafts while nothing is prefilled. Decode steps have
    padding in the slots between streams (`slot_block.py`) where that is faster
    (`max_padded_length`).
    """

    def __init__(
        self,
        slots: Slots,
        limits: SchedulerLimits = DEFAULT_LIMITS,
        speculator: Speculator | None = None,
        max_padded_length: Callable[[int, int], int] = lambda streams, longest: 0,
    ) -> None:
        self._slots = slots
        self._max_padded_length = max_padded_length
        self._limits = limits
        self._speculator = speculator
        self._round_robin = AdapterRoundRobin(limits.adapter_turn_seconds)
        self._shares = TenantShares()
        self.budget = PrefillBudget(limits)
        # In prompt tokens whose prefill takes as long; 0 on a CPU.
        self.step_overhead = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        prefilling = (other for other in self.running if not other.is_prefilled)
        backlogged = {other.tenant for other in (*self.waiting, *prefilling)}
        self._shares.join(sequence.tenant, backlogged)
        self.waiting.append(sequence)
        if len(self.waiting) > 1 or not self._slots.can_acquire():  # else it starts at once
            self._estimate([sequence])
        self._update_positions()

    def find(self, key: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.key == key), None)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence. Free its slot; the slot's tokens stay in the prefix cache."""
        sequence.drafter = None  # megabytes, and the sequence may be kept
        if sequence.slot is None:
            self.waiting.remove(sequence)
            self._update_positions()
        else:
            self.running.remove(sequence)
            self._slots.release(sequence.slot)

    def admit(self) -> list[Sequence]:
        """Lease free slots to waiting sequences. Return those that are running now."""
        if not self.waiting or not self._slots.can_acquire():
            return []
        queues = self._queues()
        if len(self.waiting) > 1:  # a single one has no rank
            for queue in queues.values():
                self._estimate(queue[: self._max_ranked(queues)])
        admitted = []
        for sequence in self._ranked()[: self._limits.max_ranked]:
            if not self._slots.can_acquire():
                break
            if coming := self._coming_prefix(sequence):
                self._slots.plan_checkpoints(*coming)
            elif sequence.claim():
                self._start(sequence)
                admitted.append(sequence)
        self._update_positions()
        return admitted

    def schedule(self) -> Step:
        """Return the next step; some sequence must be running. Raises BackendError."""
        streams = [s for s in self.running if s.is_prefilled]
        first = self._next_prefill()
        if first is None:
            return self._with_drafts(self._decode(streams))
        self.budget.waiting_prompts = self._waiting_prompts()
        if not streams or self._should_hold(streams, first):
            max_tokens = self.budget.chunk_of(first.remaining_prefill)
            return Step(self._prefill(first, max_tokens), is_prefill=True)
        if self.budget.can_prefill:
            chunks = self._prefill(first, self.budget.interleaved_chunk)
            return Step(chunks, is_prefill=True, is_interleaved=True)
        return self._decode(streams)

    def commit(self, step: Step) -> None:
        """Record that a step was computed. No drafted token is kept yet."""
        for sequence, chunk in step.scheduled:
            self.keep(sequence, chunk.tokens[:1] if step.drafts else chunk.tokens)

    def record(self, step: Step, seconds: float) -> None:
        """Record how long a step took."""
        if step.is_prefill:
            self.budget.record_prefill(step.tokens, seconds, step.is_interleaved)
            return
        self._round_robin.record_decode(seconds)
        if self._speculator:
            streams = len(step.scheduled)
            self._speculator.record(streams, step.tokens // streams, seconds)
        if step.drafts:
            self.budget.repay(seconds)
        else:
            self.budget.record_decode(seconds)

    def record_interrupted(self, step: Step, seconds: float) -> None:
        """Record that a step took time and computed nothing: others have waited for it."""
        for sequence, chunk in step.scheduled:
            self._shares.charge(sequence.tenant, len(chunk.tokens))
        if step.is_interleaved:
            self.budget.owe(seconds)

    def keep(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """Record that the sequence's slot has these tokens now, too."""
        assert sequence.slot is not None
        self._shares.charge(sequence.tenant, len(tokens))
        sequence.computed_tokens += len(tokens)
        self._slots.extend(sequence.slot, tokens)

    def check_invariants(self) -> None:
        self._slots.check_invariants(len(self.running))

    def _queues(self) -> dict[str, list[Sequence]]:
        """Return the waiting sequences of each tenant, in the order of their arrival."""
        queues: dict[str, list[Sequence]] = {}
        for sequence in self.waiting:
            queues.setdefault(sequence.tenant, []).append(sequence)
        return queues

    def _max_ranked(self, queues: Collection[str]) -> int:
        """Return how many waiting sequences of each tenant are ranked by urgency."""
        return max(1, self._limits.max_ranked // len(queues))

    def _ranked(self) -> list[Sequence]:
        """
        Return the waiting sequences in the order in which they would get slots now: the next one is
        of the tenant with the fewest tokens, including those that its running sequences reserve.
        """
        if len(self.waiting) < 2:
            return list(self.waiting)
        now, queues = time.monotonic(), self._queues()
        ranked = {tenant: self._by_urgency(queue, queues, now) for tenant, queue in queues.items()}
        tokens = {tenant: self._shares.used(tenant) for tenant in queues}
        for sequence in self.running:
            if sequence.tenant in tokens:
                tokens[sequence.tenant] += self._reserved(sequence)
        return [*_take_turns(ranked, tokens, self._reserved)]

    def _by_urgency(
        self, queue: list[Sequence], queues: Collection[str], now: float
    ) -> list[Sequence]:
        count = self._max_ranked(queues)
        return [*sorted(queue[:count], key=lambda s: self._rank(s, now)), *queue[count:]]

    def _reserved(self, sequence: Sequence) -> int:
        """Return how many tokens that a sequence still needs count as used by its tenant."""
        needed = sequence.remaining_prefill + max(0, sequence.remaining_tokens)
        return min(needed, self._limits.max_reserved_tokens)

    def _rank(self, sequence: Sequence, now: float) -> float:
        """Return the tokens of remaining prefill, reduced by aging: the lowest rank is first."""
        waited = now - sequence.received_at
        return sequence.remaining_prefill - self._limits.aging_tokens_per_second * waited

    def _update_positions(self) -> None:
        for position, sequence in enumerate(self._ranked(), start=1):
            sequence.queue_position = position

    def _estimate(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            sequence.cached_estimate = self._cached_length(sequence)

    def _cached_length(self, sequence: Sequence) -> int:
        return self._slots.cached_length(sequence.prefix_key, sequence.owner)

    def _coming_prefix(self, sequence: Sequence) -> tuple[int, tuple[int]] | None:
        """
        Return the slot and the length of a prefix that another sequence is prefilling, if it is
        worth waiting for: longer than what is cached.
        """
        key = sequence.prefix_key
        coming = (
            (self._slots.coming_length(key, s.slot, s.prefix_key), s.slot)
            for s in self.running
            if not s.is_prefilled and s.slot is not None
        )
        length, slot = max(coming, default=(0, 0))
        if length < self._limits.min_awaited_tokens or length <= self._cached_length(sequence):
            return None
        return slot, (length,)

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        lease = self._slots.acquire(
            sequence.prefix_key, sequence.owner, sequence.reusable_stable_length
        )
        cached = self._cut_to_blocks(lease) if sequence.is_deterministic else lease.cached
        sequence.slot, sequence.queue_position = lease.slot, 0
        sequence.computed_tokens = sequence.cached_tokens = cached
        sequence.started_at = time.monotonic()
        self.running.append(sequence)

    def _cut_to_blocks(self, lease: Lease) -> int:
        """
        Truncate the cached prefix to whole blocks, if the model can, and return its length: kernels
        that compute a part of a block may round differently.
        """
        if not self._slots.is_truncatable:
            return lease.cached
        whole = lease.cached - lease.cached % ROW_BLOCK
        self._slots.truncate(lease.slot, whole)
        return whole

    def _next_prefill(self) -> Sequence | None:
        """Return the most urgent prefill of the tenant for which the fewest were computed."""
        now = time.monotonic()
        prefilling = (s for s in self.running if not s.is_prefilled)
        return min(
            prefilling,
            key=lambda s: (self._shares.used(s.tenant), self._rank(s, now)),
            default=None,
        )

    def _waiting_prompts(self) -> int:
        """
        Return how many prompts count as waiting for prefill: of several tenants one each, so that
        no tenant slows down the streams of another by sending many.
        """
        tenants = [s.tenant for s in self.running if not s.is_prefilled]
        is_alone = len({s.tenant for s in self.running}) == 1
        waiting = len(tenants) if is_alone else len(set(tenants))
        return min(waiting, self._limits.max_waiting_prompts)

    def _should_hold(self, streams: list[Sequence], first: Sequence) -> bool:
        """
        Return whether to pause decoding until `first` is prefilled: it arrived with the streams,
        all of its tenant, and all short prompts that did can be prefilled within `max_hold_seconds`
        of the first token.
        """
        if any(stream.tenant != first.tenant for stream in streams):
            return False
        began = min(stream.first_token_at for stream in streams)
        latest_start = began + self._limits.batch_window_seconds
        companions = [
            s
            for s in self.running
            if not s.is_prefilled
            and s.received_at < began
            and s.started_at <= latest_start
            and self._is_short(s)
        ]
        tokens = sum(s.remaining_prefill for s in companions)
        seconds = time.monotonic() - began + self.budget.prefill_seconds(tokens)
        return first in companions and seconds <= self._limits.max_hold_seconds

    def _is_short(self, sequence: Sequence) -> bool:
        """Return whether streams may be held for the whole prefill of a sequence."""
        tokens = len(sequence.prefill_tokens) - sequence.cached_tokens
        return self.budget.prefill_seconds(tokens) <= self._limits.max_held_prompt_seconds

    def _prefill(self, first: Sequence, max_tokens: int) -> list[tuple[Sequence, Chunk]]:
        """
        Schedule at most `max_tokens` tokens of `first` and maybe its neighbours. llama.cpp splits a
        batch where lengths differ, so shorter ones compute some of their last tokens again.
        """
        batch = self._with_neighbours(first, max_tokens)
        length = max(s.remaining_prefill for s in batch)
        for sequence in batch:
            if sequence.remaining_prefill < length:
                sequence.computed_tokens -= length - sequence.remaining_prefill
                assert sequence.slot is not None
                self._slots.truncate(sequence.slot, sequence.computed_tokens)
        return self._scheduled(batch, max_tokens)

    def _with_neighbours(self, first: Sequence, max_tokens: int) -> list[Sequence]:
        """Return `first` and the prefills in slots next to it that are faster in the same step."""
        assert first.slot is not None
        by_slot = {s.slot: s for s in self.running if not s.is_prefilled}
        batch = [first]
        for direction in (1, -1):
            slot = first.slot + direction
            while (other := by_slot.get(slot)) and self._saves_time(batch, other, max_tokens):
                batch.append(other)
                slot += direction
        return batch

    def _saves_time(self, batch: list[Sequence], other: Sequence, max_tokens: int) -> bool:
        """
        Return whether adding `other` to the step lowers the mean time to first token: k prompts of
        n tokens take a step of f + k n, where f is the step overhead; one by one the mean is
        (k + 1) / 2 (f + n), which is more if n < f.
        """
        if any(s.is_deterministic or s.adapter != other.adapter for s in (*batch, other)):
            return False
        group = [*batch, other]
        length = max(s.remaining_prefill for s in group)
        added = length * len(group) - max(s.remaining_prefill for s in batch) * len(batch)
        is_long_enough = all(self._can_lengthen(s, length) for s in group)
        return added < self.step_overhead and length * len(group) <= max_tokens and is_long_enough

    def _can_lengthen(self, sequence: Sequence, remaining: int) -> bool:
        """Return whether the prefill's remaining tokens can be made so many, in one chunk."""
        assert sequence.slot is not None
        start = len(sequence.prefill_tokens) - remaining
        is_pausing = self._slots.next_checkpoint(sequence.slot) > 0
        return start >= 0 and not is_pausing and self._slots.can_truncate(sequence.slot, start)

    def _decode(self, streams: list[Sequence]) -> Step:
        adapter = self._round_robin.next({s.adapter for s in streams})
        decoding = [s for s in streams if s.adapter == adapter]
        padding = self._padding(decoding)
        if padding is None:
            self._compact(adapter)
        return Step(self._scheduled(decoding, 1), is_prefill=False, padding=padding or ())

    def _padding(self, streams: list[Sequence]) -> list[Chunk] | None:
        """
        Return a token for each slot in the streams' block that has no stream. None if gaps between
        the streams should be closed instead: because a slot is full, or so long that attention to
        it costs more, or because so few streams may have drafts, and those steps are not padded.
        """
        if len(streams) <= self._limits.max_speculating_streams:
            return None
        longest = max(s.length for s in streams)
        max_length = self._max_padded_length(len(streams), longest)
        if not max_length:
            return None
        own = {s.slot for s in streams if s.slot is not None}
        block = slot_block(sorted(own), self._slots.count)
        if block is None:
            return None
        lengths = {slot: self._slots.length(slot) for slot in block if slot not in own}
        if max(lengths.values(), default=0) >= min(max_length, self._slots.max_length):
            return None
        adapter = streams[0].adapter
        return [Chunk(slot, length, [0], None, adapter) for slot, length in lengths.items()]

    def _with_drafts(self, step: Step) -> Step:
        """Return the decode step with drafts to verify, if they are expected to save time."""
        drafts = self._speculator.drafts(step.sequences, self.budget) if self._speculator else []
        if not drafts:
            return step
        chunks = with_drafts(step.chunks, drafts)
        scheduled = [*zip(step.sequences, chunks, strict=True)]
        return step._replace(scheduled=scheduled, drafts=drafts, padding=())

    def _compact(self, adapter: int) -> None:
        """
        Move the adapter's last sequence into the first gap between its slots, since llama.cpp
        batches only neighbouring slots; but not if it will end too soon to be worth the copies.
        """
        by_slot = {s.slot: s for s in self.running if s.slot is not None}
        own = {slot for slot, s in by_slot.items() if s.adapter == adapter}
        end = max(own)
        gap = next((slot for slot in range(min(own), end) if slot not in own), None)
        if gap is None:
            return
        last, other = by_slot[end], by_slot.get(gap)
        copied = last.computed_tokens + (other.computed_tokens if other else 0)
        if copied <= self._limits.max_moved_per_remaining_token * last.remaining_tokens:
            self._slots.move(end, gap)
            last.slot = gap
            if other:
                other.slot = end

    def _scheduled(
        self, sequences: list[Sequence], max_tokens: int
    ) -> list[tuple[Sequence, Chunk]]:
        """Schedule at most `max_tokens` tokens of each sequence, up to its next checkpoint."""
        scheduled = []
        for sequence in sequences:
            assert sequence.slot is not None
            pause = self._slots.next_checkpoint(sequence.slot)
            scheduled.append((sequence, sequence.next_chunk(max_tokens, pause)))
        return sorted(scheduled, key=lambda each: each[1].slot)


def _take_turns(
    queues: Mapping[str, list[Sequence]],
    tokens: Mapping[str, float],
    cost: Callable[[Sequence], int],
) -> Iterator[Sequence]:
    """
    Merge the queues of the tenants: next is the head of the queue whose tenant has the fewest
    tokens, to which its cost is added.
    """
    turns = [
        (tokens[tenant], number, iter(queue))
        for number, (tenant, queue) in enumerate(queues.items())
    ]
    heapify(turns)
    while turns:
        used, number, queue = heappop(turns)
        if sequence := next(queue, None):
            yield sequence
            heappush(turns, (used + cost(sequence), number, queue))


class AdapterRoundRobin:
    """Decodes the streams of one adapter after the other. Reads no clock."""

    def __init__(self, turn_seconds: float) -> None:
        self._turn_seconds = turn_seconds
        self._adapter = 0
        self._seconds_left = turn_seconds

    def next(self, adapters: Collection[int]) -> int:
        """Return which of `adapters`, those with streams, the next step decodes."""
        if self._adapter not in adapters or self._seconds_left <= 0:
            self._adapter = min(adapters, key=lambda a: (a <= self._adapter, a))
            self._seconds_left = self._turn_seconds
        return self._adapter

    def record_decode(self, seconds: float) -> None:
        self._seconds_left -= seconds
