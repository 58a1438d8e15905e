"""Prompts that can't fit are rejected by counts, and abandoned requests never prepared."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.contract import subjects
from services.contract.conversation import ChatMessage
from services.contract.messages import Cancel, ChatRequest, Done, Failed, StreamEvent
from services.inference.service import PREPARING
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, Worker, text, worker

CONTEXT = 2000


class Watched(FakeBackend):
    """Records what it has to tokenize, and continues when allowed to."""

    def __init__(self) -> None:
        super().__init__(ANSWERS, CONTEXT)
        self.seen: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def tokenize(self, text: str, special: bool) -> list[int]:
        self.seen.append(text)
        assert self.may_go_on.wait(30)
        return super().tokenize(text, special)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[tuple[Worker, Watched]]:
    backend = Watched()
    async with worker(tmp_path, backend=backend) as watched:
        backend.seen.clear()
        yield watched, backend


async def ask(worker: Worker, **fields: Any) -> list[StreamEvent]:
    return [event async for event in worker.events(ChatRequest(**fields))]


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
    watched: tuple[Worker, Watched], request_: dict[str, Any]
) -> None:
    fast, backend = watched
    (failed,) = await ask(fast, **request_)
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert f"context length is {CONTEXT} tokens" in failed.message
    assert "at least" in failed.message
    assert backend.seen == []


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": (message("hi"),) * 50},
        {"messages": (message("hi"), message("x" * 5000, "assistant"), message("hi"))},
        {"text": (104,) * CONTEXT},
        {"text": "x" * CONTEXT},
    ],
    ids=["messages", "a long answer, which a template may cut", "tokens", "text"],
)
async def test_prompt_that_might_fit_is_prepared(
    watched: tuple[Worker, Watched], request_: dict[str, Any]
) -> None:
    fast, backend = watched
    *_, end = await ask(fast, **request_)
    assert isinstance(end, Done) or "at least" not in end.message  # type: ignore[union-attr]
    assert backend.seen or isinstance(request_.get("text"), tuple)


async def occupied(fast: Worker, backend: Watched) -> list[asyncio.Task[list[StreamEvent]]]:
    """Occupy all threads until the backend may continue."""
    backend.may_go_on.clear()
    busy = [asyncio.create_task(fast.ask("hi", f"{i}")) for i in range(PREPARING)]
    while len(backend.seen) < PREPARING:
        await asyncio.sleep(0.01)
    return busy


async def test_request_without_a_listener_is_not_prepared(
    watched: tuple[Worker, Watched],
) -> None:
    fast, backend = watched
    busy = await occupied(fast, backend)
    waiting = asyncio.create_task(fast.ask("unwanted", "s", request_id="r"))
    while fast.service.waiting <= PREPARING:
        await asyncio.sleep(0.01)
    await fast.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r"), Cancel())
    *_, end = await waiting
    assert isinstance(end, Done) and end.finish_reason == "cancelled"
    backend.may_go_on.set()
    assert [text(events) for events in await asyncio.gather(*busy)] == ["hello"] * PREPARING
    assert not any("unwanted" in seen for seen in backend.seen)


async def test_timeout_ends_a_request_that_waits_for_preparation(
    watched: tuple[Worker, Watched],
) -> None:
    fast, backend = watched
    busy = await occupied(fast, backend)
    *_, failed = await fast.ask("unwanted", "s", timeout_s=0.3)
    assert isinstance(failed, Failed) and failed.code == "timeout"
    backend.may_go_on.set()
    await asyncio.gather(*busy)
    assert not any("unwanted" in seen for seen in backend.seen)
