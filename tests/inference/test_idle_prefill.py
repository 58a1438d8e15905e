"""The context window of a session, and prefill of its next prompt while the worker is idle."""

import asyncio
import threading
from typing import Any

import pytest

from services.contract.messages import Done, Started
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.prompt_builder import PromptBuilder
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, StartWorker, Worker, text

PAUSE = 0.5  # seconds; an idle prefill begins after about 0.2 (until_prefilled waits for one)


async def test_oldest_exchanges_are_dropped_and_counted(
    start_worker: StartWorker,
) -> None:
    async with start_worker(context=700) as small:
        for _ in range(2):
            _, started, *_, done = await small.ask("long", "s", max_tokens=300)
        assert isinstance(started, Started) and isinstance(done, Done)
        assert (started.exchanges_kept, started.exchanges_dropped) == (0, 1)
        assert done.exchanges_dropped == 1


async def test_full_window_loses_its_cached_prefix_only_sometimes(
    start_worker: StartWorker,
) -> None:
    async with start_worker(context=900) as small:
        prefilled, dropped = [], []
        for turn in range(16):
            _, started, *_ = await small.ask(f"{turn:02} hi", "s", max_tokens=300)
            assert isinstance(started, Started)
            prefilled.append(started.prompt_tokens - started.cached_tokens)
            dropped.append(started.exchanges_dropped)
        assert max(dropped) > 0
        assert sum(tokens > 100 for tokens in prefilled[1:]) <= 5


async def until_prefilled(small: Worker) -> None:
    """Wait until an idle prefill has begun and ended."""
    before = last = len(small.backend.steps)
    async with asyncio.timeout(20):
        while last == before or last < len(small.backend.steps):
            last = len(small.backend.steps)
            await asyncio.sleep(0.1)


async def ask_after_pause(small: Worker, *questions: str, **more: Any) -> Started:
    """Return the Started of the last question, which follows an idle prefill."""
    *first, last = questions
    for question in first:
        await small.ask(question, "s", max_tokens=300, **more)
    await until_prefilled(small)
    _, started, *_ = await small.ask(last, "s", max_tokens=300, **more)
    assert isinstance(started, Started)
    return started


@pytest.mark.parametrize(("turns", "last", "following"), [(7, 0, 0), (6, 80, 0), (7, 0, 80)])
async def test_truncated_window_is_prefilled_before_the_next_question(
    start_worker: StartWorker, turns: int, last: int, following: int
) -> None:
    async with start_worker(context=900) as small:
        more = [*[0] * (turns - 1), last, following]
        questions = [f"{turn:02} {'x' * more[turn]} hi" for turn in range(turns + 1)]
        started = await ask_after_pause(small, *questions)
        assert started.exchanges_dropped >= 3
        assert started.prompt_tokens - started.cached_tokens < 60 + following


async def test_no_idle_prefill_between_quick_questions(
    start_worker: StartWorker,
) -> None:
    """The long question would truncate the window, but the session has continued."""
    async with start_worker(context=900) as small:
        for turn, more in enumerate((0, 0, 160, 0)):
            await small.ask(f"{turn:02} {more * 'x'} hi", "s", max_tokens=300)
        steps = len(small.backend.steps)
        await asyncio.sleep(PAUSE)
        assert len(small.backend.steps) == steps


async def test_idle_prefill_is_reused_by_a_recurrent_model(
    start_worker: StartWorker,
) -> None:
    async with start_worker(backend=FakeBackend(ANSWERS, 900, window=0)) as small:
        started = await ask_after_pause(small, *(f"{turn:02} hi" for turn in range(8)))
        assert started.exchanges_dropped == 3
        assert started.prompt_tokens - started.cached_tokens < 60


async def test_idle_prefill_is_dropped_when_the_session_continues(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, has_continued = threading.Event(), threading.Event()

    def build(*_: object) -> IdlePrompt:
        building.set()
        has_continued.wait(20)
        return IdlePrompt([1] * 100, 0, "open.s")

    monkeypatch.setattr(PromptBuilder, "idle_prompt", build)
    async with start_worker() as fast:
        await fast.ask("hi", "s")
        await asyncio.to_thread(building.wait)
        monkeypatch.setattr(PromptBuilder, "idle_prompt", lambda *_: None)
        await fast.ask("hi", "s")
        has_continued.set()
        await asyncio.sleep(PAUSE)
        assert not any(chunk.tokens[0] == 1 for (chunk,) in fast.backend.steps)


async def test_no_idle_prefill_for_requests_with_a_seed(start_worker: StartWorker) -> None:
    """They use a deterministic prefill, which reuses no other."""
    async with start_worker(context=900) as small:
        for turn in range(7):
            await small.ask(f"{turn:02} hi", "s", max_tokens=300, seed=1)
        steps = len(small.backend.steps)
        await asyncio.sleep(PAUSE)
        assert len(small.backend.steps) == steps


async def test_no_idle_prefill_while_the_window_stays(fast: Worker) -> None:
    await fast.ask("hi", "s")
    steps = len(fast.backend.steps)
    await asyncio.sleep(PAUSE)
    assert len(fast.backend.steps) == steps


class Foreign(FakeBackend):
    """A model that answers in tokens which tokenizing the text never gives."""

    def piece(self, token: int) -> bytes:
        return super().piece(token - 1000 if token >= 1000 else token)

    def _answer_to(self, prompt: bytes) -> list[int]:
        return [1000 + byte for byte in super()._answer_to(prompt)]


async def test_next_prompt_repeats_the_tokens_of_the_answer(
    start_worker: StartWorker,
) -> None:
    async with start_worker(backend=Foreign(ANSWERS)) as warm:
        cached = 0
        for prompt, answer in (("hi", "hello"), ("stop", "fine"), ("hi", "hello")):
            _, started, *events = await warm.ask(prompt, "s", max_tokens=50)
            assert isinstance(started, Started)
            assert started.cached_tokens == cached
            assert text(events) == answer
            cached = started.prompt_tokens + len(answer)
