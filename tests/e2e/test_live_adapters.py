"""Adapters that change while real processes serve: /v1/models, running answers, and crashes."""

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.inference.lora import write_lora
from tests.servers import wait_for

QUESTION = "count to 12"
SEEN_WITHIN = 10.0  # seconds; it takes about one, and much longer beside other tests
LONG: dict[str, Any] = {  # seconds, whatever the random adapters generate
    "max_tokens": 220,
    "ignore_eos": True,
    "repeat_penalty": 1.3,
    "stop": [],
    "seed": 1,  # without drafts and cached prefixes, whose rounding decides near ties
}
COUNTED = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."


class Adapters:
    """The folder of adapters beside the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, seed: int) -> None:
        """Write an adapter elsewhere, and move it into its place."""
        path = write_lora(self.folder.parent / "new.gguf", seed)
        path.replace(self.folder / f"{name}.gguf")

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.gguf").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[Stack]:
    shutil.copy("model/demo.gguf", folder)
    (folder / "adapters").mkdir()
    with running_stack(folder, slow=True, MODEL_PATH=str(folder / "demo.gguf")) as stack:
        yield stack


@pytest.fixture
def adapters(folder: Path, stack: Stack) -> Iterator[Adapters]:
    yield Adapters(folder / "adapters")
    for file in (folder / "adapters").iterdir():
        file.unlink()
    wait_for(lambda: names(stack) == ["demo"], "the end of all adapters")


def batched(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def names(stack: Stack) -> list[str]:
    return [model["id"] for model in stack.http.get("/v1/models").json()["data"]]


def wait_for_names(stack: Stack, *expected: str) -> None:
    """Wait for the names of models."""
    wait_for(lambda: names(stack) == list(expected), f"the models {expected}", SEEN_WITHIN)


def answer(stack: Stack, session: str, model: str) -> str:
    return stack.chat(QUESTION, session, model=model, max_tokens=40).text


def test_adapter_is_listed_and_answers_without_a_restart(
    stack: Stack, adapters: Adapters, session_id: str
) -> None:
    process = stack.inference.pid
    adapters.put("shout", 1)
    wait_for_names(stack, "demo", "demo:shout")
    shout = answer(stack, f"{session_id}1", "demo:shout")
    assert shout != answer(stack, f"{session_id}2", "demo") == COUNTED
    assert answer(stack, f"{session_id}3", "demo:shout@0") == COUNTED
    assert answer(stack, f"{session_id}4", "demo:shout@0.8") not in (shout, COUNTED)
    adapters.remove("shout")
    wait_for_names(stack, "demo")
    response = stack.http.post("/chat", json={"prompt": "hi", "model": "demo:shout"})
    assert response.status_code == 404
    assert response.json()["error"]["message"].endswith("available: demo.")
    assert stack.inference.pid == process


def test_running_answer_finishes_on_the_adapter_it_began_with(
    stack: Stack, adapters: Adapters, session_id: str
) -> None:
    adapters.put("shout", 1)
    wait_for_names(stack, "demo", "demo:shout")
    alone = stack.chat(QUESTION, f"{session_id}1", model="demo:shout", **LONG).text
    longer = LONG | {"max_tokens": 1500}  # it must not end before the new version is there
    with stack.open(QUESTION, f"{session_id}2", model="demo:shout", **longer) as events:
        text = next(events)["token"]
        replace(stack, adapters, 3)
        assert stack.next_report().running == 1
        while len(text) < len(alone):
            text += next(events)["token"]
    assert text.startswith(alone)
    assert stack.chat(QUESTION, f"{session_id}3", model="demo:shout", **LONG).text != alone
    replace(stack, adapters, 1)
    assert stack.chat(QUESTION, f"{session_id}4", model="demo:shout", **LONG).text == alone


def test_slow_copy_and_nonsense_disturb_nothing(
    stack: Stack, adapters: Adapters, session_id: str
) -> None:
    content = write_lora(adapters.folder.parent / "new.gguf", 1).read_bytes()
    (adapters.folder / "other.gguf").write_bytes(Path("model/demo.gguf").read_bytes())
    write_lora(adapters.folder / "narrow.gguf", 1, width=128)
    *parts, last = batched(content, len(content) // 8 + 1)
    with (adapters.folder / "slow.gguf").open("wb", buffering=0) as file:
        for number, part in enumerate(parts):
            file.write(part)
            assert answer(stack, f"{session_id}{number}", "demo") == COUNTED
            assert "demo:slow" not in names(stack)
        file.write(last)
    wait_for_names(stack, "demo", "demo:slow")
    faults = " ".join(stack.status()["workers"][0]["adapter_faults"])
    assert "other.gguf is not an adapter" in faults and "narrow.gguf is not an adapter" in faults
    assert "slow.gguf" not in faults


def test_worker_that_is_killed_while_adapters_change_returns(
    stack: Stack, adapters: Adapters, session_id: str
) -> None:
    adapters.put("good", 2)
    stop = threading.Event()

    def change() -> None:
        seed = 0
        while not stop.wait(0.05):
            seed += 1
            adapters.put("shout", seed)
            (adapters.folder / "bad.gguf").write_text("nonsense" * seed)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        wait_for(lambda: "demo:good" in names(stack), "the adapter", 10)
        for kill in range(3):
            with stack.open(QUESTION, f"{session_id}{kill}", model="demo:good") as events:
                text = next(events)["token"]
                stack.inference.stop(signal.SIGKILL)
                stack.inference.start()
                text += "".join(event.get("token", "") for event in events)
            assert text == answer(stack, f"{session_id}{kill}alone", "demo:good")[: len(text)]
    finally:
        stop.set()
        thread.join()
    wait_for(lambda: "demo:shout" in names(stack), "the adapter that changed", 10)
    assert answer(stack, f"{session_id}last", "demo") == COUNTED


def replace(stack: Stack, adapters: Adapters, seed: int) -> None:
    """Replace the adapter `shout`, and wait until the new version is loaded."""
    before = _versions(stack)
    adapters.put("shout", seed)
    wait_for(lambda: _versions(stack) > before, "the new version", SEEN_WITHIN)


def _versions(stack: Stack) -> int:
    return stack.inference.log.read_text().count("adapter loaded name=shout")
