"""How people type: in lower case, without full stops or apostrophes, with words around it."""

import random
import re
from typing import NamedTuple

BEFORE = (
    "hey, ",
    "ok, ",
    "so ",
    "and ",
    "please ",
    "well, ",
    "now, ",
    "hi, ",
    "okay, ",
    "sorry, ",
    "by the way, ",
)
AFTER = (" please", ", please", " now", " thanks", " ok", " :)", " 🙂", "!", "?", "??", "!!", "...")


class Style(NamedTuple):
    """One manner of typing, kept for a whole message: the template and the value in it."""

    lower: bool = False
    upper: bool = False
    small_start: bool = False
    bare: bool = False
    plain: bool = False
    before: str = ""
    after: str = ""
    slip: float = 0.0

    def template(self, text: str) -> str:
        """The wording in this style; its {placeholders} stay as they are."""
        text = _without_end(text) if self.bare or self.after else text
        if self.before:
            text = self.before + _small(text)
        if self.plain:
            text = text.replace("'", "")
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
        lower=case < 0.22,
        upper=0.22 <= case < 0.23,
        small_start=0.23 <= case < 0.40,
        bare=rng.random() < 0.42,
        plain=rng.random() < 0.12,
        before=rng.choice(BEFORE) if rng.random() < 0.08 else "",
        after=rng.choice(AFTER) if rng.random() < 0.08 else "",
        slip=rng.random() if rng.random() < 0.03 else 0.0,
    )


def _without_end(text: str) -> str:
    return text.rstrip(".!?")


def _small(text: str) -> str:
    keeps = text.startswith(("I ", "I'", "{"))
    return text if keeps else text[:1].lower() + text[1:]


def _upper_outside_braces(text: str) -> str:
    parts = re.split(r"(\{\w+\})", text)
    return "".join(part if part.startswith("{") else part.upper() for part in parts)


def _slipped(text: str, where: float) -> str:
    """Two neighbouring letters swapped, never inside a placeholder."""
    spots = [
        i
        for i in range(len(text) - 1)
        if (text[i] + text[i + 1]).isalpha() and not _in_braces(text, i)
    ]
    if not spots:
        return text
    i = spots[int(where * len(spots))]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def _in_braces(text: str, index: int) -> bool:
    return text.rfind("{", 0, index + 1) > text.rfind("}", 0, index)
