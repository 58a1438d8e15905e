import random
import re
import threading
from collections.abc import Sequence
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
from tests.inference.vocabulary import ADDED, LLAMA_CPP, WithSpecialTokens, load_vocabulary, text_of

CONTROL, USED, UNUSED, NESTED, SPACES, LETTER = (
    SpecialToken(text, is_control)
    for text, is_control in (
        ("<c>", True), ("<u>", False), ("<x>", False), ("<<u>>", False), ("  ", False), ("é", False)
    )
)  # fmt: skip
TEMPLATE_TEXT = "<u>: <<u>>  é"


class SpaceAddingBackend(FakeBackend):
    """Adds a space before a text, as SentencePiece does."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        return list(f" {text}".encode()) if text else []


BACKEND = WithSpecialTokens(FakeBackend({}), (CONTROL, USED, UNUSED, NESTED, SPACES, LETTER))
SPACED = WithSpecialTokens(SpaceAddingBackend({}), (CONTROL, USED))
C, U, X, N, S, L = range(ADDED, ADDED + 6)


def content_tokens(tokenizer: Tokenizer, text: str, previous: Sequence[int] = ()) -> list[int]:
    """Return the tokens of a content that follows other tokens."""
    tokens = list(previous)
    tokenizer.append_content(tokens, text)
    return tokens[len(previous) :]


def template_tokens(tokenizer: Tokenizer, text: str, previous: Sequence[int] = ()) -> list[int]:
    """Return the tokens of a template's text that follows other tokens."""
    tokens = list(previous)
    tokenizer.append(tokens, text, special=True)
    return tokens[len(previous) :]


def test_template_text_becomes_reserved_tokens() -> None:
    assert Tokenizer(BACKEND, TEMPLATE_TEXT).tokenize("<c><u>a", special=True) == [C, U, ord("a")]


def test_content_becomes_no_reserved_token_and_is_not_lost() -> None:
    tokenizer = Tokenizer(BACKEND, TEMPLATE_TEXT)
    for content in ("<c>", "a<u>b<u>", "<<u>>", "<<<u>>>", "<u", "<u><c><x>"):
        tokens = content_tokens(tokenizer, content)
        assert not {C, U, N} & set(tokens)
        assert text_of(BACKEND, tokens) == content


def test_other_user_defined_tokens_are_kept_in_content() -> None:
    tokens = content_tokens(Tokenizer(BACKEND, TEMPLATE_TEXT), "<x>  é")
    assert tokens == [X, S, L]


def test_names_of_reserved_tokens_are_found() -> None:
    tokenizer = Tokenizer(BACKEND, TEMPLATE_TEXT)
    assert tokenizer.names_reserved("a <c> b") and tokenizer.names_reserved("<<u>>")
    assert not tokenizer.names_reserved("<x>  é")


def test_space_is_added_at_the_start_and_after_special_tokens() -> None:
    tokenizer = Tokenizer(SPACED, TEMPLATE_TEXT)
    for tokens_of in (template_tokens, content_tokens):
        assert tokens_of(tokenizer, "a") == list(b" a")
        assert tokens_of(tokenizer, "a", [C]) == list(b" a")
        assert tokens_of(tokenizer, "a", [ord("b")]) == list(b"a")
    split_up = content_tokens(tokenizer, "a<u>b", [ord("b")])
    assert text_of(SPACED, split_up) == "a<u>b" and U not in split_up


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "qwen2", "gemma-4"])
def test_pieces_of_a_text_decode_to_the_text(name: str) -> None:
    vocabulary = load_vocabulary(name)
    tokenizer = Tokenizer(vocabulary, "")
    tokens: list[int] = []
    for piece in ("Grüße", ", wor", "ld!", "\n", "\n  two", " spaces", " "):
        tokenizer.append_content(tokens, piece)
    assert text_of(vocabulary, tokens).lstrip(" ") == "Grüße, world!\n\n  two spaces "


def test_match_answer_returns_tokens_of_a_text_prefix() -> None:
    tokenizer = Tokenizer(BACKEND, TEMPLATE_TEXT)
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
def test_very_long_word_is_tokenized(name: str, letter: str) -> None:
    """On a default stack, 20,000 letters crash the process."""
    vocabulary = load_vocabulary(name)
    before = threading.active_count()
    text = letter * 150_000
    tokens = content_tokens(Tokenizer(vocabulary, ""), text)
    assert b"".join(map(vocabulary.piece, tokens)).decode() == text
    assert threading.active_count() <= before + 2, "no thread is made for a text"


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
def test_long_text_has_the_same_tokens_in_parts(name: str) -> None:
    vocabulary = load_vocabulary(name)
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


def test_any_of_matches_each_text() -> None:
    texts = ["<s>", "<s", "[INST]", "[/INST]", "<SPECIAL_1>", "<SPECIAL_12>", "a.b", "é"]
    found = re.compile(any_of(texts))
    for text in texts:
        assert found.fullmatch(text)
    assert [m[0] for m in found.finditer("x<s><s<SPECIAL_12>a-b é")] == [
        "<s>", "<s", "<SPECIAL_12>", "é",
    ]  # fmt: skip
    assert not re.search(any_of([]), "anything")


def test_reserved_name_is_found_anywhere_in_a_long_text() -> None:
    tokenizer = Tokenizer(BACKEND, TEMPLATE_TEXT)
    for at in range(2**16 - 4, 2**16 + 2):
        assert tokenizer.names_reserved("x" * at + "<<u>>" + "x" * 2**16)
    assert not tokenizer.names_reserved("<<u" * 2**16)


def test_short_text_is_one_part() -> None:
    for text in ("", "a", "a" * MAX_PART_CHARS):
        assert list(split(text)) == [text]


def test_long_text_is_split_at_a_line_or_else_a_word_start() -> None:
    lines, words = "A few words.\n" * 2000, "word " * 4000
    assert all(part.startswith("A few") for part in split(lines))
    assert all(part.startswith(" word") for part in list(split(words))[1:])
    chinese = list(split("这是一段，没有空格。" * 2000))
    assert len(chinese) > 1 and all(part[0] in "，。" for part in chinese[1:])


def test_long_text_is_split_before_a_special_token() -> None:
    text = "<|im_start|>a word and\none more<|im_end|>\n" * 500
    parts = list(split(text, re.compile(r"<\|im_(start|end)\|>")))
    assert len(parts) > 1 and all(part.startswith("<|im_") for part in parts)


def test_long_text_without_boundaries_is_split_anywhere() -> None:
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
