import random
import re

from services.inference.engine.prompt.text_splitting import MAX_CHARS, split


def test_a_short_text_is_one_part() -> None:
    for text in ("", "a", "a" * MAX_CHARS):
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
    assert [len(part) for part in split("x" * (2 * MAX_CHARS + 1))] == [MAX_CHARS, MAX_CHARS, 1]


def test_split_loses_nothing_and_bounds_every_part() -> None:
    dice = random.Random(1)
    for _ in range(50):
        pieces = dice.choices(["a", " ", "\n", "一", "。", "<s>", "!", "word", "\r\n"], k=3)
        text = "".join(dice.choices(pieces, k=3 * MAX_CHARS))
        parts = list(split(text, re.compile("<s>")))
        assert "".join(parts) == text and max(map(len, parts)) <= MAX_CHARS
        assert len(parts) <= 2 + 2 * len(text) // MAX_CHARS
