"""Prompts that can't fit are rejected by counts, and cancelled requests never prepared."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.contract.conversation import ChatMessage
from services.contract.messages import Done, Failed, StreamEvent
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, FAST, StartWorker, Worker, text

CONTEXT = 2000
THREADS = FAST.preparing_threads - 1  # of one tenant


class Gated(FakeBackend):
    """Records what it has to tokenize, and continues when allowed to."""

    def __init__(self) -> None:
        super().__init__(ANSWERS, CONTEXT)
        self.tokenized: list[str] = []
        self.may_continue = threading.Event()
        self.may_continue.set()

    def tokenize(self, text: str, special: bool) -> list[int]:
        self.tokenized.append(text)
        assert self.may_continue.wait(30)
        return super().tokenize(text, special)


@pytest.fixture
async def gated(start_worker: StartWorker) -> AsyncIterator[tuple[Worker, Gated]]:
    backend = Gated()
    async with start_worker(backend=backend) as worker:
        backend.tokenized.clear()
        yield worker, backend


def message(text: str, role: Any = "user") -> ChatMessage:
    return ChatMessage(role, text)


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": (message("hi"),) * (CONTEXT + 1)},
        {"messages": (message(""),) * (CONTEXT + 1)},
        {"messages": (message("x" * CONTEXT), message("x"))},
        {"text": (1,) * (CONTEXT + 1)},
        {"text": "x" * (CONTEXT + 1)},
        {"prompt": "x" * (CONTEXT + 1), "session_id": "s"},
    ],
    ids=["messages", "empty messages", "long messages", "tokens", "text", "question"],
)
async def test_prompt_that_can_not_fit_is_rejected_before_any_work(
    gated: tuple[Worker, Gated], request_: dict[str, Any]
) -> None:
    fast, backend = gated
    (failed,) = await fast.ask_stateless(**request_)
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert f"context length is {CONTEXT} tokens" in failed.message
    assert "at least" in failed.message
    assert backend.tokenized == []


@pytest.mark.parametrize(
    ("request_", "is_answered"),
    [
        ({"messages": (message("hi"),) * 50}, True),
        ({"messages": (message("hi"), message("x" * 5000, "assistant"), message("hi"))}, False),
        ({"text": (104,) * CONTEXT}, False),
        ({"text": "x" * CONTEXT}, False),
    ],
    ids=["messages", "a long answer, which a template may drop", "tokens", "text"],
)
async def test_prompt_that_might_fit_is_prepared(
    gated: tuple[Worker, Gated], request_: dict[str, Any], is_answered: bool
) -> None:
    fast, backend = gated
    *_, end = await fast.ask_stateless(**request_)
    assert isinstance(end, Done) is is_answered
    assert "at least" not in getattr(end, "message", ""), "it is not rejected by counts"
    has_text = not isinstance(request_.get("text"), tuple)
    assert bool(backend.tokenized) is has_text


async def occupied(
    fast: Worker, backend: Gated, threads: int = THREADS
) -> list[asyncio.Task[list[StreamEvent]]]:
    """Occupy threads of the tenant, by default all, until the backend may continue."""
    backend.may_continue.clear()
    asks = (fast.ask("hi", f"{i}", request_id=f"{i}") for i in range(threads))
    busy = [asyncio.create_task(ask) for ask in asks]
    await fast.until(lambda: len(backend.tokenized) >= threads)
    return busy


async def test_request_cancelled_while_it_is_prepared_is_not_computed(
    gated: tuple[Worker, Gated],
) -> None:
    fast, backend = gated
    (busy,) = await occupied(fast, backend, 1)
    samplers = len(backend.samplers)
    await fast.cancel("0")
    *_, end = await busy
    assert isinstance(end, Done) and end.finish_reason == "cancelled"
    backend.may_continue.set()
    assert text(await fast.ask("hi", "s")) == "hello"
    cancelled, _ = backend.samplers[samplers:]
    assert cancelled.closed
    assert all(chunk.sampler is not cancelled for step in backend.steps for chunk in step)


async def test_cancelled_request_is_not_prepared(
    gated: tuple[Worker, Gated],
) -> None:
    fast, backend = gated
    busy = await occupied(fast, backend)
    waiting = asyncio.create_task(fast.ask("unwanted", "s", request_id="r"))
    await fast.until(lambda: fast.waiting > THREADS)
    await fast.cancel("r")
    *_, end = await waiting
    assert isinstance(end, Done) and end.finish_reason == "cancelled"
    backend.may_continue.set()
    assert [text(events) for events in await asyncio.gather(*busy)] == ["hello"] * THREADS
    assert not any("unwanted" in each for each in backend.tokenized)


async def test_timed_out_request_is_not_prepared(
    gated: tuple[Worker, Gated],
) -> None:
    fast, backend = gated
    busy = await occupied(fast, backend)
    *_, failed = await fast.ask("unwanted", "s", timeout_s=0.3)
    assert isinstance(failed, Failed) and failed.code == "timeout"
    backend.may_continue.set()
    await asyncio.gather(*busy)
    assert not any("unwanted" in each for each in backend.tokenized)
