"""Feedback and datasets over HTTP: real processes and the demo model."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.stack import Stack, running_stack

CORRECTION = "Your name is Grace."


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("feedback")) as stack:
        yield stack


def test_model_sees_the_correction_of_its_answer(stack: Stack, session_id: str) -> None:
    assert stack.chat("my name is Ada", session_id).text == "Nice to meet you, Ada!"
    (message,) = stack.messages(session_id)
    path = f"/sessions/{session_id}/messages/{message['id']}/feedback"
    said = "what did you say in your last message?"
    plain = stack.chat(said, f"{session_id} plain").text
    assert CORRECTION not in plain
    given = {"rating": "down", "correction": CORRECTION}
    assert stack.http.put(path, json=given).json()["correction"] == CORRECTION
    assert CORRECTION in stack.chat(said, session_id).text
    assert stack.messages(session_id)[0]["feedback"]["rating"] == "down"
    assert stack.http.delete(path).status_code == 200
    assert stack.messages(session_id)[0]["feedback"] is None


def test_datasets_have_corrections_and_retries(stack: Stack, session_id: str) -> None:
    stack.chat("hello", session_id)
    first = stack.messages(session_id)[0]["id"]
    stack.chat("hello", session_id, retry_of=first, temperature=2, seed=3, model="demo")
    second = stack.messages(session_id)[1]["id"]
    path = f"/sessions/{session_id}/messages/{first}/feedback"
    given = {"rating": "up", "correction": CORRECTION, "preferred_to": second}
    assert stack.http.put(path, json=given).status_code == 200
    query = {"session_id": session_id}
    (line,) = _lines(stack, "sft", query)
    assert [message["content"] for message in line["messages"]] == ["hello", CORRECTION]
    sources = {line["source"] for line in _lines(stack, "preferences", query)}
    assert "correction" in sources


def _lines(stack: Stack, kind: str, query: dict[str, str]) -> list[dict[str, Any]]:
    answer = stack.http.get(f"/datasets/{kind}", params=query)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]
