"""OpenAI's client on /v1, with real processes and the real demo model."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ParsedFunctionToolCall
from pydantic import BaseModel

from bench import servers
from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
ENDLESS = "root ::= [a-z] root"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 0},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    name: Literal["Paris", "Rome"]
    is_big: bool


class Trip(BaseModel):
    """With a part of its own, which a schema refers to."""

    to: Place
    back: Place | None


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("openai")) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.http.base_url}/v1", api_key="any", max_retries=0
    ) as client:
        yield client


def test_conversation_is_answered_and_not_stored(stack: Stack, client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "my name is Ada"},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "what is my name?"},
    ]
    got = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, extra_headers={"X-Session-Id": "default"}
    )
    assert "Ada" in (got.choices[0].message.content or "")
    assert got.choices[0].finish_reason == "stop" and got.model == "demo"
    assert stack.messages("default") == []


def test_next_turn_prefills_only_new_tokens(client: openai.OpenAI) -> None:
    messages = [*HI]
    usage = None
    for question in ("how are you?", "what can you do?", "thank you"):
        got = client.chat.completions.create(model="demo", messages=messages, temperature=0)
        if usage is not None and got.usage is not None and got.usage.prompt_tokens_details:
            held = usage.prompt_tokens + usage.completion_tokens - 1  # the token that ended it
            assert got.usage.prompt_tokens_details.cached_tokens == held
        usage = got.usage
        messages += [
            {"role": "assistant", "content": got.choices[0].message.content},
            {"role": "user", "content": question},
        ]
    assert usage is not None


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=HI, temperature=0)
    with client.chat.completions.stream(model="demo", messages=HI, temperature=0) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].finish_reason == "stop"


def test_async_client_reads_eight_streams_at_once(stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "user", "content": f"my name is Ada number {number}"}
        ]
        stream = await client.chat.completions.create(
            model="demo", messages=messages, stream=True, temperature=0
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.http.base_url}/v1", api_key="any"
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(8)))

    assert all(asyncio.run(all_of_them()))


def test_same_seed_repeats_and_n_choices_differ(client: openai.OpenAI) -> None:
    def contents(seed: int) -> list[str | None]:
        got = client.chat.completions.create(
            model="demo", messages=HI, n=2, seed=seed, temperature=3, max_tokens=8,
            extra_body={"top_k": 0}, top_p=1,
        )  # fmt: skip
        return [choice.message.content for choice in got.choices]

    assert contents(1) != contents(7) and len(set(contents(1))) == 2


def test_answer_parses_as_a_pydantic_model(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(
        model="demo", messages=HI, response_format=Trip, max_tokens=200, temperature=1, seed=1
    )
    trip = got.choices[0].message.parsed
    assert trip is not None and trip.to.name in ("Paris", "Rome")


@pytest.mark.parametrize("stream", [False, True])
def test_required_tool_call_follows_its_schema(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "messages": HI, "tools": [WEATHER], "tool_choice": "required",
        "temperature": 1, "seed": 2, "max_tokens": 200,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as events:
            got: Any = events.get_final_completion()
    else:
        got = client.chat.completions.create(**asked)
    (choice,) = got.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments["place"] in ("Paris", "Rome") and isinstance(arguments["days"], int)


def test_response_parses_as_a_pydantic_model(client: openai.OpenAI) -> None:
    got = client.responses.parse(
        model="demo", input="hello", text_format=Trip, max_output_tokens=1000, temperature=1
    )  # the untrained format has a lot of white space
    trip = got.output_parsed
    assert trip is not None and trip.to.name in ("Paris", "Rome")


def test_output_of_a_tool_continues_a_response(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    called = client.responses.create(
        model="demo", input="hello", tools=[tool], tool_choice="required",
        temperature=1, max_output_tokens=200, extra_body={"seed": 2},
    )  # fmt: skip
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments)["place"]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    got = client.responses.create(
        model="demo", input=[output], previous_response_id=called.id, tools=[tool],
        max_output_tokens=20,
    )  # fmt: skip
    assert got.status in ("completed", "incomplete") and got.usage and called.usage
    assert got.usage.input_tokens > called.usage.input_tokens
    counted = client.responses.input_tokens.count(
        model="demo", input=[output], previous_response_id=called.id, tools=[tool]
    )
    assert counted.input_tokens == got.usage.input_tokens


def test_named_tool_call_parses_as_a_pydantic_model(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(
        model="demo",
        messages=HI,
        tools=[
            openai.pydantic_function_tool(Trip, name="travel"),
            openai.pydantic_function_tool(Place, name="find"),
        ],
        tool_choice={"type": "function", "function": {"name": "travel"}},
        max_tokens=300,
        seed=3,
    )
    assert got.choices[0].message.tool_calls is not None
    (call,) = got.choices[0].message.tool_calls
    assert isinstance(call, ParsedFunctionToolCall)
    assert isinstance(call.function.parsed_arguments, Trip)


def test_tool_result_gets_an_answer(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="demo", messages=HI, tools=[WEATHER], tool_choice="required", max_tokens=200
    )
    called = got.choices[0].message
    result: Any = {
        "role": "tool",
        "content": "sunny",
        "tool_call_id": (called.tool_calls or [])[0].id,
    }
    messages: Any = [*HI, called.model_dump(), result]
    after = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER])
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_completion_continues_a_text(client: openai.OpenAI) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    got = client.completions.create(model="demo", prompt=text, temperature=0, logprobs=2)
    whole = client.chat.completions.create(model="demo", messages=HI, temperature=0)
    assert got.choices[0].text == whole.choices[0].message.content
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and "".join(logprobs.tokens or ()) == got.choices[0].text


def test_logprobs_join_to_the_answer(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="demo", messages=HI, logprobs=True, top_logprobs=5, temperature=0
    )
    assert got.choices[0].logprobs is not None
    logprobs = got.choices[0].logprobs.content or []
    assert (
        b"".join(bytes(t.bytes or ()) for t in logprobs).decode() == got.choices[0].message.content
    )
    assert all(len(t.top_logprobs) == 5 and t.logprob <= 0 for t in logprobs)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"model": "gpt-4o"}, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "context_length_exceeded"),
        ({"logit_bias": {"999999": 1}}, "invalid_request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_request"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema":
            {"type": "hiccup"}}}}, "invalid_request"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters":
            {"type": "hiccup"}}}], "tool_choice": "required"}, "invalid_request"),
    ],
    ids=lambda case: str(case)[:40],
)  # fmt: skip
def test_bad_openai_request_is_rejected(
    client: openai.OpenAI, more: dict[str, Any], code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="demo", messages=HI, extra_body=more)
    assert error.value.code == code and 400 <= error.value.status_code < 500


def test_grammar_constrains_and_a_bad_one_is_rejected(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="demo", messages=HI, extra_body={"grammar": 'root ::= "a"{5,5}'}
    )
    assert got.choices[0].message.content == "aaaaa"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="demo", messages=HI, extra_body={"grammar": "root ::= this is (not GBNF"}
        )
    assert error.value.param == "grammar"


def test_repetitive_schema_is_answered_in_full(client: openai.OpenAI) -> None:
    """With tokens that the loop guard would take for a loop."""
    zeros = {"type": "array", "items": {"const": 0}, "minItems": 100, "maxItems": 100}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "mask", "description": "all zero", "schema": zeros, "strict": True},
    }
    got = client.chat.completions.create(
        model="demo", messages=HI, response_format=form, max_tokens=900
    )
    assert got.choices[0].finish_reason == "stop"
    assert json.loads(got.choices[0].message.content or "") == [0] * 100


def test_unenforceable_schema_is_rejected_by_keyword(client: openai.OpenAI) -> None:
    tags = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": tags}}
    client.chat.completions.create(model="demo", messages=HI, response_format=form, max_tokens=1)
    form["json_schema"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="`properties.tags.uniqueItems`") as error:
        client.chat.completions.create(model="demo", messages=HI, response_format=form)
    assert error.value.param == "response_format"


def test_banned_token_is_never_generated(stack: Stack, client: openai.OpenAI) -> None:
    def say(bias: dict[str, int]) -> list[int]:
        got = client.chat.completions.create(
            model="demo", messages=HI, temperature=0, logit_bias=bias, max_tokens=20
        )
        content = got.choices[0].message.content
        tokens: list[int] = stack.http.post("/v1/tokenize", json={"content": content}).json()[
            "tokens"
        ]
        return tokens

    banned = say({})
    assert not set(say(dict.fromkeys(map(str, banned), -100))) & set(banned)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_conversation_is_rejected_with_counts(client: openai.OpenAI, stream: bool) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello " * 3000}]
    too_long = r"This model's maximum context length is 2048 tokens.* \d{4} tokens"
    with pytest.raises(openai.BadRequestError, match=too_long) as error:
        client.chat.completions.create(model="demo", messages=messages, stream=stream)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match=too_long) as error:
        client.completions.create(model="demo", prompt="hello " * 3000, stream=stream)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")


def test_max_tokens_beyond_the_window_is_clamped(stack: Stack, client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="demo", messages=HI, max_tokens=32_000, temperature=0
    )
    assert got.choices[0].message.content and got.choices[0].finish_reason == "stop"
    response = stack.http.post("/chat", json={"prompt": "hello", "max_tokens": 32_000})
    assert response.status_code == 200 and '"finish_reason":"stop"' in response.text


def test_message_of_the_stream_helper_works_in_a_second_turn(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "tools": [WEATHER], "max_tokens": 200}
    with client.chat.completions.stream(messages=HI, tool_choice="required", **asked) as stream:
        called: Any = stream.get_final_completion().choices[0].message
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    with client.chat.completions.stream(messages=[*HI, called, result], **asked) as stream:
        assert stream.get_final_completion().choices[0].finish_reason


def test_answer_with_tools_and_schema_is_a_call_or_parses(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(
        model="demo",
        messages=HI,
        tools=[openai.pydantic_function_tool(Place, name="find")],
        response_format=Trip,
        max_tokens=300,
        temperature=1,
        seed=1,
    )
    (choice,) = got.choices
    assert bool(choice.message.tool_calls) != (choice.message.parsed is not None)


def test_unicode_line_separators_do_not_end_an_event(stack: Stack) -> None:
    """U+2028, U+2029 and U+0085 are the only line breaks of str.splitlines allowed in JSON."""
    cut = "a\u2028b\u2029c\u0085d"
    body = {"grammar": f'root ::= "{cut}"', "max_tokens": 40}

    def streamed(path: str, read: Callable[[Any], str | None], **more: Any) -> str:
        lines = stack.http.post(path, json=body | more).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return "".join(read(event) or "" for event in events)

    assert streamed("/chat", lambda event: event.get("token"), prompt="hi") == cut
    assert cut == streamed(
        "/v1/chat/completions",
        lambda event: event["choices"][0]["delta"].get("content"),
        messages=HI,
        stream=True,
    )


async def test_benchmarks_can_use_it_as_a_peer(stack: Stack) -> None:
    peer = servers.peer(str(stack.http.base_url).rstrip("/"))
    first = await peer.ask("s", "hello there", 20)
    second = await peer.ask("s", "how are you?", 20)
    assert first.piece_times and first.completion_tokens > 0
    assert second.cached_tokens >= first.prompt_tokens


def test_models_endpoint_lists_model_and_adapter(client: openai.OpenAI) -> None:
    model, adapter = client.models.list().data
    assert (model.id, adapter.id) == ("demo", "demo:pirate") and model.created > 1_600_000_000


def test_tokenize_detokenize_and_count_agree(stack: Stack, client: openai.OpenAI) -> None:
    content = "What is the capital of France? 🙂"
    tokens = stack.http.post("/v1/tokenize", json={"content": content}).json()["tokens"]
    assert stack.http.post("/v1/detokenize", json={"tokens": tokens}).json()["content"] == content
    body = {"messages": HI, "tools": [WEATHER]}
    counted = stack.http.post("/v1/chat/completions/input_tokens", json=body).json()["input_tokens"]
    got = client.chat.completions.create(model="demo", messages=HI, tools=[WEATHER], max_tokens=1)
    assert got.usage is not None and got.usage.prompt_tokens == counted


def test_all_slots_are_free_in_the_end(stack: Stack) -> None:
    wait_for(lambda: stack.running() == 0, "the slots to be free")


@pytest.fixture(scope="module")
def slow_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("slow"), slow=True) as stack:
        yield stack


@pytest.fixture
def impatient(slow_stack: Stack) -> Iterator[openai.OpenAI]:
    """A client that gives up after 4 s."""
    base = f"{slow_stack.http.base_url}/v1"
    with openai.OpenAI(base_url=base, api_key="any", max_retries=0, timeout=4) as client:
        yield client


def test_closed_stream_frees_the_slot(slow_stack: Stack, impatient: openai.OpenAI) -> None:
    grammar = {"grammar": ENDLESS}
    stream = impatient.chat.completions.create(
        model="demo", messages=HI, stream=True, temperature=2, extra_body=grammar
    )
    next(iter(stream))
    wait_for(lambda: slow_stack.running() == 1, "the answer to run")
    stream.close()
    wait_for(lambda: slow_stack.running() == 0, "the slot to be free")


def test_client_timeout_frees_the_slot(slow_stack: Stack, impatient: openai.OpenAI) -> None:
    create, grammar = impatient.chat.completions.create, {"grammar": ENDLESS}
    with ThreadPoolExecutor(1) as pool, pytest.raises(openai.APITimeoutError):
        waiting = pool.submit(create, model="demo", messages=HI, extra_body=grammar)
        wait_for(lambda: slow_stack.running() == 1, "the answer to run")
        waiting.result()
    wait_for(lambda: slow_stack.running() == 0, "the slot to be free")
