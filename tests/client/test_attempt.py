"""A reader gets one worker's whole answer, even if events are lost on the way."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from services.client.attempt import Attempt, AttemptLost
from services.client.chat_client import ChatClient
from services.client.transcript import Transcript
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import AnswerEvent, ChatRequest, Failed, StreamEvent, Token
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox, InboxLimits
from tests.client.story_worker import (
    CONFLICT,
    FAST,
    REQUEST,
    STORY,
    TOKENS,
    FickleSink,
    check_whole,
    read,
    rejoin,
    story_worker,
)
from tests.servers import nats_server, running


async def test_lost_tokens_are_replayed(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        worker.unsent = {0, 7, 8, 9, 30, len(STORY) - 1}
        check_whole(await read(bus))
        assert len(worker.requests) == 1


async def test_sink_takes_text_for_which_the_reader_waits(bus: Bus, nats_url: str) -> None:
    taken: list[StreamEvent] = []
    sink = FickleSink(taken)
    async with story_worker(nats_url), aclosing(ChatClient(bus).stream(REQUEST)) as answer:
        yielded = []
        async for event in answer:
            yielded.append(event)
            answer.pass_text_to(sink)
    assert len(taken) > len(STORY) / 2
    tokens = [event for event in (*taken, *yielded) if isinstance(event, Token)]
    assert sorted(tokens, key=lambda token: token.offset) == list(TOKENS)


async def test_failure_of_the_sink_ends_the_answer(bus: Bus, nats_url: str) -> None:
    class BrokenSink:
        def take(self, event: AnswerEvent) -> bool:
            raise ValueError("broken")

    async with story_worker(nats_url), aclosing(ChatClient(bus).stream(REQUEST)) as answer:
        events = []
        async for event in answer:
            events.append(event)
            answer.pass_text_to(BrokenSink())
    assert isinstance(events[-1], Failed) and events[-1].code == "internal"


async def test_lost_done_is_replayed(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        worker.unsent = {len(STORY) - 1}
        worker.loses_done = True
        check_whole(await read(bus))


async def test_events_beyond_the_inbox_limit_are_replayed(nats_url: str) -> None:
    limits = InboxLimits(messages=5)
    async with (
        story_worker(nats_url) as worker,
        Bus.connect(nats_url, "slow reader", inbox_limits=limits) as bus,
        aclosing(ChatClient(bus).stream(REQUEST)) as answer,
    ):
        events = [await anext(answer)]
        await worker.stopped.wait()
        events += [event async for event in answer]
    check_whole(events)
    assert len(worker.requests) == 1


async def test_answer_continues_after_a_nats_restart(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with (
            story_worker(url) as worker,
            Bus.connect(url, "test") as bus,
            aclosing(ChatClient(bus, policy=FAST).stream(REQUEST)) as answer,
        ):
            events = [await anext(answer)]
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            events += [event async for event in answer]
            check_whole(events)
            assert len(worker.requests) == 1


async def test_silence_counts_from_the_admission(bus: Bus) -> None:
    policy = replace(FAST, lost_seconds=0.3)
    reply = subjects.reply("_", "r", "1")
    await bus.subscribe(subjects.worker_replay("w1", "_", "r"), lambda _: None)  # never replies
    attempt = Attempt(bus, policy, "_", "r", Transcript(), Inbox(), reply, lambda: None)
    await asyncio.sleep(0.1)  # until the worker replies to the offer
    attempt.admitted_by("w1")
    admitted_at = time.monotonic()
    with pytest.raises(AttemptLost):
        await attempt.next()
    assert time.monotonic() - admitted_at >= policy.lost_seconds


async def test_other_failure_of_the_worker_ends_the_answer(bus: Bus, nats_url: str) -> None:
    failure = Failed("internal", "The model failed.")
    async with story_worker(nats_url, "w1", 20, failure) as worker:
        assert (await read(bus))[-1] == failure
    assert len(worker.requests) == 1


async def test_resume_returns_all_text_and_continues_live(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        reading = asyncio.create_task(read(bus))
        await worker.accepted.wait()
        for events in await asyncio.gather(reading, rejoin(bus)):
            check_whole(events)
        check_whole(await rejoin(bus))
        assert len(worker.requests) == 1


@pytest.mark.parametrize("offset", [1, 19, 20, 40, len(STORY)])
async def test_resume_returns_the_text_after_the_offset(
    bus: Bus, nats_url: str, offset: int
) -> None:
    async with story_worker(nats_url) as worker:
        await read(bus)
        check_whole(await rejoin(bus, offset), begins_at=offset)
        worker.accepted.clear()
        reading = asyncio.create_task(read(bus, ChatRequest(prompt="hi", request_id="r")))
        await worker.accepted.wait()
        check_whole(await rejoin(bus, offset), begins_at=offset)
        check_whole(await reading)
        assert len(worker.requests) == 2


async def test_resume_of_an_unknown_request_is_not_found(bus: Bus, nats_url: str) -> None:
    (failed,) = await rejoin(bus)
    assert isinstance(failed, Failed) and failed.code == "not_found"
    async with story_worker(nats_url):
        (failed,) = await rejoin(bus)
        assert isinstance(failed, Failed) and failed.code == "not_found"
        await read(bus)
        check_whole(await rejoin(bus))


async def test_request_with_a_running_id_joins_if_it_is_equal(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        reading = asyncio.create_task(read(bus))
        await worker.accepted.wait()
        worker.rejects_with = CONFLICT
        check_whole(await read(bus))
        (failed,) = await read(bus, ChatRequest(prompt="other", request_id="r"))
        assert isinstance(failed, Failed) and failed.code == "conflict"
        check_whole(await reading)


async def test_leaving_an_answer_with_grace_does_not_cancel_it(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        async with aclosing(ChatClient(bus).stream(REQUEST)) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
        check_whole(await rejoin(bus))
        assert worker.cancelled == []


async def test_rejection_is_returned_as_failed(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        worker.rejects_with = ServiceError("model_not_found", "There is no such model.")
        assert await read(bus) == [Failed("model_not_found", "There is no such model.", 0.1)]
