"""Which requests are rejected for lack of room, and when they may be retried."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from statistics import median

from services.client.chat_client import ChatClient
from services.contract.conversation import ChatMessage
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent, Token
from tests.inference.scripted import FAST, StartWorker, Worker, text
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


async def ask_as(worker: Worker, tenant: str, prompt: str = "long") -> StreamEvent:
    """Return the last event of a stateless request."""
    request = ChatRequest(messages=(ChatMessage("user", prompt),), max_tokens=60)
    return [event async for event in worker.events(request, f"{worker.tenant}-{tenant}")][-1]


async def test_full_queue_of_one_tenant_has_room_for_others(start_worker: StartWorker) -> None:
    async with start_worker(parallel=2, queue=4, step_seconds=0.005) as busy:
        flood = [asyncio.create_task(ask_as(busy, "ann")) for _ in range(20)]
        await busy.until(lambda: len(busy.service.flights) == 6)
        others = [asyncio.create_task(ask_as(busy, "bob", "hi")) for _ in range(5)]
        ends = [await task for task in others]
        assert sum(isinstance(end, Done) for end in ends) == 3, "half of the places"
        assert all(end.code == "overloaded" for end in ends if isinstance(end, Failed))
        assert isinstance(await ask_as(busy, "eve", "hi"), Done)
        done = [isinstance(await task, Done) for task in flood]
        assert sum(done) == 6, "none of them was displaced"


async def test_bytes_of_one_tenant_leave_room_for_others(start_worker: StartWorker) -> None:
    async with start_worker(parallel=1, queue_bytes=500, step_seconds=0.005) as busy:
        running = asyncio.create_task(ask_as(busy, "ann"))
        await busy.until(lambda: len(busy.backend.steps) >= 2)  # its prompt is prefilled
        waiting = [asyncio.create_task(ask_as(busy, "ann", "x" * 480 + "hi"))]
        await busy.until(lambda: busy.waiting == 1)
        assert isinstance(await ask_as(busy, "ann", "x" * 100), Failed)
        waiting += [
            asyncio.create_task(ask_as(busy, "bob", "x" * size + "hi")) for size in (600, 10)
        ]
        await busy.until(lambda: len(busy.service.flights) == 3)
        refused = await ask_as(busy, "bob", "x" * 10 + "hi")
        assert isinstance(refused, Failed) and refused.code == "overloaded"
        ends = [await task for task in (running, *waiting)]
        assert sum(isinstance(end, Done) for end in ends) == 3, "one of bob's was too much"


async def test_second_tenant_gets_the_next_slot(start_worker: StartWorker) -> None:
    async with start_worker(parallel=1, step_seconds=0.002) as busy:
        ends: list[str] = []

        async def ask(tenant: str) -> None:
            assert isinstance(await ask_as(busy, tenant), Done)
            ends.append(tenant)

        flood = [asyncio.create_task(ask("ann")) for _ in range(6)]
        await busy.until(lambda: busy.running == 1 and busy.queued == 5)
        await asyncio.gather(ask("bob"), *flood)
        assert ends.index("bob") == 1, "after the one answer that ran"


async def test_place_of_a_waiting_request_is_lost_with_its_listener(
    start_worker: StartWorker,
) -> None:
    """An answer that has begun goes on for the whole grace."""
    async with start_worker(parallel=1, step_seconds=0.01) as busy:
        await leave(busy, ChatRequest(prompt="long", request_id="a", session_id="a", grace_s=5))
        for _ in range(3):
            await leave(busy, ChatRequest(prompt="long", session_id="b", grace_s=5))
        assert len(busy.service.flights) == 4
        await busy.until(lambda: len(busy.service.flights) == 1)
        (flight,) = busy.service.flights.values()
        assert flight.request_id == "a" and flight.has_slot
        await busy.cancel("a")


async def leave(worker: Worker, request: ChatRequest) -> None:
    """Disconnect after the first event, or of a request that gets a slot, its first token."""
    is_first = not worker.service.flights
    async with aclosing(worker.events(request)) as events:
        async for event in events:
            if isinstance(event, Token) or not is_first:
                return
