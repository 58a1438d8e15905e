import pytest

from bench.share import Profiler, Step, rows


def test_python_share_is_neither_decode_nor_sampling() -> None:
    step = Step(total=100, decode=80, sampling=15)
    python, sampling, decode = (row.result.median for row in rows([step]))
    assert (python, sampling, decode) == (5, 15, 80)


def test_profiler_adds_up_calls_including_failed_ones() -> None:
    profiler = Profiler()
    assert profiler.timed("good", lambda x: x + 1)(1) == 2
    with pytest.raises(ZeroDivisionError):
        profiler.timed("bad", lambda: 1 / 0)()
    assert profiler.seconds["good"] > 0 and profiler.seconds["bad"] > 0
