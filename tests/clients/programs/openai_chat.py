# /// script
# dependencies = ["openai==3.57.0"]
# ///
"""OpenAI's Python client, chat completions."""

import openai
from harness import KEY, MODEL, PROMPT, URL, get_weather, run
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
HELLO = [{"role": "user", "content": "hello"}]


class Person(BaseModel):
    name: str
    age: int


def tool() -> dict:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "weather", "parameters": parameters}
    return {"type": "function", "function": function}


def chat() -> None:
    got = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert got.choices[0].message.content == "Hello, Ada." and got.usage.total_tokens > 0


def stream() -> None:
    options = {"include_usage": True}
    chunks = [
        *client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options=options
        )
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello, Ada." and chunks[-1].usage.total_tokens > 0


def tool_loop() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[tool()]) as events:
        answer = events.get_final_completion().choices[0].message
    messages.append(answer.to_dict())
    for call in answer.tool_calls:
        result = get_weather(**call.function.parsed_arguments or {"city": "Rome"})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    got = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool()])
    assert got.choices[0].message.content == "It is sunny."


def structured_output() -> None:
    got = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Person)
    assert got.choices[0].message.parsed == Person(name="Ada", age=36)


def typed_error() -> None:
    try:
        client.with_options(max_retries=0).chat.completions.create(
            model=MODEL, messages=HELLO, temperature=9
        )
    except openai.BadRequestError as error:
        assert error.code == "invalid_request" and error.param == "temperature"
    else:
        raise AssertionError("no error")


def cancel() -> None:
    events = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    next(iter(events))
    events.close()


run(chat, stream, tool_loop, structured_output, typed_error, cancel)
