"""One request of a session, from admission to its end."""

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest

from services.contract import subjects
from services.contract.history import Context, DeleteRequest
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Empty,
    Failed,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    SessionErased,
    Started,
    StreamEvent,
    Token,
)
from services.runtime.deliveries import NoResponders
from tests.inference.scripted import FAST, StartWorker, Worker, started, text

UNKNOWN_TYPE = JsonSchemaFormat(JsonSchema({"type": "mystery"}))


async def test_events_have_the_order_of_the_contract(fast: Worker) -> None:
    accepted, started, *tokens, done = await fast.ask("hi", "s", request_id="r1")
    assert accepted == Accepted("r1", "worker")
    assert isinstance(started, Started) and started.exchanges_kept == 0
    assert text(tokens) == "hello"
    assert isinstance(done, Done) and (done.finish_reason, done.stored, done.length) == (
        "stop",
        "log",
        5,
    )
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (started.prompt_tokens, 6)


async def test_exchange_is_in_the_context_when_done_is_sent(fast: Worker) -> None:
    await fast.ask("hi", "s")
    (turn,) = (await fast.context("s")).turns
    assert (turn.prompt, turn.response) == ("hi", "hello")
    *_, started, _ = [e for e in await fast.ask("hi", "s") if not isinstance(e, Token)]
    assert isinstance(started, Started) and started.exchanges_kept == 1


async def test_stop_of_a_request_replaces_stop_of_the_settings(
    fast: Worker,
) -> None:
    for session, more, expected, stop_string in (
        ("a", {}, "fine", "\nUser:"),
        ("b", {"stop": ("User",)}, "fine\n", "User"),
        ("c", {"stop": ()}, "fine\nUser: me", None),
    ):
        *events, done = await fast.ask("stop", session, **more)
        assert text(events) == expected
        assert isinstance(done, Done) and done.finish_reason == "stop"
        assert done.stop_string == stop_string


async def test_stop_label_named_in_the_prompt_does_not_end_answer(fast: Worker) -> None:
    assert text(await fast.ask("Who is the user? stop", "s")) == "fine\nUser: me"


async def test_multibyte_character_is_sent_whole(fast: Worker) -> None:
    tokens = [e for e in await fast.ask("emoji", "s") if isinstance(e, Token)]
    assert [(t.offset, t.text, len(t.token_ids)) for t in tokens] == [(0, "é", 2), (1, "🙂", 4)]


async def test_max_tokens_ends_answer_with_length(fast: Worker) -> None:
    *_, done = events = await fast.ask("hi", "s", max_tokens=3)
    assert text(events) == "hel" and isinstance(done, Done) and done.finish_reason == "length"


async def test_prompt_over_context_window_is_rejected_with_numbers(fast: Worker) -> None:
    *_, failed = await fast.ask("x" * 3000, "s")
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert re.search(r"length is 2000 tokens.* has at least 3\d\d\d tokens", failed.message)


async def test_invalid_request_is_rejected_with_reason(fast: Worker) -> None:
    for prompt, code in (("", "invalid_request"), ("  \n", "invalid_request")):
        (failed,) = await fast.ask(prompt, "s")
        assert isinstance(failed, Failed) and failed.code == code
    (failed,) = await fast.ask("x" * 70_000, "s")
    assert isinstance(failed, Failed) and failed.code == "payload_too_large"
    (failed,) = await fast.ask("hi", "s", temperature=-1)
    assert isinstance(failed, Failed) and "temperature" in failed.message


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"grammar": "root ::= ("},
            "The field `grammar` can't be used: a parenthesis is not closed.",
        ),
        ({"grammar": 'root ::= root "a"'}, "allows no token"),
        ({"response_format": UNKNOWN_TYPE}, "The field `response_format` can't be used"),
        ({"grammar": 'root ::= "a"', "response_format": JsonObjectFormat()}, "remove one of them"),
        ({"logit_bias": {"257": 1.0}}, "`logit_bias` has the token 257"),
        ({"logit_bias": {"hello": 1.0}}, "logit_bias"),
        ({"min_p": 2.0}, "min_p"),
    ],
    ids=str,
)
async def test_invalid_sampling_is_rejected_before_a_slot(
    fast: Worker, more: dict[str, Any], why: str
) -> None:
    *before, failed = await fast.ask("hi", "s", **more)
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert why in failed.message
    assert not any(isinstance(event, Started) for event in before)
    assert fast.backend.steps == []


async def test_grammar_without_next_token_fails_its_answer_only(fast: Worker) -> None:
    broken, right = await asyncio.gather(
        fast.ask("hi", "a", grammar='root ::= "hell" [0-9]'),
        fast.ask("hi", "b", grammar='root ::= "hello"'),
    )
    assert isinstance(broken[-1], Failed) and broken[-1].code == "invalid_request"
    assert isinstance(right[-1], Done) and right[-1].finish_reason == "stop"
    assert (text(broken), text(right)) == ("hell", "hello")


async def test_stop_of_the_settings_ignores_grammar_answers(fast: Worker) -> None:
    events = await fast.ask("stop", "s", grammar="root ::= .{0,30}")
    assert text(events) == "fine\nUser: me"


async def test_request_without_reply_inbox_is_ignored(
    fast: Worker,
) -> None:
    await fast.ask("hi", "s")
    purge = "$JS.API.STREAM.PURGE.HISTORY"
    request = ChatRequest(prompt="hi", session_id="s")
    await fast.bus.publish(subjects.request(fast.tenant), request, reply=purge)
    await fast.bus.publish(subjects.request(fast.tenant), request)
    await fast.ask("hi", "other")
    assert len((await fast.context("s")).turns) == 1


async def test_cancel_ends_answer_and_stores_its_text(slow: Worker) -> None:
    request = ChatRequest(prompt="long", session_id="s", request_id="r1")
    events = []
    async for event in slow.events(request):
        events.append(event)
        if isinstance(event, Token):
            await slow.cancel("r1")
    done = events[-1]
    assert isinstance(done, Done) and done.finish_reason == "cancelled" and done.stored == "log"
    (turn,) = (await slow.context("s")).turns
    assert turn.response == text(events) and len(turn.response) < 500


async def test_answer_of_an_erased_session_is_cancelled_and_not_stored(
    slow: Worker,
) -> None:
    erased = subjects.history("delete", slow.tenant)
    events: list[StreamEvent] = []
    async for event in slow.events(ChatRequest(prompt="long", session_id="s")):
        if isinstance(event, Token) and not any(isinstance(e, Token) for e in events):
            await slow.bus.request(erased, DeleteRequest("s"), Empty)
        events.append(event)
    done = events[-1]
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "none")
    assert done.length == len(text(events)) and 0 < len(text(events)) < 500
    assert slow.running == 0
    assert (await slow.context("s")).turns == () and await slow.messages() == ()
    *_, done = await slow.ask("hi", "s")
    assert isinstance(done, Done) and done.stored == "log"
    assert [turn.response for turn in (await slow.context("s")).turns] == ["hello"]


async def test_request_of_session_erased_meanwhile_is_cancelled_in_queue(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    await slow.until(lambda: slow.running == 1)
    second = asyncio.create_task(slow.ask("hi", "b"))
    await slow.until(lambda: slow.queued == 1)
    await slow.bus.publish(subjects.erased(slow.tenant), SessionErased("b", 1))
    *_, done = await second
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "none")
    assert slow.running == 1, "another session is not affected"
    await slow.cancel("r1")
    await first
    assert (await slow.context("b")).last == ""


async def test_request_whose_context_is_older_than_the_erasure_is_cancelled(
    url_without_history: str,
) -> None:
    async with started(url_without_history) as alone:
        async with alone.bus.inbox(subjects.history("context", alone.tenant)) as reads:
            asking = asyncio.create_task(alone.ask("hi", "s"))
            read = await reads.next(5)
            await alone.bus.publish(subjects.erased(alone.tenant), SessionErased("s", 2))
            flights = alone.service.flights
            await alone.until(lambda: any(f.erased_epoch == 2 for f in flights.values()))
            await alone.bus.publish(read.reply, Context(epoch=1))
            *_, done = await asking
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "none")


async def test_answer_that_began_after_the_erasure_is_not_cancelled(slow: Worker) -> None:
    await slow.bus.request(subjects.history("delete", slow.tenant), DeleteRequest("s"), Empty)
    epoch = (await slow.context("s")).epoch
    begun = asyncio.create_task(slow.ask("long", "s", max_tokens=20))
    await slow.until(lambda: slow.running == 1)
    await slow.bus.publish(subjects.erased(slow.tenant), SessionErased("s", epoch))
    *_, done = await begun
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("length", "log")


async def test_cached_tokens_of_an_erased_session_are_dropped(fast: Worker) -> None:
    answers = [text(await fast.ask("long", session)).encode() for session in ("s", "another")]

    def cached() -> list[bytes]:
        slots = fast.backend.cells.values()
        held = [bytes(token for token in cells if token < 256) for cells in slots]
        return [each for each in held if answers[0] in each]

    assert len(cached()) == len(answers) == 2
    await fast.bus.request(subjects.history("delete", fast.tenant), DeleteRequest("s"), Empty)
    await fast.until(lambda: len(cached()) == 1)
    *_, done = await fast.ask("hi", "another")
    assert isinstance(done, Done) and done.usage.cached_tokens > len(answers[1])


async def test_cancel_in_queue_ends_request_without_a_slot(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    await slow.until(lambda: slow.running == 1)
    second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
    await slow.until(lambda: slow.queued == 1)
    await slow.cancel("r2")
    *_, done = await second
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "log")
    await slow.cancel("r1")
    await first
    assert (await slow.context("b")).turns == ()


async def test_drain_finishes_in_flight_requests_and_accepts_none(slow: Worker) -> None:
    asks = [asyncio.create_task(slow.ask("hi", str(i))) for i in range(3)]
    await slow.until(lambda: len(slow.service.flights) == 3)
    await slow.service.drain()
    for events in await asyncio.gather(*asks):
        assert text(events) == "hello" and isinstance(events[-1], Done)
    assert slow.backend.closed
    with pytest.raises(NoResponders):
        await slow.ask("hi", "s")


async def test_drain_deadline_fails_unfinished_requests(start_worker: StartWorker) -> None:
    limits = replace(FAST, drain_seconds=0.2)
    async with start_worker(parallel=1, step_seconds=0.01, limits=limits) as slow:
        ask = asyncio.create_task(slow.ask("long", "s"))
        await slow.until(lambda: slow.running == 1)
        await slow.service.drain()
        *_, failed = await ask
    assert isinstance(failed, Failed) and failed.code == "shutting_down"


async def test_request_of_a_session_without_history_fails(url_without_history: str) -> None:
    limits = replace(FAST, history_tries_seconds=(0.1, 0.1))
    async with started(url_without_history, limits=limits) as alone:
        *_, failed = await alone.ask("hi", "s")
    assert isinstance(failed, Failed) and failed.code == "history_unavailable"


async def test_failed_step_fails_its_answers_only(
    fast: Worker,
) -> None:
    fast.backend.fails = True
    *_, failed = await fast.ask("hi", "s")
    assert isinstance(failed, Failed) and failed.code == "internal"
    assert text(await fast.ask("hi", "s")) == "hello"


async def test_dead_engine_fails_its_answers_and_the_process(fast: Worker) -> None:
    *_, failed = await fast.ask("not in the script", "s")  # raises StopIteration in the engine
    assert isinstance(failed, Failed) and failed.code == "internal"
    assert await asyncio.wait_for(fast.failure, 5) == "the engine died"
    (refused,) = await fast.ask("hi", "s")
    assert isinstance(refused, Failed) and refused.code == "shutting_down"


async def test_concurrent_requests_of_a_session_are_all_stored(fast: Worker) -> None:
    answers = await asyncio.gather(*(fast.ask("hi", "s") for _ in range(8)))
    assert all(isinstance(e[-1], Done) and e[-1].stored == "log" for e in answers)
    assert len((await fast.context("s")).turns) == 8
