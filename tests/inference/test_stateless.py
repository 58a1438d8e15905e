"""A conversation that its caller brings whole, and plain text; what the model says is scripted."""

from typing import Any

import pytest

from services.contract.conversation import ChatMessage, Function, Tool
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    JsonObjectFormat,
    Started,
    StreamEvent,
)
from services.inference.settings import InferenceSettings
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import Worker, text, worker

ASK = ChatMessage("user", "hi")
CALL = b'<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'


async def ask(worker: Worker, **fields: Any) -> list[StreamEvent]:
    return [event async for event in worker.events(ChatRequest(**fields))]


async def test_a_conversation_is_answered_and_no_session_read_or_written(fast: Worker) -> None:
    await fast.ask("hi", "s")
    for session in ("s", ""):
        _, started, *_, done = events = await ask(fast, messages=(ASK,), session_id=session)
        assert text(events) == "hello"
        assert isinstance(started, Started) and started.exchanges_kept == 0
        assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("stop", "none")
    assert len((await fast.context("s")).turns) == 1
    assert len(await fast.messages()) == 1


async def test_no_stop_list_and_no_end_but_the_window_hold_unless_asked_for(fast: Worker) -> None:
    assert text(await ask(fast, messages=(ChatMessage("user", "stop"),))) == "fine\nUser: me"
    stops = await ask(fast, messages=(ChatMessage("user", "stop"),), stop=("User",))
    assert text(stops) == "fine\n"
    *_, done = await ask(fast, messages=(ChatMessage("user", "long"),), max_tokens=3)
    assert isinstance(done, Done) and done.finish_reason == "length"


TOOLS = (Tool(Function("wait")),)
FORM: dict[str, Any] = {"response_format": JsonObjectFormat()}


@pytest.mark.parametrize(
    ("request_", "penalty"),
    [
        (ChatRequest(prompt="hi"), 1.3),
        (ChatRequest(prompt="hi", **FORM), 1.0),
        (ChatRequest(prompt="hi", grammar="root ::= .", repeat_penalty=1.2), 1.2),
        (ChatRequest(messages=(ASK,)), 1.0),
        (ChatRequest(messages=(ASK,), tools=TOOLS, tool_choice="required"), 1.0),
        (ChatRequest(messages=(ASK,), repeat_penalty=1.2), 1.2),
        (ChatRequest(text="Once"), 1.0),
    ],
    ids=["talk", "form", "form, asked for", "messages", "call", "messages, asked for", "text"],
)
def test_the_repeat_penalty_of_the_settings_is_for_talk(
    request_: ChatRequest, penalty: float
) -> None:
    settings = InferenceSettings(chat_repeat_penalty=1.3)
    assert settings.fill_in(request_).repeat_penalty == penalty


async def test_an_answer_may_fill_the_context_window(tmp_path: Any) -> None:
    async with worker(tmp_path, context=200) as small:
        *_, done = await ask(small, messages=(ChatMessage("user", "long"),))
        assert isinstance(done, Done) and done.finish_reason == "length"
        assert done.usage.prompt_tokens + done.usage.completion_tokens == 200


async def test_max_tokens_beyond_the_window_is_clamped(tmp_path: Any) -> None:
    long = ChatMessage("user", "long")
    async with worker(tmp_path, context=500) as small:
        await small.ask("hi", "s")
        for fields in ({"messages": (long,)}, {"prompt": "long"}):
            *_, done = await ask(small, **fields, max_tokens=1_000_000, session_id="s")
            assert isinstance(done, Done)
            assert done.usage.prompt_tokens + done.usage.completion_tokens <= 500
            assert done.exchanges_dropped == 0
        plain = "long<|im_end|>\n<|im_start|>assistant\n"
        *_, done = await ask(small, text=plain, max_tokens=5000)
        assert isinstance(done, Done) and done.finish_reason == "length"
        for fields in ({"messages": (ChatMessage("user", "x" * 500),)}, {"prompt": "x" * 500}):
            *_, failed = await ask(small, **fields, session_id="s")
            assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
            assert failed.message.startswith("This model's maximum context length is 500 tokens")


async def test_the_next_turn_computes_nothing_of_the_one_before_again(fast: Worker) -> None:
    first = await ask(fast, messages=(ASK,), session_id="")
    messages = (ASK, ChatMessage("assistant", text(first)), ASK)
    *_, done = await ask(fast, messages=messages, session_id="")
    *_, before = first
    assert isinstance(before, Done) and isinstance(done, Done)
    said = before.usage.prompt_tokens + before.usage.completion_tokens - 1  # the end's
    assert done.usage.cached_tokens == said


async def test_who_names_a_seed_begins_with_nothing_that_was_read_for_who_does_not(
    fast: Worker,
) -> None:
    usages = []
    for seed in (None, None, 1, 1, 2):
        *_, done = await ask(fast, messages=(ASK,), session_id="", seed=seed)
        assert isinstance(done, Done)
        usages.append(done.usage)
    whole = usages[0].prompt_tokens
    assert [u.prompt_tokens - u.cached_tokens for u in usages] == [whole, 1, whole, 2, 2]


async def test_plain_text_is_gone_on_with(tmp_path: Any) -> None:
    async with worker(tmp_path, backend=FakeBackend({"once": b" upon a time"})) as plain:
        assert text(await ask(plain, text="once")) == " upon a time"
        assert text(await ask(plain, text=tuple(b"once"), max_tokens=5)) == " upon"
        *_, failed = await ask(plain, text=(257,))
        assert isinstance(failed, Failed) and failed.code == "invalid_request"


async def test_a_forced_call_keeps_to_its_form(tmp_path: Any) -> None:
    tools = (Tool(Function("wait", None, {"type": "object", "additionalProperties": False})),)
    end = "<|im_start|>assistant\n"
    async with worker(tmp_path, backend=FakeBackend({end: CALL}, 5000)) as calls:
        fields: dict[str, Any] = {"messages": (ASK,), "tools": tools, "tool_choice": "required"}
        events = await ask(calls, **fields)
        assert text(events) == CALL.decode()
        *_, done = events
        assert isinstance(done, Done) and done.finish_reason == "stop"


async def test_functions_are_not_shown_where_none_may_be_called(fast: Worker) -> None:
    tools = (Tool(Function("wait")),)
    *_, plain = await ask(fast, messages=(ASK,))
    *_, none = await ask(fast, messages=(ASK,), tools=tools, tool_choice="none")
    assert isinstance(plain, Done) and isinstance(none, Done)
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_what_is_wrong_with_a_conversation_fails_it_alone(fast: Worker) -> None:
    for fields in ({"messages": (ChatMessage("user"),)}, {"prompt": "hi", "messages": (ASK,)}):
        *_, failed = await ask(fast, **fields)
        assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert text(await ask(fast, messages=(ASK,))) == "hello"
