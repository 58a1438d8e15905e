"""Who is refused while there is no room, and for how long."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from statistics import median

import pytest

from services.client.chat_client import ChatClient
from services.contract import subjects
from services.contract.messages import ChatRequest, Done, Empty, Failed, StreamEvent
from tests.inference.scripted import text, worker
from tests.inference.test_reception import pair


async def test_more_bytes_than_the_queue_holds_are_refused_until_they_are_read(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, parallel=1, queue_bytes=500, step_seconds=0.01) as busy:
        first = asyncio.create_task(busy.ask("long", "a", request_id="r1"))
        while len(busy.backend.steps) < 2:  # its prompt is read
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(busy.ask("x" * 400 + "hi", "b"))
        while busy.service.waiting != 1:
            await asyncio.sleep(0.01)
        (refused,) = await busy.ask("x" * 100, "c")
        assert isinstance(refused, Failed) and refused.code == "overloaded" and refused.retry_after
        assert "402 bytes" in refused.message
        fits = asyncio.create_task(busy.ask("x" * 90 + "hi", "d"))
        while busy.service.waiting != 2:
            await asyncio.sleep(0.01)
        await busy.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), Empty())
        assert [text(events) for events in await asyncio.gather(waiting, fits)] == ["hello"] * 2
        await first
        assert text(await busy.ask("x" * 100 + "hi", "c")) == "hello"


async def test_one_prompt_is_taken_however_long_it_is(tmp_path: Path) -> None:
    async with worker(tmp_path, queue_bytes=10, context=5000) as fast:
        assert text(await fast.ask("x" * 1000 + "hi", "s")) == "hello"


async def test_of_100_at_once_8_slots_and_a_queue_of_16_answer_24_and_refuse_76_at_once(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, step_seconds=0.02) as busy:
        began = time.monotonic()
        refused_after = []

        async def ask(session: str) -> StreamEvent:
            *_, end = await busy.ask("hi", session)
            if isinstance(end, Failed):
                refused_after.append(time.monotonic() - began)
                assert end.code == "overloaded" and end.retry_after
            return end

        ends = await asyncio.gather(*(ask(str(number)) for number in range(100)))
        assert sum(isinstance(end, Done) for end in ends) == 24
        assert len(refused_after) == 76
        assert median(refused_after) < 0.25, "all of it, with 100 inboxes, in one process"


async def test_of_100_at_once_two_workers_answer_48_before_one_is_refused(tmp_path: Path) -> None:
    async with pair(tmp_path, step_seconds=0.02) as (first, _):
        client = ChatClient(first.bus, workers=first.workers)
        ends = await asyncio.gather(*(last(client, str(number)) for number in range(100)))
        assert sum(isinstance(end, Done) for end in ends) == 48
        assert sum(isinstance(end, Failed) and end.code == "overloaded" for end in ends) == 52


async def last(client: ChatClient, session: str) -> StreamEvent:
    async with aclosing(client.stream(ChatRequest(prompt="hi", session_id=session))) as events:
        return [event async for event in events][-1]


async def test_who_is_refused_is_told_how_long_the_queue_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.admission.LEAST_WAIT", 0.01)
    async with worker(tmp_path, parallel=1, queue=2, step_seconds=0.005) as busy:
        await busy.ask("long", "a", max_tokens=100)  # so long is an answer, and so long it takes
        asks = [asyncio.create_task(busy.ask("long", str(n), max_tokens=100)) for n in range(3)]
        while busy.service.running + busy.service.waiting != 3:
            await asyncio.sleep(0.001)
        (refused,) = await busy.ask("long", "b")
        began = time.monotonic()
        assert isinstance(refused, Failed) and refused.retry_after
        await asyncio.gather(*asks)
        took = time.monotonic() - began  # with the one that had the slot: half as long again
        assert took / 3 < refused.retry_after < took
