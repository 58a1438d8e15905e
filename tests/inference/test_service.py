"""One request in the service, from its receipt to its end."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from services.contract import subjects
from services.contract.history import (
    DeleteRequest,
)
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Empty,
    Failed,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Started,
    StreamEvent,
    Token,
)
from services.inference import service
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from tests.inference.engine.prompt.test_chat_template import CHATML
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, Worker, text, worker
from tests.servers import nats_server, running

SCHEMA_OF_NOTHING = JsonSchemaFormat(JsonSchema({"type": "mystery"}))


async def test_an_answer_comes_in_the_order_of_the_contract(fast: Worker) -> None:
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


async def test_the_exchange_is_in_the_context_once_done_is_seen(fast: Worker) -> None:
    await fast.ask("hi", "s")
    (turn,) = (await fast.context("s")).turns
    assert (turn.prompt, turn.response) == ("hi", "hello")
    *_, started, _ = [e for e in await fast.ask("hi", "s") if not isinstance(e, Token)]
    assert isinstance(started, Started) and started.exchanges_kept == 1


async def test_the_stop_list_of_the_settings_holds_unless_the_request_brings_its_own(
    fast: Worker,
) -> None:
    for session, more, said, stop_string in (
        ("a", {}, "fine", "\nUser:"),
        ("b", {"stop": ("User",)}, "fine\n", "User"),
        ("c", {"stop": ()}, "fine\nUser: me", None),
    ):
        *events, done = await fast.ask("stop", session, **more)
        assert text(events) == said
        assert isinstance(done, Done) and done.finish_reason == "stop"
        assert done.stop_string == stop_string


async def test_stop_list_ignores_reasoning_opened_by_the_template(
    tmp_path: Path,
) -> None:
    said = "so\nUser: asks</think>\nFine."
    backend = FakeBackend({"<think>": f"{said}\nUser: me".encode()}, context=2000)
    async with worker(tmp_path, backend=backend, source=f"{CHATML}<think>") as thinking:
        assert text(await thinking.ask("hi", "s")) == said


async def test_role_named_in_the_prompt_does_not_end_the_answer(fast: Worker) -> None:
    assert text(await fast.ask("Who is the user? stop", "s")) == "fine\nUser: me"


async def test_characters_come_whole(fast: Worker) -> None:
    tokens = [e for e in await fast.ask("emoji", "s") if isinstance(e, Token)]
    assert [(t.offset, t.text, len(t.token_ids)) for t in tokens] == [(0, "é", 2), (1, "🙂", 4)]


async def test_max_tokens_ends_an_answer_with_length(fast: Worker) -> None:
    *_, done = events = await fast.ask("hi", "s", max_tokens=3)
    assert text(events) == "hel" and isinstance(done, Done) and done.finish_reason == "length"


async def test_a_prompt_that_can_not_fit_is_refused_with_both_numbers(fast: Worker) -> None:
    *_, failed = await fast.ask("x" * 3000, "s")
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert re.search(r"length is 2000 tokens.* has at least 3\d\d\d tokens", failed.message)


async def test_bad_requests_are_refused_and_say_why(fast: Worker) -> None:
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
        ({"response_format": SCHEMA_OF_NOTHING}, "The field `response_format` can't be used"),
        ({"grammar": 'root ::= "a"', "response_format": JsonObjectFormat()}, "leave one of them"),
        ({"logit_bias": {"257": 1.0}}, "`logit_bias` names the token 257"),
        ({"logit_bias": {"hello": 1.0}}, "logit_bias"),
        ({"min_p": 2.0}, "min_p"),
    ],
    ids=str,
)
async def test_what_can_not_be_asked_of_an_answer_is_refused_before_it_has_a_slot(
    fast: Worker, more: dict[str, Any], why: str
) -> None:
    *before, failed = await fast.ask("hi", "s", **more)
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert why in failed.message
    assert not any(isinstance(event, Started) for event in before)
    assert fast.backend.steps == []


async def test_an_answer_that_its_grammar_leaves_no_way_fails_alone(fast: Worker) -> None:
    broken, right = await asyncio.gather(
        fast.ask("hi", "a", grammar='root ::= "hell" [0-9]'),
        fast.ask("hi", "b", grammar='root ::= "hello"'),
    )
    assert isinstance(broken[-1], Failed) and broken[-1].code == "invalid_request"
    assert isinstance(right[-1], Done) and right[-1].finish_reason == "stop"
    assert (text(broken), text(right)) == ("hell", "hello")


async def test_talk_s_stop_strings_do_not_cut_what_has_a_form(fast: Worker) -> None:
    events = await fast.ask("stop", "s", grammar="root ::= .{0,30}")
    assert text(events) == "fine\nUser: me"


async def test_a_request_that_names_no_inbox_makes_the_worker_publish_nowhere(
    fast: Worker,
) -> None:
    await fast.ask("hi", "s")
    purge = "$JS.API.STREAM.PURGE.HISTORY"
    await fast.bus.publish(
        subjects.request(subjects.OPEN_TENANT), ChatRequest(prompt="hi"), reply=purge
    )
    await fast.bus.publish(subjects.request(subjects.OPEN_TENANT), ChatRequest(prompt="hi"))
    await fast.ask("hi", "other")
    assert len((await fast.context("s")).turns) == 1


async def test_a_cancel_ends_the_answer_and_what_was_said_is_kept(slow: Worker) -> None:
    request = ChatRequest(prompt="long", session_id="s", request_id="r1")
    events = []
    async for event in slow.events(request):
        events.append(event)
        if isinstance(event, Token):
            await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), Empty())
    done = events[-1]
    assert isinstance(done, Done) and done.finish_reason == "cancelled" and done.stored == "log"
    (turn,) = (await slow.context("s")).turns
    assert turn.response == text(events) and len(turn.response) < 500


async def test_an_answer_whose_session_is_erased_meanwhile_is_not_kept_and_its_end_says_so(
    slow: Worker,
) -> None:
    erased = subjects.history("delete", subjects.OPEN_TENANT)
    events: list[StreamEvent] = []
    async for event in slow.events(ChatRequest(prompt="long", session_id="s", max_tokens=50)):
        if isinstance(event, Token) and not any(isinstance(e, Token) for e in events):
            await slow.bus.request(erased, DeleteRequest("s"), Empty)
        events.append(event)
    done = events[-1]
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("length", "none")
    assert (await slow.context("s")).turns == () and await slow.messages() == ()
    *_, done = await slow.ask("hi", "s")
    assert isinstance(done, Done) and done.stored == "log"
    assert [turn.response for turn in (await slow.context("s")).turns] == ["hello"]


async def test_a_cancel_in_the_queue_ends_it_before_it_has_a_slot(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    while slow.service.running != 1:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
    while slow.service.waiting != 1:
        await asyncio.sleep(0.01)
    await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r2"), Empty())
    *_, done = await second
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "log")
    await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), Empty())
    await first
    assert (await slow.context("b")).turns == ()


async def test_draining_finishes_what_was_begun_and_takes_no_more(slow: Worker) -> None:
    asks = [asyncio.create_task(slow.ask("hi", str(i))) for i in range(3)]
    while slow.service.running + slow.service.waiting != 3:
        await asyncio.sleep(0.01)
    await slow.service.drain()
    for events in await asyncio.gather(*asks):
        assert text(events) == "hello" and isinstance(events[-1], Done)
    assert slow.backend.closed
    with pytest.raises(NoResponders):
        await slow.ask("hi", "s")


async def test_draining_fails_what_can_not_be_finished_in_time(
    slow: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FINISH_DEADLINE", 0.2)
    ask = asyncio.create_task(slow.ask("long", "s"))
    while slow.service.running != 1:
        await asyncio.sleep(0.01)
    await slow.service.drain()
    *_, failed = await ask
    assert isinstance(failed, Failed) and failed.code == "shutting_down"


async def test_without_history_a_request_fails_and_is_not_answered_as_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.sessions.TRIES", (0.1, 0.1))
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test") as bus:
            alone = Worker(bus, url, FakeBackend(ANSWERS), 1, 1)
            await alone.service.start()
            *_, failed = await alone.ask("hi", "s")
            await alone.service.drain()
    assert isinstance(failed, Failed) and failed.code == "history_unavailable"


async def test_a_step_that_fails_fails_its_answers_and_the_next_one_is_right(
    fast: Worker,
) -> None:
    fast.backend.fails = True
    *_, failed = await fast.ask("hi", "s")
    assert isinstance(failed, Failed) and failed.code == "internal"
    assert text(await fast.ask("hi", "s")) == "hello"


async def test_the_death_of_the_engine_fails_its_answers_and_is_reported(fast: Worker) -> None:
    *_, failed = await fast.ask("not in the script", "s")  # raises StopIteration in the engine
    assert isinstance(failed, Failed) and failed.code == "internal"
    assert await asyncio.wait_for(fast.failure, 5) == "the engine died"
    (refused,) = await fast.ask("hi", "s")
    assert isinstance(refused, Failed) and refused.code == "shutting_down"


async def test_turns_of_one_session_at_once_are_all_kept(fast: Worker) -> None:
    answers = await asyncio.gather(*(fast.ask("hi", "s") for _ in range(8)))
    assert all(isinstance(e[-1], Done) and e[-1].stored == "log" for e in answers)
    assert len((await fast.context("s")).turns) == 8
