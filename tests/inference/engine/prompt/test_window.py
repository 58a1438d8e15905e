from collections.abc import Callable
from itertools import pairwise

from services.inference.engine.prompt.window import (
    SLACK,
    dropped_exchanges,
    dropped_in_steps,
)

FIXED, EXCHANGE = 100, 50  # tokens
ROOM = FIXED + 10 * EXCHANGE


def prompt(exchanges: int, question: int = 0) -> Callable[[int], int]:
    return lambda dropped: FIXED + question + EXCHANGE * (exchanges - dropped)


def test_no_exchange_is_dropped_while_all_fit() -> None:
    for count in range(11):
        assert dropped_exchanges(count, prompt(count), ROOM) == 0


def test_truncation_leaves_room_for_further_exchanges() -> None:
    count = 11
    number = dropped_exchanges(count, prompt(count), ROOM)
    assert number is not None
    kept = count - number
    assert kept == 7 == (1 - SLACK) * 10


def test_dropped_exchanges_stay_dropped_until_it_is_full_again() -> None:
    previous, truncated_at = 0, []
    for count in range(40):
        number = dropped_exchanges(count, prompt(count), ROOM, previous)
        assert number is not None and number >= previous
        if number != previous:
            truncated_at.append(count)
        previous = number
    assert truncated_at == [11, 15, 19, 23, 27, 31, 35, 39]


def test_exchanges_return_after_one_long_question() -> None:
    long = 7 * EXCHANGE
    number = dropped_exchanges(9, prompt(9, long), ROOM)
    assert number == 7
    assert dropped_exchanges(9, prompt(9), ROOM, number) == 0


def test_single_exchange_does_not_return_after_a_question() -> None:
    assert dropped_exchanges(11, prompt(11, EXCHANGE), ROOM) == 5
    assert dropped_exchanges(11, prompt(11), ROOM) == 4
    assert dropped_exchanges(11, prompt(11), ROOM, previous=5) == 5
    assert dropped_exchanges(11, prompt(11), ROOM, previous=6) == 4


def test_newest_exchange_stays_if_it_fits() -> None:
    def of_two(number: int) -> int:
        return FIXED + 9 * EXCHANGE * (2 - number)

    assert dropped_exchanges(2, of_two, ROOM) == 1
    assert dropped_exchanges(2, of_two, ROOM - EXCHANGE) == 1
    assert dropped_exchanges(2, of_two, ROOM - EXCHANGE - 1) == 2


def test_question_without_room_drops_all_exchanges() -> None:
    assert dropped_exchanges(5, prompt(5, 10 * EXCHANGE), ROOM) == 5
    assert dropped_exchanges(5, prompt(5, 10 * EXCHANGE + 1), ROOM) is None
    assert dropped_exchanges(0, prompt(0, 10 * EXCHANGE), ROOM) == 0
    assert dropped_exchanges(0, prompt(0, 10 * EXCHANGE + 1), ROOM) is None


def test_few_prompts_are_tried() -> None:
    tried: set[int] = set()

    def length(number: int) -> int:
        tried.add(number)
        return prompt(13)(number)

    assert dropped_exchanges(13, length, ROOM) == 6
    assert len(tried) <= 6  # with all, with none, and four by bisection


def test_steps_drop_the_same_exchanges_for_several_turns() -> None:
    dropped = [dropped_in_steps(count, prompt(count), ROOM) for count in range(40)]
    assert dropped[:11] == [0] * 11
    assert all(FIXED + EXCHANGE * (n - (d or 0)) <= ROOM for n, d in enumerate(dropped))
    changes = sum(one != other for one, other in pairwise(dropped))
    assert changes == 9 and None not in dropped


def test_steps_keep_dropped_exchanges_after_a_long_question() -> None:
    usual = dropped_in_steps(20, prompt(20), ROOM)
    assert dropped_in_steps(20, prompt(20, 20), ROOM) == usual


def test_steps_without_room_for_the_question_return_none() -> None:
    assert dropped_in_steps(3, prompt(3, ROOM), ROOM) is None
    assert dropped_in_steps(3, prompt(3, ROOM - FIXED), ROOM) == 3
