import random
from collections.abc import Iterable

import pytest

from services.inference.engine.adapter_numbers import adapter_number
from services.inference.engine.backend import Chunk
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED_TOKENS
from services.inference.engine.kv_cache.slots import MAX_DISCARDED_TOKENS, Slots
from tests.inference.fake_backend import FakeBackend

SYSTEM = [7] * MIN_SHARED_TOKENS


def talk(number: int, length: int = MAX_DISCARDED_TOKENS + 1) -> list[int]:
    """Return tokens that only this conversation has, enough to be worth keeping."""
    return [100 + number] * length


class Pool:
    """
    Slots over a fake backend, used as the engine does. A prompt's owner is named after its largest
    token, if the test names none.
    """

    def __init__(
        self,
        count: int,
        max_bytes: int = 10_000,
        public_prefixes: Iterable[list[int]] = (),
        window: int | None = None,
    ) -> None:
        self.backend = FakeBackend({}, window=window)
        self.slots = Slots(self.backend, count, max_bytes, public_prefixes)
        self.leased = 0

    def start(
        self,
        prompt: list[int],
        adapter: int = 0,
        owner: str | None = None,
        tenant: str = "",
    ) -> tuple[int, int]:
        """Compute a prompt, and return its slot and its number of cached tokens."""
        owner = f"{max(prompt)}" if owner is None else owner
        slot, cached = self.slots.acquire(prefix.pack(adapter, prompt[:-1], tenant=tenant), owner)
        self.leased += 1
        assert self.backend.cells.get(slot, []) == prompt[:cached]
        self.backend.decode([Chunk(slot, cached, prompt[cached:], None, adapter)])
        self.slots.extend(slot, prompt[cached:])
        self.slots.check_invariants(self.leased)
        return slot, cached

    def end(self, slot: int) -> None:
        self.slots.release(slot)
        self.leased -= 1
        self.slots.check_invariants(self.leased)

    def run(self, prompt: list[int], owner: str | None = None, tenant: str = "") -> tuple[int, int]:
        slot, cached = self.start(prompt, owner=owner, tenant=tenant)
        self.end(slot)
        return slot, cached


def test_forget_session_drops_its_slots_and_saved_states() -> None:
    pool = Pool(1)
    for number in (1, 2, 3):  # the first two are offloaded
        pool.run(talk(number), owner=f"0.t.{number}")
    for number in (1, 3):
        pool.slots.forget_session(f"t.{number}")
        pool.slots.check_invariants(leased=0)
    lengths = [pool.slots.cached_length(prefix.pack(0, talk(number))) for number in (1, 2, 3)]
    assert lengths == [0, len(talk(2)), 0]


def test_prompts_of_the_base_model_are_kept_for_the_next_process() -> None:
    before, after = Pool(2), Pool(2)
    for number in (1, 2, 3):
        before.run(talk(number))
    before.end(before.start(talk(4), adapter=1)[0])
    saved = before.slots.save_all()
    assert [each.owner for each in saved] == ["103", "102", "101"]  # newest first
    after.run(talk(2)[:20], owner=saved[1].owner)  # this conversation has gone on
    for each in saved:
        after.slots.adopt(each)
    after.slots.check_invariants(leased=0)
    lengths = [after.slots.cached_length(prefix.pack(0, talk(number))) for number in (1, 2, 3)]
    assert lengths == [len(talk(1)), 20, len(talk(3))]


def test_next_turn_prefills_only_new_tokens() -> None:
    pool = Pool(2)
    slot, _ = pool.run([1, 2, 3, 4])
    assert pool.run([1, 2, 3, 4, 5, 6]) == (slot, 4)
    assert pool.backend.restored == 0


def test_last_token_is_computed_even_if_all_is_cached() -> None:
    pool = Pool(1)
    slot, _ = pool.run([1, 2, 3])
    assert pool.run([1, 2, 3]) == (slot, 2)


def test_prefix_is_copied_from_running_sequence() -> None:
    pool = Pool(2)
    first, _ = pool.start([*SYSTEM, 4])
    second, cached = pool.start([*SYSTEM, 9])
    assert (cached, second != first) == (len(SYSTEM), True)


def test_short_prefix_is_not_copied() -> None:
    pool = Pool(2)
    pool.start([*SYSTEM[1:], *talk(1, 500)])
    assert pool.start([*SYSTEM[1:], 9])[1] == 0 and pool.backend.saved == 0


def test_empty_slot_is_leased_before_cached_one() -> None:
    pool = Pool(4, max_bytes=0)
    pool.start(talk(0))
    for i in (1, 2, 1, 2):
        cached = pool.run(talk(i))[1]
    assert cached == len(talk(1)) - 1


def test_evicted_conversation_continues_from_host_cache() -> None:
    pool = Pool(1)
    pool.run(talk(1))
    pool.run(talk(2))
    assert pool.run([*talk(1), 5])[1] == len(talk(1))
    assert pool.run([*talk(2), 5])[1] == len(talk(2))


def test_many_conversations_share_few_slots() -> None:
    pool = Pool(2)
    prompts = {i: [*SYSTEM, *talk(i)] for i in range(20)}
    for turn in range(3):
        for i in prompts:
            prompts[i] = [*prompts[i], turn]
            cached = pool.run(prompts[i])[1]
            assert turn == 0 or cached == len(prompts[i]) - 1


def test_new_session_copies_system_prompt_of_cached_one() -> None:
    pool = Pool(2)
    warm, _ = pool.run([*SYSTEM, *talk(1)])
    assert pool.run([*SYSTEM, *talk(2)])[1] == len(SYSTEM)
    assert pool.run([*SYSTEM, *talk(1), 3])[1] == len(SYSTEM) + len(talk(1))


def test_third_user_of_prefix_copies_only_the_prefix() -> None:
    pool = Pool(3)
    pool.start([*SYSTEM, *talk(1, 500)])
    pool.start([*SYSTEM, *talk(2, 500)])
    before = pool.backend.restored
    assert pool.start([*SYSTEM, *talk(3)])[1] == len(SYSTEM)
    assert pool.backend.restored - before == len(SYSTEM)


def test_evicted_slot_of_another_tenant_gives_only_the_public_prefix() -> None:
    pool = Pool(2, public_prefixes=[SYSTEM])
    for number in range(4):
        pool.run([*SYSTEM, *talk(number)], owner=f"a{number}", tenant="a")
    before = pool.backend.restored
    for number in range(2):  # of the conversations that are in the slots
        prompt = [*SYSTEM, *talk(2 + number), 9]
        assert pool.run(prompt, owner=f"b{number}", tenant="b")[1] == len(SYSTEM)
    assert pool.backend.restored == before, "the slot is cut, and nothing is copied"


def test_slightly_longer_prefix_is_not_saved_separately() -> None:
    pool = Pool(3)
    for i in range(9):
        pool.run([*SYSTEM, i % 3, *talk(i, 300)], owner=f"{i}")
    assert [prefix.length(saved.key) for saved in pool.slots.host_cache if not saved.owner] == [
        len(SYSTEM)
    ]
    before = pool.backend.restored
    assert pool.run([*SYSTEM, 1, *talk(99)], owner="new")[1] == len(SYSTEM)
    assert pool.backend.restored == before, "the evicted slot begins with it, so nothing is copied"


def test_shared_prefix_outlives_its_conversations() -> None:
    pool = Pool(1, max_bytes=150)
    for i in range(10):
        pool.run([*SYSTEM, *talk(i)])
    assert pool.run([*SYSTEM, *talk(99)])[1] == len(SYSTEM)


def test_prefix_is_not_shared_between_adapters() -> None:
    pool = Pool(3)
    pool.start([*SYSTEM, 4], adapter=0)
    assert pool.start([*SYSTEM, 4], adapter=1)[1] == 0
    assert pool.start([*SYSTEM, 9], adapter=1)[1] == len(SYSTEM)


def test_without_host_cache_evicted_conversation_is_prefilled() -> None:
    pool = Pool(1, max_bytes=0)
    pool.run(talk(1))
    pool.run(talk(2))
    assert pool.run(talk(1))[1] == 0


def test_slot_next_to_leased_ones_is_leased() -> None:
    pool = Pool(5)
    slots = [pool.start(talk(i))[0] for i in range(3)]
    assert slots == [0, 1, 2]
    pool.end(1)
    assert pool.start(talk(9))[0] == 1


def test_move_closes_gap_and_offloads_cached_sequence() -> None:
    pool = Pool(4)
    for i in range(3):
        pool.start(talk(i))
    pool.end(1)
    pool.slots.move(2, 1)
    pool.slots.check_invariants(pool.leased)
    assert pool.backend.cells[1] == talk(2)
    assert pool.start([*talk(1), 1])[1] == len(talk(1)), "the gap's sequence was offloaded"


def test_move_swaps_two_leased_sequences() -> None:
    pool = Pool(2)
    pool.start(talk(1))
    pool.start(talk(2), adapter=1)
    pool.slots.move(0, 1)
    pool.slots.check_invariants(pool.leased)
    assert pool.backend.cells == {0: talk(2), 1: talk(1)}
    pool.end(0)
    assert pool.start([*talk(2), 5], adapter=1) == (0, len(talk(2)))


def test_slot_next_to_those_of_same_adapter_is_leased() -> None:
    pool = Pool(6)
    slots = [pool.start(talk(i), adapter=i % 2)[0] for i in range(4)]
    assert slots == [0, 1, 2, 3]
    pool.end(1)
    assert pool.start(talk(9), adapter=1)[0] == 4
    assert pool.start(talk(8), adapter=0)[0] == 1


def test_slot_offloaded_while_idle_is_evicted_without_copy() -> None:
    pool = Pool(2)
    prompts = [talk(1), talk(2)]
    for prompt in prompts:
        pool.run(prompt)
    while pool.slots.offload_next():
        pool.slots.check_invariants(pool.leased)
    saved = pool.backend.saved
    pool.run(talk(3))
    assert pool.backend.saved == saved
    assert [pool.run([*prompt, 1])[1] for prompt in prompts] == [len(talk(1))] * 2


def test_session_has_one_saved_state_after_many_turns() -> None:
    pool = Pool(2)
    for turn in range(12):
        prompt = [*SYSTEM, *(t for i in range(turn // 4 * 4, turn + 1) for t in talk(i))]
        pool.run(prompt, owner="a")
        pool.run([*SYSTEM, *talk(50 + turn)], owner=f"other {turn % 3}")
        while pool.slots.offload_next():
            pass
    owners = [saved.owner for saved in pool.slots.host_cache]
    assert sorted(filter(None, owners)) == ["a", "other 0", "other 1", "other 2"]


def test_superseded_prompt_does_not_replace_newer_one() -> None:
    pool = Pool(3)
    old, new = [*SYSTEM, *talk(1, 300)], [*SYSTEM, *talk(2, 300)]
    pool.run(old, owner="a")
    pool.run(new, owner="a")
    while pool.slots.offload_next():
        pass
    for i in range(3):
        pool.run(talk(10 + i))
    assert pool.run([*new, 1], owner="a")[1] == len(new)


def test_stateless_requests_are_not_saved_and_evict_no_session() -> None:
    pool = Pool(2, max_bytes=60)
    pool.run(talk(1))
    for i in range(10, 20):
        pool.run([*SYSTEM, *talk(i)], owner="")
        while pool.slots.offload_next():
            pass
    assert [saved.owner for saved in pool.slots.host_cache] == ["101"]
    assert pool.run([*talk(1), 5])[1] == len(talk(1))


def test_stateless_turns_reuse_slots_that_nobody_needs() -> None:
    pool = Pool(3)
    prompts = {i: [*SYSTEM, *talk(i)] for i in range(3)}
    for turn in range(4):
        for i in prompts:
            prompts[i] = [*prompts[i], *talk(10 + turn)]
            cached = pool.run(prompts[i], owner="")[1]
            assert cached >= (len(prompts[i]) - len(talk(0)) if turn else 0)
    assert len(pool.slots.host_cache) == 0


def test_stateless_sequence_is_evicted_before_unsaved_session() -> None:
    pool = Pool(3)
    for i in range(2):
        pool.run(talk(i))
    pool.run(talk(5), owner="")
    pool.run(talk(6), owner="")
    assert pool.backend.saved == 0
    assert [pool.run([*talk(i), 1])[1] for i in range(2)] == [len(talk(0))] * 2


def test_stateless_prefix_is_saved_only_if_shared_concurrently() -> None:
    pool = Pool(4)
    for i in range(4):
        pool.run([*SYSTEM, *talk(1, 40 * i), *talk(2 + i)], owner="")
    assert len(pool.slots.host_cache) == 0
    pool.start([*SYSTEM, *talk(7)], owner="")
    pool.start([*SYSTEM, *talk(8)], owner="")
    assert [saved.key for saved in pool.slots.host_cache] == [prefix.pack(0, SYSTEM)]


def test_public_prefix_of_stateless_requests_is_saved_once() -> None:
    pool = Pool(4, public_prefixes=[SYSTEM])
    for i in range(4):
        assert pool.run([*SYSTEM, *talk(1 + i)], owner="")[1] == (len(SYSTEM) if i else 0)
    assert [saved.key for saved in pool.slots.host_cache] == [prefix.pack(0, SYSTEM)]
    assert pool.backend.saved == 2  # the copy to another slot, and the public prefix


def test_prefix_shared_by_session_and_stateless_is_saved() -> None:
    pool = Pool(1)
    pool.run([*SYSTEM, *talk(1)])
    pool.run([*SYSTEM, *talk(2)], owner="")
    pool.run(talk(3))
    assert pool.run([*SYSTEM, *talk(4)], owner="")[1] == len(SYSTEM)


def test_recurrent_model_reuses_whole_sequences_only() -> None:
    pool = Pool(2, window=0)
    pool.run([1, 2, 3])
    assert pool.run([1, 2, 3, 4])[1] == 3
    assert pool.run([1, 2, 9, 9])[1] == 0


def test_invalidated_slot_is_not_reused() -> None:
    pool = Pool(1)
    slot, _ = pool.start([1, 2, 3])
    pool.slots.invalidate(slot)
    pool.end(slot)
    assert pool.run([1, 2, 3, 4]) == (slot, 0)


def test_check_finds_lost_and_twice_freed_slots() -> None:
    pool = Pool(2)
    slot, _ = pool.start([1])
    with pytest.raises(AssertionError, match="lost"):
        pool.slots.check_invariants(leased=0)
    pool.end(slot)
    pool.slots.release(slot)
    with pytest.raises(AssertionError, match="twice"):
        pool.slots.check_invariants(leased=0)


def test_check_finds_unknown_tokens_in_kv_cache() -> None:
    pool = Pool(2)
    slot, _ = pool.start([1, 2])
    pool.backend.cells[slot].append(3)
    with pytest.raises(AssertionError, match="differs from its key"):
        pool.slots.check_invariants(leased=1)


def test_checkpoints_take_at_most_half_of_the_host_cache() -> None:
    pool = Pool(2, max_bytes=400, window=0)
    for number in (1, 2, 3):
        prompt = talk(number, 150)
        slot, cached = pool.slots.acquire(prefix.pack(0, prompt), f"{number}", stable_length=140)
        assert (cached, pool.slots.next_checkpoint(slot)) == (0, 140)
        for part in (prompt[:140], prompt[140:]):
            at = pool.backend.length(slot)
            pool.backend.decode([Chunk(slot, at, part, None)])
            pool.slots.extend(slot, part)
        pool.slots.release(slot)
        pool.slots.check_invariants(leased=0)
    assert pool.backend.checkpoints == 3
    kept = [pool.slots.cached_length(prefix.pack(0, talk(n, 145))) for n in (1, 2, 3)]
    assert kept == [0, 0, 140]


def test_window_is_truncated_in_place_while_it_lasts() -> None:
    pool = Pool(2, window=20)
    prompt = list(range(100))
    slot, _ = pool.run(prompt, owner="s")
    assert pool.run([*prompt[:85], 200], owner="s") == (slot, 85)
    assert pool.run([*prompt[:50], 300], owner="s")[1] == 0
    assert pool.backend.rewound == 0


def test_forget_adapter_drops_its_tokens_at_any_scale() -> None:
    pool = Pool(4)
    adapters = (0, adapter_number(1), adapter_number(1, 0.5), adapter_number(2))
    for number, adapter in enumerate(adapters):
        slot, _ = pool.start(talk(number), adapter)
        pool.end(slot)
    while pool.slots.offload_next():
        pass
    pool.slots.forget_adapter(1)
    pool.slots.check_invariants(leased=0)
    kept = [
        pool.slots.cached_length(prefix.pack(adapter, talk(number))) > 0
        for number, adapter in enumerate(adapters)
    ]
    assert kept == [True, False, False, True] and len(pool.slots.host_cache) == 2


@pytest.mark.parametrize("window", [None, 4])
def test_source_is_the_longest_reusable_prefix_and_free_if_one_is(window: int | None) -> None:
    """Also among prompts of other tenants and adapters, which is found without comparing all."""
    rng = random.Random(7)
    pool = Pool(6, public_prefixes=[SYSTEM], window=window)
    running: list[int] = []

    def prompt() -> list[int]:
        return SYSTEM + rng.choices((1, 2), k=rng.randrange(1, 40))

    for _ in range(200):
        if len(running) == pool.slots.count or (running and rng.random() < 0.4):
            pool.end(running.pop(rng.randrange(len(running))))
        tenant, adapter = rng.choice(("", "ann", "bob")), rng.randrange(2)
        key = prefix.pack(adapter, prompt(), tenant=tenant)
        lengths = [pool.slots._reusable(slot, key, "") for slot in range(pool.slots.count)]
        source, length = pool.slots._best_source(key, "")
        assert length == lengths[source] == max(lengths)
        best = {slot for slot, found in enumerate(lengths) if found == length}
        assert source in pool.slots._free or not best & {*pool.slots._free}
        slot, _ = pool.start(prompt(), adapter, tenant=tenant)
        running.append(slot)
