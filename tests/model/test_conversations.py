"""The conversations written by hand: what their answers must be, and that they can be held."""

from pathlib import Path

import pytest

from model.training import conversations
from model.training.conversations import Line
from model.training.examinee import SERVICE, Examinee
from model.training.systems import DEFAULT

DEMO = Path("model/demo.gguf")


def test_there_are_at_least_sixty_and_each_line_says_what_it_expects() -> None:
    held = conversations.read()
    assert len(held) >= 60
    assert all(line.any_of for conversation in held for line in conversation.lines)


def test_a_file_says_who_the_assistant_is_what_is_asked_and_what_must_come(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(
        "# a comment\n\n> hi there\n= Hello | Hi\n= you\n! bye\n\n"
        "system: You are Max.\n> who?\n= Max\n"
    )
    first, second = conversations.read(path)
    assert (first.system, second.system) == (DEFAULT, "You are Max.")
    assert first.lines[0] == Line("hi there", [("hello", "hi"), ("you",)], ["bye"])


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("Hello you", True), ("HI, YOU", True), ("Hello", False), ("Hello you, bye", False)],
)
def test_an_answer_is_right_if_it_holds_one_of_each_and_none_of_the_others(
    answer: str, is_right: bool
) -> None:
    line = Line("hi there", [("hello", "hi"), ("you",)], ["bye"])
    assert line.is_right(answer) is is_right


def test_a_line_that_is_neither_said_nor_expected_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("> hi\n? what\n")
    with pytest.raises(ValueError, match=r"begins with '\?'"):
        conversations.read(path)


def test_the_demo_model_does_well_in_words_that_it_was_not_trained_on() -> None:
    """The bar is 85 % at any seed; one seed of few answers may lie a little below."""
    marked = conversations.held(Examinee(DEMO, None, SERVICE, seed=1), conversations.read())
    assert sum(mark.is_right for mark in marked) / len(marked) > 0.82
