import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.scheduling.slot_block import slot_block


@pytest.mark.parametrize(
    ("slots", "block"),
    [
        ([5], range(5, 6)),
        ([0, 1, 2], range(4)),
        ([3, 4, 6], range(3, 7)),
        ([15], range(15, 16)),
        ([13, 14, 15], range(12, 16)),
        ([*range(10)], range(16)),
        ([*range(20)], range(32)),
        ([*range(17, 30)], range(16, 32)),
        ([*range(40)], range(40)),
    ],
)
def test_streams_are_computed_in_a_block_around_them(slots: list[int], block: range) -> None:
    assert slot_block(slots, max(16, slots[-1] + 1, block.stop)) == block


def test_block_stays_when_streams_begin_and_end() -> None:
    blocks = {slot_block([*range(count)], 16) for count in range(9, 17)}
    assert blocks == {range(16)}


def test_block_ends_with_the_slots() -> None:
    assert slot_block([*range(9)], 12) == range(12)


@pytest.mark.parametrize("slots", [[0, 7], [0, 1, 2, 3, 31], [2, 60]])
def test_few_streams_that_are_far_apart_have_no_block(slots: list[int]) -> None:
    assert slot_block(slots, 64) is None


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_block_has_all_streams_and_only_slots(drawn: tuple[int, set[int]]) -> None:
    count, slots = drawn
    if slots and (block := slot_block(sorted(slots), count)):
        assert slots <= set(block) <= set(range(count))
        assert len(block) <= 2 * len(slots)
