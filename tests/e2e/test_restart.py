"""Parts that die, come back, or leave, while people talk."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from services.client.reader import PATIENCE
from tests.e2e.stack import Answer, Process, Stack, stack
from tests.servers import mongod, running, wait_for

LONG = "count to 50"
OTHER = {"prompt": "hello", "session_id": "other"}


class Asking:
    """An answer that is being read in a thread; `begun` once its first token is there."""

    def __init__(self, up: Stack, prompt: str, session: str) -> None:
        self.begun = threading.Event()
        self._text = ""
        self._end: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._read, args=(up, prompt, session))
        self._thread.start()
        assert self.begun.wait(20)

    def answer(self) -> Answer:
        self._thread.join(30)
        return Answer(self._text, self._end)

    def _read(self, up: Stack, prompt: str, session: str) -> None:
        with up.open(prompt, session) as events:
            for event in events:
                self._text, self._end = self._text + event.get("token", ""), event
                if self._text:
                    self.begun.set()


def test_the_conversation_survives_a_restart_of_every_part(tmp_path: Path) -> None:
    with stack(tmp_path) as up:
        up.chat("my name is Ada", "s")
        for part in (up.history, up.inference, up.edge, up.nats):
            part.stop()
            part.start()
            up.wait_until_ready()
            assert "Ada" in up.chat("what is my name?", "s").text, f"after {part.name}"
        assert len(up.messages("s")) == 5


def test_the_conversation_survives_the_death_of_every_part(tmp_path: Path) -> None:
    with stack(tmp_path) as up:
        up.chat("my name is Ada", "s")
        for part in (up.history, up.inference, up.edge, up.nats):
            part.stop(signal.SIGKILL)
            part.start()
            up.wait_until_ready()
            # the edge believes in a killed worker until it has been silent for 3 s
            wait_for(lambda: up.http.post("/chat", json=OTHER).is_success, "a chat")
            assert "Ada" in up.chat("what is my name?", "s").text, f"after {part.name}"


def test_mongo_down_and_back_loses_nothing(tmp_path: Path) -> None:
    database = mongod(tmp_path)
    uri = f"mongodb://127.0.0.1:{database.port}/"
    with running(database), stack(tmp_path, uri) as up:
        wait_for(lambda: up.status()["database_connected"], "the database")
        up.chat("one", "s")
        database.stop(signal.SIGKILL)
        wait_for(lambda: not up.status()["database_connected"], "the loss of the database")
        for prompt in ("two", "three"):
            assert up.chat(prompt, "s").end["stored"] == "log"
        prompts = ["one", "two", "three"]
        assert [m["user_prompt"] for m in up.messages("s")] == prompts
        database.start()
        wait_for(lambda: up.status()["history"]["unarchived"] == 0, "the archive")
        assert up.status()["database_connected"]
        assert [m["user_prompt"] for m in up.messages("s")] == prompts


def test_an_answer_goes_on_for_a_client_that_lost_its_connection(tmp_path: Path) -> None:
    with stack(tmp_path, slow=True) as up:
        with up.open(LONG, "s") as events:
            assert any("token" in event for event in events)
            wait_for(lambda: up.running() == 1, "the report")
        wait_for(lambda: up.running() == 0, "the slot", seconds=10)
        (message,) = up.messages("s")
        assert message["finish_reason"] == "stop"
        assert message["model_response"].rstrip(".").endswith("49, 50")


@pytest.mark.parametrize("name", ["edge", "inference", "history"])
def test_a_signal_in_the_middle_of_an_answer_loses_no_reply(tmp_path: Path, name: str) -> None:
    with stack(tmp_path, slow=True) as up:
        asking = Asking(up, LONG, "s")
        assert getattr(up, name).stop(signal.SIGTERM) == 0
        text, end = asking.answer()
        assert end.get("done") and end["stored"] == "log"
        assert text.rstrip(".").endswith("49, 50")


def test_an_answer_whose_worker_dies_ends_in_an_error_and_never_in_done(tmp_path: Path) -> None:
    with stack(tmp_path, slow=True) as up:
        asking = Asking(up, LONG, "s")
        up.inference.stop(signal.SIGKILL)
        text, end = asking.answer()
        assert end["code"] == "worker_lost" and end["error"]
        assert text and up.messages("s") == []


def test_without_a_worker_a_chat_is_refused_at_once_with_503(tmp_path: Path) -> None:
    with stack(tmp_path) as up:
        up.inference.stop()
        began = time.monotonic()
        response = up.http.post("/chat", json={"prompt": "hi"})
        assert response.status_code == 503 and response.headers["Retry-After"]
        assert response.json()["error"]["code"] == "no_worker"
        assert time.monotonic() - began < PATIENCE


def test_a_model_that_can_not_be_loaded_is_explained_and_the_service_stays_up(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path("model/demo.gguf").read_bytes()[:100_000])
    with stack(tmp_path) as up:
        up.inference.stop()
        up.inference.environ["MODEL_PATH"] = str(broken)
        up.inference.start()
        wait_for(lambda: any(w["error"] for w in up.status()["workers"]), "the report")
        assert up.status()["model_loaded"] is False
        response = up.http.post("/chat", json={"prompt": "hi"})
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "model_unavailable" and "broken.gguf" in error["message"]
        assert up.inference.stop() == 0


def test_a_history_process_that_is_frozen_is_passed_over(tmp_path: Path) -> None:
    with stack(tmp_path) as up:
        up.chat("my name is Ada", "s")
        second = Process("services.history", 0, up.history.environ, tmp_path)
        second.start()
        wait_for(lambda: up.histories() == 2, "the second history process")
        up.history.signal(signal.SIGSTOP)
        try:
            for _ in range(6):
                assert up.chat("what is my name?", "s").text == "Your name is Ada."
                assert up.messages("s")
        finally:
            up.history.signal(signal.SIGCONT)
            second.stop()
        assert len(up.messages("s")) == 7
