import random
from typing import NamedTuple

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import HostCache, SavedState


class Bytes(NamedTuple):
    nbytes: int


def saved(*tokens: int, size: int = 1, adapter: int = 0, session: str = "") -> SavedState:
    return SavedState(prefix.pack(adapter, tokens), Bytes(size), session)


def filled(*all_saved: SavedState, budget: int = 100) -> HostCache:
    states = HostCache(budget)
    for each in all_saved:
        states.add(each)
    states.check()
    return states


def test_the_longest_common_beginning_is_found_among_all() -> None:
    long, short, other = saved(1, 2, 3, 4), saved(1, 2, 9), saved(7, 7)
    states = filled(long, short, other)
    assert states.longest(prefix.pack(0, [1, 2, 3, 5])) == (long, 3)
    assert states.longest(prefix.pack(0, [1, 2, 9, 9, 9])) == (short, 3)
    assert states.longest(prefix.pack(0, [8])) == (None, 0)
    assert states.longest(prefix.pack(1, [1, 2, 3])) == (None, 0)


def test_of_equals_the_shortest_is_found() -> None:
    root = saved(1, 2)
    states = filled(saved(1, 2, 3), root, saved(1, 2, 4, 4))
    assert states.longest(prefix.pack(0, [1, 2, 8])) == (root, 2)


def test_it_finds_what_a_look_at_every_one_finds() -> None:
    dice = random.Random(1)
    states = HostCache(10_000)
    for i in range(300):
        states.add(saved(*dice.choices(range(3), k=dice.randint(1, 12)), session=f"{i}"))
    states.check()
    for _ in range(300):
        run = prefix.pack(0, dice.choices(range(3), k=dice.randint(1, 12)))
        longest = max(prefix.shared(run, other) for other in states._runs)
        found, length = states.longest(run)
        assert length == longest
        assert length == 0 or found and prefix.shared(run, found.run) == longest


def test_the_least_recently_used_goes_when_the_budget_is_spent() -> None:
    a, b, c = saved(1, size=40), saved(2, size=40), saved(3, size=40)
    states = filled(a, b, budget=100)
    states.touch(a.run)
    states.add(c)
    states.check()
    assert a.run in states and c.run in states and b.run not in states


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    states = filled(saved(1, size=50), saved(2, size=101), budget=100)
    assert len(states) == 1
    assert len(filled(saved(1), budget=0)) == 0


def test_the_same_run_is_kept_once() -> None:
    states = filled(saved(1, size=60), saved(1, size=70), budget=100)
    assert len(states) == 1
    states.remove(saved(1).run)
    states.remove(saved(1).run)
    states.check()
    assert len(states) == 0


def test_a_session_has_one_state_and_its_next_replaces_it() -> None:
    states = filled(saved(1, 2, session="a"), saved(1, 2, 3, session="a"), saved(1, 9, session="b"))
    assert len(states) == 2 and saved(1, 2).run not in states
    states.add(saved(7, size=101, session="a"))  # larger than the budget: it has none then
    states.check()
    assert len(states) == 1
