import random
from typing import NamedTuple

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import HostCache, SavedState


class Bytes(NamedTuple):
    nbytes: int

    def tobytes(self) -> bytes:
        return bytes(self.nbytes)


def saved(*tokens: int, size: int = 1, adapter: int = 0, owner: str = "") -> SavedState:
    return SavedState(prefix.pack(adapter, tokens), Bytes(size), owner)


def cache_of(*states: SavedState, max_bytes: int = 100) -> HostCache:
    cache = HostCache(max_bytes)
    for each in states:
        cache.add(each)
    cache.check_invariants()
    return cache


def test_longest_match_among_several_states() -> None:
    long, short, other = saved(1, 2, 3, 4), saved(1, 2, 9), saved(7, 7)
    cache = cache_of(long, short, other)
    assert cache.longest_match(prefix.pack(0, [1, 2, 3, 5])) == (long, 3)
    assert cache.longest_match(prefix.pack(0, [1, 2, 9, 9, 9])) == (short, 3)
    assert cache.longest_match(prefix.pack(0, [8])) == (None, 0)
    assert cache.longest_match(prefix.pack(1, [1, 2, 3])) == (None, 0)


def test_longest_match_prefers_shared_prefix() -> None:
    root = saved(1, 2)
    cache = cache_of(saved(1, 2, 3), root, saved(1, 2, 4, 4))
    assert cache.longest_match(prefix.pack(0, [1, 2, 8])) == (root, 2)


def test_longest_match_equals_linear_search() -> None:
    dice = random.Random(1)
    cache = HostCache(10_000)
    for i in range(300):
        cache.add(saved(*dice.choices(range(3), k=dice.randint(1, 12)), owner=f"{i}"))
    cache.check_invariants()
    for _ in range(300):
        key = prefix.pack(0, dice.choices(range(3), k=dice.randint(1, 12)))
        longest = max(prefix.shared_length(key, saved.key) for saved in cache)
        found, length = cache.longest_match(key)
        assert length == longest
        assert length == 0 or found and prefix.shared_length(key, found.key) == longest


def test_full_cache_evicts_least_recently_used_state() -> None:
    a, b, c = saved(1, size=40), saved(2, size=40), saved(3, size=40)
    cache = cache_of(a, b, max_bytes=100)
    cache.touch(a.key)
    cache.add(c)
    cache.check_invariants()
    assert a.key in cache and c.key in cache and b.key not in cache


def test_state_larger_than_cache_is_not_kept() -> None:
    cache = cache_of(saved(1, size=50), saved(2, size=101), max_bytes=100)
    assert len(cache) == 1
    assert len(cache_of(saved(1), max_bytes=0)) == 0


def test_same_run_is_kept_once() -> None:
    cache = cache_of(saved(1, size=60), saved(1, size=70), max_bytes=100)
    assert len(cache) == 1
    cache.remove(saved(1).key)
    cache.remove(saved(1).key)
    cache.check_invariants()
    assert len(cache) == 0


def test_owner_has_one_state_which_next_one_replaces() -> None:
    cache = cache_of(saved(1, 2, owner="a"), saved(1, 2, 3, owner="a"), saved(1, 9, owner="b"))
    assert len(cache) == 2 and saved(1, 2).key not in cache
    cache.add(saved(7, size=101, owner="a"))  # exceeds max_bytes, so it has none then
    cache.check_invariants()
    assert len(cache) == 1


def test_adopted_state_displaces_nothing_and_is_evicted_first() -> None:
    cache = cache_of(saved(1, size=50, owner="a"), max_bytes=100)
    cache.adopt(saved(9, size=60, owner="b"))  # no room
    cache.adopt(saved(1, 2, size=10, owner="a"))  # older than what the owner has
    cache.adopt(saved(2, size=20, owner="c"))
    cache.check_invariants()
    assert [each.owner for each in cache] == ["c", "a"]
    cache.add(saved(3, size=40, owner="d"))
    assert [each.owner for each in cache] == ["a", "d"]
