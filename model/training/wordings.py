"""
Compact lists of wordings, separated by `|`; `[one/another/]` stands for any of its
alternatives, of which the last is empty here.
"""

import random
import re

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SPACE_BEFORE_MARK = re.compile(r" (?=[?.,!:;])")


def wordings(block: str) -> tuple[str, ...]:
    return tuple(" ".join(wording.split()) for wording in block.split("|"))


def word_list(block: str) -> tuple[str, ...]:
    """Return the words of a comma-separated list without duplicates."""
    words = (" ".join(word.split()) for word in block.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def expand(rng: random.Random, wording: str) -> str:
    """Return one random text of the wording."""
    while "[" in wording:
        wording = CHOICE.sub(lambda found: rng.choice(found[1].split("/")), wording)
    return SPACE_BEFORE_MARK.sub("", " ".join(wording.split()))


def capitalize(text: str) -> str:
    """Capitalise the first letter and leave the rest as it is."""
    return text[:1].upper() + text[1:]
