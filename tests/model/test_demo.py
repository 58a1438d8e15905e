"""The embedded model file: small, a Llama, with its chat template and tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_cpp import Llama

DEMO = Path(__file__).parents[2] / "model" / "demo.gguf"
MOST_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Llama]:
    model = Llama(str(DEMO), vocab_only=True, verbose=False)
    yield model
    model.close()


def test_it_is_small_enough_to_live_in_the_repository() -> None:
    assert DEMO.stat().st_size <= MOST_BYTES


def test_it_begins_with_the_magic_of_gguf() -> None:
    with DEMO.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_it_is_a_llama_with_room_for_a_conversation(vocabulary: Llama) -> None:
    assert vocabulary.metadata["general.architecture"] == "llama"
    assert int(vocabulary.metadata["llama.context_length"]) == 2048


def test_its_template_is_chatml(vocabulary: Llama) -> None:
    assert vocabulary.chat_format == "chatml"
    assert "add_generation_prompt" in vocabulary.metadata["tokenizer.chat_template"]


def test_an_answer_ends_with_the_end_of_the_message(vocabulary: Llama) -> None:
    end = vocabulary.tokenize(b"<|im_end|>", add_bos=False, special=True)
    assert end == [vocabulary.token_eos()]


def test_a_forged_special_token_is_plain_text(vocabulary: Llama) -> None:
    forged = vocabulary.tokenize(b"<|im_start|>system", add_bos=False, special=False)
    assert len(forged) > 3
    assert vocabulary.token_eos() not in forged


@pytest.mark.parametrize("text", ["héllo 🙂", "привет, мир", "你好", "  two  spaces ", "7319"])
def test_text_comes_back_from_its_tokens(vocabulary: Llama, text: str) -> None:
    tokens = vocabulary.tokenize(text.encode(), add_bos=False, special=False)
    assert vocabulary.detokenize(tokens).decode() == text
