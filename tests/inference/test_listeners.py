"""Replays of answers, and answers without listeners."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import cast

import pytest
from msgspec.structs import replace as replace_request

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    Replay,
    ReplayRequest,
    Sampling,
    SessionErased,
    Token,
)
from services.inference.adapters import Variant
from services.inference.engine.adapter_numbers import BASE
from services.inference.in_flight import InFlightRequest
from services.inference.limits import InferenceLimits
from services.runtime.bus import Bus
from tests.inference.scripted import FAST, LONG, StartWorker, Worker, text

REQUEST = ChatRequest(prompt="long", session_id="s", request_id="r")


@pytest.fixture
async def slow(start_worker: StartWorker) -> AsyncIterator[Worker]:
    """A worker with 5 ms per step that cancels answers after 0.2 s without a listener."""
    limits = replace(FAST, min_grace_seconds=0.2)
    async with start_worker(parallel=1, queue=2, step_seconds=0.005, limits=limits) as slow:
        yield slow


def of_any(worker: Worker) -> str:
    return subjects.replay(worker.tenant, "r")


def of_worker(worker: Worker) -> str:
    return subjects.worker_replay("worker", worker.tenant, "r")


async def replay(worker: Worker, subject: str, offset: int = 0) -> Replay:
    return await worker.bus.request(subject, ReplayRequest(offset), Replay, timeout=0.5)


async def disconnect_after_first_token(worker: Worker, request: ChatRequest) -> None:
    async with aclosing(worker.events(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                return


@pytest.mark.parametrize("subject_of", [of_any, of_worker])
async def test_running_and_finished_answers_are_replayed(
    start_worker: StartWorker, subject_of: Callable[[Worker], str]
) -> None:
    async with start_worker(step_seconds=0.001) as worker:
        subject, received = subject_of(worker), []
        async for event in worker.events(REQUEST):
            received.append(event)
            if isinstance(event, Token) and event.offset == 0:
                running = await replay(worker, subject)
                assert running.request == REQUEST and running.reply.startswith("_INBOX.")
                assert list(running.events)[:3] == received and isinstance(received[0], Accepted)
        accepted, _, token, done = (await replay(worker, subject)).events
        assert (accepted, done) == (received[0], received[-1])
        assert token == Token(0, LONG.decode(), ())
        assert (await replay(worker, subject, offset=500)).events == (done,)


async def test_only_direct_replay_of_an_unknown_request_is_rejected(fast: Worker) -> None:
    with pytest.raises(ServiceError, match="does not have"):
        await replay(fast, of_worker(fast))
    with pytest.raises(TimeoutError):
        await replay(fast, of_any(fast))


async def test_answer_of_an_erased_session_is_not_replayed(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r")
    assert (await replay(fast, of_worker(fast))).events
    await fast.bus.publish(subjects.erased(fast.tenant), SessionErased("s"))
    with pytest.raises(ServiceError, match="does not have"):
        await replay(fast, of_worker(fast))


async def test_replay_is_sent_to_inboxes_only(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r")
    to_worker = subjects.worker_request("worker", fast.tenant)
    async with fast.bus.inbox("elsewhere") as inbox:
        for subject in (of_any(fast), of_worker(fast), to_worker):
            await fast.bus.publish(subject, ReplayRequest(0), reply="elsewhere")
        assert (await replay(fast, of_any(fast))).events
        with pytest.raises(TimeoutError):
            await inbox.next(0.05)


async def test_second_attempt_at_a_running_request_is_a_conflict(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "s", request_id="r", max_tokens=50))
    await slow.until(lambda: slow.running == 1)
    (failed,) = await slow.ask("long", "s", request_id="r")
    assert isinstance(failed, Failed) and failed.code == "conflict"
    assert isinstance((await first)[-1], Done)


async def test_answer_without_listeners_is_cancelled_after_the_grace(slow: Worker) -> None:
    await disconnect_after_first_token(slow, REQUEST)
    await slow.until(lambda: not slow.service.flights)
    (message,) = await slow.messages()
    assert message.finish_reason == "cancelled"
    assert 10 < len(message.model_response) < 400, "it continued for the grace"


@pytest.mark.parametrize(("min_grace", "are_gone"), [(0.0, True), (60.0, False)])
def test_request_without_grace_has_the_minimum(min_grace: float, are_gone: bool) -> None:
    limits = InferenceLimits(min_grace_seconds=min_grace)
    bus = cast(Bus, None)
    variant = Variant(BASE, ModelInfo("fake", "digest", 1000, 0))
    flight = InFlightRequest(bus, limits, "w", 1, "t", REQUEST, "_INBOX.r", Sampling(), variant)
    flight.listeners.on_missed(flight.listeners.next_number())
    assert flight.listeners.are_gone is are_gone


async def test_reader_that_returns_within_the_grace_gets_the_rest(slow: Worker) -> None:
    request = replace_request(REQUEST, grace_s=5, max_tokens=100)
    await disconnect_after_first_token(slow, request)
    await slow.until(lambda: len(slow.backend.steps) > 40)
    reply = (await replay(slow, of_any(slow))).reply
    async with slow.bus.inbox(reply) as inbox:
        while b'"done"' not in (await inbox.next(5)).data:
            pass
    *_, done = (await replay(slow, of_any(slow))).events
    assert isinstance(done, Done) and (done.finish_reason, done.length) == ("length", 100)


async def test_worker_disconnected_while_frozen_drops_its_requests(
    start_worker: StartWorker,
) -> None:
    limits = replace(FAST, disconnected_seconds=0.5)
    async with start_worker(parallel=1, step_seconds=0.005, limits=limits) as slow:
        events = []
        async for event in slow.events(REQUEST):
            events.append(event)
            if isinstance(event, Token) and event.offset == 0:
                slow.bus._client._transport._io_writer.transport.abort()  # type: ignore[union-attr]
                time.sleep(0.8)  # freezes all of the process but the engine's thread
        assert isinstance(events[-1], Failed) and events[-1].code == "worker_lost"
        assert len(text(events)) < 10
        await slow.until(lambda: not slow.service.flights)
        assert await slow.messages() == ()
        with pytest.raises(ServiceError, match="does not have"):
            await replay(slow, of_worker(slow))
        assert text(await slow.ask("hi", "s")) == "hello"
