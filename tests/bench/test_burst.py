import pytest

from bench.burst import sum_up
from bench.load import Sample


def test_a_burst_lasts_from_the_first_question_to_the_last_piece() -> None:
    samples = [
        Sample(asked=10.0, pieces=[10.2, 13.0], completion_tokens=60),
        Sample(asked=10.1, pieces=[10.5, 15.0], completion_tokens=40),
    ]
    assert sum_up(samples) == pytest.approx((20.0, 300.0))
