"""Who reads a worker's answers: what is said again, and what happens when nobody is left."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Failed,
    Replay,
    ReplayRequest,
    SessionErased,
    Token,
)
from services.inference import audience, contact
from services.runtime.bus import Bus
from tests.inference.scripted import LONG, Worker, text, worker

REQUEST = ChatRequest(prompt="long", session_id="s", request_id="r")
EVERYBODY = subjects.replay("_", "r")
THE_WORKER = subjects.worker_replay("worker", "_", "r")


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Worker]:
    async with worker(tmp_path, parallel=1, queue=2, step_seconds=0.005) as slow:
        yield slow


async def replay(bus: Bus, subject: str, at: int = 0) -> Replay:
    return await bus.request(subject, ReplayRequest(at), Replay, timeout=0.5)


async def leave_after_the_first_token(worker: Worker, request: ChatRequest) -> None:
    async with aclosing(worker.events(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                return


async def until_idle(worker: Worker) -> None:
    async with asyncio.timeout(5):
        while worker.service.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("subject", [EVERYBODY, THE_WORKER])
async def test_an_answer_that_runs_and_one_that_has_ended_is_said_again(
    slow: Worker, subject: str
) -> None:
    seen = []
    async for event in slow.events(REQUEST):
        seen.append(event)
        if isinstance(event, Token) and event.offset == 0:
            running = await replay(slow.bus, subject)
            assert running.request == REQUEST and running.reply.startswith("_INBOX.")
            assert list(running.events)[:3] == seen and isinstance(seen[0], Accepted)
    accepted, _, token, done = (await replay(slow.bus, subject)).events
    assert (accepted, token, done) == (seen[0], Token(0, LONG.decode(), ()), seen[-1])
    assert (await replay(slow.bus, subject, at=500)).events == (done,)


async def test_one_that_is_not_known_is_said_so_by_the_worker_that_was_asked_itself(
    slow: Worker,
) -> None:
    with pytest.raises(ServiceError, match="does not know"):
        await replay(slow.bus, THE_WORKER)
    with pytest.raises(TimeoutError):
        await replay(slow.bus, EVERYBODY)


async def test_answer_of_an_erased_session_is_not_replayed(slow: Worker) -> None:
    await slow.ask("hi", "s", request_id="r")
    assert (await replay(slow.bus, THE_WORKER)).events
    await slow.bus.publish(subjects.erased("_"), SessionErased("s"))
    with pytest.raises(ServiceError, match="does not know"):
        await replay(slow.bus, THE_WORKER)


async def test_an_answer_is_said_again_to_an_inbox_alone(slow: Worker) -> None:
    await slow.ask("hi", "s", request_id="r")
    async with slow.bus.inbox("elsewhere") as inbox:
        for subject in (EVERYBODY, THE_WORKER, subjects.worker_request("worker", "_")):
            await slow.bus.publish(subject, ReplayRequest(0), reply="elsewhere")
        assert (await replay(slow.bus, EVERYBODY)).events
        with pytest.raises(TimeoutError):
            await inbox.next(0.05)


async def test_a_second_attempt_at_what_runs_here_is_a_conflict(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "s", request_id="r"))
    while not slow.service.running:
        await asyncio.sleep(0.01)
    (failed,) = await slow.ask("long", "s", request_id="r")
    assert isinstance(failed, Failed) and failed.code == "conflict"
    assert isinstance((await first)[-1], Done)


async def test_an_answer_that_nobody_hears_is_cancelled_after_the_grace(
    slow: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "LEAST_GRACE", 0.2)
    await leave_after_the_first_token(slow, REQUEST)
    await until_idle(slow)
    (message,) = await slow.messages()
    assert message.finish_reason == "cancelled"
    assert 10 < len(message.model_response) < 400, "it went on for the grace"


async def test_who_comes_back_within_the_grace_gets_the_rest(
    slow: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "LEAST_GRACE", 1.0)
    await leave_after_the_first_token(slow, REQUEST)
    await asyncio.sleep(0.4)
    reply = (await replay(slow.bus, EVERYBODY)).reply
    async with slow.bus.inbox(reply) as inbox:
        while b'"done"' not in (await inbox.next(1)).data:
            pass
    *_, done = (await replay(slow.bus, EVERYBODY)).events
    assert isinstance(done, Done) and (done.finish_reason, done.length) == ("stop", 500)


async def test_a_worker_that_was_frozen_drops_what_it_holds_and_stores_nothing(
    slow: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact, "LIMIT", 0.5)
    events = []
    async for event in slow.events(REQUEST):
        events.append(event)
        if isinstance(event, Token) and event.offset == 0:
            time.sleep(0.8)  # nothing of this process runs but the model
    assert isinstance(events[-1], Failed) and events[-1].code == "worker_lost"
    assert len(text(events)) < 10
    await until_idle(slow)
    assert await slow.messages() == ()
    with pytest.raises(ServiceError, match="does not know"):
        await replay(slow.bus, THE_WORKER)
    assert text(await slow.ask("hi", "s")) == "hello"
