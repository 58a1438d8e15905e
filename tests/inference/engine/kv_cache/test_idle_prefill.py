from services.inference.engine.kv_cache import idle_prefill, prefix
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from services.inference.engine.kv_cache.slots import Slots
from tests.inference.fake_backend import FakeBackend

LENGTH = 100


class Forgetful(FakeBackend):
    """As a recurrent model may be: no part of a sequence can be kept."""

    def cut(self, slot: int, length: int) -> bool:
        super().cut(slot, 0)
        return False


class Idle:
    def __init__(self, backend: FakeBackend | None = None) -> None:
        self.backend = backend or FakeBackend({})
        self.slots = Slots(self.backend, 2, 10_000)
        self.ahead = IdlePrefill(self.backend, self.slots)

    def add(self, number: int, session: str = "s", adapter: int = 0) -> IdlePrompt:
        beginning = IdlePrompt([number] * LENGTH, adapter, session)
        self.ahead.add(beginning)
        return beginning

    def read_all(self) -> int:
        """How many chunks of at most 30 tokens were asked for."""
        chunks = 0
        while self.ahead.read(30):
            chunks += 1
            self.slots.check(held=0)
            assert chunks < 100
        return chunks

    def cached(self, beginning: IdlePrompt) -> int:
        run = prefix.pack(beginning.adapter, [*beginning.tokens, 1, 2, 3])
        return self.slots.cached(run)


def test_a_beginning_is_read_chunk_by_chunk_and_found_by_the_next_prompt() -> None:
    idle = Idle()
    beginning = idle.add(7)
    idle.read_all()
    assert [len(chunk.tokens) for (chunk,) in idle.backend.steps] == [30, 30, 30, 10]
    assert idle.cached(beginning) == LENGTH
    assert idle.read_all() == 0


def test_what_is_there_already_is_not_computed_again() -> None:
    idle = Idle()
    idle.add(7)
    idle.read_all()
    idle.add(7)
    idle.read_all()
    assert idle.backend.computed == LENGTH


def test_only_a_conversations_newest_beginning_is_read() -> None:
    idle = Idle()
    older, newer = idle.add(7), idle.add(8)
    idle.read_all()
    assert (idle.cached(older), idle.cached(newer)) == (0, LENGTH)


def test_a_conversation_that_goes_on_is_not_read_further() -> None:
    idle = Idle()
    beginning = idle.add(7)
    idle.ahead.read(30)
    idle.ahead.forget(beginning.owner)
    assert not idle.ahead.read(30)
    assert idle.cached(beginning) == 30


def test_it_is_read_with_its_adapter() -> None:
    idle = Idle()
    with_adapter = idle.add(7, adapter=1)
    idle.read_all()
    assert idle.cached(with_adapter) == LENGTH
    assert idle.cached(with_adapter._replace(adapter=0)) == 0


def test_a_model_that_fails_ends_the_one_and_not_the_others() -> None:
    idle = Idle()
    one, other = idle.add(7, "s"), idle.add(8, "t")
    idle.backend.fails = True
    idle.read_all()
    assert (idle.cached(one), idle.cached(other)) == (0, LENGTH)


def test_a_model_that_keeps_no_part_of_a_sequence_is_not_read_for_ever() -> None:
    idle = Idle(Forgetful({}))
    idle.add(7)
    assert idle.read_all() == 2


def test_the_oldest_are_left_out_when_many_wait() -> None:
    idle = Idle()
    for number in range(idle_prefill.MOST + 1):
        idle.add(number, session=f"{number}")
    idle.read_all()
    assert {chunk.tokens[0] for (chunk,) in idle.backend.steps} == set(
        range(1, idle_prefill.MOST + 1)
    )
