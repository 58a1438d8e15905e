import pytest

from bench.load import Sample
from bench.report import Spread
from bench.window import rows


def sample(seconds: float, prompt: int, cached: int) -> Sample:
    return Sample(0, [seconds, 9], prompt_tokens=prompt, cached_tokens=cached)


def test_result_compares_with_and_without_pauses() -> None:
    with_pauses = [sample(0.1, 100, 90), sample(0.2, 200, 170)]
    without = [sample(0.1, 100, 90), sample(0.8, 200, 0)]
    median, longest, prefilled = rows([(with_pauses, without)])
    assert median.cells == pytest.approx((150, 450))
    assert longest.result == Spread.of([0.25])
    assert prefilled.cells == (20, 105)
