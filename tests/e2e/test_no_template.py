"""A model without a chat template, over HTTP: completions work, chats are rejected."""

from collections.abc import Iterator

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.inference.gguf_files import without_template

WHY = "base.gguf has no chat template, so it can't chat: set MODEL_CHAT_TEMPLATE to a file"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder, MODEL_PATH=str(without_template(folder / "base.gguf"))) as stack:
        yield stack


def test_status_says_that_the_ready_model_cannot_chat(stack: Stack) -> None:
    (worker,) = stack.status()["workers"]
    assert worker["state"] == "ready" and WHY in worker["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_chat_without_template_names_the_setting(
    stack: Stack, path: str, body: dict[str, object]
) -> None:
    answer = stack.http.post(path, json={"model": "base"} | body)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"
    assert WHY in answer.json()["error"]["message"]


def test_completions_and_tokenize_work_without_template(stack: Stack) -> None:
    body = {"model": "base", "prompt": "Once upon a time", "max_tokens": 4}
    answer = stack.http.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
    tokens = stack.http.post("/v1/tokenize", json={"content": "Once upon a time"}).json()["tokens"]
    text = stack.http.post("/v1/detokenize", json={"tokens": tokens}).json()["content"]
    assert text == "Once upon a time"
