from bench.report import Goal, Spread
from bench.turns import TURNS, median, rows


def test_median_includes_first_and_last_turn() -> None:
    times = [[float(turn), float(turn)] for turn in range(1, TURNS + 1)]
    assert median(times, 5, 15) == 10
    assert median(times, 15, 15) == 15


def test_late_turns_are_compared_with_peer_and_early_turns() -> None:
    ours = [[100.0]] * 10 + [[150.0]] * 5
    theirs = [[400.0]] * TURNS
    late, growth = rows([(ours, theirs)])
    assert late.result == Spread.of([100 / 400]) and late.goal == Goal("≤", 0.35)
    assert growth.result == Spread.of([1.5]) and growth.cells == (1.5, 1.0)
