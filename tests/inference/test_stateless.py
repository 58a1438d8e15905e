"""Requests that bring the whole conversation, or a plain text to continue."""

from typing import Any

import pytest

from services.contract.conversation import ChatMessage, Function, FunctionCall, Tool
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    JsonObjectFormat,
    Started,
)
from services.inference.engine.backend import ROW_BLOCK
from services.inference.settings import InferenceSettings
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import StartWorker, Worker, answer_of, text

ASK = ChatMessage("user", "hi")
CALL = b'<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'


async def test_stateless_request_neither_reads_nor_writes_a_session(fast: Worker) -> None:
    await fast.ask("hi", "s")
    for session in ("s", ""):
        _, started, *_, done = events = await fast.ask_stateless(
            messages=(ASK,), session_id=session
        )
        assert text(events) == "hello"
        assert isinstance(started, Started) and started.exchanges_kept == 0
        assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("stop", "none")
    assert len((await fast.context("s")).turns) == 1
    assert len(await fast.messages()) == 1


async def test_stop_and_max_tokens_of_the_settings_do_not_apply(fast: Worker) -> None:
    assert (
        text(await fast.ask_stateless(messages=(ChatMessage("user", "stop"),))) == "fine\nUser: me"
    )
    stops = await fast.ask_stateless(messages=(ChatMessage("user", "stop"),), stop=("User",))
    assert text(stops) == "fine\n"
    *_, done = await fast.ask_stateless(messages=(ChatMessage("user", "long"),), max_tokens=3)
    assert isinstance(done, Done) and done.finish_reason == "length"


TOOLS = (Tool(Function("wait")),)
JSON: dict[str, Any] = {"response_format": JsonObjectFormat()}


@pytest.mark.parametrize(
    ("request_", "penalty"),
    [
        (ChatRequest(prompt="hi"), 1.3),
        (ChatRequest(prompt="hi", **JSON), 1.0),
        (ChatRequest(prompt="hi", grammar="root ::= .", repeat_penalty=1.2), 1.2),
        (ChatRequest(messages=(ASK,)), 1.0),
        (ChatRequest(messages=(ASK,), tools=TOOLS, tool_choice="required"), 1.0),
        (ChatRequest(messages=(ASK,), repeat_penalty=1.2), 1.2),
        (ChatRequest(text="Once"), 1.0),
    ],
    ids=[
        "session",
        "format",
        "own, with grammar",
        "messages",
        "tool call",
        "own, with messages",
        "text",
    ],
)
def test_repeat_penalty_of_the_settings_is_for_sessions(
    request_: ChatRequest, penalty: float
) -> None:
    settings = InferenceSettings(chat_repeat_penalty=1.3)
    assert settings.fill_in(request_).repeat_penalty == penalty


async def test_answer_may_fill_the_context_window(start_worker: StartWorker) -> None:
    async with start_worker(context=200) as small:
        *_, done = await small.ask_stateless(messages=(ChatMessage("user", "long"),))
        assert isinstance(done, Done) and done.finish_reason == "length"
        assert done.usage.prompt_tokens + done.usage.completion_tokens == 200


async def test_max_tokens_is_clamped_to_the_context_window(start_worker: StartWorker) -> None:
    long = ChatMessage("user", "long")
    async with start_worker(context=500) as small:
        await small.ask("hi", "s")
        for fields in ({"messages": (long,)}, {"prompt": "long"}):
            *_, done = await small.ask_stateless(**fields, max_tokens=1_000_000, session_id="s")
            assert isinstance(done, Done)
            assert done.usage.prompt_tokens + done.usage.completion_tokens <= 500
            assert done.exchanges_dropped == 0
        plain = "long<|im_end|>\n<|im_start|>assistant\n"
        *_, done = await small.ask_stateless(text=plain, max_tokens=5000)
        assert isinstance(done, Done) and done.finish_reason == "length"
        for fields in ({"messages": (ChatMessage("user", "x" * 500),)}, {"prompt": "x" * 500}):
            *_, failed = await small.ask_stateless(**fields, session_id="s")
            assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
            assert failed.message.startswith("This model's maximum context length is 500 tokens")


async def test_next_prompt_of_a_conversation_reuses_the_whole_answer(fast: Worker) -> None:
    first = await fast.ask_stateless(messages=(ASK,), session_id="")
    messages = (ASK, ChatMessage("assistant", text(first)), ASK)
    *_, done = await fast.ask_stateless(messages=messages, session_id="")
    *_, before = first
    assert isinstance(before, Done) and isinstance(done, Done)
    computed = before.usage.prompt_tokens + before.usage.completion_tokens - 1  # the end token
    assert done.usage.cached_tokens == computed


async def test_seeded_request_reuses_no_prefix_without_a_seed(
    fast: Worker,
) -> None:
    usages = []
    for seed in (None, None, 1, 1, 2):
        *_, done = await fast.ask_stateless(messages=(ASK,), session_id="", seed=seed)
        assert isinstance(done, Done)
        usages.append(done.usage)
    whole = usages[0].prompt_tokens
    rest = whole % ROW_BLOCK
    assert [u.prompt_tokens - u.cached_tokens for u in usages] == [whole, 1, whole, rest, rest]


async def test_plain_text_is_continued(start_worker: StartWorker) -> None:
    async with start_worker(backend=FakeBackend({"once": b" upon a time"})) as plain:
        assert text(await plain.ask_stateless(text="once")) == " upon a time"
        assert text(await plain.ask_stateless(text=tuple(b"once"), max_tokens=5)) == " upon"
        *_, failed = await plain.ask_stateless(text=(257,))
        assert isinstance(failed, Failed) and failed.code == "invalid_request"


async def test_forced_tool_call_matches_its_grammar(start_worker: StartWorker) -> None:
    tools = (Tool(Function("wait", None, {"type": "object", "additionalProperties": False})),)
    end = "<|im_start|>assistant\n"
    async with start_worker(backend=FakeBackend({end: CALL}, 5000)) as calls:
        fields: dict[str, Any] = {"messages": (ASK,), "tools": tools, "tool_choice": "required"}
        events = await calls.ask_stateless(**fields)
        *_, done = events
        assert isinstance(done, Done) and done.finish_reason == "tool_calls"
        (call,) = answer_of(events).tool_calls
        assert call.function == FunctionCall("wait", "{}")


async def test_tools_are_left_out_with_tool_choice_none(fast: Worker) -> None:
    tools = (Tool(Function("wait")),)
    *_, plain = await fast.ask_stateless(messages=(ASK,))
    *_, none = await fast.ask_stateless(messages=(ASK,), tools=tools, tool_choice="none")
    assert isinstance(plain, Done) and isinstance(none, Done)
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_invalid_conversation_fails_its_request_only(fast: Worker) -> None:
    for fields in ({"messages": (ChatMessage("user"),)}, {"prompt": "hi", "messages": (ASK,)}):
        *_, failed = await fast.ask_stateless(**fields)
        assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert text(await fast.ask_stateless(messages=(ASK,))) == "hello"
