from math import ceil

import pytest

from services.inference.engine.backend import MAX_BATCH_TOKENS, ROW_BLOCK
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS as LIMITS
from services.inference.engine.scheduling.prefill_budget import PrefillBudget, Throughput

TOKEN_SECONDS = 0.001  # of prefill


def gaps_beside(budget: PrefillBudget, decode: float, tokens: int) -> list[float]:
    """Return the seconds between a stream's tokens while this many tokens are prefilled."""
    gaps, gap = [], 0.0
    while tokens > 0:
        if budget.can_prefill:
            seconds = budget.interleaved_chunk * TOKEN_SECONDS
            budget.record_prefill(budget.interleaved_chunk, seconds, is_interleaved=True)
            tokens -= budget.interleaved_chunk
            gap += seconds
        else:
            budget.record_decode(decode)
            gaps.append(gap + decode)
            gap = 0.0
    return gaps


def calibrated(decode: float) -> PrefillBudget:
    budget = PrefillBudget()
    for _ in range(20):
        budget.record_decode(decode)
        budget.record_prefill(100, 100 * TOKEN_SECONDS, is_interleaved=False)
    return budget


def test_mean_slowdown_of_stream_is_bounded() -> None:
    for decode in (0.003, 0.006, 0.025, 0.07):
        gaps = gaps_beside(calibrated(decode), decode, 1500)
        assert sum(gaps) / len(gaps) <= LIMITS.max_slowdown * decode * 1.05


def test_gap_between_emits_is_bounded() -> None:
    for decode in (0.006, 0.025, 0.07):
        before = decode * ceil(LIMITS.emit_interval_seconds / decode)
        emits, since = [], 0.0
        for gap in gaps_beside(calibrated(decode), decode, 1500):
            since += gap
            if since >= LIMITS.emit_interval_seconds:
                emits.append(since)
                since = 0.0
        assert max(emits) <= LIMITS.max_slowdown * before * 1.05


def test_chunk_stays_between_minimum_and_batch_size() -> None:
    slow = PrefillBudget()
    for _ in range(20):
        slow.record_prefill(16, 1.0, is_interleaved=False)
        slow.record_decode(0.01)
    assert slow.interleaved_chunk == slow.chunk == LIMITS.min_chunk_tokens
    budget = calibrated(100.0)
    for _ in range(20):
        budget.record_prefill(512, 0.01, is_interleaved=False)
    assert budget.interleaved_chunk == budget.chunk == MAX_BATCH_TOKENS


def test_slow_model_gets_small_chunks() -> None:
    budget = PrefillBudget()
    for _ in range(20):
        budget.record_prefill(50, 1.0, is_interleaved=False)
    assert abs(budget.chunk - 50 * LIMITS.max_chunk_seconds) <= ROW_BLOCK / 2


@pytest.mark.parametrize("tokens_per_second", [1, 50, 77, 333, 1234, 98765])
def test_chunk_has_whole_blocks_of_rows(tokens_per_second: int) -> None:
    budget = PrefillBudget()
    budget.record_decode(0.03)
    budget.record_prefill(100 * tokens_per_second, 100.0, is_interleaved=False)
    for chunk in (budget.chunk, budget.interleaved_chunk, budget.idle_chunk):
        assert chunk >= ROW_BLOCK
        assert chunk % ROW_BLOCK == 0


def test_interleaved_chunk_rounds_to_the_nearest_block() -> None:
    budget = calibrated(0.07)
    tokens = 0.07 * (LIMITS.max_slowdown - 1) / TOKEN_SECONDS
    assert abs(budget.interleaved_chunk - tokens) <= ROW_BLOCK / 2


def test_first_slow_chunk_corrects_the_estimate_at_once() -> None:
    budget = PrefillBudget()
    budget.record_prefill(budget.chunk, budget.chunk * 0.02, is_interleaved=False)
    assert abs(budget.chunk - LIMITS.max_chunk_seconds / 0.02) <= ROW_BLOCK / 2


def test_prefill_without_streams_leaves_no_debt() -> None:
    budget = PrefillBudget()
    budget.record_prefill(500, 10.0, is_interleaved=False)
    assert budget.can_prefill


def test_throughput_follows_recent_steps() -> None:
    throughput = Throughput()
    assert throughput.tokens_per_second == 0
    for _ in range(100):
        throughput.record(10, 0.1)
    assert throughput.tokens_per_second == pytest.approx(100)
    for _ in range(500):
        throughput.record(20, 0.1)
    assert 199 < throughput.tokens_per_second < 200


def test_throughput_counts_prefilled_tokens_apart() -> None:
    throughput = Throughput()
    throughput.record_prefill(500, 1)
    throughput.record(100, 1)
    assert throughput.prefilled_tokens == 500
    assert 290 < throughput.tokens_per_second < 300


def test_throughput_weighs_steps_by_their_duration() -> None:
    throughput = Throughput()
    throughput.record(500, 1)
    throughput.record(100, 1)
    assert 290 < throughput.tokens_per_second < 300
