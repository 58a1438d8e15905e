"""Tool loops and prefill over HTTP with real processes and the real demo model."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from services.contract.answer import Answer
from services.contract.messages import ToolCallDelta
from tests.e2e.stack import GREEDY, Stack, running_stack

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Öslo"]}},
            "required": ["city"],
        },
    },
}
FORCED = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


def read(stack: Stack, prompt: str, session: str, **more: Any) -> tuple[Answer, dict[str, Any]]:
    """Return the answer without its offsets, and the last event."""
    answer, end = Answer(), {}
    with stack.open(prompt, session, **more) as events:
        for event in events:
            assert "error" not in event, event
            if call := event.get("tool_call"):
                answer.add(ToolCallDelta(0, token_ids=(), **call))
            end = event
    return answer, end


def test_session_keeps_a_tool_loop(stack: Stack, session_id: str) -> None:
    answer, end = read(stack, "what is the weather?", session_id, **FORCED)
    (call,) = answer.tool_calls
    assert (end["finish_reason"], end["stored"]) == ("tool_calls", "log")
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Öslo")
    results = [{"tool_call_id": call.id, "content": "sunny"}]
    final = stack.chat("", session_id, tools=[TOOL], tool_results=results, max_tokens=20)
    assert final.end["stored"] == "log"
    first, second = stack.messages(session_id)
    assert (first["model_response"], first["tool_calls"][0]["id"]) == ("", call.id)
    assert (second["user_prompt"], second["tool_results"]) == ("", results)
    exported = stack.http.get(f"/sessions/{session_id}/export").content
    copy = f"{session_id} copy"
    imported = stack.http.post(f"/sessions/{copy}/messages", content=exported)
    assert imported.json() == {"status": "success", "imported": 2}
    assert [each["tool_calls"] for each in stack.messages(copy)] == [first["tool_calls"], []]


def test_call_is_replayed_from_each_of_its_ids(stack: Stack, session_id: str) -> None:
    body = GREEDY | FORCED | {"prompt": "what is the weather?", "session_id": session_id}
    whole = stack.http.post("/chat", json=body)
    address = whole.headers["content-location"]
    ids = [line[4:] for line in whole.text.splitlines() if line.startswith("id: ")][:-1]
    assert calls_in(whole.text)
    for last_id in ids:
        rest = stack.http.get(address, headers={"Last-Event-ID": last_id})
        begin = whole.text.index(f"id: {last_id}\n")
        parts = calls_in(whole.text[: whole.text.index("\n\n", begin)]) + calls_in(rest.text)
        assert "".join(parts) == "".join(calls_in(whole.text))


def calls_in(text: str) -> list[str]:
    """Return the names and arguments of the calls in a stream."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    calls = [event["tool_call"] for event in events if "tool_call" in event]
    return [call.get("name", "") + call["arguments"] for call in calls]


def test_prefix_is_continued_and_stored(stack: Stack, session_id: str) -> None:
    stack.chat("my name is Ada", session_id)
    answer = stack.chat("what is my name?", session_id, prefix="Your name is")
    assert answer.text.startswith(" Ada")
    assert stack.messages(session_id)[-1]["model_response"].startswith("Your name is Ada")


@pytest.mark.parametrize("more", [{"continue_final_message": True}, {}], ids=["flag", "prefix"])
def test_last_message_is_continued(stack: Stack, more: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=str(stack.http.base_url.join("/v1")), api_key="x")
    begun = {"role": "assistant", "content": "Your name is"} | ({} if more else {"prefix": True})
    messages: Any = [
        {"role": "user", "content": "my name is Ada"},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "what is my name?"},
        begun,
    ]
    for echo, start in ((False, " Ada"), (True, "Your name is Ada")):
        got = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, extra_body=more | {"echo": echo}
        )
        assert (got.choices[0].message.content or "").startswith(start)
