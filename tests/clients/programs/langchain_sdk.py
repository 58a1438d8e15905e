# /// script
# dependencies = ["langchain-openai==1.7.4", "langgraph==1.2.24"]
# ///
"""LangChain's ChatOpenAI, and a LangGraph agent."""

from harness import KEY, MODEL, PROMPT, URL, get_weather, run
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from pydantic import BaseModel

model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY)


class Person(BaseModel):
    name: str
    age: int


def chat() -> None:
    got = model.invoke("hello")
    assert got.content == "Hello, Ada." and got.usage_metadata["total_tokens"] > 0


def stream() -> None:
    assert "".join(chunk.content for chunk in model.stream("hello")) == "Hello, Ada."


def tool_loop() -> None:
    agent = create_react_agent(model, [tool(get_weather)])
    got = agent.invoke({"messages": [("user", PROMPT)]})
    assert got["messages"][-1].content == "It is sunny."


def structured_output() -> None:
    assert model.with_structured_output(Person).invoke("hello") == Person(name="Ada", age=36)


def responses() -> None:
    by_responses = ChatOpenAI(
        model=MODEL, base_url=f"{URL}/v1", api_key=KEY, use_responses_api=True
    )
    assert by_responses.invoke("hello").text == "Hello, Ada."


run(chat, stream, tool_loop, structured_output, responses)
