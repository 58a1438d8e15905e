"""How tenants share slots and prefill steps, in random and in chosen schedules."""

import random
from collections import Counter
from itertools import groupby

import pytest

from services.inference.engine.scheduling.limits import DEFAULT_LIMITS as LIMITS
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.scheduling.tenant_shares import TenantShares, has_room
from tests.inference.engine.scheduling.test_scheduler import SchedulerRun

SLOTS = 4
MAX_PROMPT, MAX_ANSWER = 300, 120


def test_new_tenant_begins_with_the_least_of_the_others() -> None:
    shares = TenantShares()
    shares.join("ann", [])
    shares.charge("ann", 100)
    shares.join("bob", ["ann"])
    assert shares.used("bob") == shares.used("ann") == 100


def test_returning_tenant_keeps_its_excess_but_saves_nothing() -> None:
    shares = TenantShares()
    for tenant in ("ann", "bob", "eve"):
        shares.join(tenant, ["ann"] if tenant != "ann" else [])
    shares.charge("ann", 50)
    shares.charge("bob", 80)
    shares.join("bob", ["ann"])
    shares.join("eve", ["ann"])
    assert (shares.used("bob"), shares.used("eve")) == (80, 50)


def test_shares_are_forgotten_once_nobody_waits() -> None:
    shares = TenantShares()
    shares.join("ann", [])
    shares.charge("ann", 50)
    shares.join("ann", [])
    assert shares.used("ann") == 0


class TenantsRun(SchedulerRun):
    """Ends each sequence at its maximum, and counts the tokens computed for each tenant."""

    def __init__(self, slots: int = SLOTS) -> None:
        super().__init__(slots)
        self.tokens: Counter[str] = Counter()
        self.added: list[Sequence] = []
        self.ended: list[Sequence] = []

    def ask(self, tenant: str, prompt: int, max_tokens: int) -> Sequence:
        number = len(self.added)
        tokens = [number % 251, number // 251, *[7] * (prompt - 2)]  # no two share a prefix
        self.added.append(self.add(str(number), tokens, max_tokens, tenant=tenant))
        return self.added[-1]

    def run_step(self) -> list[Sequence]:
        """Return the sequences that ended."""
        tenants = {sequence.key: sequence.tenant for sequence in self.added}
        for key, tokens in self.step():
            self.tokens[tenants[key]] += tokens
        ended = [s for s in self.scheduler.running if s.generated and not s.remaining_tokens]
        for sequence in ended:
            self.end(sequence)
        return ended

    def end(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.ended.append(sequence)


@pytest.mark.parametrize("seed", range(4))
def test_backlogged_tenants_get_the_same_tokens(seed: int) -> None:
    """
    However long the prompts and answers of each are, and however many it sends. What differs can't
    be interrupted: an answer for each slot.
    """
    dice = random.Random(seed)
    run = TenantsRun()
    backlog = {"ann": 40, "bob": 6, "eve": 3}
    longest = {tenant: (dice.randint(3, MAX_PROMPT), dice.randint(1, MAX_ANSWER))
               for tenant in backlog}  # fmt: skip
    bound = SLOTS * (MAX_PROMPT + MAX_ANSWER) + LIMITS.max_reserved_tokens
    while min(run.tokens.values(), default=0) < 2 * bound:
        waiting = Counter(sequence.tenant for sequence in run.scheduler.waiting)
        for tenant, count in backlog.items():
            prompt, answer = longest[tenant]
            for _ in range(count - waiting[tenant]):
                run.ask(tenant, dice.randint(2, prompt), dice.randint(1, answer))
        run.run_step()
        if len(run.tokens) == len(backlog):
            assert max(run.tokens.values()) - min(run.tokens.values()) <= bound


@pytest.mark.parametrize("seed", range(4))
def test_every_sequence_ends_once_in_random_schedules(seed: int) -> None:
    dice = random.Random(seed)
    run = TenantsRun(slots=dice.randint(1, 5))
    for _ in range(300):
        if dice.random() < 0.3:
            tenant = dice.choice(["ann"] * 8 + ["bob", "eve"])
            run.ask(tenant, dice.randint(2, MAX_PROMPT), dice.randint(1, MAX_ANSWER))
        present = [*run.scheduler.waiting, *run.scheduler.running]
        if present and dice.random() < 0.05:
            run.end(dice.choice(present))  # a cancel
        run.scheduler.admit()
        if run.scheduler.running:
            run.run_step()
    while not run.scheduler.is_idle:
        run.run_step()
    assert sorted(map(id, run.ended)) == sorted(map(id, run.added))
    run.scheduler.check_invariants()


@pytest.mark.parametrize("seed", range(3))
def test_single_tenant_has_the_order_without_tenants(seed: int) -> None:
    """The order of slots by urgency, as a list that knows no tenants computes it."""
    dice = random.Random(seed)
    run = TenantsRun(slots=1)
    run.ask("ann", 10, 3)
    run.step()
    for _ in range(40):
        run.ask("ann", dice.randint(2, MAX_PROMPT), 3).received_at -= dice.random()
    while run.scheduler.waiting:
        waiting = list(run.scheduler.waiting)
        first = sorted(waiting[: LIMITS.max_ranked], key=lambda s: (
            s.remaining_prefill + LIMITS.aging_tokens_per_second * s.received_at
        ))  # fmt: skip
        while not run.run_step():
            pass
        run.scheduler.admit()
        assert first[0].slot is not None


def test_next_free_slot_goes_to_the_tenant_without_any() -> None:
    run = TenantsRun(slots=2)
    flood = [run.ask("ann", 5, 50) for _ in range(100)]
    run.step()
    bob = run.ask("bob", 200, 5)
    assert bob.queue_position == 1 and flood[2].queue_position == 2
    run.end(flood[0])
    run.step()
    assert bob.slot is not None


def test_free_slots_alternate_between_tenants() -> None:
    run = TenantsRun()
    for _ in range(20):
        run.ask("ann", 20, 20)
    for _ in range(20):
        run.ask("bob", 20, 20)
    run.scheduler.admit()
    assert Counter(s.tenant for s in run.scheduler.running) == {"ann": 2, "bob": 2}


def test_prefill_of_another_tenant_interrupts_long_prompts() -> None:
    run = TenantsRun()
    for _ in range(3):
        run.ask("ann", 3000, 1)
    run.steps(2)
    bob = run.ask("bob", 100, 1)
    run.steps(2)
    assert bob.is_prefilled


@pytest.mark.parametrize("flooding", ["eve", "bob"])
def test_tenant_saves_nothing_while_it_only_decodes(flooding: str) -> None:
    """Ann uses the slots that eve does not want. Then eve, or a new tenant, floods."""
    run = TenantsRun()
    run.ask("eve", 5, 1000)
    while run.tokens["ann"] < 6000:
        if not any(sequence.tenant == "ann" for sequence in run.scheduler.running):
            run.ask("ann", MAX_PROMPT, 2)
        run.run_step()
    flood = [run.ask(flooding, 50, 20) for _ in range(30)]
    run.steps(3)
    ann = run.ask("ann", 50, 20)
    while ann.slot is None:
        run.run_step()
    assert sum(sequence.slot is not None for sequence in flood) <= 2 * SLOTS


@pytest.mark.parametrize(("tenant", "is_held"), [("ann", True), ("bob", False)])
def test_stream_is_held_for_prompts_of_its_own_tenant_only(tenant: str, is_held: bool) -> None:
    run = TenantsRun()
    for _ in range(3):
        run.ask("ann", 200, 1)
    run.ask(tenant, 20, 9)
    while not any(sequence.generated for sequence in run.added):
        run.step()
    chunks = [run.step()[0][1] for _ in range(3)]
    assert (chunks == [200] * 3) is is_held and (1 in chunks) is not is_held


def test_queue_positions_alternate_between_tenants() -> None:
    run = TenantsRun(slots=1)
    run.ask("ann", 20, 20)
    run.step()
    waiting = [run.ask(tenant, 20, 20) for tenant in ("ann",) * 3 + ("bob",) * 3]
    order = [s.tenant for s in sorted(waiting, key=lambda s: s.queue_position)]
    assert sorted(s.queue_position for s in waiting) == [1, 2, 3, 4, 5, 6]
    assert [(tenant, len([*group])) for tenant, group in groupby(order)][0] == ("bob", 1)
    assert order[:4].count("bob") >= 2


@pytest.mark.parametrize("seed", range(4))
def test_places_always_have_room_for_a_share(seed: int) -> None:
    """The harmonic sum bounds how many places are taken, whatever comes and goes."""
    dice, maximum = random.Random(seed), 24
    used: Counter[str] = Counter()
    bound = sum(maximum / n for n in range(1, maximum + 1))
    for _ in range(3000):
        tenant = dice.choice(["ann"] * 20 + [str(n) for n in range(40)])
        others = {t for t in used if t != tenant}
        if has_room(tenant, used, maximum):
            used[tenant] += 1
        else:
            assert used.total() >= maximum and used[tenant] >= maximum // (len(others) + 1)
        if dice.random() < 0.3 and used:
            used -= Counter([dice.choice(sorted(used))])
        used = +used
        assert used.total() <= bound


def test_single_tenant_has_all_places_and_no_more() -> None:
    assert has_room("ann", {"ann": 23}, 24) and not has_room("ann", {"ann": 24}, 24)
    assert has_room("bob", {"ann": 24}, 24) and has_room("bob", {"ann": 24, "bob": 11}, 24)
    assert not has_room("bob", {"ann": 24, "bob": 12}, 24)
