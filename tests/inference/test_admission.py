"""Which requests are rejected for lack of room, and when they may be retried."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from statistics import median

from services.client.chat_client import ChatClient
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent
from tests.inference.scripted import FAST, StartWorker, text
from tests.inference.test_router import pair


async def test_prompt_bytes_over_the_limit_are_rejected(start_worker: StartWorker) -> None:
    async with start_worker(parallel=1, queue_bytes=500, step_seconds=0.01) as busy:
        first = asyncio.create_task(busy.ask("long", "a", request_id="r1"))
        await busy.until(lambda: len(busy.backend.steps) >= 2)  # its prompt is prefilled
        waiting = asyncio.create_task(busy.ask("x" * 400 + "hi", "b"))
        await busy.until(lambda: busy.waiting == 1)
        (refused,) = await busy.ask("x" * 100, "c")
        assert isinstance(refused, Failed) and refused.code == "overloaded" and refused.retry_after
        assert "402 bytes" in refused.message
        fits = asyncio.create_task(busy.ask("x" * 90 + "hi", "d"))
        await busy.until(lambda: busy.waiting == 2)
        await busy.cancel("r1")
        assert [text(events) for events in await asyncio.gather(waiting, fits)] == ["hello"] * 2
        await first
        assert text(await busy.ask("x" * 100 + "hi", "c")) == "hello"


async def test_single_prompt_is_admitted_whatever_its_length(start_worker: StartWorker) -> None:
    async with start_worker(queue_bytes=10, context=5000) as fast:
        assert text(await fast.ask("x" * 1000 + "hi", "s")) == "hello"


async def test_worker_admits_as_many_as_slots_and_queue_hold(start_worker: StartWorker) -> None:
    async with start_worker(step_seconds=0.02) as busy:
        began = time.monotonic()
        done_after, rejected_after = [], []

        async def ask(session: str) -> None:
            *_, end = await busy.ask("hi", session)
            seconds = time.monotonic() - began
            if isinstance(end, Done):
                done_after.append(seconds)
            else:
                assert isinstance(end, Failed) and end.code == "overloaded" and end.retry_after
                rejected_after.append(seconds)

        await asyncio.gather(*(ask(str(number)) for number in range(100)))
        assert len(done_after) == 8 + 16
        assert len(rejected_after) == 76
        assert median(rejected_after) < median(done_after), "rejected at once, not after a wait"


async def test_two_workers_admit_twice_as_many(start_worker: StartWorker) -> None:
    async with pair(start_worker, step_seconds=0.02) as (first, _):
        client = ChatClient(first.bus, first.tenant, first.workers)
        ends = await asyncio.gather(*(last(client, str(number)) for number in range(100)))
        assert sum(isinstance(end, Done) for end in ends) == 48
        assert sum(isinstance(end, Failed) and end.code == "overloaded" for end in ends) == 52


async def last(client: ChatClient, session: str) -> StreamEvent:
    async with aclosing(client.stream(ChatRequest(prompt="hi", session_id=session))) as events:
        return [event async for event in events][-1]


async def test_retry_after_is_the_time_of_the_queue(start_worker: StartWorker) -> None:
    limits = replace(FAST, min_retry_after_seconds=0.01)
    async with start_worker(parallel=1, queue=2, step_seconds=0.005, limits=limits) as busy:
        await busy.ask("long", "a", max_tokens=100)  # measures length and speed
        asks = [asyncio.create_task(busy.ask("long", str(n), max_tokens=100)) for n in range(3)]
        await busy.until(lambda: len(busy.service.flights) == 3)
        (refused,) = await busy.ask("long", "b")
        began = time.monotonic()
        assert isinstance(refused, Failed) and refused.retry_after
        await asyncio.gather(*asks)
        took = time.monotonic() - began  # with the running one: half as long again
        assert took / 4 < refused.retry_after < took
