"""The thresholds of scheduling, in one object that tests replace by a faster one."""

from dataclasses import dataclass

from services.inference.engine.backend import MAX_BATCH_TOKENS


@dataclass(frozen=True)
class SchedulerLimits:
    """
    A default that was measured quotes its figures: of a 135M model on two cores, unless noted (see
    docs/decisions and bench/results/README.md). The others were chosen.
    """

    # The waiting queue:

    # Waiting sequences that are ranked by urgency, of all tenants together; those behind them keep
    # their order. Bounds the lookups in the prefix cache that each step does.
    max_ranked: int = 32
    # Tokens that a sequence still needs and that count as used by its tenant when a slot is free,
    # so that a tenant with several free slots before it does not take them all. Answers end at an
    # unknown length: more would punish requests without `max_tokens`.
    max_reserved_tokens: int = 512
    # The shortest prompt is prefilled first, but each second of waiting counts as this many tokens
    # less, so that long prompts don't starve. Two cores prefill about as many in a second.
    aging_tokens_per_second: int = 500
    # Minimum prefix that a sequence waits for while another one prefills it. Prefilling a shorter
    # one twice is faster.
    min_awaited_tokens: int = 64

    # Prefill beside running sequences:

    # Minimum time between two emits of a stream. Each event costs four processes CPU time that the
    # next token needs: a step of 8 sequences takes 26.4 ms with an event per token, 23.8 with one
    # for two tokens, 23.3 without any.
    emit_interval_seconds: float = 1 / 30
    # Pause after a step that begins answers, if the model runs on the CPU: the threads of the next
    # step would take all cores, and four processes need them to bring the first token to its
    # reader: with the demo model in 5.4 ms without a pause, in 2.7 with one.
    first_token_pause_seconds: float = 0.001
    # Gap between two emits of a stream while one prompt is prefilled, relative to that without it.
    max_slowdown: float = 2.1
    # How many prompts count that wait for prefill. For k of them, streams wait k times as long as
    # for one, so that each is prefilled about as fast as one alone. 4 leave a fifth of the time.
    max_waiting_prompts: int = 4
    # Fewer tokens take a CPU nearly as long: 16 tokens 27 ms, 8 tokens 23.
    min_chunk_tokens: int = 16
    max_chunk_tokens: int = MAX_BATCH_TOKENS
    # Maximum time of a chunk before it is rounded to blocks. The last chunk of a prompt may take a
    # quarter longer. New requests wait until it ends.
    max_chunk_seconds: float = 0.75
    # The same for idle prefill, which a new request has to wait for.
    max_idle_chunk_seconds: float = 0.1
    # A prefill step that takes longer replaces the average: the first chunk of a slow model shows
    # that the initial guess was far off.
    outlier_seconds: float = 1.5
    # Tokens per second, a guess until the first measurement.
    initial_prefill_rate: float = 250.0
    # Weight of the newest measurement in an exponential moving average.
    average_weight: float = 0.3

    # Speculative decoding:

    # Streams of a step that verifies drafts; 0 turns speculative decoding off. A step of more
    # streams has less unused room for drafted tokens, and following the streams takes time, too.
    max_speculating_streams: int = 4
    # Tokens of such a step, and at most those of a chunk of prefill. From 64 on, flash attention
    # uses other kernels, whose logits differ by up to 0.1 (docs/decisions/0028).
    max_verified_tokens: int = 63
    # Expected tokens per second of such a step, relative to one without drafts.
    min_speculation_gain: float = 1.2

    # Batching sequences that arrive together:

    # Sequences that are admitted within this time after a stream's first token belong together.
    batch_window_seconds: float = 0.1
    # Decoding is held for the prefill of short prompts that arrived together, if all of it ends
    # within this time after the first token. 16 prompts of 75 tokens take a 1.5B model 12 s;
    # interleaved with decoding they take half as long again, and the answers a tenth longer.
    max_hold_seconds: float = 15.0
    # A prompt is short if its prefill takes no longer: a chat need not wait for a document.
    max_held_prompt_seconds: float = 4.0
    # Maximum tokens copied to move a sequence to a neighbouring slot, for each token that it may
    # still generate. Copying 500 tokens takes 2 ms, a gap costs 20 ms in each step.
    max_moved_per_remaining_token: int = 64
    # Decoding time of an adapter before the next one's turn. A change of the adapter costs 0.3 to
    # 2.5 ms; longer turns would be visible as pauses in the streams.
    adapter_turn_seconds: float = 0.05

    # Idle work:

    # Time without a request until idle prefill and offloading start, so that the next turn of a
    # conversation does not wait for them if it follows at once.
    idle_after_seconds: float = 0.3


DEFAULT_LIMITS = SchedulerLimits()
