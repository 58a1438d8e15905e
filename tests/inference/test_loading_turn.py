"""The turns of workers that load at the same time."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.inference.engine.llama_model import ModelError
from services.inference.loading_turn import loading_turn
from services.inference.models import load_chat_model
from services.inference.settings import InferenceSettings
from tests.inference.gguf_files import DEMO

HOLD = """
from services.inference.loading_turn import loading_turn
with loading_turn(lambda: True):
    print("mine", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the turn until it is killed or gets a line."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_turn_is_waited_for_until_the_other_process_dies(other: subprocess.Popen[str]) -> None:
    asked = []

    def may_wait() -> bool:
        asked.append(True)
        if len(asked) == 3:
            other.kill()
        return True

    with loading_turn(may_wait):
        assert len(asked) >= 3


def test_waiting_for_the_turn_ends_when_the_worker_is_stopped(
    other: subprocess.Popen[str],
) -> None:
    settings = InferenceSettings(model_path=str(DEMO))
    with pytest.raises(ModelError, match="was stopped before it had loaded"):
        load_chat_model(settings, on_progress=lambda _: False)
    assert other.poll() is None


def test_turn_ends_when_the_model_is_loaded() -> None:
    settings = InferenceSettings(model_path=str(DEMO))
    models = [load_chat_model(settings, on_progress=lambda _: True) for _ in range(2)]
    for model in models:
        model.backend.close()
