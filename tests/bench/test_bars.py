import pytest

from bench.bars import Bar, Spread, number


def test_a_spread_is_the_median_between_the_lowest_and_the_highest() -> None:
    assert Spread.of([5, 1, 2]) == Spread(2, 1, 5)
    assert str(Spread.of([5, 1, 2])) == "**2.00** (1.00 to 5.00)"


def test_a_single_run_has_no_spread() -> None:
    assert str(Spread.of([2])) == "**2.00**"


@pytest.mark.parametrize(
    ("bar", "held", "missed"),
    [(Bar("≥", 1.1), 1.1, 1.09), (Bar("≤", 0.6), 0.6, 0.61), (Bar("<", 3), 2.99, 3)],
)
def test_a_bar_holds_up_to_its_limit(bar: Bar, held: float, missed: float) -> None:
    assert bar.holds(held) and not bar.holds(missed)


def test_a_number_has_three_digits_or_all_before_the_point() -> None:
    assert [number(x) for x in (0.349, 12.34, 123.4, 12345)] == ["0.35", "12.3", "123", "12345"]
