"""Anthropic's API, requested with its own client; the worker is scripted."""

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest

from services.contract.messages import ChatRequest, Failed, Started
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
from tests.fakes import ACCEPTED, DONE, HELLO, Script, answer_script, random_answer, scripted_worker

URL = "/v1/messages"
HI: Any = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 50, "messages": HI}
TOOL: Any = {"name": "go", "description": "goes", "input_schema": {"type": "object"}}
CALLS = answer_script(
    ("reasoning", "Hm, "),
    ("reasoning", "so."),
    ("content", "I "),
    ("content", "go."),
    ("call", "go"),
    ("arguments", '{"to": '),
    ("arguments", '"Rome"}'),
    ("call", "stop"),
    ("arguments", "{}"),
    finish_reason="tool_calls",
)


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=str(http.base_url), api_key="any", max_retries=0
    ) as client:
        yield client


async def ask(http: httpx.AsyncClient, nats_url: str, **fields: Any) -> ChatRequest:
    """Return the request that a worker gets for a body."""
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(URL, json=BODY | fields)
    assert got.status_code == 200, got.text
    ((_, request),) = worker.requests
    return request


async def test_client_reads_a_message(client: anthropic.AsyncAnthropic, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await client.messages.create(model="demo", max_tokens=50, messages=HI)
    assert got.id.startswith("msg_") and (got.model, got.role) == ("demo", "assistant")
    (block,) = got.content
    assert block.type == "text" and block.text == "Grüß dich"
    assert (got.stop_reason, got.stop_sequence) == ("end_turn", None)
    usage = got.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 3, 2)


async def test_stream_builds_the_same_message(
    client: anthropic.AsyncAnthropic, nats_url: str
) -> None:
    async with scripted_worker(nats_url, CALLS):
        whole = await client.messages.create(model="demo", max_tokens=50, messages=HI, tools=[TOOL])
        async with client.messages.stream(
            model="demo", max_tokens=50, messages=HI, tools=[TOOL]
        ) as events:
            streamed = await events.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.to_dict()["content"] == [
        {"type": "thinking", "thinking": "Hm, so.", "signature": "finetunellm"},
        {"type": "text", "text": "I go."},
        {"type": "tool_use", "id": "callid001", "name": "go", "input": {"to": "Rome"}},
        {"type": "tool_use", "id": "callid002", "name": "stop", "input": {}},
    ]
    assert whole.stop_reason == "tool_use"
    assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("tool_use", 9)


async def test_any_stream_is_collected_as_the_whole(
    client: anthropic.AsyncAnthropic, nats_url: str
) -> None:
    for seed in range(30):
        async with scripted_worker(nats_url, random_answer(random.Random(seed))):
            whole = await client.messages.create(model="demo", max_tokens=50, messages=HI)
            async with client.messages.stream(model="demo", max_tokens=50, messages=HI) as events:
                streamed = await events.get_final_message()
        assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
        assert streamed.usage.output_tokens == whole.usage.output_tokens


async def test_stream_has_the_events_of_anthropic(http: httpx.AsyncClient, nats_url: str) -> None:
    script: Script = (ACCEPTED, Started(7, 3, 0, 0), *CALLS[1:])
    async with scripted_worker(nats_url, script):
        got = await http.post(URL, json=BODY | {"stream": True})
    events = [block.split("\ndata: ") for block in got.text.strip().split("\n\n")]
    sent = [json.loads(data) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [each["type"] for each in sent]
    assert [each["type"] for each in sent] == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * 3,  # the last one is the signature
        *("content_block_stop", "content_block_start"),
        *["content_block_delta"] * 2,
        *("content_block_stop", "content_block_start"),
        *["content_block_delta"] * 2,
        *("content_block_stop", "content_block_start", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    start = sent[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (4, 3)
    assert [each["index"] for each in sent if each["type"] == "content_block_start"] == [0, 1, 2, 3]


async def test_conversation_is_that_of_a_chat_completion(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    request = await ask(
        http,
        nats_url,
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "go"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I go."},
                    {"type": "tool_use", "id": "t1", "name": "go", "input": {"to": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "there"},
                    {"type": "text", "text": "and now?"},
                ],
            },
        ],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["X"],
        top_k=4,
    )
    messages = request.messages or ()
    assert [(each.role, each.text) for each in messages] == [
        ("system", "Be kind."),
        ("user", "go"),
        ("assistant", "I go."),
        ("tool", "there"),
        ("user", "and now?"),
    ]
    answer, result = messages[2], messages[3]
    assert answer.reasoning == "Hm" and result.tool_call_id == "t1"
    (call,) = answer.tool_calls or ()
    assert (call.id, call.function.name) == ("t1", "go")
    assert json.loads(call.function.arguments) == {"to": "Rome"}
    (tool,) = request.tools or ()
    assert (tool.function.name, tool.function.parameters) == ("go", {"type": "object"})
    assert (request.tool_choice, request.parallel_tool_calls) == ("required", False)
    assert (request.stop, request.top_k, request.max_completion_tokens) == (("X",), 4, 50)


async def test_tool_runner_sends_the_whole_conversation(
    client: anthropic.AsyncAnthropic, nats_url: str
) -> None:
    """It tries first to keep it on the server, and then sends only what is new."""

    @anthropic.beta_async_tool
    async def go(to: str) -> str:
        """Go."""
        return f"in {to}"

    @anthropic.beta_async_tool
    async def stop() -> str:
        """Stop."""
        return "stopped"

    async with scripted_worker(nats_url, CALLS) as worker:
        runner = client.beta.messages.tool_runner(
            model="demo", max_tokens=50, messages=HI, tools=[go, stop], max_iterations=2
        )
        assert [message.stop_reason async for message in runner] == ["tool_use"] * 2
    first, second = [request for _, request in worker.requests]
    assert [each.role for each in first.messages or ()] == ["user"]
    assert [each.role for each in second.messages or ()] == ["user", "assistant", "tool", "tool"]
    assert (second.messages or ())[2].text == "in Rome" and second.tools == first.tools


async def test_thinking_and_format_have_their_effect(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    schema = {"type": "object"}
    request = await ask(
        http,
        nats_url,
        thinking={"type": "enabled", "budget_tokens": 30},
        output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
    )
    assert (request.enable_thinking, request.reasoning_budget_tokens) == (True, 30)
    assert request.reasoning_effort == "low" and request.response_format is not None
    off = await ask(http, nats_url, thinking={"type": "disabled"})
    assert off.enable_thinking is False


async def test_last_message_of_the_assistant_is_continued(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    request = await ask(http, nats_url, messages=[*HI, {"role": "assistant", "content": "I am"}])
    assert request.continue_final == "content"


@pytest.mark.parametrize("as_blocks", [False, True])
async def test_billing_header_is_no_part_of_the_prompt(
    http: httpx.AsyncClient, nats_url: str, as_blocks: bool
) -> None:
    header = "x-anthropic-billing-header: cc_version=2; cch=4f2a1;"
    texts = [header, "Be kind."] if as_blocks else [f"{header}\nBe kind."]
    system: Any = [{"type": "text", "text": text} for text in texts] if as_blocks else texts[0]
    request = await ask(http, nats_url, system=system)
    assert (request.messages or ())[0].text == "Be kind."


async def test_stop_sequence_is_named(http: httpx.AsyncClient, nats_url: str) -> None:
    done = DONE.__class__("stop", DONE.usage, DONE.timings, 0, "none", stop_string="X")
    async with scripted_worker(nats_url, (*HELLO[:-1], done)):
        got = (await http.post(URL, json=BODY)).json()
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", "X")


async def test_fields_without_effect_are_named(http: httpx.AsyncClient, nats_url: str) -> None:
    more = {"metadata": {"user_id": "u"}, "service_tier": "auto", "mood": "good"}
    async with scripted_worker(nats_url, HELLO):
        got = await http.post(URL, json=BODY | more)
    assert got.headers["x-ignored-fields"] == "metadata, service_tier, mood"


BLOCK = {"type": "text", "text": "a"}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}


@pytest.mark.parametrize(
    "more",
    [
        {"messages": HI * 5000},
        {"system": [BLOCK] * 5000},
        {"tools": [TOOL] * 5000},
        {"messages": [{"role": "user", "content": [RESULT] * 5000}]},
        {"messages": [{"role": "user", "content": [RESULT | {"content": [BLOCK] * 5000}]}]},
    ],
    ids=["messages", "system", "tools", "results", "blocks of a result"],
)
async def test_many_objects_are_rejected_unread(
    http: httpx.AsyncClient, nats_url: str, more: dict[str, Any]
) -> None:
    """Each costs microseconds in the event loop."""
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(URL, json=BODY | more)
    assert got.status_code == 413 and worker.requests == []
    assert got.json()["error"]["type"] == "request_too_large"
    assert "more than 4,000" in got.json()["error"]["message"]


async def test_error_has_the_id_and_the_names_of_the_request(http: httpx.AsyncClient) -> None:
    got = await http.post(URL, json=BODY | {"stop_sequences": 5}, headers={"x-request-id": "mine"})
    assert got.json()["error"]["message"].startswith("The field `stop_sequences`")
    assert got.json()["request_id"] == got.headers["request-id"] == "mine"
    assert got.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": 5},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tool_choice": {"type": "some"}},
        {"tool_choice": {"type": "tool", "name": "go"}},
        {"mcp_servers": [{"name": "x"}]},
        {"thread": {"type": "continue", "previous_message_id": "msg_1"}},
        {"system": [{"type": "image"}]},
        {"thinking": {"type": "some"}},
    ],
    ids=str,
)
async def test_invalid_body_is_an_error_of_anthropic(
    http: httpx.AsyncClient, nats_url: str, more: dict[str, Any]
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(URL, json=BODY | more)
    assert got.status_code == 400 and worker.requests == []
    error = got.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")


async def test_errors_are_typed_by_the_client(
    client: anthropic.AsyncAnthropic, nats_url: str, bus: Bus
) -> None:
    for code, kind in (
        ("model_not_found", anthropic.NotFoundError),
        ("overloaded", anthropic.InternalServerError),
    ):
        async with scripted_worker(nats_url, (ACCEPTED, Failed(code, "No."))):  # type: ignore[arg-type]
            with pytest.raises(kind, match=r"No\."):
                await client.messages.create(model="demo", max_tokens=5, messages=HI)
    async with edge_on(bus, keys="acme:s3cret") as locked:
        got = await locked.post(URL, json=BODY, headers={"x-api-key": "wrong"})
        assert (got.status_code, got.json()["error"]["type"]) == (401, "authentication_error")
        wrong_method = await locked.get(URL)
        assert (wrong_method.status_code, wrong_method.json()["type"]) == (405, "error")


async def test_failure_in_a_stream_is_an_error_event(
    client: anthropic.AsyncAnthropic, nats_url: str
) -> None:
    script = (*HELLO[:-1], Failed("worker_lost", "It is lost."))
    async with scripted_worker(nats_url, script):
        with pytest.raises(anthropic.APIStatusError, match="It is lost"):
            async with client.messages.stream(model="demo", max_tokens=5, messages=HI) as events:
                [text async for text in events.text_stream]


NAMES = ["type", "role", "content", "text", "name", "input", "id", "x"]
SCALARS = [None, True, 0, -3, "", "text", "user", "tool_use", "tool_result", "thinking"]


def any_json(draw: random.Random, depth: int = 4) -> Any:
    match draw.randrange(3) if depth else 0:
        case 0:
            return draw.choice(SCALARS)
        case 1:
            return [any_json(draw, depth - 1) for _ in range(draw.randrange(3))]
    return {draw.choice(NAMES): any_json(draw, depth - 1) for _ in range(draw.randrange(4))}


async def test_no_body_is_a_server_error(http: httpx.AsyncClient, nats_url: str) -> None:
    fields = ["messages", "system", "tools", "tool_choice", "thinking", "stop_sequences"]
    async with scripted_worker(nats_url, HELLO):
        for seed in range(300):
            draw = random.Random(seed)
            chosen = draw.sample(fields, draw.randrange(1, 4))
            got = await http.post(URL, json=BODY | {name: any_json(draw) for name in chosen})
            assert got.status_code in (200, 400), got.text
            assert got.json()["type"] in ("message", "error")
