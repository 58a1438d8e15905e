import pytest

from bench.gaps import STEADY, gaps
from bench.load import Sample


def stream(*pieces: float) -> Sample:
    """Return a stream whose first, unsteady pieces are far apart."""
    unsteady = [float(i - 100) for i in range(STEADY - 1)]
    return Sample(sent_at=-100.0, piece_times=unsteady + list(pieces))


def test_gaps_count_from_the_request_to_its_first_token() -> None:
    long = Sample(sent_at=3.5, piece_times=[8.5, 9.0])
    found = gaps([stream(0, 1, 2, 3, 5, 8, 9, 9.1)], long)
    # 3 to 5, 5 to 8, and 8 to 9, in which the prompt's first token arrived
    assert found.relative == {"median": 2, "mean": 2, "95th percentile": 3, "longest": 3}
    assert found.ttft == pytest.approx(5000)


def test_prefill_in_one_step_is_one_long_gap() -> None:
    long = Sample(sent_at=2.1, piece_times=[9.9])
    assert gaps([stream(0, 1, 2, 10, 11)], long).relative["longest"] == 8
