"""What is stored of an answer, however it ended, and how a session's next prompt uses it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC

import pytest
from nats.js import api

from services.contract import subjects
from services.contract.history import (
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExportPage,
    ExportRequest,
    Session,
)
from services.contract.messages import (
    ChatRequest,
    Done,
    Empty,
    Failed,
    Started,
    StreamEvent,
    Token,
)
from services.inference.history_client import AppendResult, HistoryClient
from tests.inference.scripted import FAST, Worker, started, text


async def stored(worker: Worker, session: str) -> tuple[Exchange, ...]:
    subject = subjects.history("export", worker.tenant)
    return (await worker.bus.request(subject, ExportRequest(session), ExportPage)).exchanges


async def describe(worker: Worker, session: str, system_prompt: str | None) -> None:
    asked = DescribeRequest(session, Description(system_prompt=system_prompt))
    await worker.bus.request(subjects.history("describe", worker.tenant), asked, Session)


def computed(worker: Worker) -> str:
    """Return the text of all tokens that the model has computed."""
    tokens = [token for step in worker.backend.steps for chunk in step for token in chunk.tokens]
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


async def test_exchange_is_stored_with_all_fields(fast: Worker) -> None:
    reply = subjects.reply(fast.tenant, "r1", "attempt1")
    async with fast.bus.inbox(reply) as inbox:
        request = ChatRequest(prompt="hi", session_id="s", request_id="r1", seed=7)
        await fast.bus.publish(subjects.request(fast.tenant), request, reply)
        while b'"done"' not in (await inbox.next(5)).data:
            pass
    (exchange,) = await stored(fast, "s")
    assert (exchange.v, exchange.request_id, exchange.attempt) == (1, "r1", "attempt1")
    assert (exchange.prompt, exchange.response, exchange.finish_reason) == ("hi", "hello", "stop")
    assert exchange.model and exchange.model.digest == "digest of fake"
    assert (exchange.sampling.seed, exchange.sampling.temperature) == (7, 0.5)
    assert exchange.usage.completion_tokens == 6 and exchange.timings.decode > 0
    assert exchange.asked_at < exchange.answered_at
    assert exchange.asked_at.tzinfo == exchange.answered_at.tzinfo == UTC


async def test_stop_string_of_answer_is_logged_and_stored(
    fast: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # the second time it comes from the log
        *_, done = await fast.ask("stop", "s", request_id="r1")
        assert isinstance(done, Done) and (done.stop_string, done.stored) == ("\nUser:", "log")
    assert r"request finished reason=stop stop_string='\nUser:' prompt_tokens=" in caplog.text
    (exchange,) = await stored(fast, "s")
    assert (exchange.finish_reason, exchange.stop_string) == ("stop", "\nUser:")
    *_, done = await fast.ask("hi", "s", request_id="r2")
    assert isinstance(done, Done) and done.stop_string is None


async def test_request_cancelled_in_queue_is_stored_but_not_in_prompts(
    slow: Worker,
) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    await slow.until(lambda: slow.running == 1)
    second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
    await slow.until(lambda: slow.queued == 1)
    for request_id, asking in (("r2", second), ("r1", first)):
        await slow.cancel(request_id)
        assert isinstance((await asking)[-1], Done)
    (exchange,) = await stored(slow, "b")
    assert (exchange.response, exchange.finish_reason) == ("", "cancelled")
    context = await slow.context("b")
    assert (context.turns, context.last) == ((), "r2")


async def test_failed_answer_is_stored_with_its_text(slow: Worker) -> None:
    received = ""
    async for event in slow.events(ChatRequest(prompt="long", session_id="s", request_id="r1")):
        if isinstance(event, Token):
            received += event.text
            slow.backend.fails = True
    assert isinstance(event, Failed) and event.code == "internal"
    (exchange,) = await stored(slow, "s")
    assert (exchange.response, exchange.finish_reason) == (received, "failed")
    assert exchange.usage.completion_tokens >= len(received) > 0
    assert [turn.response for turn in (await slow.context("s")).turns] == [received]


@pytest.mark.parametrize("comes_back", [False, True])
async def test_failed_append_is_retried_until_a_deadline(
    own_history_url: str, comes_back: bool
) -> None:
    limits = replace(FAST, append_timeout_seconds=0.7)
    async with started(own_history_url, limits=limits) as fast:
        js = fast.bus.jetstream
        config = (await js.stream_info("HISTORY")).config
        await js.update_stream(replace(config, max_msgs=1, discard=api.DiscardPolicy.NEW))
        await fast.ask("hi", "s", request_id="r1")
        async with fast.bus.inbox(subjects.HISTORY_APPEND_FAILED) as failures:
            asking = asyncio.create_task(fast.ask("hi", "s", request_id="r2"))
            await failures.next(5)
        assert not asking.done()
        if comes_back:
            await js.update_stream(config)
        *_, done = await asking
        assert isinstance(done, Done) and done.finish_reason == "stop"
        assert done.stored == ("log" if comes_back else "failed")
        assert len(await stored(fast, "s")) == 1 + comes_back


async def test_answer_that_waits_for_its_append_occupies_no_slot(own_history_url: str) -> None:
    async with started(own_history_url) as fast:
        js = fast.bus.jetstream
        config = (await js.stream_info("HISTORY")).config
        await js.update_stream(replace(config, max_msgs=1, discard=api.DiscardPolicy.NEW))
        await fast.ask("hi", "s", request_id="r1")
        async with fast.bus.inbox(subjects.HISTORY_APPEND_FAILED) as failures:
            asking = asyncio.create_task(fast.ask("hi", "s", request_id="r2"))
            await failures.next(5)
        flights = fast.service.flights
        assert (len(flights), flights.running, flights.waiting, flights.queued_tokens) == (
            1,
            0,
            0,
            0,
        )
        await js.update_stream(config)
        *_, done = await asking
        assert isinstance(done, Done) and done.stored == "log"


async def cut_short(worker: Worker, cut: Callable[[], object]) -> list[StreamEvent]:
    """Return the events of the request r1; `cut` is called with its first token."""
    events: list[StreamEvent] = []
    request = ChatRequest(prompt="long", session_id="s", request_id="r1", max_tokens=50)
    async for event in worker.events(request):
        if isinstance(event, Token) and not any(isinstance(e, Token) for e in events):
            cut()
        events.append(event)
    return events


async def test_cancelled_repeat_returns_the_stored_answer(
    slow: Worker,
) -> None:
    whole = await slow.ask("long", "s", request_id="r1", max_tokens=50)
    events = await cut_short(slow, lambda: slow.bus.spawn(slow.cancel("r1")))
    assert text(events) == text(whole)
    (exchange,) = await stored(slow, "s")
    assert exchange.response == text(whole)
    (*_, done), (*_, first) = events, whole
    assert isinstance(done, Done) and isinstance(first, Done)
    assert (done.finish_reason, done.stored, done.usage) == ("length", "log", first.usage)
    assert done.length == len(exchange.response)


async def test_repeat_ends_like_the_stored_answer(
    slow: Worker,
) -> None:
    whole = await slow.ask("hi", "s", request_id="r1")
    events = await slow.ask("hi", "s", request_id="r1", max_tokens=len("hello"))
    assert text(events) == text(whole) == "hello"
    (*_, done), (*_, first) = events, whole
    assert isinstance(done, Done) and isinstance(first, Done)
    assert (done.finish_reason, done.stored, done.usage) == ("stop", "log", first.usage)


async def test_repeat_longer_than_the_stored_answer_is_not_stored(slow: Worker) -> None:
    short = await cut_short(slow, lambda: setattr(slow.backend, "fails", True))
    *_, done = whole = await slow.ask("long", "s", request_id="r1", max_tokens=50)
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("length", "failed")
    (exchange,) = await stored(slow, "s")
    assert exchange.response == text(short) != text(whole)


async def test_repeat_does_not_end_like_a_failed_answer(slow: Worker) -> None:
    await cut_short(slow, lambda: setattr(slow.backend, "fails", True))
    (exchange,) = await stored(slow, "s")
    *_, done = events = await slow.ask("long", "s", request_id="r1", max_tokens=1)
    assert exchange.finish_reason == "failed" and exchange.response.startswith(text(events))
    assert isinstance(done, Done) and done.finish_reason == "length"


async def test_other_prompt_with_a_stored_request_id_is_not_stored(
    fast: Worker,
) -> None:
    await fast.ask("hi", "s", request_id="r1")
    *_, done = events = await fast.ask("stop", "s", request_id="r1")
    assert text(events) == "fine"
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("stop", "failed")


async def test_append_to_an_erased_session_stores_nothing(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r1")
    (exchange,) = await stored(fast, "s")
    erase = subjects.history("delete", fast.tenant)
    await fast.bus.request(erase, DeleteRequest("s"), Empty)
    key = subjects.session_key(fast.tenant, "s")
    assert await HistoryClient(fast.bus).append(key, exchange, lambda: True) == AppendResult("none")


async def test_request_that_fails_before_its_start_is_not_stored(fast: Worker) -> None:
    (_, failed) = await fast.ask("hi " * 660, "s")
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert await stored(fast, "s") == ()


async def test_system_prompt_of_the_session_replaces_the_default(fast: Worker) -> None:
    await fast.ask("hi", "other")
    assert "helpful, friendly assistant" in computed(fast)
    fast.backend.steps.clear()
    await describe(fast, "s", "Speak like a pirate.")
    await fast.ask("hi", "s")
    assert "Speak like a pirate." in computed(fast) and "friendly" not in computed(fast)
    fast.backend.steps.clear()
    await describe(fast, "none", "")
    await fast.ask("hi", "none")
    assert "<|im_start|>user" in computed(fast) and "system" not in computed(fast)


async def test_retry_replaces_the_last_exchange(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r1")
    await fast.ask("stop", "s", request_id="r2")
    events = await fast.ask("emoji", "s", request_id="r3", retry_of="r2")
    started = next(event for event in events if isinstance(event, Started))
    assert started.exchanges_kept == 1 and text(events) == "é🙂"
    assert [turn.request_id for turn in (await fast.context("s")).turns] == ["r1", "r3"]
    assert [(e.request_id, e.retry_of) for e in await stored(fast, "s")] == [
        ("r1", None),
        ("r2", None),
        ("r3", "r2"),
    ]
    marks = {message.id: message.retried for message in await fast.messages()}
    assert marks == {"r1": False, "r2": True, "r3": False}


@pytest.mark.parametrize("retry_of", ["r2", "r3"])
async def test_retry_that_failed_without_text_can_be_retried(fast: Worker, retry_of: str) -> None:
    await fast.ask("hi", "s", request_id="r1")
    await fast.ask("hi", "s", request_id="r2")
    fast.backend.fails = True
    *_, failed = await fast.ask("hi", "s", request_id="r3", retry_of="r2")
    assert isinstance(failed, Failed)
    context = await fast.context("s")
    assert ([turn.request_id for turn in context.turns], context.last) == (["r1", "r2"], "r3")
    events = await fast.ask("emoji", "s", request_id="r4", retry_of=retry_of)
    started = next(event for event in events if isinstance(event, Started))
    assert started.exchanges_kept == 1 and text(events) == "é🙂"
    assert [turn.request_id for turn in (await fast.context("s")).turns] == ["r1", "r4"]


async def test_retry_of_an_earlier_exchange_is_rejected(fast: Worker) -> None:
    for request_id in ("r1", "r2"):
        await fast.ask("hi", "s", request_id=request_id)
    for session, last in (("s", "'r2'"), ("another", "none")):
        *_, failed = await fast.ask("hi", session, retry_of="r1")
        assert isinstance(failed, Failed) and failed.code == "invalid_request"
        assert f"`retry_of` must name the session's last exchange, and that is {last}." == (
            failed.message
        )
    assert len((await fast.context("s")).turns) == 2
