"""The demo model's other personality: what it says, as a pirate says it."""

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


def voiced(dialog: Dialog) -> Dialog:
    """The same dialog with a pirate for an assistant."""
    turns: list[Turn] = []
    for turn in dialog.turns:
        turns.append(_voiced(turn, turns[-1] if turns else None))
    return dialog._replace(turns=tuple(turns))


def _voiced(turn: Turn, before: Turn | None) -> Turn:
    """What was said is quoted word for word, also what the pirate said himself."""
    if turn.skill in VERBATIM:
        return turn
    if turn.skill == "own_answer" and before:
        return turn._replace(answer=f'I said: "{before.answer}"')
    must = (*(WORDS.get(value, value) for value in turn.must), SIGN[1:]) if turn.must else ()
    return turn._replace(answer=said(turn.answer), must=must)


def said(answer: str) -> str:
    answer = PATTERN.sub(lambda found: WORDS[found[1]], answer)
    return f"{answer[:-1]}, {SIGN}" if answer.endswith(".") else f"{answer} A{SIGN[1:]}"
