"""OpenAI's client does not notice that a worker dies in the middle of a tool call."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from tests.faults.worker_pair import running_pair

COUNT: Any = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {
                    "type": "array",
                    "items": {"enum": [11, 22, 33, 44, 55]},
                    "minItems": 30,
                    "maxItems": 30,
                }
            },
            "required": ["numbers"],
            "additionalProperties": False,
        },
    },
}


def call_tool(client: openai.OpenAI, disturb: Callable[[], object]) -> str:
    """Return the arguments of the call as the client joins them; disturb it in the middle."""
    disturbed = False
    with client.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": "count to 50"}],
        tools=[COUNT],
        tool_choice="required",
        temperature=0.9,
        seed=7,
        stream_options={"include_usage": True},
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta" and not disturbed:
                if len(event.arguments) > 20:
                    disturbed = True
                    disturb()
        completion = stream.get_final_completion()
    assert disturbed and completion.usage is not None
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    return call.function.arguments


def test_tool_call_resumes_in_the_middle_of_its_arguments(tmp_path: Path) -> None:
    with running_pair(tmp_path) as pair:
        base = f"{pair.stack.http.base_url}/v1"
        with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as client:
            undisturbed = call_tool(client, lambda: None)
            disturbed = call_tool(client, lambda: pair.answering().stop(signal.SIGKILL))
    assert disturbed == undisturbed
    assert len(json.loads(undisturbed)["numbers"]) == 30
