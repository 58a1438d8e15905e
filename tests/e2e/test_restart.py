"""Parts of the stack stop, die, freeze and come back while a client chats."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.client.failover import DEFAULT_POLICY
from tests.e2e.stack import Answer, Process, Stack, running_stack
from tests.servers import mongod, running, wait_for

LONG_PROMPT = "count to 50"
PARTS = ("history", "inference", "edge", "nats")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Shared: every test leaves all parts running."""
    with running_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def slow_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Answers take seconds. Shared: every test leaves all parts running."""
    with running_stack(tmp_path_factory.mktemp("slow"), slow=True) as stack:
        yield stack


@contextmanager
def stopped(stack: Stack, part: Process, how: signal.Signals = signal.SIGTERM) -> Iterator[int]:
    """Stop a part and yield its exit code; at the end, start it again as it was."""
    environ = part.environ
    try:
        yield part.stop(how)
    finally:
        part.environ = environ
        part.stop()
        part.start()
        stack.wait_until_ready()


class BackgroundChat:
    """An answer that a thread reads, created once its first token has come."""

    def __init__(self, stack: Stack, prompt: str, session: str) -> None:
        self._has_token = threading.Event()
        self._text = ""
        self._end: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._read, args=(stack, prompt, session))
        self._thread.start()
        assert self._has_token.wait(20)

    def result(self) -> Answer:
        """Wait for the end of the stream and return what came."""
        self._thread.join(30)
        return Answer(self._text, self._end)

    def _read(self, stack: Stack, prompt: str, session: str) -> None:
        with stack.open(prompt, session) as events:
            for event in events:
                self._text, self._end = self._text + event.get("token", ""), event
                if self._text:
                    self._has_token.set()


def test_restart_of_each_part_keeps_the_conversation(stack: Stack, session_id: str) -> None:
    stack.chat("my name is Ada", session_id)
    for name in PARTS:
        part: Process = getattr(stack, name)
        part.stop()
        part.start()
        stack.wait_until_ready()
        assert "Ada" in stack.chat("what is my name?", session_id).text, f"after {name}"
    assert len(stack.messages(session_id)) == 5


def test_kill_of_each_part_keeps_the_conversation(stack: Stack, session_id: str) -> None:
    other = {"prompt": "hello", "session_id": f"{session_id} other"}
    stack.chat("my name is Ada", session_id)
    for name in PARTS:
        part: Process = getattr(stack, name)
        part.stop(signal.SIGKILL)
        part.start()
        stack.wait_until_ready()
        # the edge lists a killed worker until it has been silent for 3 s
        wait_for(lambda: stack.http.post("/chat", json=other).is_success, "a chat")
        assert "Ada" in stack.chat("what is my name?", session_id).text, f"after {name}"


def test_mongodb_outage_loses_no_exchange(tmp_path: Path) -> None:
    database = mongod(tmp_path)
    uri = f"mongodb://127.0.0.1:{database.port}/"
    with running(database), running_stack(tmp_path, uri) as stack:
        wait_for(lambda: stack.status()["database_connected"], "the database")
        stack.chat("one", "s")
        database.stop(signal.SIGKILL)
        wait_for(lambda: not stack.status()["database_connected"], "the loss of the database")
        for prompt in ("two", "three"):
            assert stack.chat(prompt, "s").end["stored"] == "log"
        prompts = ["one", "two", "three"]
        assert [m["user_prompt"] for m in stack.messages("s")] == prompts
        database.start()
        wait_for(lambda: stack.status()["history"]["unarchived"] == 0, "the archive")
        assert stack.status()["database_connected"]
        assert [m["user_prompt"] for m in stack.messages("s")] == prompts


def test_answer_continues_after_its_client_disconnects(slow_stack: Stack, session_id: str) -> None:
    with slow_stack.open(LONG_PROMPT, session_id) as events:
        assert any("token" in event for event in events)
        wait_for(lambda: slow_stack.running() == 1, "the report")
    wait_for(lambda: slow_stack.running() == 0, "the free slot", seconds=10)
    (message,) = slow_stack.messages(session_id)
    assert message["finish_reason"] == "stop"
    assert message["model_response"].rstrip(".").endswith("49, 50")


@pytest.mark.parametrize("name", ["edge", "inference", "history"])
def test_sigterm_of_a_part_during_an_answer_loses_nothing(
    slow_stack: Stack, session_id: str, name: str
) -> None:
    chat = BackgroundChat(slow_stack, LONG_PROMPT, session_id)
    with stopped(slow_stack, getattr(slow_stack, name)) as exit_code:
        assert exit_code == 0
        text, end = chat.result()
    assert end.get("done") and end["stored"] == "log"
    assert text.rstrip(".").endswith("49, 50")


def test_kill_of_the_only_worker_ends_the_answer_in_an_error(
    slow_stack: Stack, session_id: str
) -> None:
    chat = BackgroundChat(slow_stack, LONG_PROMPT, session_id)
    with stopped(slow_stack, slow_stack.inference, signal.SIGKILL):
        text, end = chat.result()
        assert end["code"] == "worker_lost" and end["error"]
        assert text and slow_stack.messages(session_id) == []


def test_chat_without_a_worker_is_a_503_at_once(stack: Stack) -> None:
    with stopped(stack, stack.inference):
        began = time.monotonic()
        response = stack.http.post("/chat", json={"prompt": "hi"})
        assert response.status_code == 503 and response.headers["Retry-After"]
        assert response.json()["error"]["code"] == "no_worker"
        assert time.monotonic() - began < DEFAULT_POLICY.give_up_seconds


def test_broken_model_is_explained_and_the_worker_stays_up(stack: Stack, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path("model/demo.gguf").read_bytes()[:100_000])
    with stopped(stack, stack.inference):
        stack.inference.environ = stack.inference.environ | {"MODEL_PATH": str(broken)}
        stack.inference.start()
        wait_for(lambda: any(w["error"] for w in stack.status()["workers"]), "the report")
        assert stack.status()["model_loaded"] is False
        response = stack.http.post("/chat", json={"prompt": "hi"})
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "model_unavailable" and "broken.gguf" in error["message"]
        assert stack.inference.stop() == 0


def test_frozen_history_process_is_skipped(stack: Stack, session_id: str, tmp_path: Path) -> None:
    stack.chat("my name is Ada", session_id)
    second = Process("services.history", 0, stack.history.environ, tmp_path)
    second.start()
    wait_for(lambda: stack.histories() == 2, "the second history process")
    stack.history.signal(signal.SIGSTOP)
    try:
        for _ in range(6):
            assert stack.chat("what is my name?", session_id).text == "Your name is Ada."
            assert stack.messages(session_id)
    finally:
        stack.history.signal(signal.SIGCONT)
        second.stop()
    assert len(stack.messages(session_id)) == 7
