"""
What tenants share of the prefix cache: public heads, which no tenant wrote, and nothing else.
"""

import random

import pytest

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from tests.inference.engine.kv_cache.test_slots import Pool, talk
from tests.inference.engine.scheduling.test_scheduler import Run

BARE = [1, 2, 3] * MIN_SHARED  # what the template writes before a caller's text
SYSTEM = [*BARE, *[7] * (2 * MIN_SHARED)]  # what it writes with the server's system prompt
HEADS = (BARE, SYSTEM)
SECRET = [8, 1, 3, 3, 5, 5]


def pool(slots: int = 4, budget: int = 10_000) -> Pool:
    return Pool(slots, budget, HEADS)


@pytest.mark.parametrize("head", [[], BARE, SYSTEM], ids=["none", "bare", "system"])
@pytest.mark.parametrize("slots", [1, 4], ids=["from RAM", "from slots"])
def test_tenants_share_public_head_and_own_prompts_share_all(head: list[int], slots: int) -> None:
    shared = pool(slots)
    prompt = [*head, *talk(1)]
    shared.run(prompt, "ann's", tenant="ann")
    for tenant in ("bob", "cec"):
        assert shared.run(prompt, f"{tenant}'s", tenant=tenant)[1] == len(head)
        shared.run(talk(9), "another", tenant=tenant)  # takes the only slot, if there is just one
    for tenant in ("ann", "bob", "cec"):
        assert shared.run([*prompt, 5], f"{tenant}'s", tenant=tenant)[1] == len(prompt)


def test_head_that_a_tenant_wrote_in_part_is_not_shared() -> None:
    shared = pool()
    shared.run([*SYSTEM[:-1], *talk(1)], "a", tenant="ann")
    assert shared.run([*SYSTEM, *talk(2)], "b", tenant="bob")[1] == len(BARE)
    assert shared.run([*SYSTEM[:-1], *talk(3)], "c", tenant="ann")[1] == len(SYSTEM) - 1


def test_a_head_is_kept_for_all_tenants_once_two_have_shared_it() -> None:
    shared = pool(slots=3)
    for tenant in ("ann", "bob"):
        shared.start([*SYSTEM, *talk(1, 500)], session=tenant, tenant=tenant)
    before = shared.backend.restored
    assert shared.start([*SYSTEM, *talk(1, 500)], session="c", tenant="cec")[1] == len(SYSTEM)
    assert shared.backend.restored - before == len(SYSTEM)


def test_common_prefix_of_a_tenant_is_kept_for_that_tenant_only() -> None:
    shared = pool(slots=3)
    prompt = [*SYSTEM, *talk(1, 100)]
    for number in (2, 3):
        shared.run([*prompt, *talk(number, 500)], f"{number}", tenant="ann")
    shared.run([*prompt, *talk(2)], "bob's", tenant="bob")
    roots = [s.run for s in shared.slots.states._by_use.values() if not s.session]
    assert sorted(map(prefix.length, roots)) == [len(SYSTEM), len(prompt)]
    assert shared.run([*prompt, *talk(4)], "", tenant="cec")[1] == len(SYSTEM)
    assert shared.run([*prompt, *talk(4)], "", tenant="ann")[1] == len(prompt)


def test_a_head_that_another_adapter_computed_is_not_shared() -> None:
    shared = pool()
    shared.start([*SYSTEM, 4], adapter=1, tenant="ann")
    assert shared.start([*SYSTEM, 4], adapter=0, tenant="bob")[1] == 0
    assert shared.start([*SYSTEM, 4], adapter=1, tenant="cec")[1] == len(SYSTEM)


@pytest.mark.parametrize("is_idle", [False, True], ids=["running", "in RAM"])
def test_guessing_tokens_reveals_nothing_of_another_tenants_prompt(is_idle: bool) -> None:
    shared = pool(slots=8)
    slot, _ = shared.start([*SYSTEM, *SECRET, 0], session="private", tenant="ann")
    if is_idle:
        shared.end(slot)
        while shared.slots.tidy():
            pass
    for known in range(len(SECRET)):
        guesses = ([*SYSTEM, *SECRET[:known], guess, 0] for guess in range(10))
        found = {
            shared.slots.cached(prefix.pack(0, prompt[:-1], tenant="bob")) for prompt in guesses
        }
        assert found == {len(SYSTEM)}
        own = prefix.pack(0, [*SYSTEM, *SECRET[: known + 1]], tenant="ann")
        assert shared.slots.cached(own) == len(SYSTEM) + known + 1, "the tenant itself finds it"


def test_idle_prefill_is_kept_per_tenant() -> None:
    shared = pool(slots=2)
    ahead = IdlePrefill(shared.backend, shared.slots)
    ahead.add(IdlePrompt([*SYSTEM, *SECRET], 0, "ann.s", "ann"))
    while ahead.read(30):
        pass
    prompt = [*SYSTEM, *SECRET, 0]
    for tenant, found in (("ann", len(prompt) - 1), ("bob", len(SYSTEM))):
        assert shared.slots.cached(prefix.pack(0, prompt, tenant=tenant)) == found


def test_request_waits_for_another_tenants_head_only() -> None:
    run = Run(slots=3, heads=[SYSTEM])
    prompt = [*SYSTEM[:64], *[9] * 600]
    run.add("a", prompt, tenant="ann")
    run.scheduler.admit()
    run.add("b", prompt, tenant="ann")
    run.add("c", prompt, tenant="bob")
    assert [sequence.key for sequence in run.scheduler.admit()] == ["c"]
    run.add("d", [*SYSTEM, *[5] * 600], tenant="cec")
    assert [sequence.key for sequence in run.scheduler.admit()] == ["d"]


class World:
    """A schedule of two tenants; the tokens of ann are shifted by `shift`."""

    def __init__(self, seed: int, shift: int) -> None:
        self._dice = random.Random(seed)
        self._pool = pool(slots=self._dice.choice([1, 2, 4]), budget=self._dice.choice([0, 400]))
        self._shift = shift
        self._said: dict[str, list[list[int]]] = {"ann": [], "bob": []}
        self._running: list[int] = []
        self.seen: list[int] = []  # cached tokens of each of bob's prompts

    def run(self) -> "World":
        for _ in range(200):
            match self._dice.choice(["start", "start", "start", "end", "tidy"]):
                case "start" if self._pool.slots.can_acquire():
                    self._start(self._dice.choice(["ann", "bob"]))
                case "end" if self._running:
                    self._pool.end(self._running.pop(self._dice.randrange(len(self._running))))
                case "tidy":
                    self._pool.slots.tidy()
        return self

    def _start(self, tenant: str) -> None:
        dice, said = self._dice, self._said[tenant]
        shift = self._shift if tenant == "ann" else 0
        words = [word + shift for word in dice.choices([20, 21], k=dice.randint(1, 50))]
        head = dice.choice([[], BARE, SYSTEM, SYSTEM[: dice.randrange(len(SYSTEM))]])
        goes_on = bool(said) and dice.random() < 0.6
        prompt = [*(dice.choice(said) if goes_on else head), *words]
        session = dice.choice(["", f"{tenant}.1", f"{tenant}.2"])
        slot, cached = self._pool.start(prompt, dice.randrange(2), session, tenant)
        self._running.append(slot)
        said.append(prompt)
        if tenant == "bob":
            self.seen.append(cached)


@pytest.mark.parametrize("seed", range(100))
def test_tenant_observes_the_same_whatever_another_one_sends(seed: int) -> None:
    alike, apart = World(seed, shift=0).run(), World(seed, shift=1000).run()
    assert alike.seen == apart.seen
    assert any(alike.seen), "bob's own prompts are found again"
