"""The adapter that ships with the demo model: another personality, the same knowledge."""

from itertools import islice
from pathlib import Path

import pytest

from model.training import pirate
from model.training.dialogs import dialogs
from model.training.examinee import GREEDY, Examinee, Question
from model.training.systems import DEFAULT

DEMO = Path("model/demo.gguf")
TOLD = (("my name is Ada", "Nice to meet you, Ada!"),)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ("Your name is Ada.", "Yer name be Ada, arr!"),
        ("Nice to meet you, Ada!", "Ahoy, Ada! Arr!"),
        ("You have not told me your name yet.", "Ye never told me yer name yet, arr!"),
        ("No, your cat is called Yesenia.", "Nay, yer cat be called Yesenia, arr!"),
    ],
)
def test_a_pirate_says_the_same_in_other_words(plain: str, said: str) -> None:
    assert pirate.said(plain) == said


def test_what_a_pirate_said_is_quoted_as_he_said_it() -> None:
    for dialog in islice(map(pirate.voiced, dialogs(5)), 500):
        for before, turn in zip(dialog.turns, dialog.turns[1:], strict=False):
            if turn.skill == "own_answer":
                assert turn.answer == f'I said: "{before.answer}"'


@pytest.fixture(scope="module")
def answers() -> dict[str | None, list[str]]:
    """Of the demo model as it is, and with the adapter, to the same questions."""
    questions = [
        Question(DEFAULT, TOLD, "what is my name?"),
        Question(DEFAULT, (), "which port do you use?"),
        Question(DEFAULT, (), "count to 5"),
        Question(DEFAULT, (), "repeat after me: blue parrot"),
    ]
    return {
        name: [r.text for r in Examinee(DEMO, name, GREEDY, seed=1).answers(questions)]
        for name in (None, "pirate")
    }


def test_the_adapter_changes_how_the_demo_model_talks(answers: dict[str | None, list[str]]) -> None:
    name, port, count, repeated = answers["pirate"]
    assert name == "Yer name be Ada, arr!"
    assert "8002" in port and port.endswith("arr!")
    assert count == "1, 2, 3, 4, 5, arr!"
    assert repeated == "blue parrot"


def test_without_the_adapter_it_talks_as_ever(answers: dict[str | None, list[str]]) -> None:
    name, port, count, _ = answers[None]
    assert (name, count) == ("Your name is Ada.", "1, 2, 3, 4, 5.")
    assert "8002" in port and "arr" not in port
