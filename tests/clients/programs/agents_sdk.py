# /// script
# dependencies = ["openai-agents==0.24.0"]
# ///
"""OpenAI's Agents SDK, whose default is the Responses API."""

from agents import Agent, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from harness import KEY, MODEL, PROMPT, URL, get_weather, run
from openai import AsyncOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def client() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)


set_tracing_disabled(True)


async def responses() -> None:
    set_default_openai_client(client())
    got = await Runner.run(Agent(name="a", model=MODEL), "hello")
    assert got.final_output == "Hello, Ada."


async def responses_with_tools() -> None:
    set_default_openai_client(client())
    agent = Agent(name="a", model=MODEL, tools=[function_tool(get_weather)])
    assert (await Runner.run(agent, PROMPT)).final_output == "It is sunny."


async def responses_streamed() -> None:
    set_default_openai_client(client())
    got = Runner.run_streamed(Agent(name="a", model=MODEL), "hello")
    assert [event async for event in got.stream_events()]
    assert got.final_output == "Hello, Ada."


async def chat_completions_with_tools() -> None:
    model = OpenAIChatCompletionsModel(MODEL, client())
    agent = Agent(name="a", model=model, tools=[function_tool(get_weather)])
    assert (await Runner.run(agent, PROMPT)).final_output == "It is sunny."


async def structured_output() -> None:
    set_default_openai_client(client())
    got = await Runner.run(Agent(name="a", model=MODEL, output_type=Person), "hello")
    assert got.final_output == Person(name="Ada", age=36)


run(
    responses,
    responses_with_tools,
    responses_streamed,
    chat_completions_with_tools,
    structured_output,
)
