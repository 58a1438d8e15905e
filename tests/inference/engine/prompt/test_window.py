from collections.abc import Callable

from services.inference.engine.prompt.window import SLACK, dropped_exchanges

FIXED, EXCHANGE = 100, 50  # tokens
ROOM = FIXED + 10 * EXCHANGE


def prompt(exchanges: int, question: int = 0) -> Callable[[int], int]:
    return lambda dropped: FIXED + question + EXCHANGE * (exchanges - dropped)


def test_all_exchanges_stay_while_they_fit() -> None:
    for count in range(11):
        assert dropped_exchanges(count, prompt(count), ROOM) == 0


def test_a_cut_leaves_room_for_the_next_exchanges() -> None:
    count = 11
    left_out = dropped_exchanges(count, prompt(count), ROOM)
    assert left_out is not None
    kept = count - left_out
    assert kept == 7 == (1 - SLACK) * 10


def test_what_was_left_out_stays_left_out_until_the_prompt_is_full_again() -> None:
    """A turn adds an exchange; nobody but the cut takes one away."""
    first, cuts = 0, []
    for count in range(40):
        left_out = dropped_exchanges(count, prompt(count), ROOM, first)
        assert left_out is not None and left_out >= first
        if left_out != first:
            cuts.append(count)
        first = left_out
    assert cuts == [11, 15, 19, 23, 27, 31, 35, 39]


def test_what_one_long_question_had_no_room_for_is_told_again_with_the_next() -> None:
    long = 7 * EXCHANGE
    left_out = dropped_exchanges(9, prompt(9, long), ROOM)
    assert left_out == 7
    assert dropped_exchanges(9, prompt(9), ROOM, left_out) == 0


def test_what_a_longer_question_had_no_room_for_stays_left_out_if_it_is_but_one_exchange() -> None:
    assert dropped_exchanges(11, prompt(11, EXCHANGE), ROOM) == 5
    assert dropped_exchanges(11, prompt(11), ROOM) == 4
    assert dropped_exchanges(11, prompt(11), ROOM, previous=5) == 5
    assert dropped_exchanges(11, prompt(11), ROOM, previous=6) == 4


def test_the_newest_exchange_is_told_wherever_it_fits() -> None:
    def of_two(left_out: int) -> int:
        return FIXED + 9 * EXCHANGE * (2 - left_out)

    assert dropped_exchanges(2, of_two, ROOM) == 1
    assert dropped_exchanges(2, of_two, ROOM - EXCHANGE) == 1
    assert dropped_exchanges(2, of_two, ROOM - EXCHANGE - 1) == 2


def test_a_question_that_leaves_no_room_is_asked_without_exchanges() -> None:
    assert dropped_exchanges(5, prompt(5, 10 * EXCHANGE), ROOM) == 5
    assert dropped_exchanges(5, prompt(5, 10 * EXCHANGE + 1), ROOM) is None
    assert dropped_exchanges(0, prompt(0, 10 * EXCHANGE), ROOM) == 0
    assert dropped_exchanges(0, prompt(0, 10 * EXCHANGE + 1), ROOM) is None


def test_few_prompts_are_tried() -> None:
    tried: set[int] = set()

    def length(left_out: int) -> int:
        tried.add(left_out)
        return prompt(13)(left_out)

    assert dropped_exchanges(13, length, ROOM) == 6
    assert len(tried) <= 6  # all of it, nothing of it, and four by halves
