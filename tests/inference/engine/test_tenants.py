"""Tenants share public prefixes, which no tenant wrote, and nothing else of the prefix cache."""

import random

import pytest

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.host_cache import MIN_SHARED_TOKENS
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from tests.inference.engine.kv_cache.test_slots import Pool, talk
from tests.inference.engine.scheduling.test_scheduler import SchedulerRun

BARE = [1, 2, 3] * MIN_SHARED_TOKENS  # the template's own start of a prompt
SYSTEM = [*BARE, *[7] * (2 * MIN_SHARED_TOKENS)]  # the same with the server's system prompt
PUBLIC_PREFIXES = (BARE, SYSTEM)
SECRET = [8, 1, 3, 3, 5, 5]


def pool(slots: int = 4, max_bytes: int = 10_000) -> Pool:
    return Pool(slots, max_bytes, PUBLIC_PREFIXES)


@pytest.mark.parametrize("head", [[], BARE, SYSTEM], ids=["none", "bare", "system"])
@pytest.mark.parametrize("slots", [1, 4], ids=["host cache", "slots"])
def test_tenants_share_public_prefix_only(head: list[int], slots: int) -> None:
    shared = pool(slots)
    prompt = [*head, *talk(1)]
    shared.run(prompt, "ann's", tenant="ann")
    for tenant in ("bob", "cec"):
        assert shared.run(prompt, f"{tenant}'s", tenant=tenant)[1] == len(head)
        shared.run(talk(9), "another", tenant=tenant)  # takes the only slot, if there is just one
    for tenant in ("ann", "bob", "cec"):
        assert shared.run([*prompt, 5], f"{tenant}'s", tenant=tenant)[1] == len(prompt)


def test_prefix_partly_written_by_tenant_is_not_shared() -> None:
    shared = pool()
    shared.run([*SYSTEM[:-1], *talk(1)], "a", tenant="ann")
    assert shared.run([*SYSTEM, *talk(2)], "b", tenant="bob")[1] == len(BARE)
    assert shared.run([*SYSTEM[:-1], *talk(3)], "c", tenant="ann")[1] == len(SYSTEM) - 1


def test_public_prefix_is_saved_once_two_tenants_shared_it() -> None:
    shared = pool(slots=3)
    for tenant in ("ann", "bob"):
        shared.start([*SYSTEM, *talk(1, 500)], owner=tenant, tenant=tenant)
    before = shared.backend.restored
    assert shared.start([*SYSTEM, *talk(1, 500)], owner="c", tenant="cec")[1] == len(SYSTEM)
    assert shared.backend.restored - before == len(SYSTEM)


def test_prefix_of_a_tenant_is_saved_for_that_tenant_only() -> None:
    shared = pool(slots=3)
    prompt = [*SYSTEM, *talk(1, 100)]
    for number in (2, 3):
        shared.run([*prompt, *talk(number, 500)], f"{number}", tenant="ann")
    shared.run([*prompt, *talk(2)], "bob's", tenant="bob")
    saved = [s.key for s in shared.slots.host_cache if not s.owner]
    assert sorted(map(prefix.length, saved)) == [len(SYSTEM), len(prompt)]
    assert shared.run([*prompt, *talk(4)], "", tenant="cec")[1] == len(SYSTEM)
    assert shared.run([*prompt, *talk(4)], "", tenant="ann")[1] == len(prompt)


def test_public_prefix_of_another_adapter_is_not_shared() -> None:
    shared = pool()
    shared.start([*SYSTEM, 4], adapter=1, tenant="ann")
    assert shared.start([*SYSTEM, 4], adapter=0, tenant="bob")[1] == 0
    assert shared.start([*SYSTEM, 4], adapter=1, tenant="cec")[1] == len(SYSTEM)


@pytest.mark.parametrize("is_idle", [False, True], ids=["running", "offloaded"])
def test_guessed_tokens_reveal_nothing_of_other_tenants_prompt(is_idle: bool) -> None:
    shared = pool(slots=8)
    slot, _ = shared.start([*SYSTEM, *SECRET, 0], owner="private", tenant="ann")
    if is_idle:
        shared.end(slot)
        while shared.slots.offload_next():
            pass
    for known in range(len(SECRET)):
        prompts = ([*SYSTEM, *SECRET[:known], guess] for guess in range(10))
        guesses = (prefix.pack(0, prompt, tenant="bob") for prompt in prompts)
        assert {shared.slots.cached_length(key) for key in guesses} == {len(SYSTEM)}
        own = prefix.pack(0, [*SYSTEM, *SECRET[: known + 1]], tenant="ann")
        assert shared.slots.cached_length(own) == len(SYSTEM) + known + 1, "positive control"


def test_idle_prefill_is_kept_per_tenant() -> None:
    shared = pool(slots=2)
    idle = IdlePrefill(shared.backend, shared.slots)
    idle.add(IdlePrompt([*SYSTEM, *SECRET], 0, "ann.s", "ann"))
    while idle.step(30):
        pass
    prompt = [*SYSTEM, *SECRET, 0]
    for tenant, found in (("ann", len(prompt) - 1), ("bob", len(SYSTEM))):
        assert shared.slots.cached_length(prefix.pack(0, prompt, tenant=tenant)) == found


def test_request_awaits_only_public_prefix_of_other_tenant() -> None:
    run = SchedulerRun(slots=3, public_prefixes=[SYSTEM])
    prompt = [*SYSTEM[:64], *[9] * 600]
    run.add("a", prompt, tenant="ann")
    run.scheduler.admit()
    run.add("b", prompt, tenant="ann")
    run.add("c", prompt, tenant="bob")
    assert [sequence.key for sequence in run.scheduler.admit()] == ["c"]
    run.add("d", [*SYSTEM, *[5] * 600], tenant="cec")
    assert [sequence.key for sequence in run.scheduler.admit()] == ["d"]


class TwoTenants:
    """Random requests of ann and bob. The tokens of ann are shifted by `shift`."""

    def __init__(self, seed: int, shift: int) -> None:
        self._dice = random.Random(seed)
        self._pool = pool(slots=self._dice.choice([1, 2, 4]), max_bytes=self._dice.choice([0, 400]))
        self._shift = shift
        self._prompts: dict[str, list[list[int]]] = {"ann": [], "bob": []}
        self._running: list[int] = []
        self.bob_cached: list[int] = []  # tokens, of each of his prompts

    def run(self) -> "TwoTenants":
        for _ in range(200):
            match self._dice.choice(["start", "start", "start", "end", "tidy"]):
                case "start" if self._pool.slots.can_acquire():
                    self._start(self._dice.choice(["ann", "bob"]))
                case "end" if self._running:
                    self._pool.end(self._running.pop(self._dice.randrange(len(self._running))))
                case "tidy":
                    self._pool.slots.offload_next()
        return self

    def _start(self, tenant: str) -> None:
        dice, earlier = self._dice, self._prompts[tenant]
        shift = self._shift if tenant == "ann" else 0
        words = [word + shift for word in dice.choices([20, 21], k=dice.randint(1, 50))]
        head = dice.choice([[], BARE, SYSTEM, SYSTEM[: dice.randrange(len(SYSTEM))]])
        continues = bool(earlier) and dice.random() < 0.6
        prompt = [*(dice.choice(earlier) if continues else head), *words]
        owner = dice.choice(["", f"{tenant}.1", f"{tenant}.2"])
        slot, cached = self._pool.start(prompt, dice.randrange(2), owner, tenant)
        self._running.append(slot)
        earlier.append(prompt)
        if tenant == "bob":
            self.bob_cached.append(cached)


@pytest.mark.parametrize("seed", range(100))
def test_tenant_observes_the_same_whatever_another_one_sends(seed: int) -> None:
    alike, apart = TwoTenants(seed, shift=0).run(), TwoTenants(seed, shift=1000).run()
    assert alike.bob_cached == apart.bob_cached
    assert any(alike.bob_cached), "bob's own prompts are found again"
