from services.inference.engine.scheduling.adapter_turns import TURN, AdapterRoundRobin


def order(turns: AdapterRoundRobin, adapters: set[int], seconds: float, count: int) -> list[int]:
    """Who decodes, when each step takes so long."""
    seen = []
    for _ in range(count):
        seen.append(turns.of(adapters))
        turns.has_decoded(seconds)
    return seen


def test_one_adapter_alone_is_always_the_one() -> None:
    assert order(AdapterRoundRobin(), {3}, TURN, 4) == [3, 3, 3, 3]


def test_each_has_its_turn_one_after_the_other() -> None:
    assert order(AdapterRoundRobin(), {0, 2, 5}, TURN, 7) == [0, 2, 5, 0, 2, 5, 0]


def test_fast_steps_share_a_turn() -> None:
    assert order(AdapterRoundRobin(), {0, 1}, TURN / 2, 6) == [0, 0, 1, 1, 0, 0]


def test_who_has_no_stream_any_more_is_passed_over_at_once() -> None:
    turns = AdapterRoundRobin()
    assert order(turns, {0, 1}, TURN * 0.3, 1) == [0]
    assert order(turns, {1, 2}, TURN * 0.3, 5) == [1, 1, 1, 1, 2]


def test_who_comes_new_does_not_wait_for_more_than_one_turn_of_each() -> None:
    turns = AdapterRoundRobin()
    order(turns, {1, 3}, TURN, 10)
    assert set(order(turns, {1, 2, 3}, TURN, 3)) == {1, 2, 3}
