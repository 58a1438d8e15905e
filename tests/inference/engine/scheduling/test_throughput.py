import pytest

from services.inference.engine.scheduling.throughput import Throughput


def test_speed_is_that_of_late_and_0_before_anything_was_computed() -> None:
    speed = Throughput()
    assert speed.per_second == 0
    for _ in range(100):
        speed.add(10, 0.1)
    assert speed.per_second == pytest.approx(100)
    for _ in range(500):
        speed.add(20, 0.1)
    assert 199 < speed.per_second < 200


def test_reading_a_prompt_counts_by_the_time_that_it_took() -> None:
    speed = Throughput()
    speed.add(500, 1)
    speed.add(100, 1)
    assert 290 < speed.per_second < 300
