from services.contract.messages import Sampling
from services.inference.engine.scheduler import PREFILL_ALONE, PREFILL_BESIDE, Scheduler
from services.inference.engine.sequence import Sequence
from services.inference.engine.slots import Slots
from tests.inference.fake_backend import FakeBackend


def scheduler(slots: int = 2) -> Scheduler:
    return Scheduler(Slots(FakeBackend({}, context=10_000), slots))


def sequence(key: str, length: int) -> Sequence:
    return Sequence(key, [ord(key[0])] * length, Sampling(max_tokens=10))


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """One step in which every sequence that is read to its end says token 1."""
    scheduler.admit()
    planned = scheduler.plan()
    scheduler._slots._backend.decode([p.chunk for p in planned])
    scheduler.commit(planned)
    for done, chunk in planned:
        if done.computed == done.length:
            done.generated.append(1)
        assert done.computed == chunk.position + len(chunk.tokens)
    return [(p.sequence.key, len(p.chunk.tokens)) for p in planned]


def test_a_prompt_is_read_in_chunks_and_then_one_token_a_step() -> None:
    chat = scheduler()
    chat.add(sequence("a", PREFILL_ALONE + 10))
    assert step(chat) == [("a", PREFILL_ALONE)]
    assert step(chat) == [("a", 10)]
    assert step(chat) == [("a", 1)]


def test_a_long_prompt_is_read_in_small_chunks_beside_a_running_stream() -> None:
    chat = scheduler()
    chat.add(sequence("a", 3))
    step(chat)
    chat.add(sequence("b", 2 * PREFILL_BESIDE))
    assert step(chat) == [("a", 1), ("b", PREFILL_BESIDE)]
    assert step(chat) == [("a", 1), ("b", PREFILL_BESIDE)]
    assert step(chat) == [("a", 1), ("b", 1)]


def test_short_prompts_share_a_step() -> None:
    chat = scheduler()
    chat.add(sequence("a", 3))
    chat.add(sequence("b", 4))
    assert step(chat) == [("a", 3), ("b", 4)]


def test_who_finds_no_slot_waits_and_gets_the_next_one() -> None:
    chat = scheduler(slots=1)
    first, second = sequence("a", 3), sequence("b", 3)
    chat.add(first)
    chat.add(second)
    assert step(chat) == [("a", 3)]
    assert list(chat.waiting) == [second]
    chat.remove(first)
    assert step(chat) == [("b", 3)]
    chat.remove(second)
    assert chat.is_idle
    chat.check()


def test_a_waiting_sequence_can_be_removed_anywhere_in_the_queue() -> None:
    chat = scheduler(slots=1)
    sequences = [sequence(key, 3) for key in "abc"]
    for waiting in sequences:
        chat.add(waiting)
    step(chat)
    chat.remove(sequences[1])
    assert list(chat.waiting) == [sequences[2]]
    assert chat.find("b") is None
    chat.check()


def test_those_who_arrive_together_read_their_common_beginning_once() -> None:
    chat = scheduler(slots=8)
    for key in "abcdefgh":
        chat.add(Sequence(key, [7] * 700 + [ord(key)] * 5, Sampling(max_tokens=10)))
    read = [step(chat) for _ in range(4)]
    assert read[:2] == [[("a", PREFILL_ALONE)], [("a", 193)]]
    assert [key for key, _ in read[2]] == list("abcdefgh")
    assert sum(n for planned in read for _, n in planned if n > 1) == 705 + 7 * 5


def test_who_waits_for_a_beginning_is_not_held_up_when_its_reader_leaves() -> None:
    chat = scheduler(slots=2)
    first, second = (Sequence(key, [7] * 700, Sampling(max_tokens=10)) for key in "ab")
    chat.add(first)
    chat.add(second)
    step(chat)
    assert list(chat.waiting) == [second]
    chat.remove(first)
    assert step(chat)[0][0] == "b" and second.cached == PREFILL_ALONE


def test_a_short_common_beginning_is_not_waited_for() -> None:
    chat = scheduler()
    for key in "ab":
        chat.add(Sequence(key, [7] * 20 + [ord(key)], Sampling(max_tokens=10)))
    assert step(chat) == [("a", 21), ("b", 21)]
