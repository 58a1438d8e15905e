from math import ceil

from services.inference.engine.scheduling.prefill_budget import (
    CHUNK_MAX,
    CHUNK_MIN,
    CHUNK_SECONDS,
    PIECE_INTERVAL,
    SLOWDOWN,
    PrefillBudget,
)

TOKEN = 0.001  # seconds to read one


def read_beside(pace: PrefillBudget, decode: float, tokens: int) -> list[float]:
    """A stream's gaps while so many tokens are read beside it."""
    gaps, gap = [], 0.0
    while tokens > 0:
        if pace.may_read:
            seconds = pace.chunk_beside * TOKEN
            pace.has_read(pace.chunk_beside, seconds, beside=True)
            tokens -= pace.chunk_beside
            gap += seconds
        else:
            pace.has_decoded(decode)
            gaps.append(gap + decode)
            gap = 0.0
    return gaps


def learned(decode: float) -> PrefillBudget:
    pace = PrefillBudget()
    for _ in range(20):
        pace.has_decoded(decode)
        pace.has_read(100, 100 * TOKEN, beside=False)
    return pace


def test_a_running_stream_is_slowed_down_by_no_more_than_it_can_bear() -> None:
    for decode in (0.003, 0.006, 0.025, 0.07):
        gaps = read_beside(learned(decode), decode, 1500)
        assert sum(gaps) / len(gaps) <= SLOWDOWN * decode * 1.05


def test_no_piece_of_a_stream_comes_later_than_it_can_bear() -> None:
    for decode in (0.006, 0.025, 0.07):
        before = decode * ceil(PIECE_INTERVAL / decode)
        pieces, since = [], 0.0
        for gap in read_beside(learned(decode), decode, 1500):
            since += gap
            if since >= PIECE_INTERVAL:
                pieces.append(since)
                since = 0.0
        assert max(pieces) <= SLOWDOWN * before * 1.05


def test_a_chunk_is_never_so_small_that_it_is_a_waste_nor_larger_than_a_batch() -> None:
    slow = PrefillBudget()
    for _ in range(20):
        slow.has_read(16, 1.0, beside=False)
        slow.has_decoded(0.01)
    assert slow.chunk_beside == slow.chunk == CHUNK_MIN
    pace = learned(100.0)
    for _ in range(20):
        pace.has_read(512, 0.01, beside=False)
    assert pace.chunk_beside == pace.chunk == CHUNK_MAX


def test_a_slow_model_reads_less_at_once_so_that_a_cancel_is_heard() -> None:
    pace = PrefillBudget()
    for _ in range(20):
        pace.has_read(50, 1.0, beside=False)
    assert pace.chunk < 30


def test_of_a_slow_model_no_more_than_the_first_chunk_takes_too_long() -> None:
    pace = PrefillBudget()
    pace.has_read(pace.chunk, pace.chunk * 0.02, beside=False)
    assert pace.chunk * 0.02 <= CHUNK_SECONDS


def test_reading_alone_leaves_no_debt() -> None:
    pace = PrefillBudget()
    pace.has_read(500, 10.0, beside=False)
    assert pace.may_read
