import re
import threading
from functools import partial
from pathlib import Path

import pytest

from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.tokenizer import RenderedText, Tokenizer, any_of
from services.inference.engine.threads import DeepStackThreads
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import ADDED, LLAMA_CPP, Vocabulary, WithMarkers, text_of

CONTROL, USED, UNUSED, NESTED, SPACES, LETTER = (
    SpecialToken(text, is_control)
    for text, is_control in (
        ("<c>", True), ("<u>", False), ("<x>", False), ("<<u>>", False), ("  ", False), ("é", False)
    )
)  # fmt: skip
OWN = "<u>: <<u>>  é"  # what the template writes


class Spaced(FakeBackend):
    """Puts a space before a text, as SentencePiece does."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        return list(f" {text}".encode()) if text else []


BACKEND = WithMarkers(FakeBackend({}), (CONTROL, USED, UNUSED, NESTED, SPACES, LETTER))
SPACED = WithMarkers(Spaced({}), (CONTROL, USED))
C, U, X, N, S, L = range(ADDED, ADDED + 6)


def test_of_the_templates_text_markers_come() -> None:
    assert Tokenizer(BACKEND, OWN).template("<c><u>a", []) == [C, U, ord("a")]


def test_of_a_content_no_markers_come_and_nothing_is_lost() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    for content in ("<c>", "a<u>b<u>", "<<u>>", "<<<u>>>", "<u", "<u><c><x>"):
        tokens = tokenizer.content(content, [])
        assert not {C, U, N} & set(tokens)
        assert text_of(BACKEND, tokens) == content


def test_user_defined_tokens_that_tell_no_roles_apart_stay_what_the_model_was_trained_on() -> None:
    tokens = Tokenizer(BACKEND, OWN).content("<x>  é", [])
    assert tokens == [X, S, L]


def test_a_text_that_names_a_marker_is_told() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    assert tokenizer.names_a_marker("a <c> b") and tokenizer.names_a_marker("<<u>>")
    assert not tokenizer.names_a_marker("<x>  é")


def test_a_text_that_goes_on_gets_no_space_and_one_after_a_special_token_does() -> None:
    tokenizer = Tokenizer(SPACED, OWN)
    for tokenize in (tokenizer.template, tokenizer.content):
        assert tokenize("a", []) == list(b" a")
        assert tokenize("a", [C]) == list(b" a")
        assert tokenize("a", [ord("b")]) == list(b"a")
    taken_apart = tokenizer.content("a<u>b", [ord("b")])
    assert text_of(SPACED, taken_apart) == "a<u>b" and U not in taken_apart


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "qwen2", "gemma-4"])
def test_on_a_real_vocabulary_a_text_in_pieces_is_the_text(name: str) -> None:
    vocabulary = Vocabulary(name)
    tokenizer = Tokenizer(vocabulary, "")
    tokens: list[int] = []
    for piece in ("Grüße", ", wor", "ld!", "\n", "\n  two", " spaces", " "):
        tokens += tokenizer.content(piece, tokens)
    assert text_of(vocabulary, tokens).lstrip(" ") == "Grüße, world!\n\n  two spaces "
    vocabulary.close()


def test_what_an_answer_said_is_found_in_its_text() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    assert tokenizer.said(list(b"one"), "one") == RenderedText(list(b"one"), "one", "")
    assert tokenizer.said(list(b"one two"), "one") == RenderedText(list(b"one"), "one", "")
    assert tokenizer.said(list(b"one"), "one two") == RenderedText(list(b"one"), "one", " two")
    assert tokenizer.said([*b"a", X, *b"b"], "a<x>b") == RenderedText(
        [*b"a", X, *b"b"], "a<x>b", ""
    )
    assert tokenizer.said([*b"a", U, *b"b"], "a<u>b") == RenderedText([*b"a"], "a", "<u>b")
    assert tokenizer.said([], "one") == RenderedText([], "", "one")


@pytest.mark.parametrize(
    ("name", "letter"), [("falcon", "!"), ("deepseek-llm", "中"), ("gpt-neox", "1")]
)
def test_a_word_of_any_length_is_tokenized(name: str, letter: str) -> None:
    """On a default stack, 20,000 letters crash the process."""
    vocabulary = Vocabulary(name)
    before = threading.active_count()
    text = letter * 150_000
    tokens = Tokenizer(vocabulary, "").content(text, [])
    assert b"".join(map(vocabulary.piece, tokens)).decode() == text
    assert threading.active_count() <= before + 2, "no thread is made for a text"
    vocabulary.close()


DOCUMENT = Path("docs/architecture.md").read_text()
CODE = Path("tests/inference/engine/scheduling/test_scheduler.py").read_text()
ORDINARY = {
    "prose": DOCUMENT,
    "one line": " ".join(DOCUMENT.split()),
    "Windows": DOCUMENT.replace("\n", "\r\n"),
    "code": CODE,
    "Russian": "Быстрая лиса перепрыгивает через ленивую собаку и убегает. " * 300,
    "Chinese": "这是一个很长的中文段落，没有空格，也没有换行。我们用它来测试分词器。" * 300,
    "mixed": (LLAMA_CPP / "models/ggml-vocab-gpt-2.gguf.inp").read_text(errors="replace") * 9,
}
EMBEDDING = ("bert-bge", "nomic-bert-moe")  # not chat models
NAMES = [path.stem.removeprefix("ggml-vocab-") for path in LLAMA_CPP.glob("models/*.gguf")]


@pytest.mark.parametrize("name", sorted({*NAMES} - {*EMBEDDING}))
def test_long_text_has_the_same_tokens_in_parts_as_whole(name: str) -> None:
    vocabulary = Vocabulary(name)
    tokenizer = Tokenizer(vocabulary, "")
    threads = DeepStackThreads("test", 1, 2**28)
    for kind, text in ORDINARY.items():
        whole = threads.submit(partial(vocabulary._tokenize, text.encode(), True)).result()
        assert tokenizer.tokenize(text, special=True) == whole, kind
        assert len(whole) >= len(text.encode()) // tokenizer.longest_token
    for dense in (" ", "=", "-", "\n", "\t", "a", "中"):
        tokens = tokenizer.tokenize(dense * 5000, special=True)
        assert len(tokens) >= len((dense * 5000).encode()) // tokenizer.longest_token
    threads.close()
    vocabulary.close()


def test_one_of_many_texts_is_found_wherever_it_stands() -> None:
    texts = ["<s>", "<s", "[INST]", "[/INST]", "<SPECIAL_1>", "<SPECIAL_12>", "a.b", "é"]
    found = re.compile(any_of(texts))
    for text in texts:
        assert found.fullmatch(text)
    assert [m[0] for m in found.finditer("x<s><s<SPECIAL_12>a-b é")] == [
        "<s>", "<s", "<SPECIAL_12>", "é",
    ]  # fmt: skip
    assert not re.search(any_of([]), "anything")


def test_a_marker_is_found_at_any_place_of_a_long_text() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    for at in range(2**16 - 4, 2**16 + 2):
        assert tokenizer.names_a_marker("x" * at + "<<u>>" + "x" * 2**16)
    assert not tokenizer.names_a_marker("<<u" * 2**16)
