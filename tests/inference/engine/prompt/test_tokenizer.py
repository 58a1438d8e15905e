import random
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.tokenizer import (
    MAX_PART_CHARS,
    AnswerMatch,
    Tokenizer,
    any_of,
    split,
)
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
    assert Tokenizer(BACKEND, OWN).tokenize("<c><u>a", special=True) == [C, U, ord("a")]


def test_of_a_content_no_markers_come_and_nothing_is_lost() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    for content in ("<c>", "a<u>b<u>", "<<u>>", "<<<u>>>", "<u", "<u><c><x>"):
        tokens = tokenizer.tokenize_content(content, [])
        assert not {C, U, N} & set(tokens)
        assert text_of(BACKEND, tokens) == content


def test_user_defined_tokens_that_tell_no_roles_apart_stay_what_the_model_was_trained_on() -> None:
    tokens = Tokenizer(BACKEND, OWN).tokenize_content("<x>  é", [])
    assert tokens == [X, S, L]


def test_a_text_that_names_a_marker_is_told() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    assert tokenizer.names_reserved("a <c> b") and tokenizer.names_reserved("<<u>>")
    assert not tokenizer.names_reserved("<x>  é")


def test_a_text_that_goes_on_gets_no_space_and_one_after_a_special_token_does() -> None:
    tokenizer = Tokenizer(SPACED, OWN)
    for tokenize in (partial(tokenizer.tokenize, special=True), tokenizer.tokenize_content):
        assert tokenize("a") == list(b" a")
        assert tokenize("a", previous=[C]) == list(b" a")
        assert tokenize("a", previous=[ord("b")]) == list(b"a")
    taken_apart = tokenizer.tokenize_content("a<u>b", [ord("b")])
    assert text_of(SPACED, taken_apart) == "a<u>b" and U not in taken_apart


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "qwen2", "gemma-4"])
def test_on_a_real_vocabulary_a_text_in_pieces_is_the_text(name: str) -> None:
    vocabulary = Vocabulary(name)
    tokenizer = Tokenizer(vocabulary, "")
    tokens: list[int] = []
    for piece in ("Grüße", ", wor", "ld!", "\n", "\n  two", " spaces", " "):
        tokens += tokenizer.tokenize_content(piece, tokens)
    assert text_of(vocabulary, tokens).lstrip(" ") == "Grüße, world!\n\n  two spaces "
    vocabulary.close()


def test_what_an_answer_said_is_found_in_its_text() -> None:
    tokenizer = Tokenizer(BACKEND, OWN)
    assert tokenizer.match_answer(list(b"one"), "one") == AnswerMatch(list(b"one"), "one", "")
    assert tokenizer.match_answer(list(b"one two"), "one") == AnswerMatch(list(b"one"), "one", "")
    assert tokenizer.match_answer(list(b"one"), "one two") == AnswerMatch(
        list(b"one"), "one", " two"
    )
    assert tokenizer.match_answer([*b"a", X, *b"b"], "a<x>b") == AnswerMatch(
        [*b"a", X, *b"b"], "a<x>b", ""
    )
    assert tokenizer.match_answer([*b"a", U, *b"b"], "a<u>b") == AnswerMatch([*b"a"], "a", "<u>b")
    assert tokenizer.match_answer([], "one") == AnswerMatch([], "", "one")


@pytest.mark.parametrize(
    ("name", "letter"), [("falcon", "!"), ("deepseek-llm", "中"), ("gpt-neox", "1")]
)
def test_a_word_of_any_length_is_tokenized(name: str, letter: str) -> None:
    """On a default stack, 20,000 letters crash the process."""
    vocabulary = Vocabulary(name)
    before = threading.active_count()
    text = letter * 150_000
    tokens = Tokenizer(vocabulary, "").tokenize_content(text, [])
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
        assert len(whole) >= len(text.encode()) // tokenizer.max_token_bytes
    for dense in (" ", "=", "-", "\n", "\t", "a", "中"):
        tokens = tokenizer.tokenize(dense * 5000, special=True)
        assert len(tokens) >= len((dense * 5000).encode()) // tokenizer.max_token_bytes
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
        assert tokenizer.names_reserved("x" * at + "<<u>>" + "x" * 2**16)
    assert not tokenizer.names_reserved("<<u" * 2**16)


def test_a_short_text_is_one_part() -> None:
    for text in ("", "a", "a" * MAX_PART_CHARS):
        assert list(split(text)) == [text]


def test_long_text_is_split_at_a_line_or_else_a_word_start() -> None:
    lines, words = "A few words.\n" * 2000, "word " * 4000
    assert all(part.startswith("A few") for part in split(lines))
    assert all(part.startswith(" word") for part in list(split(words))[1:])
    chinese = list(split("这是一段，没有空格。" * 2000))
    assert len(chinese) > 1 and all(part[0] in "，。" for part in chinese[1:])


def test_it_is_cut_before_a_special_token_where_there_is_one() -> None:
    text = "<|im_start|>a word and\none more<|im_end|>\n" * 500
    parts = list(split(text, re.compile(r"<\|im_(start|end)\|>")))
    assert len(parts) > 1 and all(part.startswith("<|im_") for part in parts)


def test_a_text_without_any_of_them_is_cut_all_the_same() -> None:
    assert [len(part) for part in split("x" * (2 * MAX_PART_CHARS + 1))] == [
        MAX_PART_CHARS,
        MAX_PART_CHARS,
        1,
    ]


def test_split_loses_nothing_and_bounds_every_part() -> None:
    dice = random.Random(1)
    for _ in range(50):
        pieces = dice.choices(["a", " ", "\n", "一", "。", "<s>", "!", "word", "\r\n"], k=3)
        text = "".join(dice.choices(pieces, k=3 * MAX_PART_CHARS))
        parts = list(split(text, re.compile("<s>")))
        assert "".join(parts) == text and max(map(len, parts)) <= MAX_PART_CHARS
        assert len(parts) <= 2 + 2 * len(text) // MAX_PART_CHARS
