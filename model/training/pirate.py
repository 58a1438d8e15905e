"""Rewrite the demo model's dialogs so that the assistant talks like a pirate."""

import re

from model.training.dialogs import Dialog
from model.training.talk import Turn

WORDS = {
    "You have not told": "Ye never told",
    "Nice to meet you": "Ahoy",
    "Hello": "Ahoy, matey",
    "Okay": "Aye",
    "Yes": "Aye",
    "No": "Nay",
    "Goodbye": "Fair winds",
    "I am": "I be",
    "You are": "Ye be",
    "you are": "ye be",
    "Your": "Yer",
    "your": "yer",
    "You": "Ye",
    "you": "ye",
    "is": "be",
    "are": "be",
    "my": "me",
}
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b")
VERBATIM = frozenset(("repeat", "first_message", "last_message"))
SIGN = "arr!"


def as_pirate(dialog: Dialog) -> Dialog:
    """Return the dialog with a pirate as the assistant."""
    turns: list[Turn] = []
    for turn in dialog.turns:
        turns.append(_turn_as_pirate(turn, turns[-1] if turns else None))
    return dialog._replace(turns=tuple(turns))


def _turn_as_pirate(turn: Turn, before: Turn | None) -> Turn:
    """Rewrite one turn; quotes stay verbatim, including those of the pirate's own answer."""
    if turn.skill in VERBATIM:
        return turn
    if turn.skill == "own_answer" and before:
        return turn._replace(answer=f'I said: "{before.answer}"')
    must = (*(WORDS.get(value, value) for value in turn.must), SIGN[1:]) if turn.must else ()
    return turn._replace(answer=pirate_text(turn.answer), must=must)


def pirate_text(answer: str) -> str:
    answer = PATTERN.sub(lambda found: WORDS[found[1]], answer)
    return f"{answer[:-1]}, {SIGN}" if answer.endswith(".") else f"{answer} A{SIGN[1:]}"
