from bench.history import Turns, latency_rows, turn_rows
from bench.report import Goal


def test_latency_is_the_median_percentile_over_the_runs() -> None:
    runs = [[1.0] * 100, [2.0] * 100, [3.0] * 95 + [50.0] * 5]
    p50, p99 = latency_rows("context", runs, Goal("<", 10))
    assert (p50.result.median, p50.result.high, p99.result.high) == (2, 3, 50)
    assert p50.goal is not None and p99.goal is None


def test_growth_compares_fewest_and_most_sessions() -> None:
    slow, fast = Turns([3.0, 3.0], [1.0, 1.0]), Turns([2.0, 2.0], [1.0, 1.0])
    rows = turn_rows({1: [fast], 10: [slow], 1_000: [slow]})
    assert [r.result.median for r in rows if "growth" in r.what] == [1.5, 1.0]
