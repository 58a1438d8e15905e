# /// script
# dependencies = ["anthropic==2.14.0"]
# ///
"""Anthropic's Python client."""

import anthropic
from harness import KEY, MODEL, PROMPT, URL, get_weather, run

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def message() -> None:
    got = client.messages.create(model=MODEL, max_tokens=50, messages=HELLO)
    assert got.content[0].text == "Hello, Ada." and got.stop_reason == "end_turn"


def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as events:
        assert "".join(events.text_stream) == "Hello, Ada."


def tool_loop() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    first = client.messages.create(model=MODEL, max_tokens=50, messages=messages, tools=[TOOL])
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": get_weather(**call.input),
    }
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    got = client.messages.create(model=MODEL, max_tokens=50, messages=messages, tools=[TOOL])
    assert got.content[0].text == "It is sunny."


def tool_runner() -> None:
    runner = client.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=50,
        messages=[{"role": "user", "content": PROMPT}],
        tools=[anthropic.beta_tool(get_weather)],
    )
    assert runner.until_done().content[0].text == "It is sunny."


def typed_error() -> None:
    try:
        client.messages.create(model=MODEL, max_tokens=50, messages=[])
    except anthropic.BadRequestError:
        return
    raise AssertionError("no error")


run(message, stream, tool_loop, tool_runner, typed_error)
