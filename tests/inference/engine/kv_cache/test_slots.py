from collections.abc import Iterable

import pytest

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED
from services.inference.engine.kv_cache.slots import SPARE, Slots
from tests.inference.fake_backend import FakeBackend

SYSTEM = [7] * MIN_SHARED


def talk(number: int, length: int = SPARE + 1) -> list[int]:
    """What one conversation says, and no other; long enough to be worth keeping."""
    return [100 + number] * length


class Pool:
    """
    Slots over a fake cache, filled as the engine would. A prompt's session is named after its
    talk, if the test does not say whose it is.
    """

    def __init__(self, count: int, budget: int = 10_000, heads: Iterable[list[int]] = ()) -> None:
        self.backend = FakeBackend({})
        self.slots = Slots(self.backend, count, budget, heads)
        self.held = 0

    def start(
        self,
        prompt: list[int],
        adapter: int = 0,
        session: str | None = None,
        tenant: str = "",
    ) -> tuple[int, int]:
        owner = f"{max(prompt)}" if session is None else session
        slot, cached = self.slots.acquire(prefix.pack(adapter, prompt[:-1], tenant=tenant), owner)
        self.held += 1
        assert self.backend.cells.get(slot, []) == prompt[:cached]
        self.backend.cells[slot] = list(prompt)
        self.slots.update(slot, prompt[cached:])
        self.slots.check(self.held)
        return slot, cached

    def end(self, slot: int) -> None:
        self.slots.release(slot)
        self.held -= 1
        self.slots.check(self.held)

    def run(
        self, prompt: list[int], session: str | None = None, tenant: str = ""
    ) -> tuple[int, int]:
        slot, cached = self.start(prompt, session=session, tenant=tenant)
        self.end(slot)
        return slot, cached


def test_the_next_turn_of_a_conversation_reads_only_what_is_new() -> None:
    pool = Pool(2)
    slot, _ = pool.run([1, 2, 3, 4])
    assert pool.run([1, 2, 3, 4, 5, 6]) == (slot, 4)
    assert pool.backend.restored == 0


def test_the_last_token_is_always_computed_since_its_logits_are_needed() -> None:
    pool = Pool(1)
    slot, _ = pool.run([1, 2, 3])
    assert pool.run([1, 2, 3]) == (slot, 2)


def test_a_beginning_is_shared_with_a_sequence_that_is_still_running() -> None:
    pool = Pool(2)
    first, _ = pool.start([*SYSTEM, 4])
    second, cached = pool.start([*SYSTEM, 9])
    assert (cached, second != first) == (len(SYSTEM), True)


def test_a_beginning_that_is_as_soon_computed_is_not_copied() -> None:
    pool = Pool(2)
    pool.start([*SYSTEM[1:], *talk(1, 500)])
    assert pool.start([*SYSTEM[1:], 9])[1] == 0 and pool.backend.saved == 0


def test_an_empty_slot_is_given_before_a_warm_one() -> None:
    pool = Pool(4, budget=0)
    pool.start(talk(0))
    for i in (1, 2, 1, 2):
        cached = pool.run(talk(i))[1]
    assert cached == len(talk(1)) - 1


def test_a_conversation_without_a_slot_goes_on_where_it_was() -> None:
    pool = Pool(1)
    pool.run(talk(1))
    pool.run(talk(2))
    assert pool.run([*talk(1), 5])[1] == len(talk(1))
    assert pool.run([*talk(2), 5])[1] == len(talk(2))


def test_many_conversations_take_turns_on_few_slots() -> None:
    pool = Pool(2)
    prompts = {i: [*SYSTEM, *talk(i)] for i in range(20)}
    for turn in range(3):
        for i in prompts:
            prompts[i] = [*prompts[i], turn]
            cached = pool.run(prompts[i])[1]
            assert turn == 0 or cached == len(prompts[i]) - 1


def test_a_new_session_takes_the_system_prompt_from_a_warm_one_and_leaves_it_warm() -> None:
    pool = Pool(2)
    warm, _ = pool.run([*SYSTEM, *talk(1)])
    assert pool.run([*SYSTEM, *talk(2)])[1] == len(SYSTEM)
    assert pool.run([*SYSTEM, *talk(1), 3])[1] == len(SYSTEM) + len(talk(1))


def test_once_two_share_a_beginning_a_third_is_spared_the_copy_of_the_rest() -> None:
    pool = Pool(3)
    pool.start([*SYSTEM, *talk(1, 500)])
    pool.start([*SYSTEM, *talk(2, 500)])
    before = pool.backend.restored
    assert pool.start([*SYSTEM, *talk(3)])[1] == len(SYSTEM)
    assert pool.backend.restored - before == len(SYSTEM)


def test_a_word_more_in_common_makes_no_root_of_its_own() -> None:
    pool = Pool(3)
    for i in range(9):
        pool.run([*SYSTEM, i % 3, *talk(i, 300)], session=f"{i}")
    states = pool.slots.states._by_use.values()
    assert [prefix.length(saved.run) for saved in states if not saved.session] == [len(SYSTEM)]
    before = pool.backend.restored
    assert pool.run([*SYSTEM, 1, *talk(99)], session="new")[1] == len(SYSTEM)
    assert pool.backend.restored - before == len(SYSTEM)


def test_a_common_beginning_stays_when_those_who_share_it_have_gone() -> None:
    pool = Pool(1, budget=150)
    for i in range(10):
        pool.run([*SYSTEM, *talk(i)])
    assert pool.run([*SYSTEM, *talk(99)])[1] == len(SYSTEM)


def test_what_one_adapter_computed_is_not_shared_with_another() -> None:
    pool = Pool(3)
    pool.start([*SYSTEM, 4], adapter=0)
    assert pool.start([*SYSTEM, 4], adapter=1)[1] == 0
    assert pool.start([*SYSTEM, 9], adapter=1)[1] == len(SYSTEM)


def test_without_ram_for_it_an_idle_conversation_is_read_again() -> None:
    pool = Pool(1, budget=0)
    pool.run(talk(1))
    pool.run(talk(2))
    assert pool.run(talk(1))[1] == 0


def test_a_slot_beside_the_held_ones_is_given() -> None:
    pool = Pool(5)
    slots = [pool.start(talk(i))[0] for i in range(3)]
    assert slots == [0, 1, 2]
    pool.end(1)
    assert pool.start(talk(9))[0] == 1


def test_a_hole_between_held_slots_is_closed_by_a_move() -> None:
    pool = Pool(4)
    for i in range(3):
        pool.start(talk(i))
    pool.end(1)
    pool.slots.move(2, 1)
    pool.slots.check(pool.held)
    assert pool.backend.cells[1] == talk(2)
    assert pool.start([*talk(1), 1])[1] == len(talk(1)), "what was in the hole went to RAM"


def test_two_held_sequences_change_places() -> None:
    pool = Pool(2)
    pool.start(talk(1))
    pool.start(talk(2), adapter=1)
    pool.slots.move(0, 1)
    pool.slots.check(pool.held)
    assert pool.backend.cells == {0: talk(2), 1: talk(1)}
    pool.end(0)
    assert pool.start([*talk(2), 5], adapter=1) == (0, len(talk(2)))


def test_a_slot_beside_those_of_the_same_adapter_is_given() -> None:
    pool = Pool(6)
    slots = [pool.start(talk(i), adapter=i % 2)[0] for i in range(4)]
    assert slots == [0, 1, 2, 3]
    pool.end(1)
    assert pool.start(talk(9), adapter=1)[0] == 4
    assert pool.start(talk(8), adapter=0)[0] == 1


def test_what_was_tidied_up_costs_nothing_when_its_slot_is_needed() -> None:
    pool = Pool(2)
    prompts = [talk(1), talk(2)]
    for prompt in prompts:
        pool.run(prompt)
    while pool.slots.tidy():
        pool.slots.check(pool.held)
    saved = pool.backend.saved
    pool.run(talk(3))
    assert pool.backend.saved == saved
    assert [pool.run([*prompt, 1])[1] for prompt in prompts] == [len(talk(1))] * 2


def test_a_session_has_one_copy_however_often_it_goes_on_and_whatever_its_window_cuts_off() -> None:
    pool = Pool(2)
    for turn in range(12):
        window = [*SYSTEM, *(t for i in range(turn // 4 * 4, turn + 1) for t in talk(i))]
        pool.run(window, session="a")
        pool.run([*SYSTEM, *talk(50 + turn)], session=f"other {turn % 3}")
        while pool.slots.tidy():
            pass
    sessions = [saved.session for saved in pool.slots.states._by_use.values()]
    assert sorted(filter(None, sessions)) == ["a", "other 0", "other 1", "other 2"]


def test_what_was_cut_off_does_not_replace_what_goes_on() -> None:
    pool = Pool(3)
    old, new = [*SYSTEM, *talk(1, 300)], [*SYSTEM, *talk(2, 300)]
    pool.run(old, session="a")
    pool.run(new, session="a")
    while pool.slots.tidy():
        pass
    for i in range(3):
        pool.run(talk(10 + i))
    assert pool.run([*new, 1], session="a")[1] == len(new)


def test_what_is_nobodys_leaves_no_copy_in_ram_and_no_session_is_pushed_out_for_it() -> None:
    pool = Pool(2, budget=60)
    pool.run(talk(1))
    for i in range(10, 20):
        pool.run([*SYSTEM, *talk(i)], session="")
        while pool.slots.tidy():
            pass
    assert [saved.session for saved in pool.slots.states._by_use.values()] == ["101"]
    assert pool.run([*talk(1), 5])[1] == len(talk(1))


def test_what_is_nobodys_is_read_on_while_its_slot_is_not_needed() -> None:
    pool = Pool(3)
    prompts = {i: [*SYSTEM, *talk(i)] for i in range(3)}
    for turn in range(4):
        for i in prompts:
            prompts[i] = [*prompts[i], *talk(10 + turn)]
            cached = pool.run(prompts[i], session="")[1]
            assert cached >= (len(prompts[i]) - len(talk(0)) if turn else 0)
    assert len(pool.slots.states) == 0


def test_what_is_nobodys_goes_before_a_session_that_is_not_in_ram() -> None:
    pool = Pool(3)
    for i in range(2):
        pool.run(talk(i))
    pool.run(talk(5), session="")
    pool.run(talk(6), session="")
    assert pool.backend.saved == 0
    assert [pool.run([*talk(i), 1])[1] for i in range(2)] == [len(talk(0))] * 2


def test_what_nobodys_turns_have_in_common_makes_no_root_unless_they_run_at_once() -> None:
    pool = Pool(4)
    for i in range(4):
        pool.run([*SYSTEM, *talk(1, 40 * i), *talk(2 + i)], session="")
    assert len(pool.slots.states) == 0
    pool.start([*SYSTEM, *talk(7)], session="")
    pool.start([*SYSTEM, *talk(8)], session="")
    assert [saved.run for saved in pool.slots.states._by_use.values()] == [prefix.pack(0, SYSTEM)]


def test_what_a_session_and_nobody_have_in_common_is_kept() -> None:
    pool = Pool(1)
    pool.run([*SYSTEM, *talk(1)])
    pool.run([*SYSTEM, *talk(2)], session="")
    pool.run(talk(3))
    assert pool.run([*SYSTEM, *talk(4)], session="")[1] == len(SYSTEM)


def test_a_model_that_keeps_no_part_of_a_sequence_computes_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(2)

    def whole_or_nothing(slot: int, length: int) -> bool:
        kept = length == len(pool.backend.cells.get(slot, []))
        pool.backend.cells[slot] = pool.backend.cells.get(slot, []) if kept else []
        return kept

    monkeypatch.setattr(pool.backend, "cut", whole_or_nothing)
    pool.run([1, 2, 3])
    assert pool.run([1, 2, 3, 4])[1] == 3
    assert pool.run([1, 2, 9, 9])[1] == 0


def test_a_forgotten_slot_is_not_reused() -> None:
    pool = Pool(1)
    slot, _ = pool.start([1, 2, 3])
    pool.slots.forget(slot)
    pool.end(slot)
    assert pool.run([1, 2, 3, 4]) == (slot, 0)


def test_a_slot_that_is_lost_or_freed_twice_is_noticed() -> None:
    pool = Pool(2)
    slot, _ = pool.start([1])
    with pytest.raises(AssertionError, match="lost"):
        pool.slots.check(held=0)
    pool.end(slot)
    pool.slots.release(slot)
    with pytest.raises(AssertionError, match="twice"):
        pool.slots.check(held=0)


def test_cells_that_nobody_knows_of_are_noticed() -> None:
    pool = Pool(2)
    slot, _ = pool.start([1, 2])
    pool.backend.cells[slot].append(3)
    with pytest.raises(AssertionError, match="not known"):
        pool.slots.check(held=1)
