"""LoRA adapters over HTTP: real processes, and the demo model with two adapters beside it."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.inference.lora import write_lora

QUESTION = "count to 12"
ADAPTERS = (("shout", 1), ("whisper", 5))  # seeds of weights
MODELS = ["demo", "demo:shout", "demo:whisper"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    shutil.copy("model/demo.gguf", folder)
    for name, seed in ADAPTERS:
        write_lora(folder / f"adapters/{name}.gguf", seed)
    with running_stack(folder, MODEL_PATH=str(folder / "demo.gguf")) as stack:
        yield stack


def test_adapters_answer_alike_alone_and_in_one_batch(stack: Stack, session_id: str) -> None:
    # A batch changes logprobs by up to 0.07; the first eight tokens lead by 0.88 and more.
    def answer(session: str, model: str) -> str:
        sampling = {"max_tokens": 8, "repeat_penalty": 1.0}
        return stack.chat(QUESTION, f"{session_id} {session}", model=model, **sampling).text

    alone = {model: answer(model, model) for model in MODELS}
    assert alone["demo"] == answer("again", "demo")
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        texts = pool.map(answer, "abcdef", MODELS * 2)
        assert list(texts) == [alone[model] for model in MODELS * 2]


def test_next_turn_of_an_adapter_reuses_only_its_own_prefix(stack: Stack, session_id: str) -> None:
    usages = [
        stack.chat("hello", session_id, model=model).end["usage"]
        for model in ("demo", "demo:shout", "demo:shout", "demo")
    ]
    first, other, again, back = usages
    system = first["cached_tokens"]  # of the test before, the same for all
    assert other["cached_tokens"] == system < again["cached_tokens"]
    assert again["cached_tokens"] >= other["prompt_tokens"]
    assert back["cached_tokens"] >= first["prompt_tokens"]


def test_unknown_adapter_is_a_404_that_lists_the_models(stack: Stack) -> None:
    response = stack.http.post("/chat", json={"prompt": "hi", "model": "demo:sing"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["message"] == (
        "There is no model 'demo:sing'; available: demo, demo:shout, demo:whisper."
    )


def test_status_lists_adapters_and_messages_name_their_model(stack: Stack, session_id: str) -> None:
    assert stack.status()["model"]["adapters"] == ["shout", "whisper"]
    stack.chat("hello", session_id, model="demo:shout")
    assert [message["model"] for message in stack.messages(session_id)] == ["demo:shout"]
