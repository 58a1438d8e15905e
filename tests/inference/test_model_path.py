"""The models that MODEL_PATH names."""

from pathlib import Path

import pytest

from services.inference.model_path import (
    MAX_SENTENCE_CHARS,
    model_name,
    sentence,
    split_model_path,
)


@pytest.mark.parametrize(
    ("model_path", "paths"),
    [
        ("", ()),
        ("a.gguf", ("a.gguf",)),
        ("a.gguf,b.gguf", ("a.gguf", "b.gguf")),
        (" a.gguf , sub/b c.gguf,", ("a.gguf", "sub/b c.gguf")),
        (",,", ()),
    ],
)
def test_commas_separate_models(model_path: str, paths: tuple[str, ...]) -> None:
    assert split_model_path(model_path) == paths


def test_file_with_a_comma_in_its_name_is_one_model(tmp_path: Path) -> None:
    path = tmp_path / "a,b.gguf"
    path.touch()
    assert split_model_path(str(path)) == (str(path),)


@pytest.mark.parametrize("name", ["long" * 60, "~nobody/x"])
def test_path_that_can_not_be_a_file_is_still_split(name: str) -> None:
    assert split_model_path(f"{name},{name}") == (name, name)


def test_part_of_a_model_has_the_name_of_the_whole() -> None:
    assert model_name(Path("model/mine-00002-of-00003.gguf")) == "mine"


def test_sentence_is_one_line_of_bounded_length() -> None:
    assert sentence("a\x1b[31m\nb\udc80 é") == "a\ufffd[31m\ufffdb\ufffd é"
    assert sentence("x" * 10**6) == "x" * MAX_SENTENCE_CHARS + "…"
