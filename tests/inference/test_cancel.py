"""Requests that end early: by a cancel, or by their own time-out."""

import asyncio
import time

import pytest

from services.contract.messages import Cancel, Done, Failed, StreamEvent, Token
from services.inference.in_flight import RecentCancels
from services.inference.limits import InferenceLimits
from tests.inference.scripted import StartWorker, Worker, started, text

STEP = 0.05  # seconds
MANY_CHUNKS = "x" * 3000 + "long"


async def until_running(worker: Worker, steps: int) -> None:
    await worker.until(lambda: worker.running > 0 and len(worker.backend.steps) >= steps)


def end(events: list[StreamEvent], reason: str) -> Done:
    assert isinstance(events[-1], Done) and events[-1].finish_reason == reason
    return events[-1]


@pytest.mark.parametrize(
    ("prompt", "steps"), [("long", 4), (MANY_CHUNKS, 2)], ids=["decode", "prefill"]
)
async def test_cancel_frees_the_slot_after_the_current_step(
    start_worker: StartWorker, prompt: str, steps: int
) -> None:
    async with start_worker(parallel=1, step_seconds=STEP, context=5000) as slow:
        asking = asyncio.create_task(slow.ask(prompt, "s", request_id="r1"))
        await until_running(slow, steps)
        done = len(slow.backend.steps)
        await slow.cancel("r1")
        end(await asking, "cancelled")
        assert len(slow.backend.steps) <= done + 2, "the current step, and one begun meanwhile"
        assert slow.running == 0


async def test_cancel_in_queue_does_not_wait_for_the_current_step(
    start_worker: StartWorker,
) -> None:
    async with start_worker(parallel=1, step_seconds=0.2) as slow:
        first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
        await until_running(slow, 1)
        second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
        await slow.until(lambda: slow.queued == 1)
        await until_running(slow, len(slow.backend.steps) + 1)  # a step has just begun
        steps = len(slow.backend.steps)
        await slow.cancel("r2")
        end(await second, "cancelled")
        assert len(slow.backend.steps) == steps
        assert slow.waiting == 0
        await slow.cancel("r1")
        await first


async def test_cancel_and_timeout_do_not_wait_for_silent_history(url_without_history: str) -> None:
    async with started(url_without_history) as alone, asyncio.timeout(30):
        asking = asyncio.create_task(alone.ask("hi", "s", request_id="r1"))
        late = asyncio.create_task(alone.ask("hi", "s", request_id="r2", timeout_s=0.1))
        await alone.until(lambda: alone.waiting == 2)
        await alone.cancel("r1")
        assert end(await asking, "cancelled").stored == "none"
        assert isinstance(failed := (await late)[-1], Failed) and failed.code == "timeout"


async def test_cancel_before_its_request_ends_it(fast: Worker) -> None:
    await fast.cancel("r1")
    await fast.cancel("r2", Cancel(reply="_INBOX.another attempt"))
    await fast.cancel("r3", Cancel(worker_id="another"))
    assert text(await fast.ask("hi", "s", request_id="r2")) == "hello"
    assert text(await fast.ask("hi", "s", request_id="r3")) == "hello"
    assert end(await fast.ask("hi", "s", request_id="r1"), "cancelled").stored == "none"
    assert len(fast.backend.samplers) == 2, "r1 is not prepared"


async def test_timeout_ends_answer_and_stores_its_text(
    start_worker: StartWorker,
) -> None:
    async with start_worker(parallel=1, step_seconds=0.02) as slow:
        began = time.monotonic()
        events = await slow.ask("long", "s", timeout_s=0.3)
        assert time.monotonic() - began >= 0.3
        assert end(events, "timeout").stored == "log"
        (turn,) = (await slow.context("s")).turns
        assert turn.response == text(events) and 0 < len(turn.response) < 500
        assert slow.running == 0


async def test_timeout_in_queue_fails_request(
    start_worker: StartWorker,
) -> None:
    async with start_worker(parallel=1, step_seconds=0.02) as slow:
        first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
        await until_running(slow, 1)
        events = await slow.ask("hi", "b", timeout_s=0.1)
        assert isinstance(events[-1], Failed) and events[-1].code == "timeout"
        assert not any(isinstance(event, Token) for event in events)
        assert slow.waiting == 0 and (await slow.context("b")).turns == ()
        await slow.cancel("r1")
        await first


async def test_answer_within_its_timeout_ends_with_stop(fast: Worker) -> None:
    end(await fast.ask("hi", "s", timeout_s=30), "stop")


def test_recent_cancels_are_evicted_by_age_and_count() -> None:
    now = 0.0
    cancels = RecentCancels(InferenceLimits(max_cancels_kept=5), lambda: now)
    cancels.add("_.r1", Cancel())
    now = 29.9
    assert cancels.of("_.r1") == [Cancel()] and cancels.of("_.r2") == []
    now = 30.0
    assert cancels.of("_.r1") == []
    for number in range(6):
        cancels.add(f"_.{number}", Cancel())
    assert cancels.of("_.0") == [] and cancels.of("_.5") == [Cancel()]
