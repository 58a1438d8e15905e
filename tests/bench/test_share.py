import pytest

from bench.share import Clock, Step, rows


def test_what_is_not_llama_cpps_is_pythons() -> None:
    step = Step(whole=100, backend=95, computing=80, sampling=10)
    python, in_backend, in_engine, sampling, computing = (row.result.median for row in rows([step]))
    assert (in_backend, in_engine, python) == (5, 5, 10)
    assert sampling + computing + python == 100


def test_a_clock_adds_up_calls_also_those_that_fail() -> None:
    clock = Clock()
    assert clock.timed("good", lambda x: x + 1)(1) == 2
    with pytest.raises(ZeroDivisionError):
        clock.timed("bad", lambda: 1 / 0)()
    assert clock.seconds["good"] > 0 and clock.seconds["bad"] > 0
