"""The thresholds of scheduling, in one object that tests replace by a faster one."""

from dataclasses import dataclass

from services.inference.engine.backend import MAX_BATCH_TOKENS


@dataclass(frozen=True)
class SchedulerLimits:
    """
    Defaults that were measured quote the figures, of a 135M model on two cores if nothing else is
    said (docs/decisions, bench/results/README.md). The others were chosen.
    """

    # The waiting queue:

    # Waiting sequences that are ranked by urgency; those behind them keep their order. Bounds the
    # lookups in the prefix cache that each step does.
    max_ranked: int = 32
    # The shortest prompt is prefilled first, but each second of waiting counts as so many tokens
    # less, so that long prompts don't starve. Two cores prefill about as many in a second.
    aging_tokens_per_second: int = 500
    # A sequence waits for a prefix that another one is prefilling, if it is at least so long.
    # Shorter ones are prefilled twice sooner than waited for.
    min_awaited_tokens: int = 64

    # Prefill beside running sequences:

    # A stream's text is emitted at most so often. Each event costs four processes CPU time that the
    # next token needs: a step of 8 sequences takes 26.4 ms with an event per token, 23.8 with one
    # for two tokens, 23.3 without any.
    emit_interval_seconds: float = 1 / 30
    # Gap between two emits of a stream during another's prefill, relative to that without it.
    max_slowdown: float = 2.1
    # Fewer tokens take a CPU nearly as long: 16 tokens 27 ms, 8 tokens 23.
    min_chunk_tokens: int = 16
    max_chunk_tokens: int = MAX_BATCH_TOKENS
    # Bounds how long a cancelled request keeps computing.
    max_chunk_seconds: float = 0.5
    # The same for idle prefill, which a new request has to wait for.
    max_idle_chunk_seconds: float = 0.1
    # A prefill step that takes longer replaces the average: the first chunk of a slow model shows
    # that the initial guess was far off.
    outlier_seconds: float = 1.0
    # Tokens per second, a guess until the first measurement.
    initial_prefill_rate: float = 250.0
    # Weight of the newest measurement in an exponential moving average.
    average_weight: float = 0.3

    # Batching sequences that arrive together:

    # Sequences that are admitted within this time after a stream's first token belong together.
    batch_window_seconds: float = 0.1
    # Decoding is held for the prefill of sequences that arrived together, if it takes no longer. 16
    # prompts of 50 tokens take a 500M model 2.6 s; interleaved with decoding a third longer.
    max_hold_seconds: float = 4.0
    # A sequence moves to a neighbouring slot if that copies at most so many tokens for each token
    # that is still to be generated. Copying 500 tokens takes 2 ms, a gap costs 20 ms in each step.
    max_moved_per_remaining_token: int = 64
    # Decoding time of an adapter before the next one's turn. A change of the adapter costs 0.3 to
    # 2.5 ms; longer turns would be visible as pauses in the streams.
    adapter_turn_seconds: float = 0.05

    # Idle work:

    # Idle prefill and offloading start so long after the last request, so that the next turn of a
    # conversation that follows at once does not wait for them.
    idle_after_seconds: float = 0.3


DEFAULT_LIMITS = SchedulerLimits()
