"""/v1 while its worker dies: OpenAI's own client sees nothing of it, in the middle of a call."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from tests.faults.pair import pair

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


def call(client: openai.OpenAI, in_the_middle: Callable[[], object]) -> str:
    """The arguments, as the client puts them together."""
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
                    in_the_middle()
        got = stream.get_final_completion()
    assert disturbed and got.choices[0].finish_reason == "tool_calls" and got.usage is not None
    assert got.choices[0].message.tool_calls is not None
    (made,) = got.choices[0].message.tool_calls
    return made.function.arguments


def test_a_call_goes_on_in_the_middle_of_its_arguments(tmp_path: Path) -> None:
    with pair(tmp_path) as two:
        base = f"{two.stack.http.base_url}/v1"
        with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as client:
            undisturbed = call(client, lambda: None)
            disturbed = call(client, lambda: two.answering().stop(signal.SIGKILL))
    assert disturbed == undisturbed
    assert len(json.loads(undisturbed)["numbers"]) == 30
