"""Admission by the bytes of the prompts that are still to be read."""

import asyncio
from pathlib import Path

from services.contract import subjects
from services.contract.messages import Empty, Failed
from tests.inference.test_service import text, worker


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
