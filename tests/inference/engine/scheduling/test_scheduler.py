import random
import time
from collections.abc import Iterable

import pytest

from services.contract.messages import Sampling
from services.inference.engine.kv_cache.slots import Slots
from services.inference.engine.scheduling.adapter_turns import TURN
from services.inference.engine.scheduling.prefill_budget import CHUNK_MIN
from services.inference.engine.scheduling.scheduler import HELD, Scheduler
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.fake_backend import FakeBackend

READ = 0.001  # seconds that a token takes to read
DECODE = 0.01  # seconds that a decode step takes


class Run:
    """A scheduler over a scripted model whose steps take the time that is written here."""

    def __init__(
        self, slots: int = 2, fixed_cost: int = 0, heads: Iterable[list[int]] = ()
    ) -> None:
        self.backend = FakeBackend({"": b"x" * 1000}, context=10_000)
        self.scheduler = Scheduler(Slots(self.backend, slots, 100_000, heads))
        self.scheduler.fixed_cost = fixed_cost

    def add(
        self,
        key: str,
        prompt: int | list[int],
        max_tokens: int = 100,
        adapter: int = 0,
        is_exact: bool = False,
        tenant: str = "",
    ) -> Sequence:
        tokens = [ord(key)] * prompt if isinstance(prompt, int) else prompt
        sampling = Sampling(max_tokens=max_tokens)
        sampler = self.backend.sampler(sampling)
        sequence = Sequence(
            key, tokens, sampling, sampler, adapter, is_exact=is_exact, tenant=tenant
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int]]:
        """Every sequence that is computed to its end says token 1."""
        self.scheduler.admit()
        step = self.scheduler.plan()
        self.backend.decode([p.chunk for p in step.planned])
        tokens = sum(len(p.chunk.tokens) for p in step.planned)
        self.scheduler.commit(step, tokens * READ if step.is_read else DECODE)
        for sequence, _ in step.planned:
            if sequence.computed == sequence.length:
                sequence.first_token = sequence.first_token or time.monotonic()
                sequence.generated.append(1)
        return [(p.sequence.key, len(p.chunk.tokens)) for p in step.planned]

    def steps(self, count: int) -> list[list[tuple[str, int]]]:
        return [self.step() for _ in range(count)]

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)


def test_a_prompt_is_read_and_then_one_token_a_step() -> None:
    run = Run()
    run.add("a", 20)
    assert run.steps(3) == [[("a", 20)], [("a", 1)], [("a", 1)]]


def test_a_long_prompt_is_read_in_chunks() -> None:
    run = Run()
    run.add("a", 1000)
    read = run.steps(5)
    assert all(key == "a" and tokens <= 512 for step in read for key, tokens in step)
    assert sum(tokens for step in read for _, tokens in step if tokens > 1) == 1000


def test_those_who_come_together_are_read_first_and_then_decode_together() -> None:
    run = Run(slots=4)
    for key in "abcd":
        run.add(key, 20)
    assert run.steps(4) == [[(key, 20)] for key in "abcd"]
    assert run.step() == [(key, 1) for key in "abcd"]


def test_beside_an_older_stream_a_prompt_is_read_at_a_pace_that_it_can_bear() -> None:
    run = Run()
    run.add("a", 20)
    run.steps(5)
    run.add("b", 300)
    during: list[list[tuple[str, int]]] = []
    while not during or len(during[-1]) == 1:
        during.append(run.step())
    read = [tokens for ((key, tokens), *_) in during if key == "b"]
    stream = sum(1 for step in during if step[0][0] == "a")
    assert sum(read) >= 300
    assert sum(read) * READ <= 1.5 * stream * DECODE + max(read) * READ


def test_a_stream_is_not_held_for_a_long_prompt_that_came_before_it_began() -> None:
    run = Run()
    run.add("a", 20)
    run.add("b", int(2 * HELD / READ))
    assert run.step() == [("a", 20)]
    assert [("a", 1)] in run.steps(3)


def test_a_stream_is_not_held_for_who_waited_in_the_queue_before_it_began() -> None:
    run = Run(slots=2)
    first, _ = run.add("a", 20), run.add("b", 20)
    queued = run.add("c", 300)
    run.steps(4)
    run.end(first)
    run.scheduler.admit()
    queued.started += 1  # a second later
    steps = run.steps(6)
    assert [("b", 1)] in steps[:3]


def test_the_shortest_prompt_is_read_first() -> None:
    run = Run(slots=3)
    for key, length in (("a", 90), ("b", 30), ("c", 60)):
        run.add(key, length)
    assert run.steps(3) == [[("b", 30)], [("c", 60)], [("a", 90)]]


def test_who_waits_long_goes_before_a_shorter_one() -> None:
    run = Run(slots=1)
    long, short = run.add("a", 500), run.add("b", 20)
    long.received -= 1.5
    run.step()
    assert long.slot is not None and short.slot is None


def test_who_finds_no_slot_waits_and_gets_the_next_one() -> None:
    run = Run(slots=1)
    first, second = run.add("a", 3), run.add("b", 3)
    assert run.step() == [("a", 3)]
    assert list(run.scheduler.waiting) == [second]
    run.end(first)
    assert run.step() == [("b", 3)]
    run.end(second)
    assert run.scheduler.is_idle
    run.scheduler.check()


def test_places_in_the_queue_are_those_in_which_slots_are_given() -> None:
    run = Run(slots=1)
    running = run.add("a", 50)
    run.steps(2)
    waiting = [run.add(key, length) for key, length in (("b", 90), ("c", 30), ("d", 60))]
    assert [s.place for s in (running, *waiting)] == [0, 3, 1, 2]
    run.end(waiting[1])
    assert [waiting[0].place, waiting[2].place] == [2, 1]
    run.end(running)
    run.step()
    assert [waiting[0].place, waiting[2].place, waiting[2].slot] == [1, 0, 0]


def test_a_long_conversation_that_is_known_is_before_a_shorter_new_one() -> None:
    run = Run(slots=1)
    first = run.add("b", 100)
    run.step()
    known, new = run.add("c", [*first.prompt, 5, 6]), run.add("d", 50)
    assert (known.place, new.place) == (1, 2)


def test_a_waiting_sequence_can_be_removed_anywhere_in_the_queue() -> None:
    run = Run(slots=1)
    _, second, third = (run.add(key, 3) for key in "abc")
    run.step()
    run.end(second)
    assert list(run.scheduler.waiting) == [third]
    assert run.scheduler.find("b") is None
    run.scheduler.check()


def test_those_who_arrive_together_read_their_common_beginning_once() -> None:
    run = Run(slots=8)
    sequences = [run.add(key, [7] * 700 + [ord(key)] * 5) for key in "abcdefgh"]
    while not all(sequence.generated for sequence in sequences):
        run.step()
    read = sum(len(chunk.tokens) for step in run.backend.steps for chunk in step)
    decoded = sum(len(sequence.generated) - 1 for sequence in sequences)
    assert read - decoded == 705 + 7 * 5


def test_who_waits_for_a_beginning_is_not_held_up_when_its_reader_leaves() -> None:
    run = Run()
    first, second = run.add("a", [7] * 700), run.add("b", [7] * 700)
    ((_, read),) = run.step()
    assert list(run.scheduler.waiting) == [second]
    run.end(first)
    assert run.step()[0][0] == "b" and second.cached == read


def test_a_short_common_beginning_is_not_waited_for() -> None:
    run = Run()
    for key in "ab":
        run.add(key, [7] * 20 + [ord(key)])
    run.step()
    assert not run.scheduler.waiting


def test_streams_are_computed_in_the_order_of_their_slots_and_close_up() -> None:
    run = Run(slots=4)
    sequences = [run.add(key, 20) for key in "abcd"]
    run.steps(4)
    run.end(sequences[1])
    run.step()
    assert [chunk.slot for chunk in run.backend.steps[-1]] == [0, 1, 2]
    run.steps(3)
    run.scheduler.check()


def test_a_long_sequence_that_is_about_to_end_is_not_moved() -> None:
    run = Run(slots=3)
    first, second = run.add("a", 20), run.add("b", 20)
    last = run.add("c", CHUNK_MIN * 20, max_tokens=3)
    while not last.generated:
        run.step()
    run.end(second)
    run.step()
    assert [chunk.slot for chunk in run.backend.steps[-1]] == [0, 2]
    assert first.slot == 0


def keys(steps: list[list[tuple[str, int]]]) -> list[str]:
    return ["".join(key for key, _ in step) for step in steps]


def test_the_streams_of_one_adapter_are_decoded_together_and_the_adapters_take_turns() -> None:
    run = Run(slots=6)
    for number, key in enumerate("abcdef"):
        run.add(key, 20, adapter=number % 2)
    run.steps(6)
    seen = ["".join(sorted(step)) for step in keys(run.steps(40))]
    turn = round(TURN / DECODE)
    assert seen == (["ace"] * turn + ["bdf"] * turn) * (20 // turn)


def test_streams_of_one_adapter_that_stand_between_others_move_together() -> None:
    run = Run(slots=6)
    sequences = [run.add(key, 20, adapter="abcabc".index(key)) for key in "abcabc"]
    run.steps(6 + 30)
    slots = {a: sorted(s.slot or 0 for s in sequences if s.adapter == a) for a in range(3)}
    assert all(last - first == 1 for first, last in slots.values())
    for sequence in sequences:
        run.end(sequence)
    run.scheduler.check()


def test_no_prompt_is_shared_with_another_adapter() -> None:
    run = Run(slots=3)
    prompt = [7] * 100
    first, second = run.add("a", prompt), run.add("b", prompt, adapter=1)
    run.steps(2)
    assert (first.cached, second.cached) == (0, 0)
    run.end(second)
    again = run.add("c", prompt, adapter=1)
    run.step()
    assert again.cached == len(prompt) - 1


def test_a_prompt_of_one_adapter_is_read_beside_the_streams_of_another() -> None:
    run = Run()
    run.add("a", 20)
    run.steps(5)
    late = run.add("b", 100, adapter=1)
    seen = keys(run.steps(40))
    assert "a" in seen[: seen.index("b") + 5] and late.generated
    assert set(seen[-12:]) == {"a", "b"}


def test_short_prompts_are_read_in_one_step_where_a_step_costs_more_than_they_do() -> None:
    run = Run(slots=4, fixed_cost=50)
    for key in "abcd":
        run.add(key, 30)
    assert run.steps(2) == [[(key, 30) for key in "abcd"], [(key, 1) for key in "abcd"]]


def test_how_fast_prompts_are_read_is_learned_from_all_that_a_step_read() -> None:
    run = Run(slots=4, fixed_cost=50)
    for key in "abcd":
        run.add(key, CHUNK_MIN)
    before = run.scheduler.pace.seconds(100)
    run.step()
    alone = Run()
    alone.add("a", 4 * CHUNK_MIN)
    alone.step()
    assert run.scheduler.pace.seconds(100) == alone.scheduler.pace.seconds(100) < before


def test_of_the_shorter_prompts_some_known_tokens_are_read_again() -> None:
    run = Run(slots=4, fixed_cost=50)
    first = run.add("a", [7] * 60)
    run.steps(2)
    run.end(first)
    lengths = {"b": 9, "c": 4, "d": 7}
    sequences = [run.add(key, [*first.prompt, *[ord(key)] * n]) for key, n in lengths.items()]
    assert sorted(run.step()) == [("b", 9), ("c", 9), ("d", 9)]
    assert [sequence.cached for sequence in sequences] == [60, 60, 60]
    run.step()
    run.scheduler.check()
    held = [run.backend.cells[sequence.slot or 0][:-1] for sequence in sequences]
    assert held == [sequence.prompt for sequence in sequences]


def test_a_prompt_of_which_nothing_is_known_is_not_read_with_a_longer_one() -> None:
    run = Run(slots=2, fixed_cost=50)
    run.add("a", 20)
    run.add("b", 10)
    assert run.steps(2) == [[("b", 10)], [("a", 20)]]


def test_who_would_cost_the_others_more_than_a_step_is_read_alone() -> None:
    run = Run(slots=3, fixed_cost=50)
    first = run.add("a", [7] * 60)
    run.steps(2)
    run.end(first)
    for key, own in (("b", 5), ("c", 30), ("d", 5)):
        run.add(key, [*first.prompt, *[ord(key)] * own]).received = first.received
    assert run.steps(2) == [[("b", 5), ("d", 5)], [("c", 30)]]


def test_a_prompt_that_costs_as_much_as_a_step_is_read_alone() -> None:
    run = Run(slots=2, fixed_cost=50)
    run.add("a", 50)
    run.add("b", 50)
    assert run.steps(2) == [[("a", 50)], [("b", 50)]]


def test_prompts_of_two_adapters_and_an_exact_one_are_not_read_together() -> None:
    run = Run(slots=4, fixed_cost=50)
    run.add("a", 20)
    run.add("b", 20)
    run.add("c", 20, adapter=1)
    run.add("d", 20, is_exact=True)
    assert run.steps(3) == [[("a", 20), ("b", 20)], [("c", 20)], [("d", 20)]]


@pytest.mark.parametrize(("ended", "together"), [("ab", 2), ("ac", 1)])
def test_only_neighbours_are_read_together(ended: str, together: int) -> None:
    run = Run(slots=4, fixed_cost=50)
    sequences = {key: run.add(key, 20) for key in "abcd"}
    run.step()
    for key in ended:
        run.end(sequences[key])
    late = [run.add(key, 5) for key in "ef"]
    assert max(len(step) for step in run.steps(40) if step[0][1] > 1) == together
    assert all(sequence.generated for sequence in late)


def test_what_is_read_together_is_no_more_than_a_chunk() -> None:
    run = Run(slots=16, fixed_cost=50)
    for key in "abcdefghijklmnop":
        run.add(key, 40)
    chunk = run.scheduler.pace.chunk
    assert len(run.step()) == chunk // 40 < 16


def test_whatever_is_read_together_each_slot_holds_its_own_sequence() -> None:
    chance = random.Random(1)
    run = Run(slots=6, fixed_cost=100)
    running: list[Sequence] = []
    for _ in range(200):
        for key in "abcd"[: chance.randrange(4)]:
            beginning = [7] * chance.choice((0, 40, 100))
            own = [chance.randrange(97, 123)] * chance.randrange(1, 30)
            running.append(run.add(key, [*beginning, *own]))
        run.steps(chance.randrange(4))
        while len(running) > 6:
            run.end(running.pop(chance.randrange(len(running))))
        for sequence in running:
            if sequence.slot is not None:
                assert run.backend.cells[sequence.slot] == all_of(sequence)[: sequence.computed]
    assert max(len(step) for step in run.backend.steps if len(step[0].tokens) > 1) > 2


def all_of(sequence: Sequence) -> list[int]:
    return [*sequence.prompt, *sequence.generated]
