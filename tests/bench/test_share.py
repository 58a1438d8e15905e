import pytest

from bench.share import Clock, Step, rows


def test_what_is_neither_computing_nor_choosing_is_pythons() -> None:
    step = Step(whole=100, computing=80, choosing=15)
    python, choosing, computing = (row.result.median for row in rows([step]))
    assert (python, choosing, computing) == (5, 15, 80)


def test_a_clock_adds_up_calls_also_those_that_fail() -> None:
    clock = Clock()
    assert clock.timed("good", lambda x: x + 1)(1) == 2
    with pytest.raises(ZeroDivisionError):
        clock.timed("bad", lambda: 1 / 0)()
    assert clock.seconds["good"] > 0 and clock.seconds["bad"] > 0
