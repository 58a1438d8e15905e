import random
import time
from collections.abc import Iterable

import pytest

from services.contract.messages import Sampling
from services.inference.engine.backend import MAX_BATCH_TOKENS
from services.inference.engine.kv_cache.slots import Slots
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS as LIMITS
from services.inference.engine.scheduling.scheduler import AdapterRoundRobin, Scheduler
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.fake_backend import FakeBackend

TURN = LIMITS.adapter_turn_seconds
PREFILL_SECONDS = 0.001  # per token
DECODE_SECONDS = 0.01  # per step


class SchedulerRun:
    """A scheduler over a fake backend, whose steps take simulated times."""

    def __init__(
        self,
        slots: int = 2,
        step_overhead: int = 0,
        public_prefixes: Iterable[list[int]] = (),
        pads_steps: bool = False,
    ) -> None:
        self.backend = FakeBackend({"": b"x" * 1000}, context=10_000)
        held = Slots(self.backend, slots, 100_000, public_prefixes)
        self.backend.pads = pads_steps
        self.scheduler = Scheduler(held, max_padded_length=self.backend.max_padded_length)
        self.scheduler.step_overhead = step_overhead

    def add(
        self,
        key: str,
        prompt: int | list[int],
        max_tokens: int = 100,
        adapter: int = 0,
        is_deterministic: bool = False,
        tenant: str = "",
    ) -> Sequence:
        tokens = [ord(key)] * prompt if isinstance(prompt, int) else prompt
        sampling = Sampling(max_tokens=max_tokens)
        sampler = self.backend.sampler(sampling)
        sequence = Sequence(
            key,
            tokens,
            sampling,
            sampler,
            GeneratedAnswer(AnswerLimits(max_tokens), StopRules()),
            adapter,
            is_deterministic=is_deterministic,
            tenant=tenant,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int]]:
        """Compute a step and return its (key, tokens). Each sampled token is 1."""
        self.scheduler.admit()
        step = self.scheduler.schedule()
        self.backend.decode(step.chunks, padding=step.padding)
        seconds = step.tokens * PREFILL_SECONDS if step.is_prefill else DECODE_SECONDS
        self.last = step
        self.scheduler.commit(step)
        self.scheduler.record(step, seconds)
        for sequence, _ in step.scheduled:
            if sequence.computed_tokens == sequence.length:
                sequence.first_token_at = sequence.first_token_at or time.monotonic()
                sequence.generated.append(1)
        return [(sequence.key, len(chunk.tokens)) for sequence, chunk in step.scheduled]

    def steps(self, count: int) -> list[list[tuple[str, int]]]:
        return [self.step() for _ in range(count)]

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)


def test_prompt_is_prefilled_then_one_token_per_step() -> None:
    run = SchedulerRun()
    run.add("a", 20)
    assert run.steps(3) == [[("a", 20)], [("a", 1)], [("a", 1)]]


def test_long_prompt_is_prefilled_in_chunks() -> None:
    run = SchedulerRun()
    run.add("a", 1000)
    steps = run.steps(5)
    assert all(key == "a" and tokens <= 512 for step in steps for key, tokens in step)
    assert sum(tokens for step in steps for _, tokens in step if tokens > 1) == 1000


def test_few_last_tokens_of_a_prompt_join_the_chunk_before() -> None:
    run = SchedulerRun()
    limit = run.scheduler.budget.chunk
    run.add("a", limit + limit // 4)
    assert run.step() == [("a", limit + limit // 4)]


def test_more_last_tokens_have_a_chunk_of_their_own() -> None:
    run = SchedulerRun()
    limit = run.scheduler.budget.chunk
    run.add("a", limit + limit // 4 + 1)
    assert run.step() == [("a", limit)]


@pytest.mark.parametrize(
    ("tokens", "chunks"), [(63, [63]), (64, [48, 16]), (111, [48, 63]), (112, [48, 48, 16])]
)
def test_deterministic_chunks_are_blocks_of_fewer_than_64_tokens(
    tokens: int, chunks: list[int]
) -> None:
    run = SchedulerRun()
    run.add("a", tokens, is_deterministic=True)
    assert run.steps(len(chunks)) == [[("a", chunk)] for chunk in chunks]


def test_deterministic_prefill_leaves_no_single_token() -> None:
    run = SchedulerRun()
    sequence = run.add("a", 33, is_deterministic=True)
    sequence.slot = 0
    assert len(sequence.next_chunk(32).tokens) == 33


def test_deterministic_prefill_reuses_whole_blocks() -> None:
    run = SchedulerRun()
    first = run.add("a", 60, is_deterministic=True)
    run.steps(2)
    run.remove(first)
    again = run.add("a", [*first.prompt, 1, 2, 3], is_deterministic=True)
    assert run.step() == [("a", 63 - 48)]
    assert again.cached_tokens == 48


def test_last_tokens_of_a_prompt_do_not_exceed_a_batch() -> None:
    run = SchedulerRun()
    run.scheduler.budget.record_prefill(10_000, 1.0, is_interleaved=False)
    run.add("a", MAX_BATCH_TOKENS + 1)
    assert run.steps(2) == [[("a", MAX_BATCH_TOKENS)], [("a", 1)]]


def test_concurrent_prompts_are_prefilled_then_decoded_as_batch() -> None:
    run = SchedulerRun(slots=4)
    for key in "abcd":
        run.add(key, 20)
    assert run.steps(4) == [[(key, 20)] for key in "abcd"]
    assert run.step() == [(key, 1) for key in "abcd"]


def test_prefill_beside_older_stream_is_paid_for_by_decoding() -> None:
    run = SchedulerRun()
    run.add("a", 20)
    run.steps(5)
    run.add("b", 300)
    during: list[list[tuple[str, int]]] = []
    while not during or len(during[-1]) == 1:
        during.append(run.step())
    chunks = [tokens for ((key, tokens), *_) in during if key == "b"]
    decoded = sum(1 for step in during if step[0][0] == "a")
    assert sum(chunks) >= 300
    unpaid = (sum(chunks) - max(chunks)) * PREFILL_SECONDS
    assert unpaid <= 1.5 * decoded * DECODE_SECONDS


def decoded_beside(prompts: int, tenant: str = "") -> int:
    """Return how many tokens a stream gets while prompts of a tenant are prefilled."""
    run = SchedulerRun(slots=17)
    run.add("s", 20)
    run.steps(5)
    waiting = [run.add(chr(ord("a") + number), 600, tenant=tenant) for number in range(prompts)]
    decoded = 0
    while any(not sequence.generated for sequence in waiting):
        decoded += run.step() == [("s", 1)]
        for sequence in run.scheduler.running[1:]:
            if sequence.generated:
                run.remove(sequence)
    return decoded


def test_prompts_that_wait_together_slow_streams_down_more() -> None:
    one, four = decoded_beside(1), decoded_beside(4)
    assert four < 2.5 * one


def test_stream_goes_on_beside_many_prompts() -> None:
    assert decoded_beside(16) > 2 * decoded_beside(4)


def test_stream_of_another_tenant_is_slowed_down_as_by_one_prompt() -> None:
    one, eight = decoded_beside(1, "other"), decoded_beside(8, "other")
    assert eight > 6 * one


def test_stream_is_not_held_for_long_prompt() -> None:
    run = SchedulerRun()
    run.add("a", 20)
    run.add("b", int(2 * LIMITS.max_held_prompt_seconds / PREFILL_SECONDS))
    assert run.step() == [("a", 20)]
    assert [("a", 1)] in run.steps(3)


def burst(prompts: int, seconds: float) -> SchedulerRun:
    """Prefill the first of several prompts, whose prefill takes so long each."""
    run = SchedulerRun(slots=16)
    run.scheduler.budget.record_prefill(10_000, 10_000 * PREFILL_SECONDS, is_interleaved=False)
    for number in range(prompts):
        run.add(chr(ord("a") + number), int(seconds / PREFILL_SECONDS))
    while not run.scheduler.running or not run.scheduler.running[0].generated:
        run.step()
    return run


def test_stream_is_held_for_many_short_prompts() -> None:
    count = int(LIMITS.max_hold_seconds / LIMITS.max_held_prompt_seconds)
    run = burst(count + 1, 0.9 * LIMITS.max_held_prompt_seconds)
    while any(not sequence.is_prefilled for sequence in run.scheduler.running):
        assert run.step() != [("a", 1)]


def test_stream_goes_on_beside_too_many_short_prompts() -> None:
    run = burst(14, 0.5 * LIMITS.max_held_prompt_seconds)
    assert [("a", 1)] in run.steps(3)


def test_stream_that_went_on_is_not_held_later() -> None:
    run = burst(4, 0.9 * LIMITS.max_held_prompt_seconds)
    run.scheduler.running[0].first_token_at -= 0.5 * LIMITS.max_hold_seconds
    assert [("a", 1)] in run.steps(3)


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    run = SchedulerRun(slots=3)
    run.add("a", 20)
    run.add("b", 30)
    run.add("c", int(2 * LIMITS.max_hold_seconds / PREFILL_SECONDS))
    assert run.steps(2) == [[("a", 20)], [("b", 30)]], "held for the short one"
    assert [("a", 1), ("b", 1)] in run.steps(3), "not for the long one"


def test_stream_is_not_held_for_sequence_from_the_queue() -> None:
    run = SchedulerRun()
    first, _ = run.add("a", 20), run.add("b", 20)
    queued = run.add("c", 300)
    run.steps(4)
    run.remove(first)
    run.scheduler.admit()
    queued.started_at += 1  # a second later
    steps = run.steps(6)
    assert [("b", 1)] in steps[:3]


def test_shortest_prompt_is_prefilled_first() -> None:
    run = SchedulerRun(slots=3)
    for key, length in (("a", 90), ("b", 30), ("c", 60)):
        run.add(key, length)
    assert run.steps(3) == [[("b", 30)], [("c", 60)], [("a", 90)]]


def test_aged_prompt_goes_before_shorter_one() -> None:
    run = SchedulerRun(slots=1)
    long, short = run.add("a", 500), run.add("b", 20)
    long.received_at -= 1.5
    run.step()
    assert long.slot is not None and short.slot is None


def test_sequence_without_slot_waits_for_next_free_one() -> None:
    run = SchedulerRun(slots=1)
    first, second = run.add("a", 3), run.add("b", 3)
    assert run.step() == [("a", 3)]
    assert list(run.scheduler.waiting) == [second]
    run.remove(first)
    assert run.step() == [("b", 3)]
    run.remove(second)
    assert run.scheduler.is_idle
    run.scheduler.check_invariants()


def test_queue_positions_follow_the_order_of_admission() -> None:
    run = SchedulerRun(slots=1)
    running = run.add("a", 50)
    run.steps(2)
    waiting = [run.add(key, length) for key, length in (("b", 90), ("c", 30), ("d", 60))]
    assert [s.queue_position for s in (running, *waiting)] == [0, 3, 1, 2]
    run.remove(waiting[1])
    assert [waiting[0].queue_position, waiting[2].queue_position] == [2, 1]
    run.remove(running)
    run.step()
    assert [waiting[0].queue_position, waiting[2].queue_position, waiting[2].slot] == [1, 0, 0]


def test_cached_long_prompt_goes_before_shorter_new_one() -> None:
    run = SchedulerRun(slots=1)
    first = run.add("b", 100)
    run.step()
    known, new = run.add("c", [*first.prompt, 5, 6]), run.add("d", 50)
    assert (known.queue_position, new.queue_position) == (1, 2)


def test_waiting_sequence_is_removed_from_middle_of_queue() -> None:
    run = SchedulerRun(slots=1)
    _, second, third = (run.add(key, 3) for key in "abc")
    run.step()
    run.remove(second)
    assert list(run.scheduler.waiting) == [third]
    assert run.scheduler.find("b") is None
    run.scheduler.check_invariants()


def test_concurrent_prompts_prefill_common_prefix_once() -> None:
    run = SchedulerRun(slots=8)
    sequences = [run.add(key, [7] * 700 + [ord(key)] * 5) for key in "abcdefgh"]
    while not all(sequence.generated for sequence in sequences):
        run.step()
    decoded = sum(len(sequence.generated) - 1 for sequence in sequences)
    assert run.backend.computed - decoded == 705 + 7 * 5


def test_waiter_for_prefix_starts_when_its_source_is_removed() -> None:
    run = SchedulerRun()
    first, second = run.add("a", [7] * 700), run.add("b", [7] * 700)
    ((_, computed),) = run.step()
    assert list(run.scheduler.waiting) == [second]
    run.remove(first)
    assert run.step()[0][0] == "b" and second.cached_tokens == computed


def test_short_common_prefix_is_not_waited_for() -> None:
    run = SchedulerRun()
    for key in "ab":
        run.add(key, [7] * 20 + [ord(key)])
    run.step()
    assert not run.scheduler.waiting


def test_streams_are_sorted_by_slot_and_gaps_are_closed() -> None:
    run = SchedulerRun(slots=4)
    sequences = [run.add(key, 20) for key in "abcd"]
    run.steps(4)
    run.remove(sequences[1])
    run.step()
    assert [chunk.slot for chunk in run.backend.steps[-1]] == [0, 1, 2]
    run.steps(3)
    run.scheduler.check_invariants()


def padded(run: SchedulerRun) -> list[int]:
    """Compute a step, and return the slots that pad it."""
    run.step()
    return run.backend.padded[-1]


def test_step_is_padded_where_streams_have_ended() -> None:
    run = SchedulerRun(slots=8, pads_steps=True)
    sequences = [run.add(key, 20) for key in "abcdefgh"]
    run.steps(8)
    for number in (1, 4):
        run.remove(sequences[number])
    assert padded(run) == [1, 4]
    assert [chunk.slot for chunk in run.last.chunks] == [0, 2, 3, 5, 6, 7]
    run.add("i", 20)
    run.step()
    assert padded(run) == [4], "a stream that begins takes a slot of the block"
    run.scheduler.check_invariants()


def test_gaps_between_few_streams_are_closed() -> None:
    run = SchedulerRun(slots=8, pads_steps=True)
    sequences = [run.add(key, 20) for key in "abcdefgh"]
    run.steps(8)
    for number in (1, 3, 4, 5):
        run.remove(sequences[number])
    run.steps(4)
    assert not run.last.padding
    assert [chunk.slot for chunk in run.last.chunks] == [0, 1, 2, 3]


def test_step_is_not_padded_with_a_much_longer_conversation() -> None:
    run = SchedulerRun(slots=8, pads_steps=True)
    sequences = [run.add(key, 20) for key in "abcdefg"]
    long = run.add("h", 200)
    while not long.generated:
        run.step()
    run.remove(long)
    assert padded(run) == [], "its slot is in the block"
    run.remove(sequences[2])
    run.step()
    assert padded(run) == [], "the gap is closed instead"
    assert [chunk.slot for chunk in run.last.chunks] == [0, 1, 2, 3, 4, 5]


def test_padded_slot_needs_room_for_its_token() -> None:
    run = SchedulerRun(slots=8, pads_steps=True)
    sequences = [run.add(key, 21 if key == "b" else 20) for key in "abcdefgh"]
    while not all(sequence.generated for sequence in sequences):
        run.step()
    run.remove(sequences[1])
    assert padded(run) == [], "it would be longer than the others"
    run.step()
    assert [chunk.slot for chunk in run.last.chunks] == [0, 1, 2, 3, 4, 5, 6], "moved"


def test_interrupted_prefill_counts_as_computed() -> None:
    run = SchedulerRun(slots=2)
    run.add("a", 20)
    run.steps(4)
    run.add("b", 1000, tenant="other")
    run.scheduler.admit()
    step = run.scheduler.schedule()
    assert step.is_interleaved
    run.scheduler.record_interrupted(step, 1.0)
    assert not run.scheduler.schedule().is_prefill, "the stream has waited"
    assert run.scheduler._shares.used("other") >= step.tokens


def test_long_sequence_near_its_end_is_not_moved() -> None:
    run = SchedulerRun(slots=3)
    first, second = run.add("a", 20), run.add("b", 20)
    last = run.add("c", LIMITS.min_chunk_tokens * 20, max_tokens=3)
    while not last.generated:
        run.step()
    run.remove(second)
    run.step()
    assert [chunk.slot for chunk in run.backend.steps[-1]] == [0, 2]
    assert first.slot == 0


def keys(steps: list[list[tuple[str, int]]]) -> list[str]:
    return ["".join(key for key, _ in step) for step in steps]


def test_streams_are_decoded_by_adapter_in_round_robin() -> None:
    run = SchedulerRun(slots=6)
    for number, key in enumerate("abcdef"):
        run.add(key, 20, adapter=number % 2)
    run.steps(6)
    batches = ["".join(sorted(step)) for step in keys(run.steps(40))]
    turn = round(TURN / DECODE_SECONDS)
    assert batches == (["ace"] * turn + ["bdf"] * turn) * (20 // turn)


def test_interleaved_slots_of_adapters_are_regrouped() -> None:
    run = SchedulerRun(slots=6)
    sequences = [run.add(key, 20, adapter="abcabc".index(key)) for key in "abcabc"]
    run.steps(6 + 30)
    slots = {a: sorted(s.slot or 0 for s in sequences if s.adapter == a) for a in range(3)}
    assert all(last - first == 1 for first, last in slots.values())
    for sequence in sequences:
        run.remove(sequence)
    run.scheduler.check_invariants()


def test_prefix_of_one_adapter_is_not_used_by_another() -> None:
    run = SchedulerRun(slots=3)
    prompt = [7] * 100
    first, second = run.add("a", prompt), run.add("b", prompt, adapter=1)
    run.steps(2)
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    run.remove(second)
    again = run.add("c", prompt, adapter=1)
    run.step()
    assert again.cached_tokens == len(prompt) - 1


def test_prefill_of_one_adapter_beside_streams_of_another() -> None:
    run = SchedulerRun()
    run.add("a", 20)
    run.steps(5)
    late = run.add("b", 100, adapter=1)
    seen = keys(run.steps(40))
    assert "a" in seen[: seen.index("b") + 5] and late.generated
    assert set(seen[-12:]) == {"a", "b"}


def test_short_prompts_share_a_step_if_overhead_is_larger() -> None:
    run = SchedulerRun(slots=4, step_overhead=50)
    for key in "abcd":
        run.add(key, 30)
    assert run.steps(2) == [[(key, 30) for key in "abcd"], [(key, 1) for key in "abcd"]]


def test_prefill_rate_counts_all_tokens_of_a_step() -> None:
    run = SchedulerRun(slots=4, step_overhead=50)
    for key in "abcd":
        run.add(key, LIMITS.min_chunk_tokens)
    before = estimate(run)
    run.step()
    alone = SchedulerRun()
    alone.add("a", 4 * LIMITS.min_chunk_tokens)
    alone.step()
    assert estimate(run) == estimate(alone) < before


def estimate(run: SchedulerRun) -> float:
    """Return the estimated seconds of a prefill of 100 tokens."""
    return run.scheduler.budget.prefill_seconds(100)


def test_shorter_prompts_recompute_cached_tokens_to_match() -> None:
    run = SchedulerRun(slots=4, step_overhead=50)
    first = run.add("a", [7] * 60)
    run.steps(2)
    run.remove(first)
    lengths = {"b": 9, "c": 4, "d": 7}
    sequences = [run.add(key, [*first.prompt, *[ord(key)] * n]) for key, n in lengths.items()]
    assert sorted(run.step()) == [("b", 9), ("c", 9), ("d", 9)]
    assert [sequence.cached_tokens for sequence in sequences] == [60, 60, 60]
    run.step()
    run.scheduler.check_invariants()
    cells = [run.backend.cells[sequence.slot or 0][:-1] for sequence in sequences]
    assert cells == [sequence.prompt for sequence in sequences]


def test_uncached_prompt_is_not_batched_with_longer_one() -> None:
    run = SchedulerRun(slots=2, step_overhead=50)
    run.add("a", 20)
    run.add("b", 10)
    assert run.steps(2) == [[("b", 10)], [("a", 20)]]


def test_prompt_that_adds_more_than_overhead_is_not_batched() -> None:
    run = SchedulerRun(slots=3, step_overhead=50)
    first = run.add("a", [7] * 60)
    run.steps(2)
    run.remove(first)
    for key, own in (("b", 5), ("c", 30), ("d", 5)):
        run.add(key, [*first.prompt, *[ord(key)] * own]).received_at = first.received_at
    assert run.steps(2) == [[("b", 5), ("d", 5)], [("c", 30)]]


def test_prompt_as_long_as_overhead_is_not_batched() -> None:
    run = SchedulerRun(slots=2, step_overhead=50)
    run.add("a", 50)
    run.add("b", 50)
    assert run.steps(2) == [[("a", 50)], [("b", 50)]]


def test_other_adapter_or_deterministic_is_not_batched() -> None:
    run = SchedulerRun(slots=4, step_overhead=50)
    run.add("a", 20)
    run.add("b", 20)
    run.add("c", 20, adapter=1)
    run.add("d", 20, is_deterministic=True)
    assert run.steps(3) == [[("a", 20), ("b", 20)], [("c", 20)], [("d", 20)]]


@pytest.mark.parametrize(("ended", "together"), [("ab", 2), ("ac", 1)])
def test_only_neighbouring_slots_are_batched(ended: str, together: int) -> None:
    run = SchedulerRun(slots=4, step_overhead=50)
    sequences = {key: run.add(key, 20) for key in "abcd"}
    run.step()
    for key in ended:
        run.remove(sequences[key])
    late = [run.add(key, 5) for key in "ef"]
    assert max(len(step) for step in run.steps(40) if step[0][1] > 1) == together
    assert all(sequence.generated for sequence in late)


def test_batched_prompts_do_not_exceed_a_chunk() -> None:
    run = SchedulerRun(slots=16, step_overhead=50)
    for key in "abcdefghijklmnop":
        run.add(key, 40)
    chunk = run.scheduler.budget.chunk
    assert len(run.step()) == chunk // 40 < 16


def test_each_slot_holds_its_own_sequence_after_batching() -> None:
    chance = random.Random(1)
    run = SchedulerRun(slots=6, step_overhead=100)
    running: list[Sequence] = []
    for _ in range(200):
        for key in "abcd"[: chance.randrange(4)]:
            start = [7] * chance.choice((0, 40, 100))
            own = [chance.randrange(97, 123)] * chance.randrange(1, 30)
            running.append(run.add(key, [*start, *own]))
        run.steps(chance.randrange(4))
        while len(running) > 6:
            run.remove(running.pop(chance.randrange(len(running))))
        for sequence in running:
            if sequence.slot is not None:
                tokens = [*sequence.prompt, *sequence.generated]
                assert run.backend.cells[sequence.slot] == tokens[: sequence.computed_tokens]
    assert max(len(step) for step in run.backend.steps if len(step[0].tokens) > 1) > 2


def turns(
    round_robin: AdapterRoundRobin, adapters: set[int], seconds: float, steps: int
) -> list[int]:
    """Return the adapter of each step, where a step takes `seconds`."""
    taken = []
    for _ in range(steps):
        taken.append(round_robin.next(adapters))
        round_robin.record_decode(seconds)
    return taken


def test_single_adapter_has_every_turn() -> None:
    assert turns(AdapterRoundRobin(TURN), {3}, TURN, 4) == [3, 3, 3, 3]


def test_adapters_take_turns_in_turns() -> None:
    assert turns(AdapterRoundRobin(TURN), {0, 2, 5}, TURN, 7) == [0, 2, 5, 0, 2, 5, 0]


def test_fast_steps_share_a_turn() -> None:
    assert turns(AdapterRoundRobin(TURN), {0, 1}, TURN / 2, 6) == [0, 0, 1, 1, 0, 0]


def test_adapter_without_streams_is_skipped_at_once() -> None:
    round_robin = AdapterRoundRobin(TURN)
    assert turns(round_robin, {0, 1}, TURN * 0.3, 1) == [0]
    assert turns(round_robin, {1, 2}, TURN * 0.3, 5) == [1, 1, 1, 1, 2]


def test_new_adapter_waits_at_most_one_turn_of_each() -> None:
    round_robin = AdapterRoundRobin(TURN)
    turns(round_robin, {1, 3}, TURN, 10)
    assert set(turns(round_robin, {1, 2, 3}, TURN, 3)) == {1, 2, 3}
