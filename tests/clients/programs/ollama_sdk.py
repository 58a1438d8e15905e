# /// script
# dependencies = ["ollama==0.6.3"]
# ///
"""Ollama's Python client."""

import ollama
from harness import MODEL, PROMPT, SCHEMA, URL, get_weather, run

client = ollama.Client(host=URL)
HELLO = [{"role": "user", "content": "hello"}]


def chat() -> None:
    assert client.chat(model=MODEL, messages=HELLO).message.content == "Hello, Ada."


def stream() -> None:
    parts = client.chat(model=MODEL, messages=HELLO, stream=True)
    assert "".join(part.message.content for part in parts) == "Hello, Ada."


def tool_loop() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat(model=MODEL, messages=messages, tools=[get_weather]).message
    (call,) = answer.tool_calls
    result = get_weather(**call.function.arguments)
    messages += [answer, {"role": "tool", "tool_name": "get_weather", "content": result}]
    got = client.chat(model=MODEL, messages=messages, tools=[get_weather])
    assert got.message.content == "It is sunny."


def structured_output() -> None:
    got = client.chat(model=MODEL, messages=HELLO, format=SCHEMA)
    assert got.message.content == '{"name": "Ada", "age": 36}'


def models() -> None:
    assert any(each.model.startswith(MODEL) for each in client.list().models)
    assert client.show(MODEL).capabilities


def typed_error() -> None:
    try:
        client.chat(model="nope", messages=HELLO)
    except ollama.ResponseError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("no error")


run(chat, stream, tool_loop, structured_output, models, typed_error)
