# /// script
# dependencies = ["litellm==1.110.2"]
# ///
"""LiteLLM, as an OpenAI-compatible provider and as Anthropic's."""

import json

import litellm
from harness import KEY, MODEL, PROMPT, URL, get_weather, run

ASK = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def chat() -> None:
    got = litellm.completion(**ASK, messages=HELLO)
    assert got.choices[0].message.content == "Hello, Ada." and got.usage.total_tokens > 0


def stream() -> None:
    chunks = [*litellm.completion(**ASK, messages=HELLO, stream=True)]
    built = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert built.choices[0].message.content == "Hello, Ada."


def tool_loop() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = litellm.completion(**ASK, messages=messages, tools=[TOOL]).choices[0].message
    messages.append(answer.model_dump())
    for call in answer.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    got = litellm.completion(**ASK, messages=messages, tools=[TOOL])
    assert got.choices[0].message.content == "It is sunny."


def anthropic() -> None:
    got = litellm.completion(
        model=f"anthropic/{MODEL}", api_base=URL, api_key=KEY, messages=HELLO, max_tokens=50
    )
    assert got.choices[0].message.content == "Hello, Ada."


def embeddings_of_a_chat_model_are_an_error() -> None:
    try:
        litellm.embedding(**ASK, input=["hello"])
    except litellm.BadRequestError:
        return
    except litellm.NotFoundError:
        return
    raise AssertionError("no error")


def overflow_is_typed() -> None:
    try:
        litellm.completion(**ASK, messages=[{"role": "user", "content": "TOO LONG"}])
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no error")


run(chat, stream, tool_loop, anthropic, embeddings_of_a_chat_model_are_an_error, overflow_is_typed)
