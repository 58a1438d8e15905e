"""The pirate adapter of the demo model: another personality with the same knowledge."""

from itertools import islice
from pathlib import Path

import pytest

from model.training import pirate
from model.training.dialogs import dialogs
from model.training.examinee import GREEDY, Examinee, Question
from model.training.systems import DEFAULT

DEMO = Path("model/demo.gguf")
HISTORY = (("my name is Ada", "Nice to meet you, Ada!"),)


@pytest.mark.parametrize(
    ("plain", "spoken"),
    [
        ("Your name is Ada.", "Yer name be Ada, arr!"),
        ("Nice to meet you, Ada!", "Ahoy, Ada! Arr!"),
        ("You have not told me your name yet.", "Ye never told me yer name yet, arr!"),
        ("No, your cat is called Yesenia.", "Nay, yer cat be called Yesenia, arr!"),
    ],
)
def test_pirate_text_rewrites_answers(plain: str, spoken: str) -> None:
    assert pirate.pirate_text(plain) == spoken


def test_own_answer_quotes_the_pirate_verbatim() -> None:
    for dialog in islice(map(pirate.as_pirate, dialogs(5)), 500):
        for before, turn in zip(dialog.turns, dialog.turns[1:], strict=False):
            if turn.skill == "own_answer":
                assert turn.answer == f'I said: "{before.answer}"'


@pytest.fixture(scope="module")
def answers() -> dict[str | None, list[str]]:
    """Answers to the same questions without an adapter (None) and with it."""
    questions = [
        Question(DEFAULT, HISTORY, "what is my name?"),
        Question(DEFAULT, (), "which port do you use?"),
        Question(DEFAULT, (), "count to 5"),
        Question(DEFAULT, (), "repeat after me: blue parrot"),
    ]
    return {
        name: [r.text for r in Examinee(DEMO, name, GREEDY, seed=1).answer_all(questions)]
        for name in (None, "pirate")
    }


def test_adapter_changes_the_demo_models_style(answers: dict[str | None, list[str]]) -> None:
    name, port, count, repeated = answers["pirate"]
    assert name == "Yer name be Ada, arr!"
    assert "8002" in port and port.endswith("arr!")
    assert count == "1, 2, 3, 4, 5, arr!"
    assert repeated == "blue parrot"


def test_without_the_adapter_the_style_is_plain(answers: dict[str | None, list[str]]) -> None:
    name, port, count, _ = answers[None]
    assert (name, count) == ("Your name is Ada.", "1, 2, 3, 4, 5.")
    assert "8002" in port and "arr" not in port
