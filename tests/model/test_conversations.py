"""The hand-written conversations: their format, and the demo model's score."""

from pathlib import Path

import pytest

from model.training import conversations
from model.training.conversations import Line
from model.training.examinee import SERVICE, Examinee
from model.training.systems import DEFAULT

DEMO = Path("model/demo.gguf")


def test_each_of_the_conversations_has_expectations() -> None:
    found = conversations.read_conversations()
    assert len(found) >= 60
    assert all(line.any_of for conversation in found for line in conversation.lines)


def test_file_has_system_prompts_prompts_and_expectations(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(
        "# a comment\n\n> hi there\n= Hello | Hi\n= you\n! bye\n\n"
        "system: You are Max.\n> who?\n= Max\n"
    )
    first, second = conversations.read_conversations(path)
    assert (first.system, second.system) == (DEFAULT, "You are Max.")
    assert first.lines[0] == Line("hi there", [("hello", "hi"), ("you",)], ["bye"])


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("Hello you", True), ("HI, YOU", True), ("Hello", False), ("Hello you, bye", False)],
)
def test_answer_is_right_with_one_text_of_each_group(answer: str, is_right: bool) -> None:
    line = Line("hi there", [("hello", "hi"), ("you",)], ["bye"])
    assert line.is_right(answer) is is_right


def test_line_with_an_unknown_mark_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("> hi\n? what\n")
    with pytest.raises(ValueError, match=r"begins with '\?'"):
        conversations.read_conversations(path)


def test_demo_model_reaches_82_percent_by_hand() -> None:
    """The goal is 85 %; a single seed with few answers may be a little below."""
    marked = conversations.run_conversations(
        Examinee(DEMO, None, SERVICE, seed=1), conversations.read_conversations()
    )
    assert sum(mark.is_right for mark in marked) / len(marked) > 0.82
