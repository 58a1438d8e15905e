# /// script
# dependencies = ["openai==3.57.0"]
# ///
"""OpenAI's Python client, responses."""

from harness import KEY, MODEL, PROMPT, URL, get_weather, run
from openai import NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class Person(BaseModel):
    name: str
    age: int


def create() -> None:
    got = client.responses.create(model=MODEL, input="hello")
    assert got.output_text == "Hello, Ada." and got.status == "completed"
    assert got.usage.total_tokens > 0


def stream() -> None:
    with client.responses.stream(model=MODEL, input="hello") as events:
        types = [event.type for event in events]
        final = events.get_final_response()
    assert types[0] == "response.created" and types[-1] == "response.completed"
    assert final.output_text == "Hello, Ada."


def tool_loop() -> None:
    items = [{"role": "user", "content": PROMPT}]
    first = client.responses.create(model=MODEL, input=items, tools=[TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    items += [call.to_dict()]
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": get_weather("Rome")}
    ]
    got = client.responses.create(model=MODEL, input=items, tools=[TOOL])
    assert got.output_text == "It is sunny."


def structured_output() -> None:
    got = client.responses.parse(model=MODEL, input="hello", text_format=Person)
    assert got.output_parsed == Person(name="Ada", age=36)


def typed_error() -> None:
    try:
        client.responses.retrieve("resp_01a221e6-e800-7f54-a17e-ca3df9ee3113")
    except NotFoundError:
        return
    raise AssertionError("no error")


run(create, stream, tool_loop, structured_output, typed_error)
