"""Chat completions, requested with OpenAI's client; the worker is scripted."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace as replace_limits
from typing import Any

import httpx
import openai
import pytest
from msgspec.structs import replace
from openai.types.chat import ChatCompletionMessageParam

from services.client.chat_client import ChatClient
from services.contract.conversation import (
    ChatMessage,
    Function,
    FunctionCall,
    FunctionName,
    NamedTool,
    Tool,
    ToolCall,
)
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    JsonObjectFormat,
    Progress,
    StreamEvent,
    Timings,
    Token,
    TokenLogprob,
    TokenProbability,
    Usage,
)
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on, until
from tests.fakes import ACCEPTED, DONE, HELLO, Script, scripted_worker

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object"}},
}


async def test_openai_client_reads_a_completion(client: openai.AsyncOpenAI, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await client.chat.completions.create(model="demo", messages=ASK)
    (choice,) = got.choices
    assert got.id.startswith("chatcmpl-") and got.object == "chat.completion" and got.created > 0
    assert (choice.message.role, choice.message.content) == ("assistant", "Grüß dich")
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert got.usage is not None and got.usage.prompt_tokens_details is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (
        5,
        2,
        7,
    )
    assert got.usage.prompt_tokens_details.cached_tokens == 3
    assert got._request_id


async def test_usage_has_what_was_drafted(client: openai.AsyncOpenAI, nats_url: str) -> None:
    usage = replace(DONE.usage, drafted_tokens=9, accepted_tokens=4)
    async with scripted_worker(nats_url, (*HELLO[:-1], replace(DONE, usage=usage))):
        got = await client.chat.completions.create(model="demo", messages=ASK, n=2)
    assert got.usage and (details := got.usage.completion_tokens_details)
    counts = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    assert counts == (8, 10), "of both choices"


async def test_stream_begins_with_the_role_and_ends_with_usage(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        stream = await client.chat.completions.create(
            model="demo", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        first, *middle, last, usage = [chunk async for chunk in stream]
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in middle) == "Grüß dich"
    assert all(c.choices[0].delta.role is None and c.usage is None for c in middle)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage is not None and usage.usage.total_tokens == 7
    assert len({c.id for c in (first, *middle, last, usage)}) == 1


async def test_stream_is_data_lines_and_done(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await http.post("/v1/chat/completions", json={"messages": ASK, "stream": True})
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-cache" and got.headers["x-accel-buffering"] == "no"
    *events, done, end = got.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


HISTORY: list[ChatCompletionMessageParam] = [
    {"role": "developer", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ada"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "go", "arguments": ""}}
        ],
    },
    {"role": "tool", "content": "there", "tool_call_id": "1"},
]
# fields of the client and of the request on the bus
UNCHANGED: Any = {
    "frequency_penalty": 1,
    "logit_bias": {"5": -100},
    "model": "demo:shout",
    "parallel_tool_calls": False,
    "presence_penalty": -1,
    "seed": 3,
    "temperature": 0.5,
    "top_p": 0.9,
}
OTHER_SERVERS = {
    "top_k": 3,
    "min_p": 0.1,
    "repeat_penalty": 1.2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "min_tokens": 2,
}


async def test_messages_reach_the_worker(client: openai.AsyncOpenAI, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await client.chat.completions.create(model="demo", messages=HISTORY)
    ((_, request),) = worker.requests
    assert request.messages is not None
    developer, user, assistant, tool = request.messages
    assert (developer, user.text, user.name) == (ChatMessage("developer", "be kind"), "hi", "Ada")
    assert assistant.tool_calls == (ToolCall("1", FunctionCall("go", "")),)
    assert tool == ChatMessage("tool", "there", tool_call_id="1")


async def test_every_supported_field_reaches_the_worker(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await client.chat.completions.create(
            **UNCHANGED,
            messages=ASK,
            logprobs=True,
            top_logprobs=2,
            max_completion_tokens=7,
            stop="\n",
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "go"}},
            user="somebody",
            prompt_cache_key="mine",
            extra_body=OTHER_SERVERS,
        )
    ((_, request),) = worker.requests
    expected = {
        **UNCHANGED,
        **OTHER_SERVERS,
        "session_id": "mine",
        "logprobs": 2,
        "max_completion_tokens": 7,
        "stop": ("\n",),
        "tools": (Tool(Function("go", None, {"type": "object"})),),
        "tool_choice": NamedTool(FunctionName("go")),
        "grace_s": 0,
        "prompt": "",
    }
    assert {name: getattr(request, name) for name in expected} == expected


async def test_json_and_stop_lists_reach_the_worker(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await client.chat.completions.create(
            model="demo",
            messages=ASK,
            stop=["a", "b"],
            max_tokens=3,
            response_format={"type": "json_object"},
        )
    ((_, request),) = worker.requests
    assert (request.stop, request.max_completion_tokens) == (("a", "b"), 3)
    assert request.response_format == JsonObjectFormat() and request.session_id == ""


@pytest.mark.parametrize("header", ["X-Session-Id", "X-Conversation-Id", "X-OpenWebUI-Chat-Id"])
async def test_session_header_routes_the_request(
    client: openai.AsyncOpenAI, nats_url: str, header: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await client.chat.completions.create(
            model="demo", messages=ASK, extra_headers={header: "my chat"}
        )
    assert worker.requests[0][1].session_id == "my chat"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"functions": 5}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "sound"}}, "response_format"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 123}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{}]}, "role"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"temperature": "hot"}, "temperature"),
    ],
    ids=str,
)
async def test_unsupported_parameter_is_rejected_by_name(
    client: openai.AsyncOpenAI, nats_url: str, more: dict[str, Any], param: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(model="demo", messages=ASK, extra_body=more)
    assert error.value.param == param and error.value.code == "invalid_request"
    assert not worker.requests


async def test_empty_values_of_unsupported_fields_are_accepted(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    answer: Any = {"role": "assistant", "content": "x", "refusal": None, "annotations": []}
    more: Any = {
        "store": False,
        "functions": None,
        "metadata": {},
        "messages": [*ASK, answer, *ASK],
    }
    async with scripted_worker(nats_url, HELLO):
        got = await client.chat.completions.with_raw_response.create(
            model="demo", messages=ASK, extra_body=more
        )
    assert got.status_code == 200 and "x-ignored-fields" not in got.headers


async def test_n_choices_have_own_seeds_and_count_the_prompt_once(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await client.chat.completions.create(model="demo", messages=ASK, n=3, seed=5)
        stream = await client.chat.completions.create(model="demo", messages=ASK, n=2, stream=True)
        chunks = [chunk async for chunk in stream]
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert {choice.message.content for choice in got.choices} == {"Grüß dich"}
    assert got.usage is not None and got.usage.prompt_tokens_details is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 6)
    assert got.usage.prompt_tokens_details.cached_tokens == 3
    assert sorted(r.seed or 0 for _, r in worker.requests[:3]) == [5, 6, 7]
    assert len({r.request_id for _, r in worker.requests}) == 5
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == "Grüß dich"
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]


async def test_logprobs_have_the_form_of_chat_completions(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    logprob = TokenLogprob(1, "é", (195, 169), -0.5, (TokenProbability(2, "e", (101,), -0.25),))
    script = (ACCEPTED, Token(0, "é", (1,), (logprob,)), Token(1, "é", (1,), (logprob,)), DONE)
    async with scripted_worker(nats_url, script):
        got = await client.chat.completions.create(
            model="demo", messages=ASK, logprobs=True, top_logprobs=1
        )
        stream = await client.chat.completions.create(
            model="demo", messages=ASK, logprobs=True, top_logprobs=1, stream=True
        )
        chunks = [chunk.choices[0].logprobs async for chunk in stream]
    assert got.choices[0].logprobs is not None
    assert got.choices[0].logprobs.content is not None
    first, _ = got.choices[0].logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("é", [195, 169], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("e", -0.25)]
    assert sum(len(part.content or ()) for part in chunks if part) == 2


@pytest.mark.parametrize("reason", ["length", "loop", "cancelled"])
async def test_cut_answer_has_finish_reason_length(
    client: openai.AsyncOpenAI, nats_url: str, reason: Any
) -> None:
    done = Done(reason, Usage(1, 1, 0), Timings(0, 0, 0), 0, "none")
    async with scripted_worker(nats_url, (ACCEPTED, Token(0, "a", (1,)), done)):
        got = await client.chat.completions.create(model="demo", messages=ASK)
    assert got.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_cancels_the_answer(
    client: openai.AsyncOpenAI, nats_url: str, stream: bool
) -> None:
    script: Script = (ACCEPTED, Token(0, "a", (1,)), *[0.05] * 200, DONE)
    async with scripted_worker(nats_url, script) as worker:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                asked: Any = client.chat.completions.create(
                    model="demo", messages=ASK, stream=stream
                )
                async for _ in await asked:
                    pass
        async with asyncio.timeout(30):
            _, request_id = await worker.cancelled.get()
    assert request_id == worker.requests[0][1].request_id


async def test_disconnect_is_logged_without_a_status(
    client: openai.AsyncOpenAI, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services.edge.access_log")
    async with scripted_worker(nats_url, (ACCEPTED, *[0.05] * 200, DONE)) as worker:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="demo", messages=ASK, timeout=0.2)
        await asyncio.wait_for(worker.cancelled.get(), 30)
    await until(lambda: "request finished" in caplog.text)
    assert "path=/v1/chat/completions status=- " in caplog.text


async def test_disconnect_cancels_all_choices(client: openai.AsyncOpenAI, nats_url: str) -> None:
    script: Script = (ACCEPTED, Token(0, "a", (1,)), *[0.05] * 200, DONE)
    async with scripted_worker(nats_url, script) as worker:
        stream = await client.chat.completions.create(model="demo", messages=ASK, stream=True, n=2)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        async with asyncio.timeout(30):
            cancelled = {(await worker.cancelled.get())[1] for _ in range(2)}
    assert cancelled == {request.request_id for _, request in worker.requests}


class NoDrain(EdgeLimits):
    drain_seconds = 0


async def test_completion_cancelled_by_shutdown_is_a_503(nats_url: str) -> None:
    script: Script = (ACCEPTED, Token(0, "a", (1,)), *[0.05] * 200, DONE)
    async with (
        Bus.connect(nats_url, "edge") as bus,
        httpx.AsyncClient() as http,
        scripted_worker(nats_url, script) as worker,
    ):
        async with edge_on(bus, limits=NoDrain(handover_seconds=0)) as edge:
            url = edge.base_url.join("/v1/chat/completions")
            asking = asyncio.create_task(http.post(url, json={"messages": ASK}))
            await until(lambda: bool(worker.requests))
        answer = await asking
        await asyncio.wait_for(worker.cancelled.get(), 30)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"


async def test_failure_before_the_first_token_has_its_status(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    failed = Failed("overloaded", "try again", 2.5)
    async with scripted_worker(nats_url, (ACCEPTED, failed)):
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                asked: Any = client.chat.completions.create(
                    model="demo", messages=ASK, stream=stream
                )
                await asked
            assert error.value.status_code == 503 and error.value.code == "overloaded"
            assert error.value.response.headers["retry-after"] == "3"


async def test_failure_in_a_stream_is_raised_by_the_client(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    script = (ACCEPTED, Token(0, "half", (1,)), Failed("worker_lost", "it is gone", 1))
    async with scripted_worker(nats_url, script):
        stream = await client.chat.completions.create(model="demo", messages=ASK, stream=True)
        with pytest.raises(openai.APIError, match="it is gone"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="demo", messages=ASK)


async def test_openai_client_retries_only_retryable_errors(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    trying = client.with_options(max_retries=1)
    for failed, tries in [
        (Failed("overloaded", "try again", 0.1), 2),
        (Failed("model_unavailable", "it is broken"), 1),
        (Failed("context_length_exceeded", "too long"), 1),
    ]:
        async with scripted_worker(nats_url, (ACCEPTED, failed)) as worker:
            with pytest.raises(openai.APIStatusError):
                await trying.chat.completions.create(model="demo", messages=ASK)
        assert len(worker.requests) == tries


async def test_without_a_worker_the_error_is_no_worker(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="No inference worker answers") as error:
        await client.chat.completions.create(model="demo", messages=ASK)
    assert error.value.code == "no_worker"


async def test_quiet_stream_is_pinged(bus: Bus, nats_url: str) -> None:
    script: Script = (ACCEPTED, Progress(1, 0, 0), 0.1, Progress(1, 0, 0), *HELLO[1:])
    quick = replace_limits(LIMITS, ping_seconds=0.05)
    async with edge_on(bus, limits=quick) as http, scripted_worker(nats_url, script):
        got = await http.post("/v1/chat/completions", json={"messages": ASK, "stream": True})
    assert got.text.count(": ping\n\n") == 1 and got.text.endswith("data: [DONE]\n\n")


async def test_exception_while_reading_events_is_a_500(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: ChatClient, request: ChatRequest) -> AsyncIterator[StreamEvent]:
        yield ACCEPTED
        raise RuntimeError("a mistake")

    monkeypatch.setattr(ChatClient, "stream", broken)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as error:
            asked: Any = client.chat.completions.create(model="demo", messages=ASK, stream=stream)
            await asked
        assert error.value.status_code == 500 and error.value.code == "internal"
