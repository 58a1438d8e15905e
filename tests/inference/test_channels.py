"""Reasoning, tool calls and continued answers of a worker with the chat template of Qwen3."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.contract import subjects
from services.contract.codec import decode
from services.contract.conversation import ChatMessage, Function, FunctionCall, Tool, ToolResult
from services.contract.history import Exchange
from services.contract.messages import Done, Failed, StreamEvent, Token, ToolCallDelta
from services.inference.limits import InferenceLimits
from services.runtime.streams import Stream
from tests.inference.engine.prompt.shipped_templates import SOURCES
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import StartWorker, Worker, answer_of, text

QWEN3 = SOURCES["Qwen-Qwen3-0.6B"]
OPEN = "<|im_start|>assistant\n"
THOUGHT = "<think>\nLet me see.\n\n\nHm.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "wait", "arguments": {"s": 1}}\n</tool_call>'
RESULT = "<tool_response>\nslept\n</tool_response><|im_end|>\n"
SCRIPT = {
    f"Wait!<|im_end|>\n{OPEN}": f"{THOUGHT}I wait.\n{CALL}",
    f"{THOUGHT}I wait.\n{CALL}<|im_end|>\n<|im_start|>user\n{RESULT}{OPEN}": "Done.",
    f"{RESULT}{OPEN}": "The thought is gone.",
    f"Again!<|im_end|>\n{OPEN}": f"{CALL}\n{CALL}",
    f"Quick!<|im_end|>\n{OPEN}<think>\n\n</think>\n\n": "Yes.",
    f"Think!<|im_end|>\n{OPEN}": "<think>\none two three",
    f"Hush!<|im_end|>\n{OPEN}<think>\n\n</think>\n\n": "<think>\nI think.",
    f"Greet!<|im_end|>\n{OPEN}<think>\n\n</think>\n\nHel": "lo.",
    f"Muse!<|im_end|>\n{OPEN}<think>\nWell": ", no.\n</think>\n\nNo.",
}
TOOLS = (Tool(Function("wait", "Waits.", {"properties": {"s": {"type": "integer"}}})),)


@pytest.fixture
async def qwen(start_worker: StartWorker) -> AsyncIterator[Worker]:
    answers = {end: answer.encode() for end, answer in SCRIPT.items()}
    async with start_worker(backend=FakeBackend(answers, 4000), template=QWEN3) as worker:
        yield worker


def done_of(events: list[StreamEvent]) -> Done:
    assert isinstance(events[-1], Done), events[-1]
    return events[-1]


def failure_of(events: list[StreamEvent]) -> str:
    assert isinstance(events[-1], Failed) and events[-1].code == "invalid_request", events[-1]
    return events[-1].message


async def test_channels_are_separate_events_and_stored(qwen: Worker) -> None:
    events = await qwen.ask("Wait!", "s", tools=TOOLS, request_id="r")
    answer, done = answer_of(events), done_of(events)
    assert (answer.reasoning, answer.content) == ("Let me see.\n\n\nHm.", "I wait.")
    assert [call.function for call in answer.tool_calls] == [FunctionCall("wait", '{"s": 1}')]
    assert (done.finish_reason, done.stored, done.length) == ("tool_calls", "log", answer.length)
    assert done.usage.reasoning_tokens == len(THOUGHT) - 2
    (turn,) = (await qwen.context("s")).turns
    assert (turn.response, turn.reasoning) == (answer.content, answer.reasoning)
    assert turn.tool_calls == tuple(answer.tool_calls)


async def test_results_of_calls_continue_the_session(qwen: Worker) -> None:
    (call,) = answer_of(await qwen.ask("Wait!", "s", tools=TOOLS)).tool_calls
    results = (ToolResult(call.id, "slept"),)
    events = await qwen.ask("", "s", tools=TOOLS, tool_results=results)
    assert text(events) == "Done." and done_of(events).finish_reason == "stop"
    assert done_of(events).usage.cached_tokens > 500, "the answer's own tokens are reused"
    first, second = (await qwen.context("s")).turns
    assert (second.prompt, second.tool_results) == ("", results)


@pytest.mark.parametrize(("max_bytes", "stored"), [(1000, TOOLS), (20, ())])
async def test_tools_of_a_request_are_stored_unless_large(
    start_worker: StartWorker, max_bytes: int, stored: tuple[Tool, ...]
) -> None:
    answers = {end: answer.encode() for end, answer in SCRIPT.items()}
    backend, limits = FakeBackend(answers, 4000), InferenceLimits(max_stored_tools_bytes=max_bytes)
    async with start_worker(backend=backend, template=QWEN3, limits=limits) as worker:
        await worker.ask("Wait!", "s", tools=TOOLS)
        assert await stored_tools(worker, "s") == stored


async def stored_tools(worker: Worker, session_id: str) -> tuple[Tool, ...]:
    subject = subjects.log(subjects.session_key(worker.tenant, session_id))
    last = await Stream(worker.bus, subjects.HISTORY_STREAM).last(subject)
    assert last is not None
    return decode(last.data, Exchange).tools


async def test_result_without_its_call_is_rejected(qwen: Worker) -> None:
    await qwen.ask("Wait!", "s", tools=TOOLS)
    results = (ToolResult("other", "slept"),)
    message = failure_of(await qwen.ask("", "s", tools=TOOLS, tool_results=results))
    assert "no tool call 'other'" in message
    assert len((await qwen.context("s")).turns) == 1


async def test_one_call_only_unless_parallel(qwen: Worker) -> None:
    both = await qwen.ask("Again!", "s", tools=TOOLS)
    assert len(answer_of(both).tool_calls) == 2
    ids = {event.id for event in both if isinstance(event, ToolCallDelta) and event.id}
    assert len(ids) == 2 and all(len(each) == 9 and each.isalnum() for each in ids)
    one = await qwen.ask("Again!", "t", tools=TOOLS, parallel_tool_calls=False)
    assert len(answer_of(one).tool_calls) == 1 and done_of(one).finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "switch",
    [
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
async def test_switch_reaches_the_template(qwen: Worker, switch: dict[str, Any]) -> None:
    assert text(await qwen.ask("Quick!", "s", **switch)) == "Yes."


@pytest.mark.parametrize(
    "kwargs", [{"messages": []}, {"enable_thinking": "false"}, {"a b": 1}, {"a": [[[]]] * 2}]
)
async def test_impossible_template_variables_are_rejected(
    qwen: Worker, kwargs: dict[str, Any]
) -> None:
    events = await qwen.ask("Quick!", "s", chat_template_kwargs=kwargs, enable_thinking=False)
    if "a" in kwargs:  # any other variable is the template's own business
        assert text(events) == "Yes."
    else:
        assert "chat_template_kwargs" in failure_of(events)


async def test_reasoning_is_closed_when_its_budget_is_spent(qwen: Worker) -> None:
    events = await qwen.ask("Think!", "s", reasoning_budget_tokens=4)
    answer = answer_of(events)
    assert answer.reasoning == "one" and answer.content.startswith(" two three"[1:])
    assert done_of(events).finish_reason == "stop"


async def test_thought_that_is_turned_off_is_closed_at_once(qwen: Worker) -> None:
    answer = answer_of(await qwen.ask("Hush!", "t", reasoning_effort="none"))
    assert (answer.reasoning, answer.content) == ("", "I think.")


async def test_thought_that_the_prompt_opens_is_closed_at_once(start_worker: StartWorker) -> None:
    opened = "<｜Assistant｜><think>\n"
    answers = {opened: b"Hm.</think>\n\nYes.", f"{opened}\n</think>\n\n": b"No."}
    template = SOURCES["deepseek-ai-DeepSeek-R1-Distill-Llama-8B"]
    async with start_worker(backend=FakeBackend(answers, 4000), template=template) as worker:
        answer = answer_of(await worker.ask("Quick!", "s"))
        assert (answer.reasoning, answer.content) == ("Hm.", "Yes.")
        assert answer_of(await worker.ask("Quick!", "t", reasoning_effort="none")).reasoning == ""


async def test_prefix_is_continued_and_stored(qwen: Worker) -> None:
    events = await qwen.ask("Greet!", "s", prefix="Hel", enable_thinking=False)
    assert text(events) == "lo." and done_of(events).length == 3
    (turn,) = (await qwen.context("s")).turns
    assert turn.response == "Hello."


async def test_last_message_is_continued(qwen: Worker) -> None:
    asked, begun = ChatMessage("user", "Greet!"), ChatMessage("assistant", "Hel")
    events = await qwen.ask_stateless(messages=(asked, begun), continue_final="content")
    assert text(events) == "lo."


async def test_reasoning_of_the_last_message_is_continued(qwen: Worker) -> None:
    messages = (ChatMessage("user", "Muse!"), ChatMessage("assistant", "", reasoning="Well"))
    events = await qwen.ask_stateless(messages=messages, continue_final="reasoning")
    assert (answer_of(events).reasoning, answer_of(events).content) == (", no.", "No.")


@pytest.mark.parametrize(
    ("last", "continued"),
    [
        (ChatMessage("user", "Hel"), "content"),
        (ChatMessage("assistant", "Hel", reasoning="Well"), "reasoning"),
    ],
)
async def test_contradictory_prefill_is_rejected(
    qwen: Worker, last: ChatMessage, continued: str
) -> None:
    messages = (ChatMessage("user", "Greet!"), last)
    failure_of(await qwen.ask_stateless(messages=messages, continue_final=continued))
    greeting = (ChatMessage("user", "Greet!"), ChatMessage("assistant", "Hel"))
    assert text(await qwen.ask_stateless(messages=greeting, continue_final="content")) == "lo."


async def test_stop_strings_of_the_settings_spare_reasoning(qwen: Worker) -> None:
    """The thought has "Let me" and three newlines, which are in CHAT_STOP."""
    events = await qwen.ask("Wait!", "s", tools=TOOLS)
    thought = "".join(
        event.text for event in events if isinstance(event, Token) and event.channel == "reasoning"
    )
    assert thought == "Let me see.\n\n\nHm." and done_of(events).stop_string is None
