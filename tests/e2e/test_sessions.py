"""A session's life over HTTP, with real processes, the real demo model and a real MongoDB."""

import json
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest

from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

DATABASE = "e2e_sessions"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, mongodb_uri: str) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder, mongodb_uri, slow=True, MONGODB_DATABASE=DATABASE) as stack:
        yield stack


def listed(stack: Stack) -> dict[str, dict[str, Any]]:
    sessions = stack.http.get("/sessions", params={"limit": 1000}).json()["sessions"]
    return {session["id"]: session for session in sessions}


def archived(mongodb_uri: str, session: str) -> int:
    with pymongo.MongoClient[dict[str, Any]](mongodb_uri) as client:
        return client[DATABASE]["exchanges"].count_documents({"session_id": session})


def test_session_is_listed_described_and_retried(stack: Stack, session_id: str) -> None:
    stack.chat("my name is Ada", session_id)
    stack.chat("hello", f"{session_id} other")
    last = stack.chat("what is my name?", session_id).end
    assert list(listed(stack))[:2] == [session_id, f"{session_id} other"], "last active first"
    session = listed(stack)[session_id]
    assert (session["title"], session["exchanges"]) == ("my name is Ada", 2)

    path = f"/sessions/{session_id}"
    changes = {"title": "Names", "system_prompt": "Be brief."}
    described = stack.http.patch(path, json=changes)
    assert described.json()["title"] == listed(stack)[session_id]["title"] == "Names"

    retry = stack.chat("what is my name?", session_id, retry_of=last["request_id"])
    assert "Ada" in retry.text and retry.end["stored"] == "log"
    page = stack.http.get(f"{path}/messages", params={"limit": 2}).json()
    assert [message["retried"] for message in page["messages"]] == [False, True]
    page = stack.http.get(f"{path}/messages", params={"before": page["next"]}).json()
    assert [m["user_prompt"] for m in page["messages"]] == ["my name is Ada"]
    assert page["next"] is None


def test_copy_outlives_the_erased_session(stack: Stack, mongodb_uri: str, session_id: str) -> None:
    path, copy = f"/sessions/{session_id}", f"{session_id} copy"
    stack.chat("my name is Ada", session_id)
    last = stack.chat("what is my name?", session_id).end
    stack.chat("what is my name?", session_id, retry_of=last["request_id"])
    exported = stack.http.get(f"{path}/export").content
    first = json.loads(exported.splitlines()[0])
    assert first["prompt"] == "my name is Ada" and first["model"]["digest"]
    imported = stack.http.post(f"/sessions/{copy}/messages", content=exported)
    assert imported.json()["imported"] == 3
    assert "Ada" in stack.chat("what is my name?", copy).text

    wait_for(lambda: archived(mongodb_uri, session_id) == 3, "the archive")
    assert stack.http.delete(path).status_code == 200
    assert session_id not in listed(stack) and copy in listed(stack)
    assert stack.messages(session_id) == [] and archived(mongodb_uri, session_id) == 0
    assert "Ada" not in stack.chat("what is my name?", session_id).text


def test_large_session_round_trips_and_is_imported_only_once(stack: Stack, session_id: str) -> None:
    lines = [
        json.dumps({"prompt": f"question {n}", "response": f"{n} " + "é" * 10_000})
        for n in range(150)
    ]
    for _ in range(2):  # repeated, as after a failure
        imported = stack.http.post(f"/sessions/{session_id}/messages", content="\n".join(lines))
        assert imported.json() == {"status": "success", "imported": 150}
    exported = stack.http.get(f"/sessions/{session_id}/export").content
    copy = f"{session_id} copy"
    assert stack.http.post(f"/sessions/{copy}/messages", content=exported).json()["imported"] == 150
    again = stack.http.get(f"/sessions/{copy}/export").content
    assert len(exported) > 3_000_000
    for content in (exported, again):
        prompts = [json.loads(line)["prompt"] for line in content.splitlines()]
        assert prompts == [f"question {n}" for n in range(150)]


def test_answer_of_an_erased_session_is_404_at_once(stack: Stack, session_id: str) -> None:
    address = f"/chat/{stack.chat('count to 5', session_id).end['request_id']}"
    assert stack.http.get(address).status_code == 200
    assert stack.http.delete(f"/sessions/{session_id}").status_code == 200
    assert stack.http.get(address).status_code == 404


def test_answer_of_a_session_erased_meanwhile_is_not_stored(
    stack: Stack, mongodb_uri: str, session_id: str
) -> None:
    erased = False
    with stack.open("count to 50", session_id) as events:
        for event in events:
            if not erased and event.get("token"):
                assert stack.http.delete(f"/sessions/{session_id}").status_code == 200
                erased = True
    assert event["done"] and event["stored"] == "none"
    assert stack.http.get(f"/chat/{event['request_id']}").status_code == 404
    assert stack.messages(session_id) == [] and session_id not in listed(stack)
    stack.chat("hello", f"{session_id} later")
    wait_for(lambda: archived(mongodb_uri, f"{session_id} later") == 1, "a later exchange")
    assert archived(mongodb_uri, session_id) == 0
