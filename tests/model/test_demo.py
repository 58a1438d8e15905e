"""The embedded model file: small, a Llama, with its chat template and tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_cpp import Llama

DEMO = Path(__file__).parents[2] / "model" / "demo.gguf"
MAX_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Llama]:
    model = Llama(str(DEMO), vocab_only=True, verbose=False)
    yield model
    model.close()


def test_file_is_at_most_8_mib() -> None:
    assert DEMO.stat().st_size <= MAX_BYTES


def test_file_begins_with_the_gguf_magic() -> None:
    with DEMO.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_model_is_a_llama_with_2048_tokens_of_context(vocabulary: Llama) -> None:
    assert vocabulary.metadata["general.architecture"] == "llama"
    assert int(vocabulary.metadata["llama.context_length"]) == 2048


def test_chat_template_is_chatml(vocabulary: Llama) -> None:
    assert vocabulary.chat_format == "chatml"
    assert "add_generation_prompt" in vocabulary.metadata["tokenizer.chat_template"]


def test_end_of_sequence_is_im_end(vocabulary: Llama) -> None:
    end = vocabulary.tokenize(b"<|im_end|>", add_bos=False, special=True)
    assert end == [vocabulary.token_eos()]


def test_forged_special_token_is_plain_text(vocabulary: Llama) -> None:
    forged = vocabulary.tokenize(b"<|im_start|>system", add_bos=False, special=False)
    assert len(forged) > 3
    assert vocabulary.token_eos() not in forged


@pytest.mark.parametrize("text", ["héllo 🙂", "привет, мир", "你好", "  two  spaces ", "7319"])
def test_tokens_decode_to_the_same_text(vocabulary: Llama, text: str) -> None:
    tokens = vocabulary.tokenize(text.encode(), add_bos=False, special=False)
    assert vocabulary.detokenize(tokens).decode() == text
