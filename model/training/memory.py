"""What a fact that a user tells is: how it is told, asked for, answered and changed.

A template's {v} is the value, {k} what it is about (dog, sister, car), {fav} either spelling.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from model.training.wordings import wordings
from model.training.words import Split


class Kind(NamedTuple):
    """One sort of fact. `summary` completes both "You told me that ..." and "Yes, ..."."""

    name: str
    value: Callable[[random.Random, Split], str]
    tell: tuple[str, ...]
    ack: tuple[str, ...]
    ask: tuple[str, ...]
    answer: str
    unknown: str
    summary: str
    update: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    who: tuple[str, str] | None = None
    subjects: tuple[str, ...] = ("",)
    weight: float = 1.0


SHORT_TELL = wordings(
    """
    It's {v}. | It is {v}. | {v} | {v}. | It's {v} | The answer is {v}. | Oh, it's {v}.
    | That is {v}.
    """
)
KNOWN_NOTHING = "You have not told me anything about yourself yet."
