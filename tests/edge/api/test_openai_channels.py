"""Reasoning and tool calls of chat completions, read with OpenAI's client."""

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from services.contract.conversation import ChatMessage, FunctionCall, ToolCall
from services.contract.messages import Token, TokenLogprob
from tests.fakes import ACCEPTED, DONE, answer_script, scripted_worker

ASK: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object"}},
}
ROME = (("call", "go"), ("arguments", '{"to": '), ("arguments", '"Rome"}'))
OSLO = (("call", "go"), ("arguments", '{"to": "Oslo"}'))
ANSWER = (("reasoning", "Hm, 🙂 "), ("content", "Let "), ("reasoning", "so."), ("content", "me"))


async def deltas_of(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """Return the deltas of a stream as JSON."""
    got = await http.post("/v1/chat/completions", json={"messages": ASK, "stream": True, **body})
    assert got.status_code == 200, got.text
    lines = [line[6:] for line in got.text.splitlines() if line.startswith("data: {")]
    return [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]


async def complete(client: openai.AsyncOpenAI, stream: bool, **body: Any) -> Any:
    """Return the completion, assembled from a stream or sent whole."""
    if not stream:
        return await client.chat.completions.create(**{"model": "demo", "messages": ASK} | body)
    options: Any = {"stream_options": {"include_usage": True}}
    async with client.chat.completions.stream(
        **{"model": "demo", "messages": ASK} | options | body
    ) as events:
        return await events.get_final_completion()


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_apart_from_content_under_both_names(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    async with scripted_worker(nats_url, answer_script(*ANSWER)):
        got = await complete(client, stream)
    (choice,) = got.choices
    assert (choice.message.content, choice.finish_reason) == ("Let me", "stop")
    assert choice.message.reasoning_content == choice.message.reasoning == "Hm, 🙂 so."
    assert got.usage.completion_tokens_details.reasoning_tokens == 2
    assert got.usage.completion_tokens == 4


async def test_reasoning_deltas_keep_their_order(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, answer_script(*ANSWER)):
        role, *parts, end = await deltas_of(http)
    assert (role, end) == ({"role": "assistant", "content": ""}, {})
    assert parts == [
        {"reasoning_content": "Hm, 🙂 ", "reasoning": "Hm, 🙂 "},
        {"content": "Let "},
        {"reasoning_content": "so.", "reasoning": "so."},
        {"content": "me"},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("switch", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
async def test_excluded_reasoning_is_counted_but_not_sent(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool, switch: dict[str, Any]
) -> None:
    async with scripted_worker(nats_url, answer_script(*ANSWER)):
        got = await complete(client, stream, extra_body=switch)
    message = got.choices[0].message
    assert message.content == "Let me" and not {"reasoning", "reasoning_content"} & {
        *message.model_extra
    }
    assert got.usage.completion_tokens_details.reasoning_tokens == 2


async def test_answer_cut_in_its_reasoning_has_no_content(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    script = answer_script(("reasoning", "Hm"), finish_reason="length")
    async with scripted_worker(nats_url, script):
        got = await complete(client, stream=False)
    (choice,) = got.choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.reasoning == "Hm"


async def test_answer_without_reasoning_has_no_fields_for_it(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_worker(nats_url, answer_script(("content", "x"))):
        got = (await http.post("/v1/chat/completions", json={"messages": ASK})).json()
    message = {"role": "assistant", "content": "x", "refusal": None}
    assert got["choices"][0]["message"] == message
    assert got["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_logprobs_are_those_of_the_content(client: openai.AsyncOpenAI, nats_url: str) -> None:
    def logprob(text: str) -> tuple[TokenLogprob, ...]:
        return (TokenLogprob(1, text, (), -0.5, ()),)

    script = (
        ACCEPTED,
        Token(0, "Hm", (1,), logprob("Hm"), "reasoning"),
        Token(2, "", (2,), logprob("\n")),
        Token(2, "x", (2,), logprob("x")),
        DONE,
    )
    async with scripted_worker(nats_url, script):
        whole = await complete(client, stream=False, logprobs=True)
        streamed = await complete(client, stream=True, logprobs=True)
    for got in (whole, streamed):
        assert [each.token for each in got.choices[0].logprobs.content] == ["\n", "x"]


# --- tool calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_are_read_by_the_client(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    script = answer_script(("content", "See:"), *ROME, *OSLO, finish_reason="tool_calls")
    async with scripted_worker(nats_url, script):
        got = await complete(client, stream, tools=[TOOL])
    (choice,) = got.choices
    assert (choice.message.content, choice.finish_reason) == ("See:", "tool_calls")
    assert [
        (call.id, call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls
    ] == [
        ("callid001", "function", "go", '{"to": "Rome"}'),
        ("callid002", "function", "go", '{"to": "Oslo"}'),
    ]


async def test_content_is_null_beside_calls_only(http: httpx.AsyncClient, nats_url: str) -> None:
    body = {"messages": ASK, "tools": [TOOL]}
    script = answer_script(("reasoning", "Hm"), *ROME, finish_reason="tool_calls")
    async with scripted_worker(nats_url, script):
        got = (await http.post("/v1/chat/completions", json=body)).json()
        first, *_ = await deltas_of(http, tools=[TOOL])
    assert got["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm",
        "reasoning": "Hm",
        "tool_calls": [
            {
                "id": "callid001",
                "type": "function",
                "function": {"name": "go", "arguments": '{"to": "Rome"}'},
            }
        ],
        "refusal": None,
    }
    assert first == {"role": "assistant", "content": None}


async def test_deltas_of_calls_are_those_of_openai(http: httpx.AsyncClient, nats_url: str) -> None:
    script = answer_script(*ROME, *OSLO, finish_reason="tool_calls")
    async with scripted_worker(nats_url, script):
        _, *parts, _ = await deltas_of(http, tools=[TOOL])
    assert [call for part in parts for call in part["tool_calls"]] == [
        {
            "index": 0,
            "function": {"name": "go", "arguments": ""},
            "id": "callid001",
            "type": "function",
        },
        {"index": 0, "function": {"arguments": '{"to": '}},
        {"index": 0, "function": {"arguments": '"Rome"}'}},
        {
            "index": 1,
            "function": {"name": "go", "arguments": ""},
            "id": "callid002",
            "type": "function",
        },
        {"index": 1, "function": {"arguments": '{"to": "Oslo"}'}},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_function_is_called_in_the_older_form(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    script = answer_script(*ROME, finish_reason="tool_calls")
    async with scripted_worker(nats_url, script):
        got = await complete(client, stream, functions=[TOOL["function"]])
    (choice,) = got.choices
    called = choice.message.function_call
    assert (called.name, called.arguments) == ("go", '{"to": "Rome"}')
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None


@pytest.mark.parametrize("reason", ["length", "stop"])
async def test_truncated_call_keeps_its_finish_reason(
    client: openai.AsyncOpenAI, nats_url: str, reason: Any
) -> None:
    async with scripted_worker(nats_url, answer_script(*ROME[:2], finish_reason=reason)):
        got = await complete(client, stream=False, tools=[TOOL])
        stream = await client.chat.completions.create(
            model="demo", messages=ASK, tools=[TOOL], stream=True
        )
        *_, last = [chunk async for chunk in stream]
    (choice,) = got.choices
    assert choice.finish_reason == last.choices[0].finish_reason == reason
    assert choice.message.tool_calls[0].function.arguments == '{"to": '


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_of_a_tool_loop_is_accepted_as_history(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    """The client's message keeps `index` of the stream, and the reasoning under both names."""
    script = answer_script(("reasoning", "Hm"), *ROME, finish_reason="tool_calls")
    async with scripted_worker(nats_url, script) as worker:
        answer = (await complete(client, stream, tools=[TOOL])).choices[0].message
        result = {
            "role": "tool",
            "tool_call_id": answer.tool_calls[0].id,
            "content": "sunny",
        }
        for sent in (answer, answer.model_dump(), answer.model_dump(exclude_unset=True)):
            await complete(client, stream, messages=[*ASK, sent, result], tools=[TOOL])
    _, *others = worker.requests
    call = ToolCall("callid001", FunctionCall("go", '{"to": "Rome"}'))
    for _, request in others:
        assert request.messages is not None
        _, assistant, tool = request.messages
        assert (assistant.reasoning, assistant.tool_calls) == ("Hm", (call,))
        assert tool == ChatMessage("tool", "sunny", tool_call_id="callid001")
    assert len(others) == 3


class City(BaseModel):
    name: str


async def test_parsed_answer_ignores_its_reasoning(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    script = answer_script(("reasoning", '{"name": "Oslo"}'), ("content", '{"name": "Rome"}'))
    async with scripted_worker(nats_url, script):
        got = await client.chat.completions.parse(model="demo", messages=ASK, response_format=City)
    assert got.choices[0].message.parsed == City(name="Rome")


async def test_parsed_call_has_typed_arguments(client: openai.AsyncOpenAI, nats_url: str) -> None:
    script = answer_script(
        ("call", "City"), ("arguments", '{"name": "Rome"}'), finish_reason="tool_calls"
    )
    async with scripted_worker(nats_url, script) as worker:
        got = await client.chat.completions.parse(
            model="demo", messages=ASK, tools=[openai.pydantic_function_tool(City)]
        )
    calls = got.choices[0].message.tool_calls
    assert calls and calls[0].function.parsed_arguments == City(name="Rome")
    assert worker.requests[0][1].tools is not None


# --- prefill --------------------------------------------------------------------------------------

BEGUN = {"role": "assistant", "content": "Once ", "reasoning_content": "A tale."}
CONTINUE: dict[str, Any] = {
    "messages": [*ASK, BEGUN],
    "extra_body": {"continue_final_message": True},
}


@pytest.mark.parametrize("stream", [False, True])
async def test_continued_answer_has_only_the_new_text(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    async with scripted_worker(nats_url, answer_script(("content", "upon"))) as worker:
        got = await complete(client, stream, **CONTINUE)
    assert got.choices[0].message.content == "upon"
    assert worker.requests[0][1].continue_final == "content"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_continued_message_first(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    asked = CONTINUE | {"extra_body": CONTINUE["extra_body"] | {"echo": True}}
    async with scripted_worker(nats_url, answer_script(("content", "upon"))):
        got = await complete(client, stream, **asked)
    message = got.choices[0].message
    assert (message.content, message.reasoning) == ("Once upon", "A tale.")


async def test_echo_of_n_choices_is_in_each(client: openai.AsyncOpenAI, nats_url: str) -> None:
    more = {"continue_final_message": True, "echo": True}
    async with scripted_worker(nats_url, answer_script(("content", "upon"))):
        got = await complete(client, False, messages=[*ASK, BEGUN], n=2, extra_body=more)
    assert [choice.message.content for choice in got.choices] == ["Once upon"] * 2
