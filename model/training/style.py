"""Typing styles: lower case, missing full stops or apostrophes, typos."""

import random
import re
from typing import NamedTuple

from model.training.wordings import wordings

BEFORE = wordings(
    """
    hey, | ok, | so | and | please | well, | now, | hi, | okay, | sorry, | by the way, | um, | hm, |
    yo, | hello, | right, | tell me, | quick question: | one question: | one more thing: | alright,
    | listen, | great, | thanks. | cool, | but | oh, | good. | then | again: | just | yes, | no, |
    also, | look, | dear assistant, | hey there, | question:
    """
)
AFTER = tuple(
    " please|, please| now| thanks| ok| :)| 🙂|!|?|??|!!|...| pls| then|, thanks|, ok?| again| :D"
    "| :-)|, my friend| haha| lol|.|, hm|, dear| for me| today|, bot".split("|")
)
SHORT = {
    "you": "u",
    "your": "ur",
    "please": "pls",
    "favourite": "fav",
    "favorite": "fav",
    "are": "r",
    "and": "&",
    "what is": "whats",
    "because": "cuz",
    "I am": "im",
    "with": "w/",
}
PLACEHOLDER = re.compile(r"(\{\w+\})")


class Style(NamedTuple):
    """How a user types one message: its template and the value in it."""

    lower: bool = False
    upper: bool = False
    small_start: bool = False
    bare: bool = False
    plain: bool = False
    short: bool = False
    before: str = ""
    after: str = ""
    slip: float = 0.0

    def template(self, text: str) -> str:
        """Return the wording in this style, with its {placeholders} unchanged."""
        text = _without_end(text) if self.bare or self.after else text
        if self.before:
            text = f"{self.before} {_small(text)}"
        if self.plain:
            text = text.replace("'", "")
        if self.short:
            text = _shortened(text)
        if self.slip:
            text = _slipped(text, self.slip)
        return self._cased(text + self.after)

    def value(self, value: str) -> str:
        if self.upper:
            return value.upper()
        return value.lower() if self.lower else value

    def _cased(self, text: str) -> str:
        if self.upper:
            return _upper_outside_braces(text)
        if self.lower:
            return text.lower()
        return _small(text) if self.small_start else text


def random_style(rng: random.Random) -> Style:
    case = rng.random()
    return Style(
        lower=case < 0.25,
        upper=0.25 <= case < 0.28,
        small_start=0.28 <= case < 0.42,
        bare=rng.random() < 0.42,
        plain=rng.random() < 0.12,
        short=rng.random() < 0.03,
        before=rng.choice(BEFORE) if rng.random() < 0.12 else "",
        after=rng.choice(AFTER) if rng.random() < 0.12 else "",
        slip=rng.random() if rng.random() < 0.06 else 0.0,
    )


def _without_end(text: str) -> str:
    return text.rstrip(".!?")


def _small(text: str) -> str:
    keeps = text.startswith(("I ", "I'", "{"))
    return text if keeps else text[:1].lower() + text[1:]


def _upper_outside_braces(text: str) -> str:
    parts = PLACEHOLDER.split(text)
    return "".join(part if part.startswith("{") else part.upper() for part in parts)


def _shortened(text: str) -> str:
    for word, short in SHORT.items():
        text = re.sub(rf"\b{word}\b", short, text)
    return text


def _slipped(text: str, where: float) -> str:
    """Drop, double or swap a letter outside of placeholders."""
    spots = [
        i
        for i in range(len(text) - 1)
        if (text[i] + text[i + 1]).isalpha() and not _in_braces(text, i)
    ]
    if not spots:
        return text
    i = spots[int(where * len(spots))]
    pair = (text[i + 1], text[i] * 2 + text[i + 1], text[i + 1] + text[i])[int(where * 997) % 3]
    return text[:i] + pair + text[i + 2 :]


def _in_braces(text: str, index: int) -> bool:
    return text.rfind("{", 0, index + 1) > text.rfind("}", 0, index)
