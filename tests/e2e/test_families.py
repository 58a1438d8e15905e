"""The demo model with the chat templates of other families, driven by OpenAI's client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.stack import running_stack
from tests.e2e.test_openai import WEATHER

TEMPLATES = Path(".data/llama.cpp/models/templates").resolve()
MARKUP = ("<tool_call", "<function", "<parameter", "<think", "</think", "<|im_")


@pytest.fixture(scope="module", params=["Qwen3-Coder", "Qwen3.5-4B"])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """A client of a stack that serves the demo model with a template of llama.cpp."""
    template = str(TEMPLATES / f"{request.param}.jinja")
    folder = tmp_path_factory.mktemp("family")
    with (
        running_stack(folder, MODEL_CHAT_TEMPLATE=template) as stack,
        openai.OpenAI(base_url=f"{stack.http.base_url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_forced_call_and_its_result_round_trip(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather in Rome?"}]
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "tools": [WEATHER]}
    options["extra_body"] = {"enable_thinking": False}
    forced = options | {"messages": messages, "tool_choice": "required"}
    message = _complete(client, forced, stream)
    [call] = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments["place"] in ("Paris", "Rome") and isinstance(arguments["days"], int)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages += [message.model_dump(exclude_none=True), result]
    settled = options | {"messages": messages, "tool_choice": "none", "max_tokens": 20}
    answer = _complete(client, settled, stream)
    assert answer.content and not answer.tool_calls
    assert not any(mark in answer.content for mark in MARKUP)


@pytest.mark.parametrize("client", ["Qwen3.5-4B"], indirect=True)
def test_spent_reasoning_budget_closes_the_thought(client: openai.OpenAI) -> None:
    extra = {"enable_thinking": True, "reasoning_budget_tokens": 5}
    got: Any = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "tell me a story"}],
        temperature=0,
        max_tokens=60,
        extra_body=extra,
    )
    message = got.choices[0].message
    assert message.reasoning_content and message.content
    assert got.usage.completion_tokens_details.reasoning_tokens >= 5
    assert not any(mark in message.reasoning_content + message.content for mark in MARKUP)


def _complete(client: openai.OpenAI, options: dict[str, Any], stream: bool) -> Any:
    if not stream:
        return client.chat.completions.create(**options).choices[0].message
    with client.chat.completions.stream(**options) as events:
        events.until_done()
        return events.current_completion_snapshot.choices[0].message  # also of max_tokens
