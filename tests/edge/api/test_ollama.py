"""Ollama's API, requested with its own client; the worker is scripted."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest

from services.contract.messages import ChatRequest, Failed
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
from tests.fakes import (
    ACCEPTED,
    HELLO,
    Script,
    answer_script,
    direct_worker,
    random_answer,
    report,
    reporting,
    scripted_worker,
)

CHAT, GENERATE = "/api/chat", "/api/generate"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "demo", "messages": HI}
CALLS = answer_script(
    ("reasoning", "Hm, "),
    ("reasoning", "so."),
    ("content", "I go."),
    ("call", "go"),
    ("arguments", '{"to": '),
    ("arguments", '"Rome"}'),
    ("call", "stop"),
    ("arguments", "{}"),
    finish_reason="tool_calls",
)


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=str(http.base_url)) as client:
        yield client


async def ask(http: httpx.AsyncClient, nats_url: str, path: str, **body: Any) -> ChatRequest:
    """Return the request that a worker gets for a body."""
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(path, json={"model": "demo", **body})
    assert got.status_code == 200, got.text
    ((_, request),) = worker.requests
    return request


async def test_client_reads_an_answer(client: ollama.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await client.chat(model="demo:latest", messages=HI)
        generated = await client.generate(model="demo", prompt="hi")
    assert (got.message.role, got.message.content) == ("assistant", "Grüß dich")
    assert (got.model, got.done, got.done_reason) == ("demo", True, "stop")
    assert (got.prompt_eval_count, got.eval_count) == (5, 2)
    assert (got.prompt_eval_duration, got.eval_duration) == (100_000_000, 200_000_000)
    assert generated.response == "Grüß dich"


async def test_stream_has_the_same_parts(client: ollama.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, CALLS):
        whole = await client.chat(model="demo", messages=HI)
        parts = [part async for part in await client.chat(model="demo", messages=HI, stream=True)]
    assert (whole.message.thinking, whole.message.content) == ("Hm, so.", "I go.")
    calls = [call.function for call in whole.message.tool_calls or ()]
    assert [(each.name, each.arguments) for each in calls] == [("go", {"to": "Rome"}), ("stop", {})]
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    streamed = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert streamed == calls
    assert [part.done for part in parts] == [False] * 5 + [True]


async def test_any_stream_is_collected_as_the_whole(
    client: ollama.AsyncClient, nats_url: str
) -> None:
    for seed in range(30):
        async with scripted_worker(nats_url, random_answer(random.Random(seed))):
            whole = (await client.chat(model="demo", messages=HI)).message
            stream = await client.chat(model="demo", messages=HI, stream=True)
            parts = [part.message async for part in stream]
        assert "".join(part.content or "" for part in parts) == whole.content
        assert "".join(part.thinking or "" for part in parts) == (whole.thinking or "")
        calls = [call for part in parts for call in part.tool_calls or ()]
        assert calls == list(whole.tool_calls or ())


async def test_lines_are_json_and_a_stream_is_the_default(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await http.post(GENERATE, json={"model": "demo", "prompt": "hi"})
    assert got.headers["content-type"] == "application/x-ndjson"
    *parts, end = [json.loads(line) for line in got.text.splitlines()]
    assert [part["response"] for part in parts] == ["Grüß ", "dich"]
    assert end["done"] is True and all(part["created_at"].endswith("Z") for part in parts)


async def test_line_separators_do_not_cut_a_line(client: ollama.AsyncClient, nats_url: str) -> None:
    """The client splits the stream with str.splitlines."""
    text = "a\u2028b\u2029c\x85d"
    async with scripted_worker(nats_url, answer_script(("content", text))):
        parts = [part async for part in await client.chat(model="demo", messages=HI, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == text


async def test_silence_is_not_filled(bus: Bus, nats_url: str) -> None:
    """Each line must be JSON, so a ping can be neither a comment nor an empty line."""
    script: Script = (*HELLO[:2], *[0.02] * 5, *HELLO[2:])
    async with edge_on(bus, limits=EdgeLimits(ping_seconds=0, handover_seconds=0)) as http:
        async with scripted_worker(nats_url, script):
            got = await http.post(CHAT, json=BODY)
    assert [json.loads(line)["done"] for line in got.text.splitlines()] == [False, False, True]


async def test_conversation_is_that_of_a_chat_completion(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    call = {"function": {"name": "go", "arguments": {"to": "Rome"}}}
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
    request = await ask(
        http,
        nats_url,
        CHAT,
        messages=[
            *HI,
            {"role": "assistant", "content": "", "thinking": "Hm", "tool_calls": [call]},
            {"role": "tool", "tool_name": "go", "content": "there"},
        ],
        tools=[tool],
        think="low",
        options={"num_predict": 7, "temperature": 0, "stop": ["X"], "seed": 4, "top_k": 3},
    )
    question, answer, result = request.messages or ()
    assert (question.text, answer.reasoning, result.text) == ("hi", "Hm", "there")
    (called,) = answer.tool_calls or ()
    assert json.loads(called.function.arguments) == {"to": "Rome"} and result.name == "go"
    assert (request.max_completion_tokens, request.temperature, request.seed) == (7, 0, 4)
    assert (request.stop, request.top_k, request.reasoning_effort) == (("X",), 3, "low")
    assert [each.function.name for each in request.tools or ()] == ["go"]


@pytest.mark.parametrize(
    ("given", "kind"),
    [("json", "json_object"), ({"type": "object"}, "json_schema"), ("", None), (None, None)],
)
async def test_format_is_a_response_format(
    http: httpx.AsyncClient, nats_url: str, given: Any, kind: str | None
) -> None:
    request = await ask(http, nats_url, CHAT, messages=HI, format=given)
    found = request.response_format
    assert (found and found.__struct_config__.tag) == kind


async def test_prompt_may_have_a_system_text(http: httpx.AsyncClient, nats_url: str) -> None:
    request = await ask(http, nats_url, GENERATE, prompt="hi", system="Be kind.", think=False)
    assert [(each.role, each.text) for each in request.messages or ()] == [
        ("system", "Be kind."),
        ("user", "hi"),
    ]
    assert request.enable_thinking is False


async def test_request_without_a_prompt_loads_the_model(client: ollama.AsyncClient) -> None:
    chat = await client.chat(model="demo", messages=[])
    generated = await client.generate(model="demo", prompt="", keep_alive=5)
    assert (chat.done_reason, generated.done_reason) == ("load", "load")


async def test_client_lists_and_describes_models(bus: Bus, nats_url: str) -> None:
    async with (
        edge_on(bus) as http,
        direct_worker(nats_url, "w1", HELLO),
        ollama.AsyncClient(host=str(http.base_url)) as client,
        reporting(bus, report("w1")),
    ):
        async with asyncio.timeout(30):
            while not (listed := (await client.list()).models):
                await asyncio.sleep(0.01)
        shown = await client.show("demo:latest")
        running = await client.ps()
        assert [each.model for each in listed] == ["demo"] == [m.model for m in running.models]
        assert shown.capabilities == ["completion", "tools"]
        assert shown.modelinfo is not None
        name = shown.modelinfo["general.architecture"]
        assert shown.modelinfo[f"{name}.context_length"] == 2048
        with pytest.raises(ollama.ResponseError, match="no model 'nope'") as error:
            await client.show("nope")
        assert error.value.status_code == 404
        assert (await http.get("/api/version")).json()["version"].split(".")[0].isdigit()


async def test_fields_without_effect_are_named(http: httpx.AsyncClient, nats_url: str) -> None:
    more = {"keep_alive": "5m", "options": {"num_ctx": 4096, "mood": 1}, "stream": False}
    async with scripted_worker(nats_url, HELLO):
        got = await http.post(CHAT, json=BODY | more)
    assert got.headers["x-ignored-fields"] == "keep_alive, options.num_ctx, options.mood"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
        {"messages": 5},
        {"messages": HI, "format": "xml"},
        {"messages": HI, "options": 5},
        {"messages": HI, "options": {"temperature": "hot"}},
        {"messages": HI, "think": "very"} | {"stream": "x"},
        {"messages": HI, "model": 5},
    ],
    ids=str,
)
async def test_invalid_body_is_an_error_of_ollama(
    client: ollama.AsyncClient, http: httpx.AsyncClient, nats_url: str, body: dict[str, Any]
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await http.post(CHAT, json={"model": "demo"} | body)
    assert got.status_code == 400 and worker.requests == []
    assert isinstance(got.json()["error"], str)


async def test_error_names_the_option_as_sent(http: httpx.AsyncClient) -> None:
    got = await http.post(CHAT, json=BODY | {"options": {"num_predict": 0}})
    assert (got.status_code, got.json()["error"]) == (
        400,
        "The field `num_predict` must be at least 1.",
    )


async def test_model_without_a_name_is_not_shown(http: httpx.AsyncClient) -> None:
    got = await http.post("/api/show", json={})
    assert got.status_code == 400
    trace_id = got.headers["x-trace-id"]
    assert got.json() == {"error": "The field `model` is missing.", "trace_id": trace_id}


async def test_failures_are_raised_by_the_client(client: ollama.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, (ACCEPTED, Failed("overloaded", "Full.", 1))):
        with pytest.raises(ollama.ResponseError, match="Full") as error:
            await client.chat(model="demo", messages=HI)
        assert error.value.status_code == 503
    script = (*HELLO[:-1], Failed("worker_lost", "It is lost."))
    async with scripted_worker(nats_url, script):
        with pytest.raises(ollama.ResponseError, match="It is lost"):
            [part async for part in await client.chat(model="demo", messages=HI, stream=True)]


@pytest.fixture
async def scripted(nats_url: str) -> AsyncIterator[None]:
    async with scripted_worker(nats_url, HELLO):
        yield


async def test_no_body_is_a_server_error(http: httpx.AsyncClient, scripted: None) -> None:
    values: list[Any] = [None, True, 0, -3, "", "json", [], {}, [[]], {"type": 5}, HI, ["x"], "low"]
    fields = ["messages", "prompt", "system", "format", "options", "think", "tools", "stream"]
    for seed in range(300):
        draw = random.Random(seed)
        body = {name: draw.choice(values) for name in draw.sample(fields, draw.randrange(1, 5))}
        got = await http.post(draw.choice([CHAT, GENERATE]), json={"model": "demo"} | body)
        assert got.status_code in (200, 400), got.text
