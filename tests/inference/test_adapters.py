"""LoRA adapters: selection by model name, batching, and the prefix cache."""

import asyncio

from services.contract.messages import Failed, Started
from tests.inference.scripted import LONG, Worker, text


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
        assert failed.message.endswith("available: fake, fake:loud, fake:shout.")


async def test_running_answer_finishes_with_the_adapter_that_was_removed(slow: Worker) -> None:
    adapters, backend = slow.service.adapters, slow.backend
    running = asyncio.create_task(slow.ask("long", "s", model="fake:shout@0.5"))
    await slow.until(lambda: slow.running > 0)
    adapters.remove("shout")
    (failed,) = await slow.ask("hi", "other", model="fake:shout@0.5")
    assert isinstance(failed, Failed) and failed.code == "model_not_found"
    assert failed.message.endswith("available: fake, fake:loud.")
    assert not running.done() and not backend.freed
    assert text(await running) == LONG.decode()
    await slow.until(lambda: backend.freed == [1])
    assert [message.model for message in await slow.messages()] == ["fake:shout@0.5"]


async def test_replaced_adapter_reuses_nothing_of_the_one_before(fast: Worker) -> None:
    cached = []
    for is_replaced in (False, False, True, False):
        if is_replaced:
            fast.service.adapters.put("shout", 7, "another digest")
        _, started, *_ = await fast.ask("hi", "s", model="fake:shout")
        assert isinstance(started, Started)
        cached.append(started.cached_tokens > 0)
    assert cached == [False, True, False, True]
    await fast.until(lambda: fast.backend.freed == [1])


async def test_scales_of_one_adapter_share_no_prefix(fast: Worker) -> None:
    cached = []
    for scale in ("@0.5", "@0.5", "@0.6", "", "@1"):
        _, started, *_ = await fast.ask("hi", "s", model=f"fake:shout{scale}")
        assert isinstance(started, Started)
        cached.append(started.cached_tokens > 0)
    assert cached == [False, True, False, False, True]


async def test_invalid_scale_is_rejected(fast: Worker) -> None:
    (failed,) = await fast.ask("hi", "s", model="fake:shout@7")
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
