"""LoRA adapters: selection by model name, batching, and the prefix cache."""

import asyncio

from services.contract.messages import Failed, Started
from tests.inference.scripted import Worker, text


async def test_model_name_selects_the_adapter_and_is_stored(fast: Worker) -> None:
    asked = {None: "hello", "fake": "hello", "fake:shout": "HELLO", "fake:loud": "HELLO"}
    for model, answer in asked.items():
        assert text(await fast.ask("hi", str(model), model=model)) == answer
    names = ["fake", "fake", "fake:shout", "fake:loud"]
    assert [message.model for message in await fast.messages()] == names


async def test_concurrent_adapters_answer_as_alone(fast: Worker) -> None:
    models = ["fake", "fake:shout", "fake:loud", "fake"] * 3
    answers = await asyncio.gather(
        *(fast.ask("hi", str(i), model=model) for i, model in enumerate(models))
    )
    assert [text(events) for events in answers] == ["hello", "HELLO", "HELLO", "hello"] * 3


async def test_adapter_reuses_only_the_prefix_of_its_own(
    fast: Worker,
) -> None:
    cached = []
    for model in ("fake", "fake:shout", "fake:shout", "fake"):
        _, started, *_ = await fast.ask("hi", "s", model=model)
        assert isinstance(started, Started)
        cached.append((started.cached_tokens > 0, started.exchanges_kept))
    assert cached == [(False, 0), (False, 1), (True, 2), (True, 3)]


async def test_unknown_model_is_rejected_with_the_known_ones(fast: Worker) -> None:
    for model in ("other", "fake:whisper"):
        (failed,) = await fast.ask("hi", "s", model=model)
        assert isinstance(failed, Failed) and failed.code == "model_not_found"
        assert failed.message.endswith("available: fake, fake:shout, fake:loud.")
