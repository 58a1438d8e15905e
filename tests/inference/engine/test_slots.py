import pytest

from services.inference.engine.slots import Slots
from tests.inference.fake_backend import FakeBackend


class Pool:
    """Slots over a fake cache, filled as the engine would."""

    def __init__(self, count: int) -> None:
        self.backend = FakeBackend({})
        self.slots = Slots(self.backend, count)

    def run(self, prompt: list[int]) -> tuple[int, int]:
        slot, cached = self.slots.acquire(prompt)
        assert self.backend.cells[slot] == prompt[:cached]
        self.backend.cells[slot] += prompt[cached:]
        self.slots.update(slot, prompt[cached:])
        return slot, cached


def test_the_next_turn_of_a_conversation_reads_only_what_is_new() -> None:
    pool = Pool(2)
    slot, _ = pool.run([1, 2, 3, 4])
    pool.slots.release(slot)
    assert pool.run([1, 2, 3, 4, 5, 6]) == (slot, 4)


def test_a_beginning_is_shared_with_a_sequence_that_is_still_running() -> None:
    pool = Pool(2)
    first, _ = pool.run([1, 2, 3, 4])
    second, cached = pool.run([1, 2, 3, 9])
    assert (cached, second != first) == (3, True)


def test_the_last_token_is_always_computed_since_its_logits_are_needed() -> None:
    pool = Pool(1)
    slot, _ = pool.run([1, 2, 3])
    pool.slots.release(slot)
    assert pool.run([1, 2, 3]) == (slot, 2)


def test_a_new_session_takes_the_system_prompt_from_a_warm_one_and_leaves_it_warm() -> None:
    pool = Pool(2)
    warm, _ = pool.run([7, 7, 1, 1, 1, 1, 1, 1])
    pool.slots.release(warm)
    new, cached = pool.run([7, 7, 2, 2])
    assert (new != warm, cached) == (True, 2)
    pool.slots.release(new)
    assert pool.run([7, 7, 1, 1, 1, 1, 1, 1, 3]) == (warm, 8)


def test_the_least_recently_used_slot_is_given_first() -> None:
    pool = Pool(3)
    taken = [pool.run([i, i])[0] for i in range(3)]
    for slot in (taken[1], taken[0], taken[2]):
        pool.slots.release(slot)
    assert pool.run([9, 9]) == (taken[1], 0)


def test_a_forgotten_slot_is_not_reused() -> None:
    pool = Pool(1)
    slot, _ = pool.run([1, 2, 3])
    pool.slots.forget(slot)
    pool.slots.release(slot)
    assert pool.run([1, 2, 3, 4]) == (slot, 0)


def test_a_slot_that_is_lost_or_freed_twice_is_noticed() -> None:
    pool = Pool(2)
    slot, _ = pool.run([1])
    pool.slots.check(held=1)
    with pytest.raises(AssertionError, match="lost"):
        pool.slots.check(held=0)
    pool.slots.release(slot)
    pool.slots.release(slot)
    with pytest.raises(AssertionError, match="twice"):
        pool.slots.check(held=0)
