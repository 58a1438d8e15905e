import pytest

from bench.burst import summarize
from bench.load import Sample


def test_burst_lasts_from_first_request_to_last_piece() -> None:
    samples = [
        Sample(sent_at=10.0, piece_times=[10.2, 13.0], completion_tokens=60),
        Sample(sent_at=10.1, piece_times=[10.5, 15.0], completion_tokens=40),
    ]
    assert summarize(samples) == pytest.approx((20.0, 300.0))
