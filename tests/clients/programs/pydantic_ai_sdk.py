# /// script
# dependencies = ["pydantic-ai-slim[openai]==2.68.0"]
# ///
"""Pydantic AI, by chat completions and by responses."""

from harness import KEY, MODEL, PROMPT, URL, get_weather, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
chat_model = OpenAIChatModel(MODEL, provider=provider)


class Person(BaseModel):
    name: str
    age: int


def chat() -> None:
    got = Agent(chat_model).run_sync("hello")
    assert got.output == "Hello, Ada."


async def stream() -> None:
    async with Agent(chat_model).run_stream("hello") as got:
        assert await got.get_output() == "Hello, Ada."


def tool_loop() -> None:
    got = Agent(chat_model, tools=[get_weather]).run_sync(PROMPT)
    assert got.output == "It is sunny."


def structured_output() -> None:
    got = Agent(chat_model, output_type=NativeOutput(Person)).run_sync("hello")
    assert got.output == Person(name="Ada", age=36)


def responses() -> None:
    model = OpenAIResponsesModel(MODEL, provider=provider)
    got = Agent(model, tools=[get_weather]).run_sync(PROMPT)
    assert got.output == "It is sunny."


run(chat, stream, tool_loop, structured_output, responses)
