from bench.bars import Bar, Spread
from bench.turns import TURNS, middle, rows


def test_turns_count_from_one_and_both_ends_belong() -> None:
    times = [[float(turn), float(turn)] for turn in range(1, TURNS + 1)]
    assert middle(times, 5, 15) == 10
    assert middle(times, 15, 15) == 15


def test_late_turns_are_held_against_the_other_server_and_against_our_own_early_ones() -> None:
    ours = [[100.0]] * 10 + [[150.0]] * 5
    theirs = [[400.0]] * TURNS
    late, growth = rows([(ours, theirs)])
    assert late.result == Spread.of([100 / 400]) and late.bar == Bar("≤", 0.35)
    assert growth.result == Spread.of([1.5]) and growth.cells == (1.5, 1.0)
