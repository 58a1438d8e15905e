"""The terminal chat on real services, as the user `client` of NATS with its permissions."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.terminal.screen import CTRL_C, CTRL_D, ENTER, on_terminal

CHAT = ("-m", "services.terminal")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), slow=True) as stack:
        yield stack


def test_session_from_the_first_word_to_its_export(stack: Stack, tmp_path: Path) -> None:
    """By a program that types; temperature and seed are the server's, so answers may vary."""
    path = tmp_path / "chat.jsonl"
    lines = [
        "my name is Ada",
        "/retry",
        "what is my name?",
        "/good",
        "/bad too short",
        "/correct Ada!",
        "/model demo:pirate",
        "what is my name?",
        "/system Your name is Bob.",
        "/new",
        "hello",
        "/sessions",
        "/sessions mine",
        f"/export {path}",
    ]
    ended = subprocess.run(
        [sys.executable, *CHAT, "--session", "mine"],
        input="\n".join(lines),
        env=os.environ | stack.user("client"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    answers = ended.stdout.splitlines()
    assert len(answers) == 5 and "Ada" in answers[2] and "arr" in answers[3]
    exported = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["response"] for each in exported] == answers[:4]
    assert exported[1]["retry_of"] == exported[0]["request_id"]
    feedback = exported[2]["feedback"]
    assert (feedback["rating"], feedback["reason"]) == ("down", "too short")
    assert feedback["correction"] == "Ada!" and ended.stderr.count("feedback is stored") == 3
    assert exported[3]["model"]["name"] == "demo:pirate"
    assert "mine  my name is Ada" in ended.stderr and "> what is my name?" in ended.stderr
    listed = {each["id"]: each for each in stack.http.get("/sessions").json()["sessions"]}
    assert listed["mine"]["system_prompt"] == "Your name is Bob."
    assert [each["retried"] for each in stack.messages("mine")] == [True, False, False, False]


def test_stopped_answer_is_stored_and_can_be_retried(stack: Stack, tmp_path: Path) -> None:
    environ = stack.user("client")
    with on_terminal([*CHAT, "--session", "stopped"], environ, tmp_path) as screen:
        screen.wait_for("\n>")
        screen.type(f"count to 50{ENTER}")
        screen.wait_for("1, 2, 3")
        screen.type(CTRL_C)
        screen.wait_for("[stopped]\n>")
        (message,) = stack.messages("stopped")
        assert message["finish_reason"] == "cancelled"
        assert message["model_response"] in screen.text.replace("\n", " ")
        screen.type(f"/retry{ENTER}")
        screen.wait_for("50.\n>")
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0
    assert [each["retried"] for each in stack.messages("stopped")] == [True, False]
