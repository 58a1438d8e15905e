"""The service with adapters: which one answers, what it remembers, and who is refused."""

import asyncio

from services.contract.messages import Failed, Started
from tests.inference.scripted import Worker, text


async def test_an_adapter_answers_who_asks_for_it_and_the_log_tells_which(fast: Worker) -> None:
    asked = {None: "hello", "fake": "hello", "fake:shout": "HELLO", "fake:loud": "HELLO"}
    for model, said in asked.items():
        assert text(await fast.ask("hi", str(model), model=model)) == said
    names = ["fake", "fake", "fake:shout", "fake:loud"]
    assert [message.model for message in await fast.messages()] == names


async def test_adapters_at_once_each_answer_as_alone(fast: Worker) -> None:
    models = ["fake", "fake:shout", "fake:loud", "fake"] * 3
    answers = await asyncio.gather(
        *(fast.ask("hi", str(i), model=model) for i, model in enumerate(models))
    )
    assert [text(events) for events in answers] == ["hello", "HELLO", "HELLO", "hello"] * 3


async def test_a_turn_is_read_again_by_another_adapter_and_goes_on_from_its_own(
    fast: Worker,
) -> None:
    cached = []
    for model in ("fake", "fake:shout", "fake:shout", "fake"):
        _, started, *_ = await fast.ask("hi", "s", model=model)
        assert isinstance(started, Started)
        cached.append((started.cached_tokens > 0, started.exchanges_kept))
    assert cached == [(False, 0), (False, 1), (True, 2), (True, 3)]


async def test_an_unknown_model_is_refused_at_once_with_what_there_is(fast: Worker) -> None:
    for model in ("other", "fake:whisper"):
        (failed,) = await fast.ask("hi", "s", model=model)
        assert isinstance(failed, Failed) and failed.code == "model_not_found"
        assert failed.message.endswith("there is fake, fake:shout, fake:loud.")
