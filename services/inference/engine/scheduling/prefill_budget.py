"""
The prefill budget: how many tokens of a prompt a step prefills, and how often beside running
streams. Both classes learn from the measured times of steps; they read no clock.
"""

from math import ceil, exp

from services.inference.engine.backend import MAX_BATCH_TOKENS, ROW_BLOCK
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits

THROUGHPUT_WINDOW_SECONDS = 10.0
MAX_STRETCH = 1.25  # by which the last chunk of a prompt may exceed `chunk`


class PrefillBudget:
    """
    Chunked prefill: a chunk takes no longer than the running streams may wait for their next text,
    unless it would be inefficiently small, and decode steps pay for it before the next chunk.

    `waiting_prompts` is how many prompts wait. For k of them, streams wait k times as long as for
    one, so that each prompt is prefilled about as fast as one alone.
    """

    def __init__(self, limits: SchedulerLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._prefill_rate = limits.initial_prefill_rate  # tokens per second
        self._decode_seconds = 0.0  # of a step
        self._debt_seconds = 0.0  # of prefill that decode steps have not paid for
        self.waiting_prompts = 1

    @property
    def can_prefill(self) -> bool:
        """Whether the running streams have made up for the last chunk."""
        return self._debt_seconds <= 0

    def prefill_seconds(self, tokens: int) -> float:
        """Estimate how long the prefill of `tokens` tokens takes."""
        return tokens / self._prefill_rate

    @property
    def chunk(self) -> int:
        """Tokens of a chunk while no stream is kept waiting."""
        return self._clamped(self._prefill_rate * self._limits.max_chunk_seconds)

    def chunk_of(self, remaining: int) -> int:
        """
        Return `chunk`, or all `remaining` tokens of a prompt if they are only a few more: a step of
        its own would compute them less efficiently.
        """
        most = min(self.chunk * MAX_STRETCH, MAX_BATCH_TOKENS)
        return remaining if self.chunk < remaining <= most else self.chunk

    @property
    def idle_chunk(self) -> int:
        """Tokens of a chunk while there is no request."""
        return self._clamped(self._prefill_rate * self._limits.max_idle_chunk_seconds)

    @property
    def interleaved_chunk(self) -> int:
        """Tokens of a chunk while streams wait for their next text."""
        decode, limits = self._decode_seconds, self._limits
        steps = ceil(limits.emit_interval_seconds / decode) if decode else 1
        seconds = steps * decode * self._prefill_per_decode
        return min(self.chunk, self._clamped(self._prefill_rate * seconds))

    def record_prefill(self, tokens: int, seconds: float, is_interleaved: bool) -> None:
        """Record a step. If it delayed streams, decode steps repay its time before the next."""
        limits = self._limits
        if tokens >= limits.min_chunk_tokens and seconds > 0:
            weight = 1.0 if seconds > limits.outlier_seconds else limits.average_weight
            self._prefill_rate += weight * (tokens / seconds - self._prefill_rate)
        if is_interleaved:
            self.owe(seconds)

    def owe(self, seconds: float) -> None:
        """Record time for which streams waited: decode steps repay it before the next chunk."""
        self._debt_seconds += seconds

    def record_decode(self, seconds: float) -> None:
        weight = self._limits.average_weight if self._decode_seconds else 1.0
        self._decode_seconds += weight * (seconds - self._decode_seconds)
        self.repay(seconds)

    def repay(self, seconds: float) -> None:
        """Record the time of a step that prefills nothing."""
        self._debt_seconds = max(0.0, self._debt_seconds - seconds * self._prefill_per_decode)

    @property
    def _prefill_per_decode(self) -> float:
        """Seconds of prefill for each second of decoding."""
        return (self._limits.max_slowdown - 1) * self.waiting_prompts

    def _clamped(self, tokens: float) -> int:
        """Return the nearest multiple of ROW_BLOCK within the limits."""
        blocks = round(tokens / ROW_BLOCK) * ROW_BLOCK
        return min(max(blocks, self._limits.min_chunk_tokens), self._limits.max_chunk_tokens)


class Throughput:
    """
    Tokens computed per second of computing, prefill and decode of all requests together; and the
    number of tokens that were prefilled and generated since the start.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self.tokens_per_second = 0.0  # 0 until something was computed
        self.prefilled_tokens = 0
        self.generated_tokens = 0

    def record_prefill(self, tokens: int, seconds: float) -> None:
        self.prefilled_tokens += tokens
        self.record(tokens, seconds)

    def record(self, tokens: int, seconds: float) -> None:
        decay = exp(-seconds / THROUGHPUT_WINDOW_SECONDS)
        self._tokens = self._tokens * decay + tokens
        self._seconds = self._seconds * decay + seconds
        if self._seconds:
            self.tokens_per_second = self._tokens / self._seconds
