"""What is kept of an answer, however it ended, and what a session's turns begin from."""

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
    Cancel,
    ChatRequest,
    Done,
    Empty,
    Failed,
    Started,
    StreamEvent,
    Token,
)
from services.inference.sessions import HistoryClient, Kept
from tests.inference.scripted import Worker, text

TENANT = subjects.OPEN_TENANT


async def kept(worker: Worker, session: str) -> tuple[Exchange, ...]:
    subject = subjects.history("export", TENANT)
    return (await worker.bus.request(subject, ExportRequest(session), ExportPage)).exchanges


async def describe(worker: Worker, session: str, system_prompt: str | None) -> None:
    asked = DescribeRequest(session, Description(system_prompt=system_prompt))
    await worker.bus.request(subjects.history("describe", TENANT), asked, Session)


def read(worker: Worker) -> str:
    """All that the model was given to read."""
    tokens = [token for step in worker.backend.steps for chunk in step for token in chunk.tokens]
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


async def test_an_exchange_is_kept_whole(fast: Worker) -> None:
    reply = subjects.reply(TENANT, "r1", "attempt1")
    async with fast.bus.inbox(reply) as inbox:
        request = ChatRequest(prompt="hi", session_id="s", request_id="r1", seed=7)
        await fast.bus.publish(subjects.request(subjects.OPEN_TENANT), request, reply)
        while b'"done"' not in (await inbox.next(5)).data:
            pass
    (exchange,) = await kept(fast, "s")
    assert (exchange.v, exchange.request_id, exchange.attempt) == (1, "r1", "attempt1")
    assert (exchange.prompt, exchange.response, exchange.finish_reason) == ("hi", "hello", "stop")
    assert exchange.model and exchange.model.digest == "digest of fake"
    assert (exchange.sampling.seed, exchange.sampling.temperature) == (7, 0.5)
    assert exchange.usage.completion_tokens == 6 and exchange.timings.decode > 0
    assert exchange.asked_at < exchange.answered_at
    assert exchange.asked_at.tzinfo == exchange.answered_at.tzinfo == UTC


async def test_stop_string_of_an_answer_is_logged_stored_and_replayed(
    fast: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):  # the second time it comes from the log
        *_, done = await fast.ask("stop", "s", request_id="r1")
        assert isinstance(done, Done) and (done.stop_string, done.stored) == ("\nUser:", "log")
    assert r"request finished reason=stop stop_string='\nUser:' prompt_tokens=" in caplog.text
    (exchange,) = await kept(fast, "s")
    assert (exchange.finish_reason, exchange.stop_string) == ("stop", "\nUser:")
    *_, done = await fast.ask("hi", "s", request_id="r2")
    assert isinstance(done, Done) and done.stop_string is None


async def test_what_was_cancelled_before_anything_was_said_is_kept_and_not_shown(
    slow: Worker,
) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    while slow.service.running != 1:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
    while slow.service.waiting != 1:
        await asyncio.sleep(0.01)
    for request_id, asking in (("r2", second), ("r1", first)):
        await slow.bus.publish(subjects.cancel(TENANT, request_id), Cancel())
        assert isinstance((await asking)[-1], Done)
    (exchange,) = await kept(slow, "b")
    assert (exchange.response, exchange.finish_reason) == ("", "cancelled")
    context = await slow.context("b")
    assert (context.turns, context.last) == ((), "r2")


async def test_a_failed_answer_is_kept_with_what_was_said(slow: Worker) -> None:
    said = ""
    async for event in slow.events(ChatRequest(prompt="long", session_id="s", request_id="r1")):
        if isinstance(event, Token):
            said += event.text
            slow.backend.fails = True
    assert isinstance(event, Failed) and event.code == "internal"
    (exchange,) = await kept(slow, "s")
    assert (exchange.response, exchange.finish_reason) == (said, "failed")
    assert exchange.usage.completion_tokens >= len(said) > 0
    assert [turn.response for turn in (await slow.context("s")).turns] == [said]


@pytest.mark.parametrize("comes_back", [False, True])
async def test_what_the_log_does_not_take_is_tried_again_until_a_deadline_and_told(
    fast: Worker, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    monkeypatch.setattr("services.inference.sessions.APPEND_DEADLINE", 1.0)
    js = fast.bus.jetstream
    config = (await js.stream_info("HISTORY")).config
    await js.update_stream(replace(config, max_msgs=1, discard=api.DiscardPolicy.NEW))
    await fast.ask("hi", "s", request_id="r1")
    asking = asyncio.create_task(fast.ask("hi", "s", request_id="r2"))
    await asyncio.sleep(0.5)
    assert not asking.done()
    if comes_back:
        await js.update_stream(config)
    *_, done = await asking
    assert isinstance(done, Done) and done.finish_reason == "stop"
    assert done.stored == ("log" if comes_back else "failed")
    assert len(await kept(fast, "s")) == 1 + comes_back


async def cut_short(worker: Worker, cut: Callable[[], object]) -> list[StreamEvent]:
    """An answer to the request r1 that is cut once something was said."""
    events: list[StreamEvent] = []
    request = ChatRequest(prompt="long", session_id="s", request_id="r1", max_tokens=50)
    async for event in worker.events(request):
        if isinstance(event, Token) and not any(isinstance(e, Token) for e in events):
            cut()
        events.append(event)
    return events


async def test_what_another_attempt_said_unheard_and_stored_is_told_by_one_that_is_cut_short(
    slow: Worker,
) -> None:
    whole = await slow.ask("long", "s", request_id="r1", max_tokens=50)
    subject = subjects.cancel(TENANT, "r1")
    events = await cut_short(slow, lambda: slow.bus.spawn(slow.bus.publish(subject, Cancel())))
    assert text(events) == text(whole)
    (exchange,) = await kept(slow, "s")
    assert exchange.response == text(whole)
    (*_, done), (*_, first) = events, whole
    assert isinstance(done, Done) and isinstance(first, Done)
    assert (done.finish_reason, done.stored, done.usage) == ("length", "log", first.usage)
    assert done.length == len(exchange.response)


async def test_an_attempt_that_lacked_nothing_but_its_end_ends_as_the_one_that_is_stored(
    slow: Worker,
) -> None:
    whole = await slow.ask("hi", "s", request_id="r1")
    events = await slow.ask("hi", "s", request_id="r1", max_tokens=len("hello"))
    assert text(events) == text(whole) == "hello"
    (*_, done), (*_, first) = events, whole
    assert isinstance(done, Done) and isinstance(first, Done)
    assert (done.finish_reason, done.stored, done.usage) == ("stop", "log", first.usage)


async def test_an_answer_of_which_the_log_has_less_is_told_as_not_stored(slow: Worker) -> None:
    short = await cut_short(slow, lambda: setattr(slow.backend, "fails", True))
    *_, done = whole = await slow.ask("long", "s", request_id="r1", max_tokens=50)
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("length", "failed")
    (exchange,) = await kept(slow, "s")
    assert exchange.response == text(short) != text(whole)


async def test_another_question_under_the_id_of_one_that_is_stored_is_not_answered_by_it(
    fast: Worker,
) -> None:
    await fast.ask("hi", "s", request_id="r1")
    *_, done = events = await fast.ask("stop", "s", request_id="r1")
    assert text(events) == "fine"
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("stop", "failed")


async def test_a_repeat_of_what_was_erased_meanwhile_is_told_as_not_kept(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r1")
    (exchange,) = await kept(fast, "s")
    erase = subjects.history("delete", TENANT)
    await fast.bus.request(erase, DeleteRequest("s"), Empty)
    key = subjects.session_key(TENANT, "s")
    assert await HistoryClient(fast.bus).append(key, exchange, lambda: True) == Kept("none")


async def test_what_fails_before_it_begins_is_no_exchange(fast: Worker) -> None:
    (_, failed) = await fast.ask("hi " * 660, "s")
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert await kept(fast, "s") == ()


async def test_a_session_has_a_system_prompt_of_its_own(fast: Worker) -> None:
    await fast.ask("hi", "other")
    assert "helpful, friendly assistant" in read(fast)
    fast.backend.steps.clear()
    await describe(fast, "s", "Speak like a pirate.")
    await fast.ask("hi", "s")
    assert "Speak like a pirate." in read(fast) and "friendly" not in read(fast)
    fast.backend.steps.clear()
    await describe(fast, "none", "")
    await fast.ask("hi", "none")
    assert "<|im_start|>user" in read(fast) and "system" not in read(fast)


async def test_a_retry_takes_the_place_of_the_last_exchange(fast: Worker) -> None:
    await fast.ask("hi", "s", request_id="r1")
    await fast.ask("stop", "s", request_id="r2")
    events = await fast.ask("emoji", "s", request_id="r3", retry_of="r2")
    started = next(event for event in events if isinstance(event, Started))
    assert started.exchanges_kept == 1 and text(events) == "é🙂"
    assert [turn.request_id for turn in (await fast.context("s")).turns] == ["r1", "r3"]
    assert [(e.request_id, e.retry_of) for e in await kept(fast, "s")] == [
        ("r1", None),
        ("r2", None),
        ("r3", "r2"),
    ]
    marks = {message.id: message.retried for message in await fast.messages()}
    assert marks == {"r1": False, "r2": True, "r3": False}


async def test_only_the_last_exchange_can_be_retried(fast: Worker) -> None:
    for request_id in ("r1", "r2"):
        await fast.ask("hi", "s", request_id=request_id)
    for session, last in (("s", "'r2'"), ("another", "none")):
        *_, failed = await fast.ask("hi", session, retry_of="r1")
        assert isinstance(failed, Failed) and failed.code == "invalid_request"
        assert f"`retry_of` must name the session's last exchange, and that is {last}." == (
            failed.message
        )
    assert len((await fast.context("s")).turns) == 2
