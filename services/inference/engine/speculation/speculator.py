"""Decides whether a decode step verifies drafts, and how long they are. Reads no clock."""

from services.inference.engine.backend import Chunk
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.prefill_budget import PrefillBudget
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.speculation.ngram_drafter import NgramDrafter
from services.inference.engine.speculation.step_costs import StepCosts

# Lengths of a stream's chunk: its newest token and the draft. Kernels compute blocks of these
# sizes.
SIZES = (2, 4, 8, 16, 32)
# What a token of a draft is guessed to add to a step before that was measured, in prefills of a
# token: it needs logits, too, and small batches are less efficient.
GUESSED_PREFILLS = 1.25


class Speculator:
    """
    Speculative decoding: a step computes the newest token of each stream together with a draft of
    the tokens after it. The sampler then chooses token by token, as far as the draft was right.

    A draft is computed if it probably saves time: by the measured costs of steps on this machine,
    and by how often drafts of this sequence were right. No other stream of the step may get its
    tokens much later. Nothing is drafted while a prompt is prefilled, nor beside a request with a
    seed, whose tokens must not depend on the number of tokens in a step.
    """

    def __init__(self, context: int, limits: SchedulerLimits = DEFAULT_LIMITS) -> None:
        self._context = context
        self._limits = limits
        self._costs = StepCosts()

    def drafts(self, streams: list[Sequence], budget: PrefillBudget) -> list[list[int]]:
        """
        Return a draft for each stream, some of them empty, if the next step of all these streams
        should verify them; else an empty list.
        """
        if not self._may_draft(streams):
            return []
        for stream in streams:
            _follow(stream)
        size = self._best_size(streams, budget)
        drafts = [_draft(stream, size) for stream in streams]
        return drafts if any(drafts) else []

    def record(self, streams: int, tokens: int, seconds: float) -> None:
        """Record a decode step in which each stream had `tokens` tokens."""
        if streams <= self._limits.max_speculating_streams:
            self._costs.record(streams, tokens, seconds)

    def _may_draft(self, streams: list[Sequence]) -> bool:
        is_small = len(streams) <= self._limits.max_speculating_streams
        return is_small and not any(stream.is_deterministic for stream in streams)

    def _best_size(self, streams: list[Sequence], budget: PrefillBudget) -> int:
        """Return how many tokens of each stream the next step should have: most per second."""
        count = len(streams)
        plain = self._costs.seconds(count, 1)
        if not plain:
            return 1
        room = self._room(streams, budget)
        rates = dict[int, float]()
        for size in filter(room.__ge__, SIZES):
            seconds = self._seconds(count, size, plain, budget)
            tokens = _expected_tokens(streams, size)
            if seconds <= min(tokens) * plain * self._limits.max_slowdown:
                rates[size] = sum(tokens) / seconds
        best = max(rates, key=rates.__getitem__, default=1)
        is_faster = best > 1 and rates[best] > self._limits.min_speculation_gain * count / plain
        return best if is_faster else 1

    def _room(self, streams: list[Sequence], budget: PrefillBudget) -> int:
        """Return how many tokens a step may have of each stream."""
        in_context = min(self._context - stream.length + 1 for stream in streams)
        in_step = min(budget.chunk, self._limits.max_verified_tokens) // len(streams)
        return min(in_context, in_step)

    def _seconds(self, streams: int, size: int, plain: float, budget: PrefillBudget) -> float:
        """Return what a step takes; `plain` is what one without drafts takes."""
        measured = self._costs.seconds(streams, size)
        if measured is not None:
            return measured
        return plain + GUESSED_PREFILLS * budget.prefill_seconds(streams * (size - 1))


def with_drafts(chunks: list[Chunk], drafts: list[list[int]]) -> list[Chunk]:
    """
    Return the chunks of single tokens with their drafts. llama.cpp splits a batch where lengths
    differ, so shorter ones get more tokens, of which nothing is kept.
    """
    size = next(size for size in SIZES if size > max(map(len, drafts)))
    return [
        chunk._replace(tokens=[*chunk.tokens, *draft, *[0] * size][:size])
        for chunk, draft in zip(chunks, drafts, strict=True)
    ]


def _follow(stream: Sequence) -> None:
    """Let the stream's drafter take in all tokens so far."""
    if stream.drafter is None:
        stream.drafter = NgramDrafter(stream.prompt)
    stream.drafter.follow(stream.generated)


def _drafter(stream: Sequence) -> NgramDrafter:
    assert stream.drafter is not None, "_follow() comes first"
    return stream.drafter


def _max_draft(stream: Sequence, size: int) -> int:
    """Return how long a draft may be: the token after it is sampled, too."""
    remaining = stream.remaining_tokens
    return min(size, remaining) - 1 if remaining > 0 else size - 1


def _expected_tokens(streams: list[Sequence], size: int) -> list[float]:
    """Return how many tokens a step is expected to generate for each stream."""
    return [1 + _drafter(each).expected_hits(_max_draft(each, size)) for each in streams]


def _draft(stream: Sequence, size: int) -> list[int]:
    return _drafter(stream).draft(_max_draft(stream, size))
