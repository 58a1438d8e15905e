from services.inference.engine.adapter_numbers import adapter_number
from services.inference.engine.kv_cache import idle_prefill, prefix
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from services.inference.engine.kv_cache.slots import Slots
from tests.inference.fake_backend import FakeBackend

LENGTH = 100


class Idle:
    def __init__(self, backend: FakeBackend | None = None) -> None:
        self.backend = backend or FakeBackend({})
        self.slots = Slots(self.backend, 2, 10_000)
        self.prefill = IdlePrefill(self.backend, self.slots)

    def add(self, token: int, session: str = "s", adapter: int = 0) -> IdlePrompt:
        prompt = IdlePrompt([token] * LENGTH, adapter, session)
        self.prefill.add(prompt)
        return prompt

    def run(self) -> int:
        """Prefill everything in chunks of at most 30 tokens. Return the number of steps."""
        steps = 0
        while self.prefill.step(30):
            steps += 1
            self.slots.check_invariants(leased=0)
            assert steps < 100
        return steps

    def cached(self, prompt: IdlePrompt) -> int:
        key = prefix.pack(prompt.adapter, [*prompt.tokens, 1, 2, 3])
        return self.slots.cached_length(key)


def test_forget_session_drops_its_prompts() -> None:
    idle = Idle()
    idle.add(7, "a", adapter=1)
    kept = idle.add(8, "b")
    idle.prefill.forget_session("a")
    idle.run()
    assert idle.cached(kept) == LENGTH == idle.backend.computed


def test_prompt_is_prefilled_in_chunks_and_found_by_next_prompt() -> None:
    idle = Idle()
    prompt = idle.add(7)
    idle.run()
    assert [len(chunk.tokens) for (chunk,) in idle.backend.steps] == [30, 30, 30, 10]
    assert idle.cached(prompt) == LENGTH
    assert idle.run() == 0


def test_cached_prompt_is_not_computed_again() -> None:
    idle = Idle()
    idle.add(7)
    idle.run()
    idle.add(7)
    idle.run()
    assert idle.backend.computed == LENGTH


def test_only_newest_prompt_of_conversation_is_prefilled() -> None:
    idle = Idle()
    older, newer = idle.add(7), idle.add(8)
    idle.run()
    assert (idle.cached(older), idle.cached(newer)) == (0, LENGTH)


def test_cancelled_prompt_is_not_prefilled_further() -> None:
    idle = Idle()
    prompt = idle.add(7)
    idle.prefill.step(30)
    idle.prefill.cancel(prompt.owner)
    assert not idle.prefill.step(30)
    assert idle.cached(prompt) == 30


def test_prompt_is_prefilled_with_its_adapter() -> None:
    idle = Idle()
    with_adapter = idle.add(7, adapter=1)
    idle.run()
    assert idle.cached(with_adapter) == LENGTH
    assert idle.cached(with_adapter._replace(adapter=0)) == 0


def test_failed_step_drops_one_prompt_only() -> None:
    idle = Idle()
    one, other = idle.add(7, "s"), idle.add(8, "t")
    idle.backend.fails = True
    idle.run()
    assert (idle.cached(one), idle.cached(other)) == (0, LENGTH)


def test_recurrent_model_prefills_the_whole_prompt() -> None:
    idle = Idle(FakeBackend({}, window=0))
    prompt = idle.add(7)
    idle.run()
    assert idle.cached(prompt) == LENGTH == idle.backend.computed


def test_oldest_prompt_is_dropped_when_many_wait() -> None:
    idle = Idle()
    for number in range(idle_prefill.MAX_WAITING + 1):
        idle.add(number, session=f"{number}")
    idle.run()
    assert {chunk.tokens[0] for (chunk,) in idle.backend.steps} == set(
        range(1, idle_prefill.MAX_WAITING + 1)
    )


def test_forget_adapter_drops_its_prompts() -> None:
    idle = Idle()
    idle.add(7, "a", adapter_number(1, 0.5))
    idle.add(7, "b", adapter_number(1))
    kept = idle.add(8, "c", adapter_number(2))
    idle.prefill.forget_adapter(1)
    idle.run()
    assert idle.cached(kept) == LENGTH == idle.backend.computed
