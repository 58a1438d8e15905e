"""What ends an answer before its end: a cancel, or the request's own deadline."""

import asyncio
import time
from pathlib import Path

import pytest

from services.contract import subjects
from services.contract.messages import Cancel, Done, Failed, StreamEvent, Token
from services.inference.cancels import MOST, Cancels
from services.runtime.bus import Bus
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, Worker, text, worker
from tests.servers import nats_server, running

STEP = 0.05  # seconds
READ = "x" * 3000 + "long"  # a prompt of many chunks


async def cancel(worker: Worker, request_id: str, how: Cancel | None = None) -> None:
    subject = subjects.cancel(subjects.OPEN_TENANT, request_id)
    await worker.bus.publish(subject, how or Cancel())


async def until_running(worker: Worker, steps: int) -> None:
    while worker.service.running == 0 or len(worker.backend.steps) < steps:
        await asyncio.sleep(0.001)


def end(events: list[StreamEvent], reason: str) -> Done:
    assert isinstance(events[-1], Done) and events[-1].finish_reason == reason
    return events[-1]


@pytest.mark.parametrize(("prompt", "steps"), [("long", 4), (READ, 2)], ids=["decode", "read"])
async def test_a_cancel_frees_the_slot_after_the_step_that_is_being_computed(
    tmp_path: Path, prompt: str, steps: int
) -> None:
    async with worker(tmp_path, parallel=1, step_seconds=STEP, context=5000) as slow:
        asking = asyncio.create_task(slow.ask(prompt, "s", request_id="r1"))
        await until_running(slow, steps)
        done = len(slow.backend.steps)
        await cancel(slow, "r1")
        end(await asking, "cancelled")
        assert len(slow.backend.steps) <= done + 2, "the one under way, and one begun meanwhile"
        assert slow.service.running == 0


async def test_a_cancel_ends_a_request_at_once_while_it_waits_for_a_slot(tmp_path: Path) -> None:
    async with worker(tmp_path, parallel=1, step_seconds=0.5) as slow:
        first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
        await until_running(slow, 1)
        second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
        await asyncio.sleep(0.6)  # so that the engine has it, and is in the middle of a step
        steps = len(slow.backend.steps)
        await cancel(slow, "r2")
        end(await second, "cancelled")
        assert len(slow.backend.steps) == steps, "it does not wait for the step"
        assert slow.service.waiting == 0
        await cancel(slow, "r1")
        await first


async def test_a_cancel_and_a_deadline_do_not_wait_for_a_history_that_is_silent(
    tmp_path: Path,
) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test") as bus, asyncio.timeout(2):
            alone = Worker(bus, url, FakeBackend(ANSWERS), 1, 1)
            await alone.service.start()
            asking = asyncio.create_task(alone.ask("hi", "s", request_id="r1"))
            late = asyncio.create_task(alone.ask("hi", "s", request_id="r2", timeout_s=0.1))
            await asyncio.sleep(0.05)
            await cancel(alone, "r1")
            assert end(await asking, "cancelled").stored == "none"
            assert isinstance(failed := (await late)[-1], Failed) and failed.code == "timeout"
            await alone.service.drain()


async def test_a_cancel_that_overtakes_its_request_still_ends_it(tmp_path: Path) -> None:
    async with worker(tmp_path) as fast:
        await cancel(fast, "r1")
        await cancel(fast, "r2", Cancel(reply="_INBOX.another attempt"))
        await cancel(fast, "r3", Cancel(worker_id="another"))
        assert text(await fast.ask("hi", "s", request_id="r2")) == "hello"
        assert text(await fast.ask("hi", "s", request_id="r3")) == "hello"
        assert end(await fast.ask("hi", "s", request_id="r1"), "cancelled").stored == "none"
        assert len(fast.backend.samplers) == 2, "nothing was computed for it"


async def test_a_deadline_ends_the_answer_and_what_was_said_is_kept(tmp_path: Path) -> None:
    async with worker(tmp_path, parallel=1, step_seconds=0.02) as slow:
        began = time.monotonic()
        events = await slow.ask("long", "s", timeout_s=0.3)
        assert time.monotonic() - began >= 0.3
        assert end(events, "timeout").stored == "log"
        (turn,) = (await slow.context("s")).turns
        assert turn.response == text(events) and 0 < len(turn.response) < 500
        assert slow.service.running == 0


async def test_a_deadline_in_the_queue_is_a_failure_that_never_had_a_slot(tmp_path: Path) -> None:
    async with worker(tmp_path, parallel=1, step_seconds=0.02) as slow:
        first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
        await until_running(slow, 1)
        events = await slow.ask("hi", "b", timeout_s=0.1)
        assert isinstance(events[-1], Failed) and events[-1].code == "timeout"
        assert not any(isinstance(event, Token) for event in events)
        assert slow.service.waiting == 0 and (await slow.context("b")).turns == ()
        await cancel(slow, "r1")
        await first


async def test_an_answer_that_is_quicker_than_its_deadline_knows_nothing_of_it(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path) as fast:
        end(await fast.ask("hi", "s", timeout_s=30), "stop")


def test_cancels_are_remembered_for_half_a_minute_and_not_without_bound() -> None:
    now = 0.0
    cancels = Cancels(lambda: now)
    cancels.remember("_.r1", Cancel())
    now = 29.9
    assert cancels.of("_.r1") == [Cancel()] and cancels.of("_.r2") == []
    now = 30.0
    assert cancels.of("_.r1") == []
    for number in range(MOST + 1):
        cancels.remember(f"_.{number}", Cancel())
    assert cancels.of("_.0") == [] and cancels.of(f"_.{MOST}") == [Cancel()]
