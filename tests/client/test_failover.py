"""When a worker is lost, another one resumes its answer. First the pure policy, then real NATS."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from services.client.chat_client import ChatClient
from services.client.failover import FailoverPolicy, FailoverState, Unresumable
from services.client.routing import WorkerDirectory
from services.client.transcript import Transcript
from services.contract import subjects
from services.contract.answer import Answer
from services.contract.codec import encode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Failed,
    ModelInfo,
    Progress,
    Started,
    StreamEvent,
    Token,
    WorkerReport,
)
from services.runtime import trace_context
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.client.story_worker import (
    CONFLICT,
    FAST,
    REQUEST,
    RESUME_STATE,
    STORY,
    StoryWorker,
    check_whole,
    read,
    read_all,
    rejoin,
    story_worker,
)
from tests.fakes import text_resume

POLICY = FailoverPolicy(max_losses=2, give_up_seconds=10, retry_seconds=0.5)
MAX_PAYLOAD = 2**20
LOST = FailoverState(1, "The worker died.", lost_at=100, gives_up_at=110)


def transcript_of(text: str, resumable: bool = True) -> Transcript:
    transcript = Transcript()
    transcript.add(Started(5, 0, 0, 0, RESUME_STATE if resumable else None))
    transcript.add(Token(0, text, (1,)))
    return transcript


# --- policy ---------------------------------------------------------------------------------------


def test_loss_is_counted_and_starts_a_time_limit() -> None:
    first = POLICY.after_loss(FailoverState(), "The worker died.", now=100)
    assert first == LOST
    assert POLICY.after_loss(first, "It froze.", now=200) == FailoverState(2, "It froze.", 200, 210)


def test_more_than_max_losses_end_the_answer() -> None:
    with pytest.raises(ServiceError, match="2 other workers were lost") as raised:
        POLICY.after_loss(FailoverState(losses=2), "The worker died.", now=100)
    assert raised.value.code == "worker_lost"


@pytest.mark.parametrize("code", ["overloaded", "no_worker", "model_loading", "shutting_down"])
def test_failed_failover_is_retried_until_the_time_limit(code: ErrorCode) -> None:
    error = ServiceError(code, "Not now.")
    assert POLICY.retry_delay(LOST, error, now=110) == 0.5
    with pytest.raises(ServiceError, match="No other worker can resume: Not now.") as raised:
        POLICY.retry_delay(LOST, error, now=110.1)
    assert raised.value.code == "worker_lost" and raised.value.retry_after


def test_time_limit_moves_while_a_worker_loads_but_not_for_ever() -> None:
    policy = dataclasses.replace(POLICY, max_loading_seconds=60)
    assert policy.while_loading(LOST, now=105).gives_up_at == 115
    loading = policy.while_loading(LOST, now=155)
    assert loading.gives_up_at == 160
    assert policy.while_loading(loading, now=170) == loading


def test_failover_that_can_never_succeed_is_not_retried() -> None:
    with pytest.raises(ServiceError, match="bad grammar"):
        POLICY.retry_delay(LOST, ServiceError("invalid_request", "bad grammar"), now=100)
    unresumable = Unresumable("worker_lost", "too long")
    with pytest.raises(Unresumable):
        POLICY.retry_delay(LOST, unresumable, now=100)


def test_resume_request_has_text_and_remaining_time() -> None:
    request = replace(REQUEST, timeout_s=60)
    resumed = POLICY.resume_request(LOST, request, transcript_of("once"), 12.5, MAX_PAYLOAD)
    resume_from = text_resume(RESUME_STATE, (1,), "once")
    assert resumed == replace(REQUEST, resume=resume_from, timeout_s=12.5)


def test_resume_request_after_the_deadline_has_almost_no_time() -> None:
    resumed = POLICY.resume_request(LOST, REQUEST, transcript_of("once"), -1, MAX_PAYLOAD)
    assert resumed.timeout_s is not None and 0 < resumed.timeout_s < 0.01


def test_answer_without_resume_state_is_unresumable() -> None:
    transcript = transcript_of("once", resumable=False)
    with pytest.raises(Unresumable, match="the prompt is too long"):
        POLICY.resume_request(LOST, REQUEST, transcript, None, MAX_PAYLOAD)


def test_conversation_that_no_message_can_hold_is_unresumable() -> None:
    fits, too_long = transcript_of("x" * 1000), transcript_of("x" * 8000)
    assert POLICY.resume_request(LOST, REQUEST, fits, None, max_payload=8192).resume
    with pytest.raises(Unresumable, match="the conversation is too long"):
        POLICY.resume_request(LOST, REQUEST, too_long, None, max_payload=8192)


# --- lost workers ---------------------------------------------------------------------------------


async def reading_until_stopped(
    bus: Bus,
    worker: StoryWorker,
    request: ChatRequest = REQUEST,
    policy: FailoverPolicy = FAST,
) -> asyncio.Task[list[StreamEvent]]:
    """Start reading, and wait until the worker has sent all that it sends."""
    reading = asyncio.create_task(read(bus, request, policy))
    await worker.stopped.wait()
    return reading


@pytest.mark.parametrize("stop_at", [0, 20, len(STORY) - 1])
async def test_another_worker_resumes_where_a_worker_died(
    bus: Bus, nats_url: str, stop_at: int
) -> None:
    async with story_worker(nats_url, "w1", stop_at) as first:
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            await first.kill()
            check_whole(await reading)
    (request,) = second.requests
    ids, text = tuple(map(ord, STORY[:stop_at])), STORY[:stop_at]
    assert request.resume == (text_resume(RESUME_STATE, ids, text) if stop_at else None)
    assert request.request_id == "r" and request.prompt == "hi"


async def test_attempts_of_a_caller_without_a_trace_share_one(bus: Bus, nats_url: str) -> None:
    traces = []

    def note(delivery: Delivery) -> None:
        traces.append(trace_context.trace_id())

    await bus.subscribe(subjects.request(subjects.OPEN_TENANT), note)
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            await first.kill()
            check_whole(await reading)
            assert second.requests
    assert len(traces) >= 2 and len(set(traces)) == 1 and traces[0]


async def test_answer_whose_started_event_was_lost_is_resumed(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20) as first:
        first.loses_started = True
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            await first.kill()
            check_whole(events := await reading)
    assert sum(isinstance(event, Started) for event in events) == 1
    (request,) = second.requests
    assert request.resume and request.resume.state == RESUME_STATE


async def test_resumed_request_has_the_remaining_timeout(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 9) as first:
        reading = await reading_until_stopped(bus, first, replace(REQUEST, timeout_s=30))
        async with story_worker(nats_url, "w2") as second:
            await first.kill()
            check_whole(await reading)
    (resumed,) = second.requests
    assert resumed.timeout_s and 25 < resumed.timeout_s < 30


async def test_joined_reader_resumes_with_the_remaining_timeout(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 9) as first:
        reading = await reading_until_stopped(bus, first, replace(REQUEST, timeout_s=30))
        reading.cancel()
        first.accepted_before = 10
        joined = asyncio.create_task(rejoin(bus))
        await first.replayed.wait()
        async with story_worker(nats_url, "w2") as second:
            await first.kill()
            check_whole(await joined)
    (resumed,) = second.requests
    assert resumed.timeout_s and resumed.timeout_s <= 20


async def test_two_readers_of_a_lost_worker_resume_one_answer(bus: Bus, nats_url: str) -> None:
    # a worker that replies late would get a second attempt, as would one that has finished
    policy = dataclasses.replace(FAST, admission_seconds=10, give_up_seconds=30)
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first, policy=policy)
        joined = asyncio.create_task(rejoin(bus, 5, policy))
        await first.replayed.wait()
        async with story_worker(nats_url, "w2", token_seconds=0.05) as second:
            await first.kill()
            check_whole(await reading)
            check_whole(await joined, begins_at=5)
            assert len(second.replies) == 1


async def test_joined_reader_switches_to_the_replacing_attempt(bus: Bus, nats_url: str) -> None:
    begun, more = STORY[:20], STORY[20:40]
    async with story_worker(nats_url, "w1", 20) as first:
        (await reading_until_stopped(bus, first)).cancel()
        async with aclosing(ChatClient(bus, policy=FAST).rejoin("r")) as joined:
            assert await text_of(joined, len(begun)) == begun
            await first.stop_accepting()
            first.forget()
            async with story_worker(nats_url, "w2", 40) as second:
                reply = subjects.reply("_", "r", "second")
                again = replace(
                    REQUEST, resume=text_resume(RESUME_STATE, tuple(map(ord, begun)), begun)
                )
                await bus.publish(subjects.request(subjects.OPEN_TENANT), again, reply)
                alive = asyncio.create_task(send_progress(bus, reply))
                try:
                    assert await text_of(joined, len(more)) == more
                finally:
                    alive.cancel()
                assert len(second.requests) == 1


async def test_replacing_attempt_lost_before_the_join_is_resumed(bus: Bus, nats_url: str) -> None:
    begun = STORY[:20]
    async with story_worker(nats_url, "w1", 20) as first:
        first.freezes_after_replay = True
        reading = await reading_until_stopped(bus, first)
        first.forget()
        reply = subjects.reply("_", "r", "second")
        again = replace(REQUEST, resume=text_resume(RESUME_STATE, tuple(map(ord, begun)), begun))
        await bus.publish(subjects.request(subjects.OPEN_TENANT), again, reply)
        async with story_worker(nats_url, "w2") as second:
            check_whole(await reading)
    assert first.replies[1:] == [reply] and first.replayed.is_set()
    (resumed,) = second.requests
    assert resumed.resume and Answer.of(resumed.resume.events).text == begun


async def text_of(events: AsyncIterator[StreamEvent], length: int) -> str:
    text = ""
    async with asyncio.timeout(30):
        while len(text) < length:
            event = await anext(events)
            text += event.text if isinstance(event, Token) else ""
    return text


async def send_progress(bus: Bus, reply: str) -> None:
    while True:
        await bus.publish(reply, Progress(0, 5, 5))
        await asyncio.sleep(0.01)


async def test_frozen_workers_attempt_is_resumed_and_dropped(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            first.is_frozen = True
            check_whole(await reading)
    assert Cancel(reply=first.replies[0]) in first.cancelled
    assert first.replies[0] not in second.replies


async def test_conflict_whose_attempt_is_then_lost_is_retried(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            second.rejects_with = CONFLICT
            await first.kill()
            await second.received.wait()
            second.rejects_with = None
            check_whole(await reading)


async def test_events_of_a_lost_attempt_are_ignored(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first)
        async with story_worker(nats_url, "w2") as second:
            first.rejects_with = ServiceError("shutting_down", "It shuts down.")
            first.forget()
            await second.stopped.wait()
            await first.publish(first.replies[0], Token(20, "WRONG", (1,)))
            check_whole(await reading)


@pytest.mark.parametrize("code", ["shutting_down", "worker_lost"])
async def test_worker_that_hands_over_is_resumed_at_once(
    bus: Bus, nats_url: str, code: ErrorCode
) -> None:
    async with story_worker(nats_url, "w1", 20, Failed(code, "It shuts down.")) as first:
        reading = asyncio.create_task(read(bus))
        await first.received.wait()
        async with story_worker(nats_url, "w2"):
            first.rejects_with = ServiceError("shutting_down", "It shuts down.")
            check_whole(await reading)


async def test_answer_that_no_worker_can_resume_ends_in_failed(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20) as first:
        reading = await reading_until_stopped(bus, first)
        await first.kill()
        *_, failed = await reading
    assert isinstance(failed, Failed) and failed.code == "worker_lost" and failed.retry_after
    assert "No other worker can resume" in failed.message


async def test_answer_waits_while_a_worker_loads_the_model(bus: Bus, nats_url: str) -> None:
    workers, model = WorkerDirectory(), ModelInfo("mine", "digest", 100, 0)
    loading = WorkerReport("w2", "loading", 8, 0, 0, 8, model=model, name="mine", progress=0.5)
    policy = dataclasses.replace(FAST, give_up_seconds=0.3, retry_seconds=0.05)
    client = ChatClient(bus, workers=workers, policy=policy)
    async with story_worker(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read_all(client.stream(replace(REQUEST, model="mine"))))
        await first.stopped.wait()
        await first.kill()
    for _ in range(9):  # longer than `give_up_seconds`
        workers.on_report(Delivery(subjects.report("w2"), encode(loading), ""))
        await asyncio.sleep(0.1)
    assert not reading.done()
    async with story_worker(nats_url, "w2"):
        check_whole(await reading)


async def test_answer_is_given_up_after_max_losses(bus: Bus, nats_url: str) -> None:
    async with story_worker(nats_url, "w1", 20, Failed("worker_lost", "Lost.")) as worker:
        *_, end = await read(bus)
    assert isinstance(end, Failed) and end.code == "worker_lost"
    assert len(worker.requests) == 1 + FAST.max_losses


async def test_only_workers_of_the_same_model_resume(bus: Bus, nats_url: str) -> None:
    workers, model = WorkerDirectory(), ModelInfo("other", "digest of other", 100, 0)
    other = WorkerReport("w2", "ready", 8, 0, 0, 8, model=model)
    workers.on_report(Delivery(subjects.report("w2"), encode(other), ""))
    client = ChatClient(bus, workers=workers, policy=FAST)
    async with aclosing(client.stream(replace(REQUEST, model="mine"))) as events:
        async with story_worker(nats_url, "w1", 9) as mine:
            await text_of(events, 9)
            await mine.kill()
        async with story_worker(nats_url, "w2", 0, Failed("model_not_found", "no")) as w2:
            *_, end = [event async for event in events]
    assert isinstance(end, Failed) and end.code == "worker_lost"
    assert w2.requests == []
