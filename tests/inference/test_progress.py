"""A caller gets an event at least once per keep-alive interval, in every phase of a request."""

import asyncio
import time
from dataclasses import replace
from typing import NamedTuple

from services.contract.messages import ChatRequest, Failed, Progress, StreamEvent, Token
from services.inference.engine.backend import MAX_BATCH_TOKENS
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, FAST, StartWorker, Worker, started, text

INTERVAL = 0.2  # seconds
SLACK = 0.4  # seconds that a busy machine may add
LIMITS = replace(FAST, keep_alive_seconds=INTERVAL)


class Received(NamedTuple):
    event: StreamEvent
    after: float  # seconds since the event before


async def receive(
    asked: Worker, prompt: str, session: str = "s", max_tokens: int | None = None
) -> list[Received]:
    received, last = [], time.monotonic()
    request = ChatRequest(prompt=prompt, session_id=session, max_tokens=max_tokens)
    async for event in asked.events(request):
        now = time.monotonic()
        received.append(Received(event, now - last))
        last = now
    return received


def progress(received: list[Received]) -> list[Progress]:
    """Return the Progress events, after a check that no silence was too long."""
    assert max(after for _, after in received) < INTERVAL + SLACK
    return [event for event, _ in received if isinstance(event, Progress)]


async def test_progress_while_history_is_silent(url_without_history: str) -> None:
    limits = replace(LIMITS, history_tries_seconds=(4 * INTERVAL,))
    async with started(url_without_history, limits=limits) as alone:
        received = await receive(alone, "hi")
    assert isinstance(received[-1].event, Failed)
    events = progress(received)
    assert len(events) >= 3 and set(events) == {Progress(1, 0, 0)}


class SlowTokenizer(FakeBackend):
    def tokenize(self, text: str, special: bool) -> list[int]:
        time.sleep(2 * INTERVAL if "slow" in text else 0)
        return super().tokenize(text, special)


async def test_progress_while_the_prompt_is_tokenized(start_worker: StartWorker) -> None:
    async with start_worker(backend=SlowTokenizer(ANSWERS, context=2000), limits=LIMITS) as slow:
        events = progress(await receive(slow, "slow hi"))
    assert len(events) >= 1 and set(events) == {Progress(1, 0, 0)}


async def test_progress_counts_prefilled_tokens(start_worker: StartWorker) -> None:
    async with start_worker(step_seconds=INTERVAL / 2, context=20_000, limits=LIMITS) as slow:
        events = progress(await receive(slow, "x" * 5 * MAX_BATCH_TOKENS + "hi"))
    counts = [event.prefilled_tokens for event in events if event.prefilled_tokens]
    assert len(counts) >= 3 and counts == sorted(counts)
    assert counts[-1] > counts[0] and counts[-1] <= events[-1].prompt_tokens
    assert all(event.queue_position == 0 for event in events if event.prefilled_tokens)


async def test_progress_while_decode_waits_for_prefill(
    start_worker: StartWorker,
) -> None:
    async with start_worker(step_seconds=INTERVAL * 1.5, limits=LIMITS) as slow:
        stream, other = await asyncio.gather(
            receive(slow, "hi", "a", max_tokens=2),
            receive(slow, "x" * 300 + "hi", "b", max_tokens=1),
        )
    first = next(i for i, (event, _) in enumerate(stream) if isinstance(event, Token))
    held = progress(stream[first:])
    assert held and all(event.queue_position == 0 for event in held)
    assert progress(other)
    assert text([event for event, _ in stream]) == "he"


async def test_progress_has_the_queue_position(
    start_worker: StartWorker,
) -> None:
    async with start_worker(parallel=1, step_seconds=0.002, context=5000, limits=LIMITS) as busy:
        first = asyncio.create_task(busy.ask("long", "a", request_id="r1"))
        await busy.until(lambda: busy.running == 1)
        prompts = ["x" * 900 + "hi", "x" * 600 + "hi", "hi"]  # the shortest goes first
        asks = [asyncio.create_task(receive(busy, p, str(i))) for i, p in enumerate(prompts)]
        received = [progress(events) for events in await asyncio.gather(*asks)]
        await busy.cancel("r1")
        await first
    positions = [[event.queue_position for event in events] for events in received]
    assert [each[0] for each in positions] == [3, 2, 1]
    assert all(each == sorted(each, reverse=True) for each in positions)
    for events, prompt in zip(received, prompts, strict=True):
        assert events[0].prompt_tokens > len(prompt)
