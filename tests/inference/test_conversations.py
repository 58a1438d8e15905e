"""What a session brings to its next prompt, and what is read of it before it is asked."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from services.contract.messages import (
    Done,
    Started,
)
from services.inference import preparation
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, Worker, text, worker


async def test_oldest_exchanges_are_dropped_and_it_is_said_how_many(tmp_path: Path) -> None:
    async with worker(tmp_path, context=700) as small:
        for _ in range(2):
            _, started, *_, done = await small.ask("long", "s", max_tokens=300)
        assert isinstance(started, Started) and isinstance(done, Done)
        assert (started.exchanges_kept, started.exchanges_dropped) == (0, 1)
        assert done.exchanges_dropped == 1


async def test_a_conversation_that_outgrows_the_window_is_read_anew_once_in_several_turns(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, context=900) as small:
        read, dropped = [], []
        for turn in range(16):
            _, started, *_ = await small.ask(f"{turn:02} hi", "s", max_tokens=300)
            assert isinstance(started, Started)
            read.append(started.prompt_tokens - started.cached_tokens)
            dropped.append(started.exchanges_dropped)
        assert max(dropped) > 0
        assert sum(tokens > 100 for tokens in read[1:]) <= 5


async def read_something(small: Worker) -> None:
    """Waits until something was read ahead, and no more comes."""
    asked = read = len(small.backend.steps)
    async with asyncio.timeout(20):
        while read == asked or read < len(small.backend.steps):
            read = len(small.backend.steps)
            await asyncio.sleep(0.3)


async def read_ahead(small: Worker, *questions: str, **more: Any) -> Started:
    """Said of the last question, before which there was a pause."""
    *first, last = questions
    for question in first:
        await small.ask(question, "s", max_tokens=300, **more)
    await read_something(small)
    _, started, *_ = await small.ask(last, "s", max_tokens=300, **more)
    assert isinstance(started, Started)
    return started


@pytest.mark.parametrize(("turns", "last", "following"), [(7, 0, 0), (6, 80, 0), (7, 0, 80)])
async def test_a_window_that_is_cut_is_read_before_the_next_question_however_long_that_is(
    tmp_path: Path, turns: int, last: int, following: int
) -> None:
    async with worker(tmp_path, context=900) as small:
        more = [*[0] * (turns - 1), last, following]
        questions = [f"{turn:02} {'x' * more[turn]} hi" for turn in range(turns + 1)]
        started = await read_ahead(small, *questions)
        assert started.exchanges_dropped >= 3
        assert started.prompt_tokens - started.cached_tokens < 60 + following


async def test_a_turn_that_was_followed_soon_is_not_looked_behind(tmp_path: Path) -> None:
    async with worker(tmp_path, context=900) as small:
        for more in (*[0] * 6, 80):
            await small.ask(f"{more * 'x'} hi", "s", max_tokens=300)
        steps = len(small.backend.steps)
        await asyncio.sleep(1)
        assert len(small.backend.steps) == steps


class Recurrent(FakeBackend):
    """Of a sequence it keeps all or nothing."""

    def truncate(self, slot: int, length: int) -> bool:
        is_whole = length == self.length(slot)
        return super().truncate(slot, length if is_whole else 0) and is_whole


async def test_what_was_read_ahead_is_of_use_to_a_model_that_keeps_all_or_nothing(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, backend=Recurrent(ANSWERS, 900)) as small:
        started = await read_ahead(small, *(f"{turn:02} hi" for turn in range(8)))
        assert started.exchanges_dropped == 3
        assert started.prompt_tokens - started.cached_tokens < 60


async def test_nothing_is_read_ahead_of_a_session_that_goes_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, gone_on = threading.Event(), threading.Event()

    def ahead(*_: object) -> IdlePrompt:
        looking.set()
        gone_on.wait(20)
        return IdlePrompt([1] * 100, 0, "open.s")

    monkeypatch.setattr(preparation, "ahead", ahead)
    async with worker(tmp_path) as fast:
        await fast.ask("hi", "s")
        await asyncio.to_thread(looking.wait)
        monkeypatch.setattr(preparation, "ahead", lambda *_: None)
        await fast.ask("hi", "s")
        gone_on.set()
        await asyncio.sleep(1.2)
        assert not any(chunk.tokens[0] == 1 for (chunk,) in fast.backend.steps)


async def test_nothing_is_read_ahead_for_who_names_a_seed(tmp_path: Path) -> None:
    """It would be read in another way, and be of no use."""
    async with worker(tmp_path, context=900) as small:
        for turn in range(7):
            await small.ask(f"{turn:02} hi", "s", max_tokens=300, seed=1)
        steps = len(small.backend.steps)
        await asyncio.sleep(1)
        assert len(small.backend.steps) == steps


async def test_a_window_that_stays_is_not_looked_at_again(fast: Worker) -> None:
    await fast.ask("hi", "s")
    steps = len(fast.backend.steps)
    await asyncio.sleep(1)
    assert len(fast.backend.steps) == steps


class Foreign(FakeBackend):
    """Says its answers in tokens that tokenizing their text would never give."""

    def piece(self, token: int) -> bytes:
        return super().piece(token - 1000 if token >= 1000 else token)

    def _answer_to(self, prompt: bytes) -> list[int]:
        return [1000 + byte for byte in super()._answer_to(prompt)]


async def test_the_next_turn_goes_on_from_the_tokens_that_were_said(tmp_path: Path) -> None:
    async with worker(tmp_path, backend=Foreign(ANSWERS)) as warm:
        held = 0  # of the first prompt, nothing
        for prompt, said in (("hi", "hello"), ("stop", "fine"), ("hi", "hello")):
            _, started, *events = await warm.ask(prompt, "s", max_tokens=50)
            assert isinstance(started, Started)
            assert started.cached_tokens == held
            assert text(events) == said
            held = started.prompt_tokens + len(said)
