"""A model from a stranger whose chat template loops once a prompt has a certain word."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest

from tests.e2e.stack import Stack, running_stack
from tests.inference.gguf_files import DEMO, changed_demo
from tests.servers import wait_for

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TRIGGER = "xyzzy"


def triggered_model(path: Path) -> Path:
    template = gguf.GGUFReader(DEMO).fields["tokenizer.chat_template"].contents()
    hidden = f"{{% if '{TRIGGER}' in messages | string %}}{LOOP}{{% endif %}}{template}"
    return changed_demo(path, tokenizer__chat_template=hidden)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    model = triggered_model(folder / "mine.gguf")
    with running_stack(folder, MODEL_PATH=str(model)) as stack:
        yield stack


def test_triggered_loop_fails_its_request_while_others_answer(stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": TRIGGER}], "max_tokens": 1}
    hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}

    def ask(body: dict[str, object]) -> tuple[int, str]:
        answer = stack.http.post("/v1/chat/completions", json={"model": "mine"} | body)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(2) as pool:
        looping = pool.submit(ask, body)
        other, _ = ask(hello)
        assert other == 200 and not looping.done()
        status, text = looping.result()
    assert status == 503 and "chat template was stopped: it runs for more than 2 seconds" in text
    log = stack.inference.log.read_text()
    assert "Traceback" not in log and "chat template was stopped" in log


def test_timeout_holds_while_a_template_renders(stack: Stack) -> None:
    answer = stack.http.post("/chat", json={"prompt": TRIGGER, "timeout_s": 1})
    assert "timeout" in answer.text and "chat template" not in answer.text


def test_worker_ends_while_a_template_renders(stack: Stack) -> None:
    def is_preparing() -> bool:
        (worker,) = stack.status()["workers"]
        return bool(worker["running"] + worker["waiting"])

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stack.http.post, "/chat", json={"prompt": TRIGGER})
        wait_for(is_preparing, "the request")
        began = time.monotonic()
        assert stack.inference.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 20  # a drain that waits for the template takes longer
        assert "chat template was stopped" in asked.result().text
    assert "Traceback" not in stack.inference.log.read_text()
